// Error messages with block and thread, once per launch; memory faults become such messages.
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include "block.h"
#include "scheduler.h"

namespace cuda_on_cpu {

namespace {

bool has_failed;
char message[1200];
struct sigaction before[2];
pthread_t runner;  // the thread of the process that runs kernels
const int faults[2] = {SIGSEGV, SIGBUS};
stack_t stack_before;
char* signal_stack;
constexpr size_t signal_stack_bytes = 64 << 10;

void record_list(const char* format, va_list values) {
  if (has_failed) return;
  const Unwatched unwatched;
  has_failed = true;
  char where[120] = "", what[900];
  if (self)
    snprintf(where, sizeof where, "block (%u, %u, %u), thread (%u, %u, %u): ", block_index.x,
             block_index.y, block_index.z, self->index.x, self->index.y, self->index.z);
  vsnprintf(what, sizeof what, format, values);
  snprintf(message, sizeof message, "%s%s", where, what);
}

[[noreturn]] void abandon() {
  for (;;) {
    self->state = State::waiting;
    yield();
  }
}

const Buffer* around(const char* address, const Buffer* found, const Buffer& buffer) {
  const bool inside = address >= buffer.map && address < buffer.map + buffer.map_bytes;
  return inside ? &buffer : found;
}

void on_fault(int number, siginfo_t* info, void* context) {
  if (!self || !pthread_equal(pthread_self(), runner)) {  // not of a kernel: return to the earlier handler, where it happens again
    sigaction(number, &before[number == SIGBUS], nullptr);
    return;
  }
  const char* address = static_cast<const char*>(info->si_addr);
  const Buffer* buffer = around(address, nullptr, block.dynamic);
  for (const Static& variable : block.statics) buffer = around(address, buffer, variable.memory);
  for (const Buffer& region : regions) buffer = around(address, buffer, region);
  if (buffer)
    record("out of bounds: byte %ld of %s, which has %zu", address - buffer->begin, buffer->name,
           buffer->bytes);
  else if (address >= self->stack && address < self->stack + stack_bytes)
    record("the thread's local variables need more than its stack of %zu KiB", stack_bytes >> 10);
  else
    record("memory fault at %p, which is in no array; or a vector access that is not aligned",
           info->si_addr);
  // The thread is never resumed: its stack is taken from the top.
  auto* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  registers[REG_RIP] = reinterpret_cast<greg_t>(abandon);
  registers[REG_RSP] = reinterpret_cast<greg_t>(self->stack + stack_bytes - 128 - 8);
}

}  // namespace

std::vector<Buffer> regions;

void record(const char* format, ...) {
  va_list values;
  va_start(values, format);
  record_list(format, values);
  va_end(values);
}

void fail(const char* format, ...) {
  va_list values;
  va_start(values, format);
  record_list(format, values);
  va_end(values);
  abandon();
}

bool failed() { return has_failed; }
const char* failure() { return has_failed ? message : nullptr; }
void clear_failure() { has_failed = false; }

#ifdef CUDA_ON_CPU_ADDRESS
void catch_faults() {}  // the report of the sanitizer says more
void restore_faults() {}
#else
void catch_faults() {
  runner = pthread_self();
  if (!signal_stack) signal_stack = static_cast<char*>(malloc(signal_stack_bytes));
  stack_t stack{};
  stack.ss_sp = signal_stack;
  stack.ss_size = signal_stack_bytes;
  sigaltstack(&stack, &stack_before);
  struct sigaction action{};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (int i = 0; i < 2; i++) sigaction(faults[i], &action, &before[i]);
}

void restore_faults() {
  for (int i = 0; i < 2; i++) sigaction(faults[i], &before[i], nullptr);
  sigaltstack(&stack_before, nullptr);
}
#endif

}  // namespace cuda_on_cpu

// One fibre per CUDA thread, switched by hand; x86-64.
#include "scheduler.h"

#include <algorithm>
#include <random>

#include "block.h"

extern "C" void cuda_on_cpu_switch(void** save, void* load);
asm(R"(
.text
.hidden cuda_on_cpu_switch
.globl cuda_on_cpu_switch
.type cuda_on_cpu_switch,@function
cuda_on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_cpu_switch,.-cuda_on_cpu_switch
)");

namespace cuda_on_cpu {

Thread* self;
Block block;

namespace {

struct Scheduler {
  void* stack_pointer;
  void* fake_stack;
  const void* stack_bottom;
  size_t stack_size;
  void* fiber;
  Schedule schedule;
  std::mt19937 random;
  void (*body)(void**);
  void** arguments;
} scheduler;

void switch_to(Thread& thread) {
  self = &thread;
#ifdef CUDA_ON_CPU_ADDRESS
  __sanitizer_start_switch_fiber(&scheduler.fake_stack, thread.stack, stack_bytes);
#endif
#ifdef CUDA_ON_CPU_THREAD
  __tsan_switch_to_fiber(thread.fiber, 1);  // 1: a switch orders nothing
#endif
  cuda_on_cpu_switch(&scheduler.stack_pointer, thread.stack_pointer);
#ifdef CUDA_ON_CPU_ADDRESS
  __sanitizer_finish_switch_fiber(scheduler.fake_stack, nullptr, nullptr);
#endif
  self = nullptr;
}

// For ThreadSanitizer: the work of all threads happened before the end of the launch, and the blocks
// of a launch are not ordered.
char joined;

void switch_back([[maybe_unused]] bool for_good) {
  Thread& me = *self;
  release(&joined);
#ifdef CUDA_ON_CPU_ADDRESS
  __sanitizer_start_switch_fiber(for_good ? nullptr : &me.fake_stack, scheduler.stack_bottom,
                                 scheduler.stack_size);
#endif
#ifdef CUDA_ON_CPU_THREAD
  __tsan_switch_to_fiber(scheduler.fiber, 1);
#endif
  cuda_on_cpu_switch(&me.stack_pointer, scheduler.stack_pointer);
#ifdef CUDA_ON_CPU_ADDRESS
  __sanitizer_finish_switch_fiber(me.fake_stack, &scheduler.stack_bottom, &scheduler.stack_size);
#endif
}

void main_of_fiber() {
#ifdef CUDA_ON_CPU_ADDRESS
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.stack_bottom, &scheduler.stack_size);
#endif
  scheduler.body(scheduler.arguments);
  self->state = State::done;
  leave(*self);
  for (;;) switch_back(true);
}

// What `switch` pops: six registers, and where to go. Beneath, the stack is aligned as by a call.
void* first_frame(char* stack) {
  auto** top = reinterpret_cast<void**>(stack + stack_bytes - 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(main_of_fiber);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  return top;
}

bool run_one(Thread& thread) {
  if (thread.state != State::ready) return false;
  switch_to(thread);
  return true;
}

bool run_round(std::vector<unsigned>& order) {
  if (scheduler.schedule == Schedule::random)
    std::shuffle(order.begin(), order.end(), scheduler.random);
  bool moved = false;
  for (unsigned i : order) {
    if (failed()) break;
    moved |= run_one(block.threads[i]);
  }
  return moved;
}

// One warp runs as far ahead as it can, then the next.
bool run_greedily(const std::vector<unsigned>& order) {
  bool moved = false;
  for (size_t first = 0; first < order.size();) {
    const unsigned warp = block.threads[order[first]].warp;
    size_t last = first;
    while (last < order.size() && block.threads[order[last]].warp == warp) last++;
    for (bool again = true; again && !failed();) {
      again = false;
      for (size_t i = first; i < last && !failed(); i++) again |= run_one(block.threads[order[i]]);
      moved |= again;
    }
    first = last;
  }
  return moved;
}

void report_deadlock() {
  char waiting[400] = "";
  size_t used = 0;
  int named = 0;
  for (const Thread& thread : block.threads) {
    if (thread.state != State::waiting || named++ >= 4) continue;
    used += snprintf(waiting + used, sizeof waiting - used, "%s thread %u in %s of line %d",
                     named > 1 ? "," : "", thread.id, thread.waits_in, thread.line);
  }
  record("deadlock: %d threads wait for one another:%s%s", block.live, waiting,
         named > 4 ? ", ..." : "");
}

}  // namespace

void enter_scheduler(Schedule schedule, unsigned seed) {
  scheduler.schedule = schedule;
  scheduler.random.seed(seed);
#ifdef CUDA_ON_CPU_THREAD
  scheduler.fiber = __tsan_get_current_fiber();
#endif
}

unsigned long random_below(unsigned long bound) { return scheduler.random() % bound; }

void make_fibers(void (*body)(void** arguments), void** arguments, char* stacks) {
  scheduler.body = body;
  scheduler.arguments = arguments;
  for (Thread& thread : block.threads) {
    thread.stack = stacks + thread.id * stack_bytes;
#ifdef CUDA_ON_CPU_ADDRESS
    __asan_unpoison_memory_region(thread.stack + 4096, stack_bytes - 4096);
#endif
    thread.stack_pointer = first_frame(thread.stack);
#ifdef CUDA_ON_CPU_THREAD
    thread.fiber = __tsan_create_fiber(0);
#endif
  }
}

void run_fibers() {
  std::vector<unsigned> order;
  for (const Thread& thread : block.threads) order.push_back(thread.id);
  const Schedule schedule = scheduler.schedule;
  if (schedule == Schedule::reversed || schedule == Schedule::greedy_reversed)
    std::reverse(order.begin(), order.end());
  const bool greedy = schedule == Schedule::greedy || schedule == Schedule::greedy_reversed;
  while (block.live && !failed())
    if (!(greedy ? run_greedily(order) : run_round(order)) && !failed()) report_deadlock();
}

void end_fibers() {
#ifdef CUDA_ON_CPU_THREAD
  for (Thread& thread : block.threads) __tsan_destroy_fiber(thread.fiber);
#endif
}

void join_fibers() { acquire(&joined); }

void yield() { switch_back(false); }

void wait(const char* name, int line) {
  self->waits_in = name;
  self->line = line;
  self->state = State::waiting;
  while (self->state == State::waiting) yield();
}

// Other threads may run between the atomic operations of a thread.
void interleave() {
  if (scheduler.schedule == Schedule::random && random_below(2)) yield();
}

}  // namespace cuda_on_cpu

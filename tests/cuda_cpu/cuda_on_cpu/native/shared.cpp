// Shared memory, and the copies that run beside the thread that starts them.
#include <stdio.h>

#include "block.h"

namespace cuda_on_cpu {

namespace {

bool contains(const Buffer& buffer, const char* address, int bytes) {
  return address >= buffer.begin && address + bytes <= buffer.begin + buffer.bytes;
}

void renew([[maybe_unused]] Buffer& buffer, [[maybe_unused]] size_t alignment) {
#ifdef CUDA_ON_CPU_THREAD
  // Accesses of an earlier block to the same memory are no race.
  char name[sizeof buffer.name];
  snprintf(name, sizeof name, "%s", buffer.name);
  const size_t bytes = buffer.bytes;
  release_memory(buffer);
  buffer = allocate(bytes, alignment, name);
#else
  fill(buffer.begin, buffer.bytes);
#endif
}

void check_alignment(const char* name, int line, const void* address, int bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes)
    fail("%s in line %d: address %p is not a multiple of %d bytes", name, line, address, bytes);
}

char fences;  // for ThreadSanitizer: what was fenced

}  // namespace

void reset_shared() {
  renew(block.dynamic, block.dynamic_alignment);
  for (Static& variable : block.statics) renew(variable.memory, 16);
}

void release_shared() {
  release_memory(block.dynamic);
  for (Static& variable : block.statics) release_memory(variable.memory);
  block.statics.clear();
}

char* dynamic_shared(size_t alignment) {
  if (block.dynamic_alignment < alignment)
    fail("dynamic shared memory is aligned to %zu bytes, and declared with %zu",
         block.dynamic_alignment, alignment);
  return block.dynamic.begin;
}

void* static_shared(const void* key, size_t bytes, size_t alignment) {
  for (Static& variable : block.statics)
    if (variable.key == key) return variable.memory.begin;
  const Unwatched unwatched;
  block.statics.push_back({key, allocate(bytes, alignment, "static shared memory")});
  size_t total = block.dynamic.bytes;
  for (const Static& variable : block.statics) total += variable.memory.bytes;
  if (total > block.shared_limit)
    fail("%zu bytes of shared memory, dynamic and static; the launch may have %zu", total,
         block.shared_limit);
  return block.statics.back().memory.begin;
}

void check_shared(const void* address, int bytes, const char* name, int line) {
  const char* first = static_cast<const char*>(address);
  check_alignment(name, line, address, bytes);
  if (contains(block.dynamic, first, bytes)) return;
  for (const Static& variable : block.statics)
    if (contains(variable.memory, first, bytes)) return;
  fail("%s in line %d: not in shared memory, byte %ld of the %zu dynamic ones", name, line,
       first - block.dynamic.begin, block.dynamic.bytes);
}

// The kernel's unit fills the destination with NaN, and copies when the group is waited for.
void begin_copy(void* to, const void* from, int bytes, int from_bytes, int line) {
  check_shared(to, bytes, "cp.async", line);
  if (from_bytes < 0 || from_bytes > bytes)
    fail("cp.async in line %d: %d bytes of a source of %d", line, from_bytes, bytes);
  if (from_bytes) check_alignment("cp.async", line, from, bytes);
  Thread& me = *self;
  if (me.n_copies == max_copies) fail("more than %d copies without a wait", max_copies);
  me.copies[me.n_copies++] = {static_cast<char*>(to), static_cast<const char*>(from), bytes,
                              from_bytes, me.group};
}

void commit_copies() { self->group++; }

bool next_copy(int keep_groups, Copy* copy) {
  Thread& me = *self;
  for (int i = 0; i < me.n_copies; i++) {
    if (me.copies[i].group >= me.group - keep_groups) continue;
    *copy = me.copies[i];
    me.n_copies--;
    for (int j = i; j < me.n_copies; j++) me.copies[j] = me.copies[j + 1];
    return true;
  }
  return false;
}

void fence() {
  acquire(&fences);
  release(&fences);
}

void atomic_acquires() { acquire(&fences); }

}  // namespace cuda_on_cpu

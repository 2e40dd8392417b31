#include "memory.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "sanitizers.h"

namespace cuda_on_cpu {

namespace {

constexpr size_t page = 4096;
constexpr size_t guard = 1 << 20;  // wide enough that an access one stride too far is in it

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

char* map_memory(size_t bytes, int protection) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* address = mmap(nullptr, bytes, protection, flags, -1, 0);
  if (address == MAP_FAILED) {
    perror("cuda_on_cpu: mmap");
    abort();
  }
  return static_cast<char*>(address);
}

void protect(void* first, size_t bytes, int protection) {
  if (!mprotect(first, bytes, protection)) return;
  perror("cuda_on_cpu: mprotect");
  abort();
}

}  // namespace

// Without functions of the C library, which the sanitizers intercept.
void fill(void* to, size_t bytes) {
  auto* written = static_cast<volatile unsigned char*>(to);
  for (; bytes && (uintptr_t(written) & 7); bytes--) *written++ = poison;
  auto* words = reinterpret_cast<volatile unsigned long*>(written);
  for (; bytes >= 8; bytes -= 8) *words++ = ~0ul;
  written = reinterpret_cast<volatile unsigned char*>(words);
  for (; bytes; bytes--) *written++ = poison;
}

void copy(void* to, const void* from, size_t bytes) {
  asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(bytes) : : "memory");
}

Buffer allocate(size_t bytes, size_t alignment, const char* name) {
  Buffer buffer{};
  snprintf(buffer.name, sizeof buffer.name, "%s", name);
  buffer.bytes = bytes;
#ifdef CUDA_ON_CPU_ADDRESS
  void* address = nullptr;
  if (posix_memalign(&address, alignment < 16 ? 16 : alignment, bytes ? bytes : 1)) abort();
  buffer.begin = buffer.map = static_cast<char*>(address);
  buffer.map_bytes = bytes;
#else
  const Unwatched unwatched;
  const size_t middle = round_up(bytes ? bytes : 1, alignment < page ? page : alignment);
  buffer.map_bytes = middle + 2 * guard;
  buffer.map = map_memory(buffer.map_bytes, PROT_NONE);
  protect(buffer.map + guard, middle, PROT_READ | PROT_WRITE);
  // At the end of the pages, so that a protected page follows the last element.
  buffer.begin = buffer.map + guard + middle - round_up(bytes, alignment);
  fill(buffer.map + guard, middle);
#endif
  fill(buffer.begin, bytes);
  return buffer;
}

void release_memory(Buffer& buffer) {
#ifdef CUDA_ON_CPU_ADDRESS
  free(buffer.map);
#else
  const Unwatched unwatched;
  munmap(buffer.map, buffer.map_bytes);
#endif
  buffer = Buffer{};
}

long written_outside([[maybe_unused]] const Buffer& buffer) {
#ifndef CUDA_ON_CPU_ADDRESS
  const char *first = buffer.map + guard, *last = buffer.map + buffer.map_bytes - guard;
  for (const char* at = buffer.begin + buffer.bytes; at < last; at++)
    if (static_cast<unsigned char>(*at) != poison) return at - buffer.begin;
  for (const char* at = buffer.begin; at-- > first;)
    if (static_cast<unsigned char>(*at) != poison) return at - buffer.begin;
#endif
  return 0;
}

char* allocate_stacks(size_t count) {
  char* stacks = map_memory(count * stack_bytes, PROT_READ | PROT_WRITE);
  for (size_t i = 0; i < count; i++) protect(stacks + i * stack_bytes, page, PROT_NONE);
  return stacks;
}

void release_stacks(char* stacks, size_t count) {
  const Unwatched unwatched;
  munmap(stacks, count * stack_bytes);
}

}  // namespace cuda_on_cpu

// Memory whose ends are checked, by protected pages or by the sanitizer.
#pragma once
#include <stddef.h>

namespace cuda_on_cpu {

// Every float, half and bfloat16 made of these bytes is a NaN, every integer is -1.
constexpr unsigned char poison = 0xff;

struct Buffer {
  char name[64];
  char* begin;
  size_t bytes;
  char* map;  // including the protected pages around it
  size_t map_bytes;
};

Buffer allocate(size_t bytes, size_t alignment, const char* name);
void release_memory(Buffer& buffer);

void fill(void* to, size_t bytes);
void copy(void* to, const void* from, size_t bytes);

// The offset from `begin` of the first byte outside the buffer that was written, or 0.
long written_outside(const Buffer& buffer);

char* allocate_stacks(size_t count);
void release_stacks(char* stacks, size_t count);

#ifdef CUDA_ON_CPU_THREAD
constexpr size_t stack_bytes = 64 << 10;  // made anew for each block, with all that is noted of it
#else
constexpr size_t stack_bytes = 256 << 10;
#endif

}  // namespace cuda_on_cpu

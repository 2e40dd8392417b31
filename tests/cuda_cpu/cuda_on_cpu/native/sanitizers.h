// Functions of the sanitizers for fibres and happens-before; empty in a build without sanitizer.
#pragma once
#include <stddef.h>

#ifdef CUDA_ON_CPU_ADDRESS
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
void __asan_unpoison_memory_region(const volatile void* address, size_t size);
}
#endif

#ifdef CUDA_ON_CPU_THREAD
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace cuda_on_cpu {

inline void acquire([[maybe_unused]] void* order) {
#ifdef CUDA_ON_CPU_THREAD
  __tsan_acquire(order);
#endif
}

inline void release([[maybe_unused]] void* order) {
#ifdef CUDA_ON_CPU_THREAD
  __tsan_release(order);
#endif
}

// Memory that is allocated or freed while one lives has no history.
struct Unwatched {
  Unwatched() {
#ifdef CUDA_ON_CPU_THREAD
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
#endif
  }
  ~Unwatched() {
#ifdef CUDA_ON_CPU_THREAD
    AnnotateIgnoreWritesEnd("", 0);
    AnnotateIgnoreReadsEnd("", 0);
#endif
  }
};

}  // namespace cuda_on_cpu

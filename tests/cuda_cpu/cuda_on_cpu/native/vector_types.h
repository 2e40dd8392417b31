// CUDA's vector types.
#pragma once
#include "runtime.h"

#define CUDA_ON_CPU_VECTORS(type, name, align1, align2, align4)                    \
  struct alignas(align1) name##1 { type x; };                                      \
  struct alignas(align2) name##2 { type x, y; };                                   \
  struct alignas(align4) name##4 { type x, y, z, w; };                             \
  inline name##1 make_##name##1(type x) { return {x}; }                            \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                 \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
#define CUDA_ON_CPU_VECTORS3(type, name)                                           \
  struct name##3 { type x, y, z; };                                                \
  inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }

CUDA_ON_CPU_VECTORS(signed char, char, 1, 2, 4)
CUDA_ON_CPU_VECTORS(unsigned char, uchar, 1, 2, 4)
CUDA_ON_CPU_VECTORS(short, short, 2, 4, 8)
CUDA_ON_CPU_VECTORS(unsigned short, ushort, 2, 4, 8)
CUDA_ON_CPU_VECTORS(int, int, 4, 8, 16)
CUDA_ON_CPU_VECTORS(unsigned, uint, 4, 8, 16)
CUDA_ON_CPU_VECTORS(long long, longlong, 8, 16, 16)
CUDA_ON_CPU_VECTORS(unsigned long long, ulonglong, 8, 16, 16)
CUDA_ON_CPU_VECTORS(float, float, 4, 8, 16)
CUDA_ON_CPU_VECTORS(double, double, 8, 16, 16)
CUDA_ON_CPU_VECTORS3(int, int)
CUDA_ON_CPU_VECTORS3(float, float)
CUDA_ON_CPU_VECTORS3(double, double)
#undef CUDA_ON_CPU_VECTORS
#undef CUDA_ON_CPU_VECTORS3

inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  dim3(uint3 other) : x(other.x), y(other.y), z(other.z) {}
};

// Asynchronous copies to shared memory that are used too early or have wrong addresses.
#include "ptx.cuh"

constexpr int size = 128;  // threads of a block

// Each thread copies four numbers of `x` to four of `tile`.
__device__ void copy_four(float* tile, const float* x, int count = 4) {
  const int i = 4 * threadIdx.x;
  ptx::cp_async<16>(tile + i, x + i, 4 * count);
}

template <bool planted>
__global__ void missing_wait(const float* x, float* y) {
  __shared__ __align__(16) float tile[4 * size];
  copy_four(tile, x);
  ptx::cp_async_commit();
  if (!planted) ptx::cp_async_wait<0>();
  __syncthreads();
  y[threadIdx.x] = tile[threadIdx.x];
}

template <bool planted>
__global__ void wait_for_the_wrong_group(const float* x, float* y) {
  __shared__ __align__(16) float tile[2][4 * size];
  for (int i = 0; i < 2; i++) {
    copy_four(tile[i], x + i * 4 * size);
    ptx::cp_async_commit();
  }
  ptx::cp_async_wait<planted ? 1 : 0>();
  __syncthreads();
  y[threadIdx.x] = tile[0][threadIdx.x] + tile[1][threadIdx.x];
}

template <bool planted>
__global__ void missing_barrier_after_wait(const float* x, float* y) {
  __shared__ __align__(16) float tile[4 * size];
  copy_four(tile, x);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  if (!planted) __syncthreads();
  y[threadIdx.x] = tile[4 * size - 1 - threadIdx.x];
}

template <bool planted>
__global__ void missing_barrier_before_refill(const float* x, float* y) {
  __shared__ __align__(16) float tile[4 * size];
  float sum = 0.0f;
  for (int i = 0; i < 3; i++) {
    copy_four(tile, x + i * 4 * size);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    sum += tile[4 * size - 1 - threadIdx.x];
    if (!planted) __syncthreads();
  }
  y[threadIdx.x] = sum;
}

template <bool planted>
__global__ void misaligned_copy(const float* x, float* y) {
  __shared__ __align__(16) float tile[4 * size];
  copy_four(tile, x + planted);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  y[threadIdx.x] = tile[threadIdx.x];
}

template <bool planted>
__global__ void copy_past_the_end(const float* x, float* y, int n) {
  __shared__ __align__(16) float tile[4 * size];
  const int left = n - 4 * int(threadIdx.x);
  copy_four(tile, x, planted || left > 4 ? 4 : left < 0 ? 0 : left);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  y[threadIdx.x] = tile[4 * threadIdx.x] + tile[4 * threadIdx.x + 3];
}

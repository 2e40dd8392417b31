// Missing barriers and races. `planted` compiles the defect; otherwise the kernel is correct.

constexpr unsigned all_lanes = 0xffffffffu;
constexpr int size = 128;  // threads of a block

template <bool planted>
__global__ void missing_barrier_before_read(const float* x, float* y) {
  __shared__ float tile[size];
  const int t = threadIdx.x;
  tile[t] = x[t];
  if (!planted) __syncthreads();
  y[t] = tile[size - 1 - t];
}

template <bool planted>
__global__ void missing_barrier_before_write(const float* x, float* y) {
  __shared__ float tile[size];
  const int t = threadIdx.x;
  float sum = 0.0f;
  for (int i = 0; i < 4; i++) {
    tile[t] = x[i * size + t];
    __syncthreads();
    sum += tile[size - 1 - t];
    if (!planted) __syncthreads();
  }
  y[t] = sum;
}

template <bool planted>
__global__ void missing_syncwarp(const float* x, float* y) {
  __shared__ float tile[size];
  const int t = threadIdx.x;
  tile[t] = x[t];
  if (!planted) __syncwarp();
  y[t] = tile[t % 32 ? t - 1 : t];
}

template <bool planted>
__global__ void shuffle_as_barrier(const float* x, float* y) {
  __shared__ float tile[size];
  const int t = threadIdx.x;
  tile[t] = x[t];
  const float other = __shfl_xor_sync(all_lanes, x[t], 2);
  if (!planted) __syncwarp();
  y[t] = tile[t ^ 1] + other;
}

template <bool planted>
__global__ void divergent_barrier(const float* x, float* y) {
  __shared__ float tile[size];
  const int t = threadIdx.x;
  tile[t] = x[t];
  if (planted && t >= 100)
    __syncthreads();
  else
    __syncthreads();
  y[t] = tile[size - 1 - t];
}

template <bool planted>
__global__ void barriers_that_wait_for_each_other(const float* x, float* y) {
  __shared__ float tile[size];
  const int t = threadIdx.x;
  tile[t] = x[t];
  if (planted && t % 2) __syncwarp();
  __syncthreads();
  y[t] = tile[size - 1 - t];
}

template <bool planted>
__global__ void race_in_a_block(const int* x, int* y) {
  __shared__ int bins[8];
  const int t = threadIdx.x;
  if (t < 8) bins[t] = 0;
  __syncthreads();
  if (planted)
    bins[x[t]]++;
  else
    atomicAdd(&bins[x[t]], 1);
  __syncthreads();
  if (t < 8) y[t] = bins[t];
}

template <bool planted>
__global__ void race_between_blocks(const int* x, int* y) {
  const int t = threadIdx.x;
  if (planted)
    y[t] += x[blockIdx.x * size + t];
  else
    atomicAdd(&y[t], x[blockIdx.x * size + t]);
}

template <bool planted>
__global__ void missing_fence(const float* x, float* y, float* parts, unsigned* done) {
  if (threadIdx.x) return;
  parts[blockIdx.x] = x[blockIdx.x];
  if (!planted) __threadfence();
  if (atomicAdd(done, 1u) != gridDim.x - 1) return;
  float sum = 0.0f;
  for (unsigned i = 0; i < gridDim.x; i++) sum += parts[i];
  y[0] = sum;
}

template <bool planted>
__global__ void order_of_blocks(const float* x, float* y) {
  const int last = blockIdx.x;
  if (threadIdx.x) return;
  float sum = planted && last ? y[last - 1] : 0.0f;
  for (int i = planted ? last : 0; i <= last; i++) sum += x[i];
  y[last] = sum;
}

// Wrong addresses, and memory that is read before it is written.

constexpr int size = 128;  // threads of a block

template <bool planted>
__global__ void global_write_past_the_end(const float* x, float* y, int n) {
  const int i = blockIdx.x * size + threadIdx.x;
  if (i < n + planted) y[i] = 2.0f * x[i < n ? i : 0];
}

template <bool planted>
__global__ void global_read_past_the_end(const float* x, float* y, int n) {
  const int i = blockIdx.x * size + threadIdx.x;
  if (i < n) y[i] = x[i] + (planted || i + 1 < n ? x[i + 1] : 0.0f);
}

template <bool planted>
__global__ void dynamic_shared_past_the_end(const float* x, float* y) {
  extern __shared__ float tile[];
  const int t = threadIdx.x;
  tile[t + planted] = x[t];
  __syncthreads();
  y[t] = tile[t + planted];
}

template <bool planted>
__global__ void static_shared_past_the_end(const float* x, float* y) {
  __shared__ float tile[size];
  const int t = threadIdx.x;
  tile[t + planted] = x[t];
  __syncthreads();
  y[t] = tile[t + planted];
}

template <bool planted>
__global__ void local_past_the_end(const float* x, float* y, const int* places) {
  const int t = threadIdx.x;
  float parts[4];
  for (int i = 0; i < 4; i++) parts[i] = x[t] + i;
  y[t] = x[t] + (parts[places[t] + planted] == 1234.5f);
}

template <bool planted>
__global__ void misaligned_vector(const float* x, float* y) {
  const int t = threadIdx.x;
  const float* from = x + 4 * t + 1;
  if (planted) {
    const float4 four = *reinterpret_cast<const float4*>(from);
    y[t] = four.x + four.y + four.z + four.w;
  } else {
    y[t] = from[0] + from[1] + from[2] + from[3];
  }
}

template <bool planted>
__global__ void index_overflow(long long* y, int row, int stride) {
  y[threadIdx.x] = planted ? row * stride : (long long)row * stride;
}

template <bool planted>
__global__ void uninitialised_register(const float* x, float* y, int n) {
  float parts[4];
  for (int i = planted; i < n; i++) parts[i] = x[4 * threadIdx.x + i];
  float sum = 0.0f;
  for (int i = 0; i < n; i++) sum += parts[i];
  y[threadIdx.x] = sum;
}

template <bool planted>
__global__ void uninitialised_shared(const float* x, float* y) {
  __shared__ float tile[size];
  const int t = threadIdx.x;
  if (!planted || t != 5) tile[t] = x[t];
  __syncthreads();
  y[t] = tile[size - 1 - t];
}

template <bool planted>
__global__ void output_not_written(const float* x, float* y, int n) {
  const int i = blockIdx.x * size + threadIdx.x;
  if (i < n - planted) y[i] = x[i];
}

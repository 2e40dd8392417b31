// A correct kernel, for wrong launches.

extern "C" __global__ void scale(const float* x, float* y, int n, float factor) {
  extern __shared__ float unused[];
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
    y[i] = factor * x[i];
}

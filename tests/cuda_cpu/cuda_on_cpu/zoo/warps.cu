// Lanes of a warp that participate wrongly, and matrix fragments in wrong places.
#include "ptx.cuh"

constexpr unsigned all_lanes = 0xffffffffu;

template <bool planted>
__global__ void divergent_shuffle(const float* x, float* y) {
  const int t = threadIdx.x;
  if (planted && t % 2)
    y[t] = __shfl_xor_sync(all_lanes, x[t], 1);
  else
    y[t] = __shfl_xor_sync(all_lanes, x[t], 1);
}

template <bool planted>
__global__ void shuffle_from_a_lane_that_left(const float* x, float* y, int n) {
  const int t = threadIdx.x;
  if (planted && t >= n) return;
  const float mine = t < n ? x[t] : 0.0f;
  const float next = __shfl_down_sync(all_lanes, mine, 1);
  if (t < n) y[t] = mine + next;
}

template <bool planted>
__global__ void lane_outside_its_mask(const float* x, float* y) {
  const int t = threadIdx.x;
  y[t] = __shfl_xor_sync(planted ? 0xffffu : all_lanes, x[t], 1);
}

template <bool planted>
__global__ void wrong_lane(const float* x, float* y) {
  float sum = x[threadIdx.x];
  for (int lanes = planted ? 8 : 16; lanes; lanes /= 2)
    sum += __shfl_xor_sync(all_lanes, sum, lanes);
  y[threadIdx.x] = sum;
}

// c = a b, a (16, 16) and b (16, 8) by rows, of f16.
template <bool planted, bool misaligned, bool transposed>
__device__ void multiply(const unsigned short* a, const unsigned short* b, float* c) {
  constexpr int pitch = misaligned ? 17 : 24;  // of the rows in shared memory
  __shared__ unsigned short tile_a[16 * pitch], tile_b[16 * 8];
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) tile_a[i / 16 * pitch + i % 16] = a[i];
  for (int i = lane; i < 128; i += 32) tile_b[i] = b[i];
  __syncwarp();
  unsigned left[4], right[2];
  float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  ptx::ldmatrix(left, tile_a + lane % 16 * pitch + lane / 16 * 8);
  ptx::ldmatrix<transposed>(right, tile_b + lane % 16 * 8);
  const unsigned swapped[2] = {right[planted], right[!planted]};
  ptx::mma_m16n8k16<ptx::f16>(sum, left, swapped, sum);
  for (int i = 0; i < 4; i++) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sum[i];
}

template <bool planted>
__global__ void fragment_in_the_wrong_place(const unsigned short* a, const unsigned short* b,
                                            float* c) {
  multiply<planted, false, true>(a, b, c);
}

template <bool planted>
__global__ void matrix_not_transposed(const unsigned short* a, const unsigned short* b, float* c) {
  multiply<false, false, !planted>(a, b, c);
}

template <bool planted>
__global__ void misaligned_row(const unsigned short* a, const unsigned short* b, float* c) {
  multiply<false, planted, true>(a, b, c);
}

// What all keys of a row subtract in the pullback, d_out . out - d_level, for a warp each: arrays
// (rows, columns) and (rows) without gaps. A row whose weights sum to 0 has no d_level.

__global__ void __launch_bounds__(THREADS)
    scores_delta(const out_type* __restrict__ out, const d_out_type* __restrict__ d_out,
                 const scalar* __restrict__ level, const scalar* __restrict__ d_level,
                 scalar* __restrict__ delta, i64 rows, int columns) {
  const i64 row = i64(blockIdx.x) * (THREADS / 32) + threadIdx.x / 32;
  const int lane = int(threadIdx.x) % 32;
  if (row >= rows) return;
  scalar sum = 0;
  for (int c = lane; c < columns; c += 32)
    sum += Stored<out_type>::read(out[row * columns + c]) *
           Stored<d_out_type>::read(d_out[row * columns + c]);
#pragma unroll
  for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(WHOLE_WARP, sum, step);
  if (lane == 0) delta[row] = level[row] == MINUS_INFINITY ? sum : sum - d_level[row];
}

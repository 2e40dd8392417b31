// The bias's cotangent, of its own shape, in which any axis may be broadcast: a block owns SIZE
// rows and SIZE keys of it, or all of a broadcast axis, and goes through what shares them.

struct Span {
  int first, last, step;
};

// What a block goes through along an axis: its own place, or all places if the axis is broadcast.
DEVICE Span span_of(int extent, int own, int count, int step) {
  return extent == 1 && count != 1 ? Span{0, count, step} : Span{own, own + 1, step};
}

__global__ void __launch_bounds__(THREADS, 1)
    scores_bias(INPUTS, COTANGENTS, d_bias_type* __restrict__ d_bias, Shape shape) {
  extern __shared__ __align__(16) char memory[];
  scalar* staged = reinterpret_cast<scalar*>(memory);
  scalar* weights = staged + Memory<DEPTH>::STAGED;
  const int* extent = shape.bias_extent;
  const int row_tiles = tiles_of(extent[3]), key_tiles = tiles_of(extent[4]);
  const i64 plane = blockIdx.x / (i64(row_tiles) * key_tiles);
  const int tile = int(blockIdx.x % (i64(row_tiles) * key_tiles));
  const int own_row = tile / key_tiles * SIZE, own_key = tile % key_tiles * SIZE;
  const Span batch = span_of(extent[0], int(plane / extent[2] / extent[1]), shape.batch, 1);
  const Span heads = span_of(extent[1], int(plane / extent[2] % extent[1]), shape.heads, 1);
  const Span group = span_of(extent[2], int(plane % extent[2]), shape.group, 1);
  const Span rows = span_of(extent[3], own_row, shape.rows, SIZE);
  const Span all_keys = span_of(extent[4], own_key, shape.keys, SIZE);
  const Inputs inputs = INPUT_NAMES;
  scalar sums[EACH][EACH] = {};
  for (int b = batch.first; b < batch.last; b++)
    for (int h = heads.first; h < heads.last; h++)
      for (int g = group.first; g < group.last; g++) {
        const i64 at = (i64(b) * shape.heads + h) * shape.group + g;
        const Head head = head_at(inputs, shape, b, h, g);
        const RowsOf<d_out_type> d_rows = cotangent_rows(d_out, shape, at);
        for (int row0 = rows.first; row0 < rows.last; row0 += rows.step) {
          const Range keys = head.keys_of(row0, row0 + SIZE);
          for (int key0 = all_keys.first; key0 < all_keys.last; key0 += all_keys.step) {
            if (key0 >= keys.last || key0 + SIZE <= keys.first) continue;
            scalar s[EACH][EACH], d[EACH][EACH];
            products(s, head.q, row0, head.k, key0, staged);
            products(d, d_rows, row0, head.v, key0, staged);
#pragma unroll
            for (int i = 0; i < EACH; i++) {
              const int row = row0 + down() + SIDE * i;
              const bool exists = row < shape.rows;
              const Range near = head.keys_of(row, row + 1);
              const scalar row_level = exists ? level[at * shape.rows + row] : MINUS_INFINITY;
              const scalar row_delta = exists ? delta[at * shape.rows + row] : scalar(0);
#pragma unroll
              for (int j = 0; j < EACH; j++) {
                const int key = key0 + across() + SIDE * j;
                sums[i][j] += pulled(head, near.has(key), s[i][j], d[i][j], row, key, row_level,
                                     row_delta).log;
              }
            }
          }
        }
      }
#pragma unroll
  for (int i = 0; i < EACH; i++)
#pragma unroll
    for (int j = 0; j < EACH; j++)
      weights[(down() + SIDE * i) * WEIGHT_PITCH + across() + SIDE * j] = sums[i][j];
  __syncthreads();
  // A broadcast axis is one of length 1: its entries are added where the first of them is written.
  const bool one_row = extent[3] == 1, one_key = extent[4] == 1;
  for (int i = int(threadIdx.x); i < SIZE * SIZE; i += THREADS) {
    const int r = i / SIZE, c = i % SIZE;
    if (own_row + r >= extent[3] || own_key + c >= extent[4]) continue;
    scalar sum = 0;
    for (int y = r; y < (one_row ? SIZE : r + 1); y++)
      for (int x = c; x < (one_key ? SIZE : c + 1); x++) sum += weights[y * WEIGHT_PITCH + x];
    d_bias[(plane * extent[3] + own_row + r) * extent[4] + own_key + c] =
        Stored<d_bias_type>::of(sum);
  }
}

// The contraction by scores: an online softmax over tiles of keys, or a plain sum of weights.
//
// A block has SIZE rows of one query head and COLUMNS columns of the values. out is
// (batch, heads, group, rows, value_dim) and level (batch, heads, group, rows), without gaps.

template <int COLUMNS>
__global__ void __launch_bounds__(THREADS, 1)
    scores_forward(INPUTS, out_type* __restrict__ out, scalar* __restrict__ level, Shape shape) {
  extern __shared__ __align__(16) char memory[];
  scalar* staged = reinterpret_cast<scalar*>(memory);
  scalar* weights = staged + Memory<COLUMNS>::STAGED;
  // Blocks of a head follow one another, since its keys stay in the cache, from the last rows on,
  // which see most under causal.
  const int tiles = tiles_of(shape.rows);
  const i64 at = blockIdx.x / tiles;
  const int row0 = (tiles - 1 - int(blockIdx.x % tiles)) * SIZE;
  const int column0 = int(blockIdx.y) * COLUMNS;
  const int g = int(at % shape.group), h = int(at / shape.group % shape.heads);
  const Inputs inputs = INPUT_NAMES;
  const Head head = head_at(inputs, shape, at / shape.group / shape.heads, h, g);
  const Range keys = head.keys_of(row0, row0 + SIZE);

  Sums<COLUMNS> sums;
  sums.clear();
  scalar peak[EACH], total[EACH];
  Range near[EACH];  // what each row sees by position
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    near[i] = head.keys_of(row0 + down() + SIDE * i, row0 + down() + SIDE * i + 1);
    peak[i] = MINUS_INFINITY;
    total[i] = 0;
  }
  for (int key0 = keys.first / SIZE * SIZE; key0 < keys.last; key0 += SIZE) {
    scalar s[EACH][EACH];
    products(s, head.q, row0, head.k, key0, staged);
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const int row = row0 + down() + SIDE * i;
      scalar* beside = weights + (down() + SIDE * i) * WEIGHT_PITCH + across();
      scalar more = 0;
#if LOG_WEIGHT
      scalar top = MINUS_INFINITY;
#pragma unroll
      for (int j = 0; j < EACH; j++) {
        const int key = key0 + across() + SIDE * j;
        const bool seen = near[i].has(key) && head.unmasked(row, key);
        s[i][j] = seen ? head.log_weight(s[i][j], row, key) : MINUS_INFINITY;
        top = larger(top, s[i][j]);
      }
      const scalar higher = larger(peak[i], largest_across(top));
      const scalar base = higher == MINUS_INFINITY ? scalar(0) : higher;  // -inf - -inf is NaN
      const scalar shrink = exponential(peak[i] - base);
      peak[i] = higher;
      total[i] *= shrink;
#pragma unroll
      for (int c = 0; c < Sums<COLUMNS>::OWN; c++) sums.x[i][c] *= shrink;
#pragma unroll
      for (int j = 0; j < EACH; j++) {
        const scalar p = exponential(s[i][j] - base);
        beside[SIDE * j] = p;
        more += p;
      }
#else
#pragma unroll
      for (int j = 0; j < EACH; j++) {
        const int key = key0 + across() + SIDE * j;
        const scalar p = near[i].has(key) && head.unmasked(row, key) ? s[i][j] : scalar(0);
        beside[SIDE * j] = p;
        more += p;
      }
#endif
      total[i] += sum_across(more);
    }
    sums.add(weights, head.v, key0, column0, staged);
  }
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int row = row0 + down() + SIDE * i;
    const scalar base = peak[i] == MINUS_INFINITY ? scalar(0) : peak[i];
    if (blockIdx.y == 0 && across() == 0 && row < shape.rows)
      level[at * shape.rows + row] = shape.has_sign   ? scalar(0)
                                     : total[i] == 0 ? MINUS_INFINITY
                                                     : base + logarithm(total[i]);
    if (shape.has_sign) continue;
#pragma unroll
    for (int c = 0; c < Sums<COLUMNS>::OWN; c++)
      sums.x[i][c] = total[i] == 0 ? scalar(0) : sums.x[i][c] / total[i];
  }
  sums.write(out + at * shape.rows * shape.value_dim, row0, shape.rows, column0, shape.value_dim);
}

// The pullback of the contraction by scores: the weights are computed again, tile by tile, and
// every result has one block that owns it, so nothing is added by atomics.
//
// level and delta are (batch, heads, group, rows), d_out (batch, heads, group, rows, value_dim),
// all without gaps, as are the results.

#define COTANGENTS                                                                                \
  const d_out_type *__restrict__ d_out, const scalar *__restrict__ level,                         \
      const scalar *__restrict__ delta

// The weight of a key for a row, and the cotangents of its logarithm and of the inner product;
// zeros for a key that the row does not see by position.
struct Pulled {
  scalar weight, log, inner;
};

DEVICE Pulled pulled(const Head& head, bool near, scalar s, scalar d_weight, int row, int key,
                     scalar level, scalar delta) {
  const scalar zero = 0;
  if (!near || level == MINUS_INFINITY || !head.unmasked(row, key)) return {zero, zero, zero};
#if LOG_WEIGHT
  const scalar p = exponential(head.log_weight(s, row, key) - level);
  // A weight of 0 has no gradient: kappa's derivative, not that of log kappa, counts.
  if (p == 0) return {zero, zero, zero};
  const scalar log = p * (d_weight * head.kept(row, key) - delta);
  return {p, log,
          log * log_kappa_slope(s, scalar(head.shape->scale), head.values, head.place(row, key))};
#else
  const scalar inverse = exponential(-level);
  return {s * inverse, zero, (d_weight - delta) * inverse};
#endif
}

DEVICE RowsOf<d_out_type> cotangent_rows(const d_out_type* d_out, const Shape& s, i64 at) {
  return rows_at(d_out + at * s.rows * s.value_dim, s.value_dim, s.rows, s.value_dim);
}

// dq, (batch, heads, group, rows, dim), for SIZE rows and COLUMNS columns; and for each block of
// rows the sum of the cotangents of every scalar of log kappa, (batch heads group, tiles, VALUES).
template <int COLUMNS>
__global__ void __launch_bounds__(THREADS, 1)
    scores_rows(INPUTS, COTANGENTS, q_type* __restrict__ dq, scalar* __restrict__ d_values,
                Shape shape) {
  extern __shared__ __align__(16) char memory[];
  scalar* staged = reinterpret_cast<scalar*>(memory);
  scalar* weights = staged + Memory<COLUMNS>::STAGED;
  const int tiles = tiles_of(shape.rows);
  const i64 at = blockIdx.x / tiles;
  const int tile = tiles - 1 - int(blockIdx.x % tiles), row0 = tile * SIZE;
  const int column0 = int(blockIdx.y) * COLUMNS;
  const int g = int(at % shape.group), h = int(at / shape.group % shape.heads);
  const Inputs inputs = INPUT_NAMES;
  const Head head = head_at(inputs, shape, at / shape.group / shape.heads, h, g);
  const RowsOf<d_out_type> d_rows = cotangent_rows(d_out, shape, at);
  const Range keys = head.keys_of(row0, row0 + SIZE);

  Sums<COLUMNS> sums;
  sums.clear();
  scalar found[VALUES ? VALUES : 1] = {};
  scalar levels[EACH], deltas[EACH];
  Range near[EACH];  // what each row sees by position
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int row = row0 + down() + SIDE * i;
    near[i] = head.keys_of(row, row + 1);
    levels[i] = row < shape.rows ? level[at * shape.rows + row] : MINUS_INFINITY;
    deltas[i] = row < shape.rows ? delta[at * shape.rows + row] : scalar(0);
  }
  for (int key0 = keys.first / SIZE * SIZE; key0 < keys.last; key0 += SIZE) {
    scalar s[EACH][EACH], d[EACH][EACH];
    products(s, head.q, row0, head.k, key0, staged);
    products(d, d_rows, row0, head.v, key0, staged);
#pragma unroll
    for (int i = 0; i < EACH; i++)
#pragma unroll
      for (int j = 0; j < EACH; j++) {
        const int row = row0 + down() + SIDE * i, key = key0 + across() + SIDE * j;
        const Pulled w = pulled(head, near[i].has(key), s[i][j], d[i][j], row, key,
                                levels[i], deltas[i]);
        weights[(down() + SIDE * i) * WEIGHT_PITCH + across() + SIDE * j] = w.inner;
#pragma unroll
        for (int n = 0; n < VALUES; n++)
          if (w.weight != 0)
            found[n] += w.log * value_slope(n, s[i][j], scalar(shape.scale), head.values,
                                            head.place(row, key));
      }
    sums.add(weights, head.k, key0, column0, staged);
  }
  sums.write(dq + at * shape.rows * shape.dim, row0, shape.rows, column0, shape.dim);
  if (blockIdx.y == 0 && VALUES) {
#pragma unroll
    for (int n = 0; n < VALUES; n++) {
      __syncthreads();
      staged[threadIdx.x] = found[n];
      for (int step = THREADS / 2; step; step /= 2) {
        __syncthreads();
        if (int(threadIdx.x) < step) staged[threadIdx.x] += staged[threadIdx.x + step];
      }
      if (threadIdx.x == 0) d_values[(at * tiles + tile) * VALUES + n] = staged[0];
    }
  }
}

// What keys, or values, and their cotangents are stored as.
template <bool OF_VALUES>
struct KeyType {
  typedef k_type type;
};
template <>
struct KeyType<true> {
  typedef v_type type;
};

// dk and the key bias's cotangent, (batch, heads, keys, dim) and (batch, heads, keys), or dv,
// (batch, heads, keys, value_dim): SIZE keys and COLUMNS columns, over all query heads of a key
// head. Two launches rather than one, for both sums would not fit the registers.
template <int COLUMNS, bool OF_VALUES>
__global__ void __launch_bounds__(THREADS, 1)
    scores_keys(INPUTS, COTANGENTS, typename KeyType<OF_VALUES>::type* __restrict__ dx,
                scalar* __restrict__ d_key_bias, Shape shape) {
  extern __shared__ __align__(16) char memory[];
  scalar* staged = reinterpret_cast<scalar*>(memory);
  scalar* weights = staged + Memory<COLUMNS>::STAGED;
  const int tiles = tiles_of(shape.keys);
  const i64 pair = blockIdx.x / tiles;  // of a sequence and a key head
  const int key0 = int(blockIdx.x % tiles) * SIZE;
  const int column0 = int(blockIdx.y) * COLUMNS;
  const Inputs inputs = INPUT_NAMES;
  Sums<COLUMNS> sums;
  sums.clear();
  scalar biases[EACH] = {};
  for (int g = 0; g < shape.group; g++) {
    const i64 at = pair * shape.group + g;
    const Head head = head_at(inputs, shape, pair / shape.heads, pair % shape.heads, g);
    const RowsOf<d_out_type> d_rows = cotangent_rows(d_out, shape, at);
    const Range rows = head.rows_of(key0, key0 + SIZE);
    Range near[EACH];  // what sees each key by position
#pragma unroll
    for (int i = 0; i < EACH; i++)
      near[i] = head.rows_of(key0 + down() + SIDE * i, key0 + down() + SIDE * i + 1);
    for (int row0 = rows.first / SIZE * SIZE; row0 < rows.last; row0 += SIZE) {
      scalar s[EACH][EACH], d[EACH][EACH] = {};
      products(s, head.k, key0, head.q, row0, staged);
      if (!OF_VALUES) products(d, head.v, key0, d_rows, row0, staged);
#pragma unroll
      for (int j = 0; j < EACH; j++) {
        const int row = row0 + across() + SIDE * j;
        const scalar row_level =
            row < shape.rows ? level[at * shape.rows + row] : MINUS_INFINITY;
        const scalar row_delta = row < shape.rows ? delta[at * shape.rows + row] : scalar(0);
#pragma unroll
        for (int i = 0; i < EACH; i++) {
          const int key = key0 + down() + SIDE * i;
          const Pulled w = pulled(head, near[i].has(row), s[i][j], d[i][j], row, key,
                                  row_level, row_delta);
          weights[(down() + SIDE * i) * WEIGHT_PITCH + across() + SIDE * j] =
              OF_VALUES ? w.weight * head.kept(row, key) : w.inner;
          biases[i] += w.log;
        }
      }
      if constexpr (OF_VALUES)
        sums.add(weights, d_rows, row0, column0, staged);
      else
        sums.add(weights, head.q, row0, column0, staged);
    }
  }
  const int columns = OF_VALUES ? shape.value_dim : shape.dim;
  sums.write(dx + pair * shape.keys * columns, key0, shape.keys, column0, columns);
  if (OF_VALUES || !d_key_bias || blockIdx.y) return;
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int key = key0 + down() + SIDE * i;
    const scalar sum = sum_across(biases[i]);
    if (across() == 0 && key < shape.keys) d_key_bias[pair * shape.keys + key] = sum;
  }
}

// The pullback of the contraction by features. With phi(q)/h for a row's features over the sum of
// its weights, dq, dk and dv are contractions by features themselves, of the same states for dq
// and of the states of rows, added up from the last one on, for dk and dv.

// dq, (batch, heads, group, rows, dim): SIZE rows of a query head and COLUMNS features.
template <int COLUMNS>
__global__ void __launch_bounds__(THREADS, 1)
    features_rows(INPUTS, COTANGENTS, const scalar* __restrict__ states,
                  const scalar* __restrict__ tops, q_type* __restrict__ dq, Shape shape,
                  Chunks cut) {
  extern __shared__ __align__(16) char memory[];
  scalar* staged = reinterpret_cast<scalar*>(memory);
  scalar* weights = staged + Memory<COLUMNS>::STAGED;
  const int tiles = tiles_of(shape.rows);
  const i64 at = blockIdx.x / tiles, pair = at / shape.group;
  const int row0 = int(blockIdx.x % tiles) * SIZE, column0 = int(blockIdx.y) * COLUMNS;
  const Inputs inputs = INPUT_NAMES;
  const Head head =
      head_at(inputs, shape, pair / shape.heads, pair % shape.heads, at % shape.group);
  const RowsOf<d_out_type> d_rows = cotangent_rows(d_out, shape, at);
  const Window window = keys_for(head, row0, cut);
  const scalar* top = top_at(tops, pair, highest_entry(window, cut), shape, cut);

  Sums<COLUMNS> sums;
  sums.clear();
  scalar deltas[EACH];
  int seen[EACH];
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int row = row0 + down() + SIDE * i;
    seen[i] = head.keys_of(row, row + 1).last;
    deltas[i] = row < shape.rows ? delta[at * shape.rows + row] : scalar(0);
  }
  if (window.entry) {
    const State state = state_at(states, pair, cut.key_count, window.entry, shape);
    add_transposed(sums, d_rows, row0, state, column0, weights, staged);
    const scalar* before = top_at(tops, pair, window.entry, shape, cut);
#pragma unroll
    for (int c = 0; c < Sums<COLUMNS>::OWN; c++) {
      const int f = column0 + Sums<COLUMNS>::column(c);
      if (f >= shape.dim) continue;
      const scalar sum = state.sums[f];
      const scalar shrink = before ? relative(before[f], before[f], top[f]) : scalar(1);
#pragma unroll
      for (int i = 0; i < EACH; i++) sums.x[i][c] = (sums.x[i][c] - deltas[i] * sum) * shrink;
    }
  }
  const auto keys = mapped(head.k, OfKeys{head.key_mask, top});
  for (int key0 = window.first; key0 < window.last; key0 += SIZE) {
    scalar d[EACH][EACH];
    products(d, d_rows, row0, head.v, key0, staged);
#pragma unroll
    for (int i = 0; i < EACH; i++)
#pragma unroll
      for (int j = 0; j < EACH; j++)
        d[i][j] = key0 + across() + SIDE * j < seen[i] ? d[i][j] - deltas[i] : scalar(0);
    keep(weights, d);
    sums.add(weights, keys, key0, column0, staged);
  }
  const OfRows map = {top, level + at * shape.rows};
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int row = row0 + down() + SIDE * i;
    if (row >= shape.rows) continue;
#pragma unroll
    for (int c = 0; c < Sums<COLUMNS>::OWN; c++) {
      const int f = column0 + Sums<COLUMNS>::column(c);
      if (f < shape.dim)
        sums.x[i][c] *= map.slope(Stored<q_type>::read(head.q.first[row * head.q.pitch + f]), row, f);
    }
  }
  sums.write(dq + at * shape.rows * shape.dim, row0, shape.rows, column0, shape.dim);
}

// dk, (batch, heads, keys, dim), or dv, (batch, heads, keys, value_dim): SIZE keys and COLUMNS
// columns, over all query heads of a key head. Log features are relative to all keys' maxima.
template <int COLUMNS, bool OF_VALUES>
__global__ void __launch_bounds__(THREADS, 1)
    features_keys(INPUTS, COTANGENTS, const scalar* __restrict__ states,
                  const scalar* __restrict__ tops,
                  typename KeyType<OF_VALUES>::type* __restrict__ dx, Shape shape, Chunks cut) {
  extern __shared__ __align__(16) char memory[];
  scalar* staged = reinterpret_cast<scalar*>(memory);
  scalar* weights = staged + Memory<COLUMNS>::STAGED;
  const int tiles = tiles_of(shape.keys);
  const i64 pair = blockIdx.x / tiles;  // of a sequence and a key head
  const int key0 = int(blockIdx.x % tiles) * SIZE, column0 = int(blockIdx.y) * COLUMNS;
  const Inputs inputs = INPUT_NAMES;
  const Head head = head_at(inputs, shape, pair / shape.heads, pair % shape.heads, 0);
  const scalar* top = top_at(tops, pair, cut.key_count, shape, cut);
  const auto keys = mapped(head.k, OfKeys{head.key_mask, top});
  const Window window = rows_for(head, key0, cut);

  Sums<COLUMNS> sums;
  sums.clear();
  if (window.entry) {
    const State state = state_at(states, pair, cut.row_count, window.entry, shape);
    if constexpr (OF_VALUES) {
      scalar unused[EACH] = {};
      add_state(sums, unused, keys, key0, state, column0, weights, staged);
    } else {
      add_transposed(sums, head.v, key0, state, column0, weights, staged);
#pragma unroll
      for (int c = 0; c < Sums<COLUMNS>::OWN; c++) {
        const int f = column0 + Sums<COLUMNS>::column(c);
        const scalar sum = f < shape.dim ? state.sums[f] : scalar(0);
#pragma unroll
        for (int i = 0; i < EACH; i++) sums.x[i][c] += sum;
      }
    }
  }
  Range near[EACH];  // what sees each key by position
#pragma unroll
  for (int i = 0; i < EACH; i++)
    near[i] = head.rows_of(key0 + down() + SIDE * i, key0 + down() + SIDE * i + 1);
  for (int g = 0; g < shape.group; g++) {
    const i64 at = pair * shape.group + g;
    const Head own = head_at(inputs, shape, pair / shape.heads, pair % shape.heads, g);
    const RowsOf<d_out_type> d_rows = cotangent_rows(d_out, shape, at);
    const auto queries = mapped(own.q, OfRows{top, level + at * shape.rows});
    for (int row0 = window.first; row0 < window.last; row0 += SIZE) {
      scalar w[EACH][EACH];
      if constexpr (OF_VALUES)
        products(w, keys, key0, queries, row0, staged);
      else
        products(w, head.v, key0, d_rows, row0, staged);
#pragma unroll
      for (int j = 0; j < EACH; j++) {
        const int row = row0 + across() + SIDE * j;
        const scalar less =
            !OF_VALUES && row < shape.rows ? delta[at * shape.rows + row] : scalar(0);
#pragma unroll
        for (int i = 0; i < EACH; i++)
          w[i][j] = near[i].has(row) ? w[i][j] - less : scalar(0);
      }
      keep(weights, w);
      if constexpr (OF_VALUES)
        sums.add(weights, d_rows, row0, column0, staged);
      else
        sums.add(weights, queries, row0, column0, staged);
    }
  }
  if constexpr (!OF_VALUES) {
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const int key = key0 + down() + SIDE * i;
      if (key >= shape.keys) continue;
#pragma unroll
      for (int c = 0; c < Sums<COLUMNS>::OWN; c++) {
        const int f = column0 + Sums<COLUMNS>::column(c);
        if (f < shape.dim)
          sums.x[i][c] *= keys.map.slope(Stored<k_type>::read(head.k.first[key * head.k.pitch + f]), key, f);
      }
    }
  }
  const int columns = OF_VALUES ? shape.value_dim : shape.dim;
  sums.write(dx + pair * shape.keys * columns, key0, shape.keys, column0, columns);
}

// The pullback of the contraction by scores on tensor cores: the weights are computed again from
// the levels, tile by tile, and every result has one block that owns it, without atomics.
//
// level and delta are (batch, heads, group, rows), d_out (batch, heads, group, rows, value_dim),
// all without gaps, as are the results. A warp has 16 rows, or 16 keys.

#define COTANGENTS                                                                                \
  const element *__restrict__ d_out, const float *__restrict__ level,                             \
      const float *__restrict__ delta

template <int DIM, int VALUE_DIM>
struct Backward {
  static constexpr int OWN = 16 * WARPS;  // rows of a block of queries, keys of a block of keys
  // What goes by: as much as there are registers for.
  static constexpr int BY = DIM + VALUE_DIM <= 128 ? 64 : 32;
  static constexpr int STAGES = 2;
  static constexpr int HELD = OWN * (DIM + VALUE_DIM), STAGE = BY * (DIM + VALUE_DIM);
  static constexpr int NEAR = 2 * (HELD + STAGES * STAGE);
  static constexpr int SOURCE = NEAR + OWN * int(sizeof(Range));
  static constexpr int BYTES = SOURCE + 1280;
};

// Shared memory of a block, and the copies on their way into it: `wide` of DIM columns and `beside`
// of VALUE_DIM; queries and cotangents, or keys and values.
template <int DIM, int VALUE_DIM>
struct Buffers {
  typedef Backward<DIM, VALUE_DIM> Sizes;
  char* memory;

  DEVICE_MEMBER element* entries() const { return reinterpret_cast<element*>(memory); }
  DEVICE_MEMBER Tile<DIM> own_wide() const { return {entries()}; }
  DEVICE_MEMBER Tile<VALUE_DIM> own_beside() const { return {entries() + Sizes::OWN * DIM}; }
  DEVICE_MEMBER Tile<DIM> wide(int t) const {
    return {entries() + Sizes::HELD + t % Sizes::STAGES * Sizes::STAGE};
  }
  DEVICE_MEMBER Tile<VALUE_DIM> beside(int t) const {
    return {wide(t).first + Sizes::BY * DIM};
  }
  DEVICE_MEMBER Range* near() const { return reinterpret_cast<Range*>(memory + Sizes::NEAR); }
  DEVICE_MEMBER Source& source() const {
    return *reinterpret_cast<Source*>(memory + Sizes::SOURCE);
  }

  DEVICE_MEMBER void fetch(const RowsOf<element>& x, const RowsOf<element>& y, int t) const {
    if (t < source().tiles.last) {
      wide(t).template load<Sizes::BY>(x, t * Sizes::BY);
      beside(t).template load<Sizes::BY>(y, t * Sizes::BY);
    }
    ptx::cp_async_commit();  // a group for every tile, of nothing past the last
  }
};

DEVICE RowsOf<element> cotangent_rows(const element* d_out, const Shape& s, i64 at) {
  return rows_at(d_out + at * s.rows * s.value_dim, s.value_dim, s.rows, s.value_dim);
}

// A weight from its inner product, and the cotangents of its logarithm and of the inner product,
// the latter without the scale where log w = scale * s. -inf is a key that the row does not see.
struct Pulled {
  float weight, log, inner;
};

DEVICE Pulled pulled(const Head& head, bool plain, float s, float d_weight, int row, int key,
                     float row_level, float row_delta) {
  if (s == MINUS_INFINITY || row_level == MINUS_INFINITY) return {0, 0, 0};
  const float scale = float(head.shape->scale);
  const float logit = plain ? s * scale : head.log_weight(s, row, key);
  const float p = ptx::exp2_approximate(LOG2E * (logit - row_level));
  // A weight of 0 has no gradient: kappa's derivative, not that of log kappa, counts.
  if (p == 0) return {0, 0, 0};
  const float log = p * (d_weight - row_delta);
  return {p, log, PLAIN ? log : log * log_kappa_slope(s, scale, head.values, head.place(row, key))};
}

// dq, (batch, heads, group, rows, dim).
template <int DIM, int VALUE_DIM, class TO>
__global__ void __launch_bounds__(MMA_THREADS, 1)
    scores_mma_rows(INPUTS, COTANGENTS, TO* __restrict__ dq, Shape shape) {
  typedef Backward<DIM, VALUE_DIM> Sizes;
  extern __shared__ __align__(16) char memory[];
  const Buffers<DIM, VALUE_DIM> buffers = {memory};
  Source& source = buffers.source();
  const Head& head = source.head;
  const int tiles = (shape.rows + Sizes::OWN - 1) / Sizes::OWN;
  const i64 at = blockIdx.x / tiles;
  const int row0 = (tiles - 1 - int(blockIdx.x % tiles)) * Sizes::OWN, warp_row = 16 * warp();
  const int g = int(at % shape.group), h = int(at / shape.group % shape.heads);
  const Inputs inputs = INPUT_NAMES;
  if (threadIdx.x == 0) {
    source.shape = shape;
    source.head = head_at(inputs, source.shape, at / shape.group / shape.heads, h, g);
    const Range keys = head.keys_of(row0, row0 + Sizes::OWN);
    source.tiles = {keys.first / Sizes::BY, (keys.last + Sizes::BY - 1) / Sizes::BY};
  }
  __syncthreads();
  const Range &some = source.some[warp()], &all = source.all[warp()];
  if (lane() == 0) {
    source.some[warp()] = head.keys_of(row0 + warp_row, row0 + warp_row + 16);
    source.all[warp()] = seen_by_all(head, row0 + warp_row, row0 + warp_row + 16);
  }
  if (int(threadIdx.x) < Sizes::OWN)
    buffers.near()[threadIdx.x] =
        head.keys_of(row0 + int(threadIdx.x), row0 + int(threadIdx.x) + 1);
  buffers.own_wide().template load<Sizes::OWN>(head.q, row0);
  buffers.own_beside().template load<Sizes::OWN>(cotangent_rows(d_out, shape, at), row0);
  buffers.fetch(head.k, head.v, source.tiles.first);

  const bool plain = PLAIN && !key_bias && !bias;
  Product<1, DIM / 8> sums;
  sums.clear();
  float levels[2], deltas[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int row = row0 + warp_row + sums.row(0, 2 * i);
    levels[i] = row < shape.rows ? level[at * shape.rows + row] : MINUS_INFINITY;
    deltas[i] = row < shape.rows ? delta[at * shape.rows + row] : 0;
  }
  for (int t = source.tiles.first; t < source.tiles.last; t++) {
    const int key0 = t * Sizes::BY;
    ptx::cp_async_wait<0>();
    __syncthreads();  // the tile is there for all warps, and the one before is no longer read
    buffers.fetch(head.k, head.v, t + 1);
    if (key0 >= some.last || key0 + Sizes::BY <= some.first) continue;
    Product<1, Sizes::BY / 8> s, d;
    s.of(buffers.own_wide().from(warp_row), buffers.wide(t));
    d.of(buffers.own_beside().from(warp_row), buffers.beside(t));
    if (head.key_mask || head.mask || key0 < all.first || key0 + Sizes::BY > all.last)
      hide(s, head, buffers.near() + warp_row, row0 + warp_row, key0);
#pragma unroll
    for (int n = 0; n < Sizes::BY / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        s.x[0][n][e] = pulled(head, plain, s.x[0][n][e], d.x[0][n][e],
                              row0 + warp_row + s.row(0, e), key0 + s.column(n, e),
                              levels[e / 2], deltas[e / 2]).inner;
    sums.add(s, buffers.wide(t));
  }
  ptx::cp_async_wait<0>();
  if (PLAIN) sums.scale(float(shape.scale));
  sums.write(dq + at * shape.rows * DIM, row0 + warp_row, shape.rows);
}

// What sees all keys first .. last - 1 by position; nothing, where not all of them are there.
DEVICE Range that_see_all(const Head& head, int first, int last) {
  if (last > head.shape->keys) return {0, 0};
  // Both ends grow with the key.
  return {head.rows_of(last - 1, last).first, head.rows_of(first, first + 1).last};
}

// dk and dv, (batch, heads, keys, dim) and (batch, heads, keys, value_dim), and the key bias's,
// (batch, heads, keys), over all query heads of a key head.
template <int DIM, int VALUE_DIM, class TO, class TO_VALUES>
__global__ void __launch_bounds__(MMA_THREADS, 1)
    scores_mma_keys(INPUTS, COTANGENTS, TO* __restrict__ dk, TO_VALUES* __restrict__ dv,
                    float* __restrict__ d_key_bias, Shape shape) {
  typedef Backward<DIM, VALUE_DIM> Sizes;
  extern __shared__ __align__(16) char memory[];
  const Buffers<DIM, VALUE_DIM> buffers = {memory};
  Source& source = buffers.source();
  const Head& head = source.head;
  const int tiles = (shape.keys + Sizes::OWN - 1) / Sizes::OWN;
  const i64 pair = blockIdx.x / tiles;  // of a sequence and a key head
  const int key0 = int(blockIdx.x % tiles) * Sizes::OWN, warp_key = 16 * warp();
  const Inputs inputs = INPUT_NAMES;
  const bool plain = PLAIN && !key_bias && !bias;
  const Range &some = source.some[warp()], &all = source.all[warp()];
  Product<1, DIM / 8> of_key;
  Product<1, VALUE_DIM / 8> of_value;
  of_key.clear();
  of_value.clear();
  float biases[2] = {};
  for (int g = 0; g < shape.group; g++) {
    const i64 at = pair * shape.group + g;
    __syncthreads();  // the head before is no longer read
    if (threadIdx.x == 0) {
      source.shape = shape;
      source.head = head_at(inputs, source.shape, pair / shape.heads, pair % shape.heads, g);
      const Range rows = head.rows_of(key0, key0 + Sizes::OWN);
      source.tiles = {rows.first / Sizes::BY, (rows.last + Sizes::BY - 1) / Sizes::BY};
    }
    __syncthreads();
    if (lane() == 0) {
      source.some[warp()] = head.rows_of(key0 + warp_key, key0 + warp_key + 16);
      source.all[warp()] = that_see_all(head, key0 + warp_key, key0 + warp_key + 16);
    }
    if (int(threadIdx.x) < Sizes::OWN)
      buffers.near()[threadIdx.x] =
          head.rows_of(key0 + int(threadIdx.x), key0 + int(threadIdx.x) + 1);
    if (g == 0) {
      buffers.own_wide().template load<Sizes::OWN>(head.k, key0);
      buffers.own_beside().template load<Sizes::OWN>(head.v, key0);
    }
    const RowsOf<element> d_rows = cotangent_rows(d_out, shape, at);
    buffers.fetch(head.q, d_rows, source.tiles.first);
    for (int t = source.tiles.first; t < source.tiles.last; t++) {
      const int row0 = t * Sizes::BY;
      ptx::cp_async_wait<0>();
      __syncthreads();  // the tile is there for all warps, and the one before is no longer read
      buffers.fetch(head.q, d_rows, t + 1);
      if (row0 >= some.last || row0 + Sizes::BY <= some.first) continue;
      Product<1, Sizes::BY / 8> s, d;
      s.of(buffers.own_wide().from(warp_key), buffers.wide(t));
      d.of(buffers.own_beside().from(warp_key), buffers.beside(t));
      if (head.key_mask || head.mask || row0 < all.first || row0 + Sizes::BY > all.last)
        hide<true>(s, head, buffers.near() + warp_key, key0 + warp_key, row0);
#pragma unroll
      for (int n = 0; n < Sizes::BY / 8; n++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
          const int row = row0 + s.column(n, c);
          const bool there = row < shape.rows;
          const float row_level = there ? level[at * shape.rows + row] : MINUS_INFINITY;
          const float row_delta = there ? delta[at * shape.rows + row] : 0;
#pragma unroll
          for (int e = c; e < 4; e += 2) {
            const Pulled w = pulled(head, plain, s.x[0][n][e], d.x[0][n][e], row,
                                    key0 + warp_key + s.row(0, e), row_level, row_delta);
            s.x[0][n][e] = w.weight;
            d.x[0][n][e] = w.inner;
            biases[e / 2] += w.log;
          }
        }
      of_value.add(s, buffers.beside(t));
      of_key.add(d, buffers.wide(t));
    }
  }
  ptx::cp_async_wait<0>();
  if (PLAIN) of_key.scale(float(shape.scale));
  of_key.write(dk + pair * shape.keys * DIM, key0 + warp_key, shape.keys);
  of_value.write(dv + pair * shape.keys * VALUE_DIM, key0 + warp_key, shape.keys);
  if (!d_key_bias) return;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int key = key0 + warp_key + of_key.row(0, 2 * i);
    const float sum = sum_in_row(biases[i]);
    if (lane() % 4 == 0 && key < shape.keys) d_key_bias[pair * shape.keys + key] = sum;
  }
}

// The contraction by scores on tensor cores: an online softmax over tiles of keys, base 2.
//
// A block has ROWS rows of one query head, a warp its share of them. Keys and values come in
// STAGES tiles of KEYS, so that the next ones are on their way while a tile is multiplied. Rows of
// a query head lie without gaps in out and level; where query heads are, their `Group` says.

// What a fold of statistics makes of queries as they are read, see `QueryFold` of
// pdcore_backends/cupy/query_fold.py; (batch, heads, columns) each, without gaps.
struct QueryFold {
  const float *centre, *factor, *gap;

  DEVICE_MEMBER float apply(float x, int column) const {
    return factor[column] < 0 ? 0 : (x - centre[column]) * factor[column];
  }
};

// What a block works on, in shared memory, as it would take more registers than there are: a query
// head from row `row0` on, and tiles of keys; what each warp's rows see, some of them and all.
struct Source {
  Shape shape;
  Head head;
  int row0;
  Range tiles;
  Range some[WARPS], all[WARPS];
  float constants[MMA_THREADS];  // of each row
  QueryFold fold;
  out_type* out;
  float* level;
};
static_assert(sizeof(Source) <= 1280, "`Source` has 1280 bytes");

template <int DIM, int VALUE_DIM>
struct Forward {
  static constexpr int WARP_TILES = 2;  // of 16 rows: the more, the fewer reads of a key
  static constexpr int ROWS = 16 * WARP_TILES * WARPS;
  // As many as there are registers for: an expression takes some.
  static constexpr int KEYS = VALUE_DIM <= 64 ? 64 : PLAIN || VALUE_DIM < 128 ? 32 : 16;
  static constexpr int STAGES = 2;
  // Shared memory, in bytes: the queries, stages of keys and values, what each row sees, and
  // `Source`.
  static constexpr int Q = ROWS * DIM * 2, K = KEYS * DIM * 2, V = KEYS * VALUE_DIM * 2;
  static constexpr int NEAR = Q + STAGES * (K + V), SOURCE = NEAR + ROWS * int(sizeof(Range));
  static constexpr int BYTES = SOURCE + 1280;
  static_assert(ROWS == MMA_THREADS, "a thread prepares a row");
};

// Rows of queries, folded, in place of `Tile::load`.
template <int HEIGHT, int WIDTH>
DEVICE void load_folded(const Tile<WIDTH>& to, const RowsOf<element>& x, int row,
                        const QueryFold& fold) {
#pragma unroll 1
  for (int i = int(threadIdx.x); i < HEIGHT * Tile<WIDTH>::CHUNKS; i += MMA_THREADS) {
    const int r = i / Tile<WIDTH>::CHUNKS, c = i % Tile<WIDTH>::CHUNKS * CHUNK;
    Vector<CHUNK / 2, unsigned> folded = {};
    if (row + r < x.count) {
      const Vector<CHUNK, element> found = read<CHUNK>(x.first + (row + r) * x.pitch + c);
#pragma unroll
      for (int e = 0; e < CHUNK; e += 2)
        folded.x[e / 2] =
            ptx::pack<element>(fold.apply(ptx::to_float(found.x[e]), c + e),
                               fold.apply(ptx::to_float(found.x[e + 1]), c + e + 1));
    }
    *reinterpret_cast<Vector<CHUNK / 2, unsigned>*>(to.first + to.place(r, c)) = folded;
  }
}

// What a folded row adds to its level, from the row as it is multiplied: what its rounding did to
// every logit, by the keys' mean, is then in both and cancels.
template <int WIDTH>
DEVICE float row_constant(const Tile<WIDTH>& folded, const RowsOf<element>& x, int row, int r,
                          const QueryFold& fold) {
  float sum = 0;
#pragma unroll 1
  for (int c = 0; c < WIDTH; c += CHUNK) {
    const Vector<CHUNK, element> found = read<CHUNK>(folded.first + folded.place(r, c));
#pragma unroll
    for (int e = 0; e < CHUNK; e++) {
      float y = ptx::to_float(found.x[e]);
      if (fold.factor[c + e] < 0)  // all keys are equal there: it is not multiplied
        y = (ptx::to_float(x.first[(row + r) * x.pitch + c + e]) - fold.centre[c + e]) *
            -fold.factor[c + e];
      sum += y * fold.gap[c + e];
    }
  }
  return sum;
}

// What all rows first .. last - 1 see by position, those that there are not aside.
DEVICE Range seen_by_all(const Head& head, int first, int last) {
  last = int(smaller(last, head.shape->rows));
  if (first >= last) return {0, head.shape->keys};
  // Both ends grow with the row.
  return {head.keys_of(last - 1, last).first, head.keys_of(first, first + 1).last};
}

// Turn inner products into logits in base 2, with their biases.
template <int M, int N>
DEVICE void to_logits(Product<M, N>& s, const Head& head, int row0, int key0) {
#pragma unroll
  for (int n = 0; n < N; n++)
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int row = row0 + s.row(m, e), key = key0 + s.column(n, e);
        if (row < head.shape->rows && key < head.shape->keys)
          s.x[m][n][e] = LOG2E * head.log_weight(s.x[m][n][e], row, key);
      }
}

// Put -inf where a row does not see a key; `near` holds what the rows see by position, or with
// OF_KEYS, where keys are the rows of the product, what sees the keys.
template <bool OF_KEYS = false, int M, int N>
DEVICE void hide(Product<M, N>& s, const Head& head, const Range* near, int down, int across) {
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const Range seen = near[s.row(m, i)];
      const int own = down + s.row(m, i);
      unsigned allowed = ~0u;  // a bit for each entry, so that masks are read in a short loop
      if (head.key_mask || head.mask) {
#pragma unroll 1
        for (int j = 0; j < 2 * N; j++) {
          const int other = across + s.column(j / 2, j % 2);
          if (seen.has(other) && !head.unmasked(OF_KEYS ? other : own, OF_KEYS ? own : other))
            allowed ^= 1u << j;
        }
      }
#pragma unroll
      for (int j = 0; j < 2 * N; j++)
        if (!seen.has(across + s.column(j / 2, j % 2)) || !(allowed >> j & 1))
          s.x[m][j / 2][i + j % 2] = MINUS_INFINITY;
    }
}

template <int DIM, int VALUE_DIM>
__global__ void __launch_bounds__(MMA_THREADS, 1)
    scores_mma(const __grid_constant__ Groups groups) {
  typedef Forward<DIM, VALUE_DIM> Sizes;
  constexpr int M = Sizes::WARP_TILES, N = Sizes::KEYS / 8, STAGES = Sizes::STAGES;
  extern __shared__ __align__(16) char memory[];
  const Tile<DIM> queries = {reinterpret_cast<element*>(memory)};
  element* const stages = queries.first + Sizes::ROWS * DIM;
  const auto key_tile = [&](int t) {
    return Tile<DIM>{stages + t % STAGES * (Sizes::KEYS * DIM)};
  };
  const auto value_tile = [&](int t) {
    return Tile<VALUE_DIM>{stages + STAGES * Sizes::KEYS * DIM +
                           t % STAGES * (Sizes::KEYS * VALUE_DIM)};
  };
  Range* const near = reinterpret_cast<Range*>(memory + Sizes::NEAR);
  Source& source = *reinterpret_cast<Source*>(memory + Sizes::SOURCE);
  const Head& head = source.head;

  const int warp_row = 16 * M * warp();
  if (threadIdx.x == 0) {
    // Blocks of a head follow one another, since its keys stay in the cache, from the last rows on,
    // which see most under causal. The group of most keys comes first.
    const Group& group = groups.x[groups.of_block(blockIdx.x)];
    const Shape& shape = source.shape = group.shape;
    const int tiles = (shape.rows + Sizes::ROWS - 1) / Sizes::ROWS;
    const int block = int(blockIdx.x - group.first), at = block / tiles;
    const int row0 = source.row0 = (tiles - 1 - block % tiles) * Sizes::ROWS;
    const int g = at % shape.group, h = at / shape.group % shape.heads;
    const int b = at / shape.group / shape.heads;
    source.head = head_at(group.inputs, source.shape, b, h, g);
    const i64 place = b * group.place[0] + h * group.place[1] + g;
    source.out = group.out + place * shape.rows * VALUE_DIM;
    source.level = group.level + place * shape.rows;
    const i64 first = i64(at / shape.group) * DIM;
    source.fold = group.centre ? QueryFold{group.centre + first, group.factor + first,
                                           group.gap + first}
                               : QueryFold{};
    const Range keys = head.keys_of(row0, row0 + Sizes::ROWS);
    source.tiles = {keys.first / Sizes::KEYS, (keys.last + Sizes::KEYS - 1) / Sizes::KEYS};
  }
  __syncthreads();
  const int row0 = source.row0;
  const Range &some = source.some[warp()], &all = source.all[warp()];
  if (lane() == 0) {
    source.some[warp()] = head.keys_of(row0 + warp_row, row0 + warp_row + 16 * M);
    source.all[warp()] = seen_by_all(head, row0 + warp_row, row0 + warp_row + 16 * M);
  }
  near[threadIdx.x] = head.keys_of(row0 + int(threadIdx.x), row0 + int(threadIdx.x) + 1);

  const auto fetch = [&](int t) {
    if (t < source.tiles.last) {
      key_tile(t).template load<Sizes::KEYS>(head.k, t * Sizes::KEYS);
      value_tile(t).template load<Sizes::KEYS>(head.v, t * Sizes::KEYS);
    }
    ptx::cp_async_commit();  // a group for every tile, of nothing past the last
  };
  if (!source.fold.centre) queries.template load<Sizes::ROWS>(head.q, row0);
#pragma unroll
  for (int t = 0; t < STAGES - 1; t++) fetch(source.tiles.first + t);
  source.constants[threadIdx.x] = 0;
  if (source.fold.centre) {
    const QueryFold fold = source.fold;
    load_folded<Sizes::ROWS>(queries, head.q, row0, fold);
    __syncthreads();
    if (row0 + int(threadIdx.x) < head.shape->rows)
      source.constants[threadIdx.x] =
          row_constant(queries, head.q, row0, int(threadIdx.x), fold);
  }

  // Logits in base 2 are `unit` times what stands in s.
  const bool plain = PLAIN && source.shape.scale > 0 && !head.key_bias && !head.bias;
  const float unit = plain ? float(source.shape.scale) * LOG2E : 1;
  Product<M, VALUE_DIM / 8> sums;
  sums.clear();
  float peak[M][2], total[M][2];
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int i = 0; i < 2; i++) peak[m][i] = MINUS_INFINITY, total[m][i] = 0;

  for (int t = source.tiles.first; t < source.tiles.last; t++) {
    const int key0 = t * Sizes::KEYS;
    ptx::cp_async_wait<STAGES - 2>();
    __syncthreads();  // the tile is there for all warps, and the one before is no longer read
    fetch(t + STAGES - 1);
    if (key0 >= some.last || key0 + Sizes::KEYS <= some.first) continue;
    Product<M, N> s;
    s.of(queries.from(warp_row), key_tile(t));
    if (!plain) to_logits(s, head, source.row0 + warp_row, key0);
    if (head.key_mask || head.mask || key0 < all.first || key0 + Sizes::KEYS > all.last)
      hide(s, head, near + warp_row, source.row0 + warp_row, key0);
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float top = peak[m][i];
#pragma unroll
        for (int n = 0; n < N; n++)
          top = larger(top, larger(s.x[m][n][2 * i], s.x[m][n][2 * i + 1]));
        top = largest_in_row(top);
        const float base = top == MINUS_INFINITY ? 0 : top * unit;  // -inf - -inf is NaN
        const float shrink = ptx::exp2_approximate(peak[m][i] * unit - base);
        peak[m][i] = top;
        float more = 0;
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
          for (int e = 2 * i; e < 2 * i + 2; e++) {
            s.x[m][n][e] = ptx::exp2_approximate(s.x[m][n][e] * unit - base);
            more += s.x[m][n][e];
          }
        total[m][i] = total[m][i] * shrink + more;
        if (__any_sync(WHOLE_WARP, shrink != 1)) {  // seldom, once the largest have been met
#pragma unroll
          for (int n = 0; n < VALUE_DIM / 8; n++) {
            sums.x[m][n][2 * i] *= shrink;
            sums.x[m][n][2 * i + 1] *= shrink;
          }
        }
      }
    sums.add(s, value_tile(t));
  }
  ptx::cp_async_wait<0>();

#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int row = source.row0 + warp_row + sums.row(m, 2 * i);
      const float sum = sum_in_row(total[m][i]), inverse = sum == 0 ? 0 : 1 / sum;
      if (lane() % 4 == 0 && row < source.shape.rows)
        source.level[row] =
            sum == 0 ? MINUS_INFINITY
                     : LN2 * (peak[m][i] * unit) + logarithm(sum) +
                           source.constants[warp_row + sums.row(m, 2 * i)];
#pragma unroll
      for (int n = 0; n < VALUE_DIM / 8; n++) {
        sums.x[m][n][2 * i] *= inverse;
        sums.x[m][n][2 * i + 1] *= inverse;
      }
    }
  sums.write(source.out, source.row0 + warp_row, source.shape.rows);
}

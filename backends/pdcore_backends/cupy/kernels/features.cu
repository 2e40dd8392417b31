// The contraction by features: states of chunks, their sums one after the other, and rows, which
// take the state before them and what is left of their keys directly. Sums are never subtracted,
// and every entry has one thread, which adds in a fixed order.

// Sum phi(k_j) [v_j, 1]^T over a chunk of keys, which goes to entry c of its head; or
// phi(q_i) / h_i [d_out_i, -delta_i]^T over a chunk of rows of all query heads of a key head. Rows
// are added up from the last one on, so their chunk goes to entry count - 1 - c.
template <bool OF_ROWS>
__global__ void __launch_bounds__(THREADS, 2)
    features_states(INPUTS, COTANGENTS, const scalar* __restrict__ tops,
                    scalar* __restrict__ states, Shape shape, Chunks cut) {
  static_assert(EACH == WIDE, "a thread's entries of a row are one vector");
  __shared__ __align__(16) scalar left[DEPTH * SIZE];
  __shared__ __align__(16) scalar right[DEPTH * SIZE];
  __shared__ scalar factors[DEPTH];
  const int count = OF_ROWS ? cut.row_count : cut.key_count;
  const int size = OF_ROWS ? cut.row_size : cut.key_size;
  const int value_tiles = shape.value_dim ? tiles_of(shape.value_dim) : 1;
  const int tiles = tiles_of(shape.dim) * value_tiles, tile = int(blockIdx.x % tiles);
  const int f0 = tile / value_tiles * SIZE, e0 = tile % value_tiles * SIZE;
  const int chunk = int(blockIdx.x / tiles % count);
  const i64 pair = blockIdx.x / tiles / count;  // of a sequence and a key head
  const int last =
      int(smaller((chunk + i64(1)) * size, OF_ROWS ? shape.rows : shape.keys));
  const scalar* top = top_at(tops, pair, OF_ROWS ? cut.key_count : chunk + 1, shape, cut);
  const Inputs inputs = INPUT_NAMES;
  Vector<EACH> s[EACH] = {};
  scalar z[EACH] = {};
  for (int g = 0; g < (OF_ROWS ? shape.group : 1); g++) {
    const Head head = head_at(inputs, shape, pair / shape.heads, pair % shape.heads, g);
    const i64 at = pair * shape.group + g;
    for (int j0 = chunk * size; j0 < last; j0 += DEPTH) {
      const int own = j0 + int(threadIdx.x);
      scalar factor = own < last;
      __syncthreads();
      if constexpr (OF_ROWS) {
        const OfRows map = {top, level + at * shape.rows};
        stage<DEPTH, SIZE, SIZE>(left, mapped(head.q, map), j0, f0);
        stage<DEPTH, SIZE, SIZE>(right, cotangent_rows(d_out, shape, at), j0, e0);
        if (int(threadIdx.x) < DEPTH && own < last) factor = -delta[at * shape.rows + own];
      } else {
        const OfKeys map = {head.key_mask, top};
        stage<DEPTH, SIZE, SIZE>(left, mapped(head.k, map), j0, f0);
        stage<DEPTH, SIZE, SIZE>(right, head.v, j0, e0);
      }
      if (int(threadIdx.x) < DEPTH) factors[threadIdx.x] = factor;
      __syncthreads();
#pragma unroll 4
      for (int r = 0; r < DEPTH; r++) {
        const Vector<EACH> x = read<EACH>(left + r * SIZE + down() * EACH);
        const Vector<EACH> y = read<EACH>(right + r * SIZE + across() * EACH);
#pragma unroll
        for (int i = 0; i < EACH; i++) {
#pragma unroll
          for (int e = 0; e < EACH; e++) s[i].x[e] += x.x[i] * y.x[e];
          z[i] += x.x[i] * factors[r];
        }
      }
    }
  }
  const int entry = OF_ROWS ? count - 1 - chunk : chunk;
  scalar* to = states + (pair * (count + 1) + entry) * state_pitch(shape);
  const int columns = shape.value_dim, e = e0 + across() * EACH;
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int f = f0 + down() * EACH + i;
    if (f >= shape.dim) break;
    if (columns % EACH == 0) {  // and so all of the entries are there, or none
      if (e < columns) *reinterpret_cast<Vector<EACH>*>(to + i64(f) * columns + e) = s[i];
    } else {
#pragma unroll
      for (int c = 0; c < EACH; c++)
        if (e + c < columns) to[i64(f) * columns + e + c] = s[i].x[c];
    }
    if (e0 == 0 && across() == 0) to[i64(shape.dim) * columns + f] = z[i];
  }
}

enum Kind { SUMS, RELATIVE_SUMS, MAXIMA };

// Put into entry c of x, (batch heads, count + 1, pitch), the sum or maximum of the entries before
// it, for the first `width` numbers. RELATIVE_SUMS are of features relative to `tops`.
template <int KIND>
__global__ void __launch_bounds__(THREADS, 2)
    features_scan(scalar* __restrict__ x, const scalar* __restrict__ tops, i64 width, i64 pitch,
                  int count, int dim, int value_dim) {
  constexpr int AHEAD = 8;  // entries that are on their way at once
  const i64 tiles = (width + THREADS - 1) / THREADS;
  const i64 i = blockIdx.x % tiles * THREADS + threadIdx.x, pair = blockIdx.x / tiles;
  if (i >= width) return;
  x += pair * (count + 1) * pitch + i;
  const i64 last = i64(dim) * value_dim;  // behind it, sums of the features themselves
  if (KIND == RELATIVE_SUMS)
    tops += pair * (count + 1) * dim + (i < last ? i / value_dim : i - last);
  scalar before = KIND == MAXIMA ? MINUS_INFINITY : scalar(0);
  for (int c = 0; c < count; c += AHEAD) {
    scalar next[AHEAD], shrink[AHEAD];
#pragma unroll
    for (int a = 0; a < AHEAD; a++) {
      if (c + a >= count) break;
      next[a] = x[(c + a) * pitch];
      if (KIND == RELATIVE_SUMS) {
        const scalar top = tops[i64(c + a) * dim];
        shrink[a] = relative(top, top, tops[i64(c + a + 1) * dim]);
      }
    }
#pragma unroll
    for (int a = 0; a < AHEAD; a++) {
      if (c + a >= count) break;
      x[(c + a) * pitch] = before;
      before = KIND == MAXIMA          ? larger(before, next[a])
               : KIND == RELATIVE_SUMS ? before * shrink[a] + next[a]
                                       : before + next[a];
    }
  }
  x[count * pitch] = before;
}

// out, (batch, heads, group, rows, value_dim), and level, (batch, heads, group, rows), without gaps:
// SIZE rows of a query head and COLUMNS columns of the values.
template <int COLUMNS>
__global__ void __launch_bounds__(THREADS, 1)
    features_forward(INPUTS, const scalar* __restrict__ states, const scalar* __restrict__ tops,
                     out_type* __restrict__ out, scalar* __restrict__ level, Shape shape,
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
  const Window window = keys_for(head, row0, cut);
  const scalar* top = top_at(tops, pair, highest_entry(window, cut), shape, cut);
  const scalar* shifts = nullptr;
#if LOG_FEATURES
  __shared__ scalar row_shifts[SIZE];
  row_maxima(head.q, row0, top, row_shifts);
  shifts = row_shifts;
#endif
  Sums<COLUMNS> sums;
  sums.clear();
  scalar total[EACH] = {};
  if (window.entry) {
    const OfQueries before = {top_at(tops, pair, window.entry, shape, cut), shifts, row0};
    const State state = state_at(states, pair, cut.key_count, window.entry, shape);
    add_state(sums, total, mapped(head.q, before), row0, state, column0, weights, staged);
  }
  const auto queries = mapped(head.q, OfQueries{top, shifts, row0});
  const auto keys = mapped(head.k, OfKeys{head.key_mask, top});
  int seen[EACH];
#pragma unroll
  for (int i = 0; i < EACH; i++)
    seen[i] = head.keys_of(row0 + down() + SIDE * i, row0 + down() + SIDE * i + 1).last;
  for (int key0 = window.first; key0 < window.last; key0 += SIZE) {
    scalar s[EACH][EACH];
    products(s, queries, row0, keys, key0, staged);
#pragma unroll
    for (int i = 0; i < EACH; i++)
#pragma unroll
      for (int j = 0; j < EACH; j++) {
        if (key0 + across() + SIDE * j >= seen[i]) s[i][j] = 0;
        total[i] += s[i][j];
      }
    keep(weights, s);
    sums.add(weights, head.v, key0, column0, staged);
  }
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int row = row0 + down() + SIDE * i;
    const scalar h = sum_across(total[i]);
    scalar own = h == 0 ? MINUS_INFINITY : logarithm(h);
#if LOG_FEATURES
    own += row_shifts[down() + SIDE * i];
#endif
    if (blockIdx.y == 0 && across() == 0 && row < shape.rows)
      level[at * shape.rows + row] = shape.has_sign ? scalar(0) : own;
    if (shape.has_sign) continue;
#pragma unroll
    for (int c = 0; c < Sums<COLUMNS>::OWN; c++)
      sums.x[i][c] = h == 0 ? scalar(0) : sums.x[i][c] / h;
  }
  sums.write(out + at * shape.rows * shape.value_dim, row0, shape.rows, column0, shape.value_dim);
}

// Moments of every prefix of the keys, in three passes: states of chunks of one tile, their scan
// (`chunks_scanned`), and the prefixes, each from what came before it alone. The cotangent goes the
// other way, by sums over the last rows. Everything is relative to one of the head's own keys, or
// means, since merges of single keys lose digits in proportion to |mean| / deviation.

// n, mean and var (batch, heads, rows + 1, columns), the first of no keys.
template <int COLUMNS>
__global__ void __launch_bounds__(THREADS)
    prefixes(KEYS, scalar* __restrict__ n, scalar* __restrict__ mean, scalar* __restrict__ m2,
             scalar* __restrict__ all_n, scalar* __restrict__ all_mean,
             scalar* __restrict__ all_var, Layout s) {
  typedef Place<COLUMNS> P;
  const Exchange exchange = shared_exchange();
  const Keys head = KEYS_OF_BLOCK;
  const i64 first = (i64(blockIdx.x) / s.chunks) * (s.rows + i64(1));
  const Results<scalar> means = results<COLUMNS>(all_mean + first * s.columns, s.columns);
  const Results<scalar> vars = results<COLUMNS>(all_var + first * s.columns, s.columns);
  const i64 row = CHUNK * P::TILE + P::lane() * RUN;
  const Run run = head.run(row);
  State own = states<COLUMNS>(n, mean, m2, gridDim.x, s.columns).read(blockIdx.x), all;
  Moments::merge(own, scan<COLUMNS, Moments>(run.moments(), all, exchange));
#pragma unroll
  for (int i = -1; i < RUN; i++) {
    if (i < 0 ? row > 0 : row + i >= s.rows) continue;
    if (i >= 0 && run.has(i)) Moments::merge(own, {1, run.x[i], zeros()});
    State found = own;
#pragma unroll
    for (int e = 0; e < WIDE; e++) {
      found.a.x[e] += head.origin.x[e];
      found.b.x[e] = own.n > 0 ? own.b.x[e] / own.n : scalar(0);
    }
    if (P::column() == 0) all_n[first + row + i + 1] = own.n;
    means.write(row + i + 1, found.a);
    vars.write(row + i + 1, found.b);
  }
}

// States of rows (batch, heads, rows, columns), n (batch, heads, rows), and cotangents.
#define ROWS                                                                       \
  const scalar *__restrict__ n, const scalar *__restrict__ mean,                   \
      const scalar *__restrict__ d_mean, const scalar *__restrict__ d_var,         \
      const i64 *__restrict__ origins
#define ROWS_OF_BLOCK rows_of<COLUMNS>(n, mean, d_mean, d_var, origins, s, blockIdx.x / s.chunks)

// What the rows of a head add to the cotangent of a key k that they count: level + slope (k - origin).
struct CountingRows {
  const scalar* n;
  Results<const scalar> mean, d_mean, d_var;
  int rows;
  Columns origin;

  // The row that `i` rows come after.
  DEVICE_MEMBER State from_last(i64 i) const {
    State found = nothing();
    const i64 row = rows - 1 - i;
    if (row < 0 || !(n[row] > 0)) return found;
    const Columns centre = mean.read(row), level = d_mean.read(row), slope = d_var.read(row);
#pragma unroll
    for (int e = 0; e < WIDE; e++) {
      found.b.x[e] = 2 * slope.x[e] / n[row];
      found.a.x[e] = level.x[e] / n[row] - found.b.x[e] * (centre.x[e] - origin.x[e]);
    }
    return found;
  }
};

template <int COLUMNS>
DEVICE Columns origin_of(const scalar* mean, const i64* origins, const Layout& s, i64 head) {
  if (!s.rows) return zeros();
  return results<COLUMNS>(mean, s.columns).read(head * s.rows + origins[head / s.heads]);
}

template <int COLUMNS>
DEVICE CountingRows rows_of(const scalar* n, const scalar* mean, const scalar* d_mean,
                            const scalar* d_var, const i64* origins, const Layout& s, i64 head) {
  const i64 first = head * s.rows;
  return {n + first,
          results<COLUMNS>(mean + first * s.columns, s.columns),
          results<COLUMNS>(d_mean + first * s.columns, s.columns),
          results<COLUMNS>(d_var + first * s.columns, s.columns),
          s.rows,
          origin_of<COLUMNS>(mean, origins, s, head)};
}

// Sums over chunks of the rows, the last rows first.
template <int COLUMNS>
__global__ void __launch_bounds__(THREADS)
    levels_of_chunks(ROWS, scalar* __restrict__ count, scalar* __restrict__ level,
                     scalar* __restrict__ slope, Layout s) {
  typedef Place<COLUMNS> P;
  const Exchange exchange = shared_exchange();
  const CountingRows head = ROWS_OF_BLOCK;
  State own = nothing();
#pragma unroll
  for (int i = 0; i < RUN; i++)
    Totals::merge(own, head.from_last(CHUNK * P::TILE + P::lane() * RUN + i));
  reduce<COLUMNS, Totals>(own, exchange);
  if (P::lane() == 0)
    states<COLUMNS>(count, level, slope, gridDim.x, s.columns).write(blockIdx.x, own);
}

// Sums over the last rows, (batch, heads, rows + 1, columns), the first of none.
template <int COLUMNS>
__global__ void __launch_bounds__(THREADS)
    suffixes(ROWS, scalar* __restrict__ count, scalar* __restrict__ level,
             scalar* __restrict__ slope, scalar* __restrict__ levels, scalar* __restrict__ slopes,
             Layout s) {
  typedef Place<COLUMNS> P;
  const Exchange exchange = shared_exchange();
  const CountingRows head = ROWS_OF_BLOCK;
  const i64 first = (i64(blockIdx.x) / s.chunks) * (s.rows + i64(1));
  const Results<scalar> to_level = results<COLUMNS>(levels + first * s.columns, s.columns);
  const Results<scalar> to_slope = results<COLUMNS>(slopes + first * s.columns, s.columns);
  const i64 begin = CHUNK * P::TILE + P::lane() * RUN;
  State each[RUN], sum = nothing(), all;
#pragma unroll
  for (int i = 0; i < RUN; i++) {
    each[i] = head.from_last(begin + i);
    Totals::merge(sum, each[i]);
  }
  State own = states<COLUMNS>(count, level, slope, gridDim.x, s.columns).read(blockIdx.x);
  Totals::merge(own, scan<COLUMNS, Totals>(sum, all, exchange));
#pragma unroll
  for (int i = -1; i < RUN; i++) {
    if (i < 0 ? begin > 0 : begin + i >= s.rows) continue;
    if (i >= 0) Totals::merge(own, each[i < 0 ? 0 : i]);
    to_level.write(begin + i + 1, own.a);
    to_slope.write(begin + i + 1, own.b);
  }
}

// The keys' cotangent: key j is counted by the last later[j] rows. `levels`, `slopes`, `mean` and
// `origins` are of `rows` rows, which `from` has; the keys' own are in `s`.
template <int COLUMNS>
__global__ void __launch_bounds__(THREADS)
    prefixes_vjp(const stored* __restrict__ keys, const bool* __restrict__ mask,
                 const scalar* __restrict__ mean, const i64* __restrict__ origins,
                 const scalar* __restrict__ levels, const scalar* __restrict__ slopes,
                 const i64* __restrict__ later, i64 by_sequence, scalar* __restrict__ d_keys,
                 Layout from, Layout s) {
  typedef Place<COLUMNS> P;
  const i64 at = i64(blockIdx.x) / s.chunks;
  Keys head = keys_of<COLUMNS>(keys, mask, nullptr, s, at);
  head.origin = origin_of<COLUMNS>(mean, origins, from, at);
  const i64 first = at * (from.rows + i64(1)) * s.columns;
  const Results<const scalar> level = results<COLUMNS>(levels + first, s.columns);
  const Results<const scalar> slope = results<COLUMNS>(slopes + first, s.columns);
  const Results<scalar> found = results<COLUMNS>(d_keys + at * s.rows * s.columns, s.columns);
  later += at / s.heads * by_sequence;
  const i64 row = CHUNK * P::TILE + P::lane() * RUN;
  Run run = head.run(row);
#pragma unroll
  for (int i = 0; i < RUN; i++) {
    if (row + i >= s.rows) continue;
    if (run.has(i)) {
      const Columns a = level.read(later[row + i]), b = slope.read(later[row + i]);
#pragma unroll
      for (int e = 0; e < WIDE; e++) run.x[i].x[e] = a.x[e] + b.x[e] * run.x[i].x[e];
    }
    found.write(row + i, run.x[i]);
  }
}

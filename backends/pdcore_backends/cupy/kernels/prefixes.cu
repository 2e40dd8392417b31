// Moments of every prefix of the keys, in three passes: states of chunks of one tile, their scan
// (`chunks_scanned`), and the prefixes, each from what came before it alone. The cotangent goes the
// other way, by sums over the last rows.

// n, mean and var (batch, heads, rows + 1, columns), the first of no keys.
template <class T>
__global__ void __launch_bounds__(THREADS, 2)
    prefixes(KEYS, scalar* __restrict__ n, scalar* __restrict__ sums, scalar* __restrict__ all_n,
             scalar* __restrict__ all_mean, scalar* __restrict__ all_var, Layout s) {
  const Place p = {s.bits};
  const Exchange exchange = shared_exchange();
  const Keys<T> head = KEYS_OF_BLOCK;
  const i64 first = (i64(blockIdx.x) / s.chunks) * (s.rows + i64(1));
  const Results<scalar> means = results(p, all_mean + first * s.columns, s.columns);
  const Results<scalar> vars = results(p, all_var + first * s.columns, s.columns);
  const i64 row = CHUNK * p.tile() + p.lane() * RUN;
  const Run run = head.run(row);
  State own = states(p, n, sums, gridDim.x, s.columns).read(blockIdx.x), all;
  Moments::merge(own, scan<Moments>(p, run.moments(), all, exchange));
#pragma unroll
  for (int i = -1; i < RUN; i++) {
    if (i < 0 ? row > 0 : row + i >= s.rows) continue;
    if (i >= 0 && run.has(i)) Moments::merge(own, {1, run.x[i], zeros(), zeros()});
    Columns var;
#pragma unroll
    for (int e = 0; e < WIDE; e++) var.x[e] = variance(own.b.x[e], own.n);
    if (p.column() == 0) all_n[first + row + i + 1] = own.n;
    means.write(row + i + 1, own.a);
    vars.write(row + i + 1, var);
  }
}

// States of rows (batch, heads, rows, columns), n (batch, heads, rows), and cotangents.
#define ROWS                                                                       \
  const scalar *__restrict__ n, const scalar *__restrict__ mean,                   \
      const scalar *__restrict__ d_mean, const scalar *__restrict__ d_var,         \
      const i64 *__restrict__ origins
#define ROWS_OF_BLOCK rows_of(p, n, mean, d_mean, d_var, origins, s, blockIdx.x / s.chunks)

// What the rows of a head add to the cotangent of a key k that they count, level + slope
// (k - origin). The origin is a mean of theirs, never far in units of the deviation.
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

DEVICE Columns origin_of(Place p, const scalar* mean, const i64* origins, const Layout& s, i64 head) {
  if (!s.rows) return zeros();
  return results(p, mean, s.columns).read(head * s.rows + origins[head / s.heads]);
}

DEVICE CountingRows rows_of(Place p, const scalar* n, const scalar* mean, const scalar* d_mean,
                            const scalar* d_var, const i64* origins, const Layout& s, i64 head) {
  const i64 first = head * s.rows;
  return {n + first,
          results(p, mean + first * s.columns, s.columns),
          results(p, d_mean + first * s.columns, s.columns),
          results(p, d_var + first * s.columns, s.columns),
          s.rows,
          origin_of(p, mean, origins, s, head)};
}

// Sums over chunks of the rows, the last rows first.
template <class Merged>
__global__ void __launch_bounds__(THREADS, 2)
    levels_of_chunks(ROWS, scalar* __restrict__ count, scalar* __restrict__ sums, Layout s) {
  const Place p = {s.bits};
  const Exchange exchange = shared_exchange();
  const CountingRows head = ROWS_OF_BLOCK;
  State own = nothing();
#pragma unroll
  for (int i = 0; i < RUN; i++)
    Merged::merge(own, head.from_last(CHUNK * p.tile() + p.lane() * RUN + i));
  reduce<Merged>(p, own, exchange);
  if (p.lane() == 0)
    states(p, count, sums, gridDim.x, s.columns).write(blockIdx.x, own);
}

// Sums over the last rows, (batch, heads, rows + 1, columns), the first of none.
template <class Merged>
__global__ void __launch_bounds__(THREADS, 2)
    suffixes(ROWS, scalar* __restrict__ count, scalar* __restrict__ sums,
             scalar* __restrict__ levels, scalar* __restrict__ slopes, Layout s) {
  const Place p = {s.bits};
  const Exchange exchange = shared_exchange();
  const CountingRows head = ROWS_OF_BLOCK;
  const i64 first = (i64(blockIdx.x) / s.chunks) * (s.rows + i64(1));
  const Results<scalar> to_level = results(p, levels + first * s.columns, s.columns);
  const Results<scalar> to_slope = results(p, slopes + first * s.columns, s.columns);
  const i64 begin = CHUNK * p.tile() + p.lane() * RUN;
  State each[RUN], sum = nothing(), all;
#pragma unroll
  for (int i = 0; i < RUN; i++) {
    each[i] = head.from_last(begin + i);
    Merged::merge(sum, each[i]);
  }
  State own = states(p, count, sums, gridDim.x, s.columns).read(blockIdx.x);
  Merged::merge(own, scan<Merged>(p, sum, all, exchange));
#pragma unroll
  for (int i = -1; i < RUN; i++) {
    if (i < 0 ? begin > 0 : begin + i >= s.rows) continue;
    if (i >= 0) Merged::merge(own, each[i < 0 ? 0 : i]);
    to_level.write(begin + i + 1, own.a);
    to_slope.write(begin + i + 1, own.b);
  }
}

// The keys' cotangent: key j is counted by the last later[j] rows. `levels`, `slopes`, `mean` and
// `origins` are of `rows` rows, which `from` has; the keys' own are in `s`.
template <class T>
__global__ void __launch_bounds__(THREADS, 2)
    prefixes_vjp(const T* __restrict__ keys, const bool* __restrict__ mask,
                 const scalar* __restrict__ mean, const i64* __restrict__ origins,
                 const scalar* __restrict__ levels, const scalar* __restrict__ slopes,
                 const i64* __restrict__ later, i64 by_sequence, scalar* __restrict__ d_keys,
                 Layout from, Layout s) {
  const Place p = {s.bits};
  const i64 at = i64(blockIdx.x) / s.chunks;
  const Keys<T> head = keys_of(p, keys, mask, s, at);
  const Columns origin = origin_of(p, mean, origins, from, at);
  const i64 first = at * (from.rows + i64(1)) * s.columns;
  const Results<const scalar> level = results(p, levels + first, s.columns);
  const Results<const scalar> slope = results(p, slopes + first, s.columns);
  const Results<scalar> found = results(p, d_keys + at * s.rows * s.columns, s.columns);
  later += at / s.heads * by_sequence;
  const i64 row = CHUNK * p.tile() + p.lane() * RUN;
  Run run = head.run(row);
#pragma unroll
  for (int i = 0; i < RUN; i++) {
    if (row + i >= s.rows) continue;
    if (run.has(i)) {
      const Columns a = level.read(later[row + i]), b = slope.read(later[row + i]);
#pragma unroll
      for (int e = 0; e < WIDE; e++) run.x[i].x[e] = a.x[e] + b.x[e] * (run.x[i].x[e] - origin.x[e]);
    }
    found.write(row + i, run.x[i]);
  }
}

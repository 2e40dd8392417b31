// Rows pooled over windows (batch, heads, rows, columns), by weights (batch, windows, scale) that are
// equal over the real keys of a window and 0 elsewhere.

// As pdcore_backends/cupy/pooling.py packs it. Strides count entries.
struct Windows {
  i64 rows[3];  // by sequence, head, row
  i64 weights;  // by sequence
  int heads, count, columns;  // `count` rows
  int windows, scale;
  int blocks, team;  // blocks of a head, and how many lanes share a window, a power of 2
  int bits;          // of `Place`
};

// A lane adds every team-th row of its window.
template <class T>
__global__ void __launch_bounds__(THREADS, 2)
    pooled(const T* __restrict__ x, const scalar* __restrict__ weights,
           scalar* __restrict__ found, Windows s) {
  const Place p = {s.bits};
  const Exchange exchange = shared_exchange();
  const i64 head = i64(blockIdx.x) / s.blocks;
  const i64 window =
      i64(blockIdx.x) % s.blocks * (p.lanes() / s.team) + p.lane() / s.team;
  const int member = p.lane() % s.team, column = p.column();
  x += head / s.heads * s.rows[0] + head % s.heads * s.rows[1] + column;
  const bool packs = in_packs(x, s.rows[2]);
  State own = nothing();  // n is the weight
  if (window < s.windows) {
    const i64 first = window * s.scale;
    const scalar* weight = weights + head / s.heads * s.weights + first;
    const int length = int(smaller(s.scale, s.count - first));
#pragma unroll 4
    for (int t = member; t < length; t += s.team) {
      // Selected, so that nothing of a row without weight is read.
      if (!(weight[t] > 0)) continue;
      own.n = weight[t];
      const Columns row = load(x + (first + t) * s.rows[2], s.columns - column, packs);
#pragma unroll
      for (int e = 0; e < WIDE; e++) own.a.x[e] += row.x[e];
    }
  }
  for (int half = s.team / 2; half; half /= 2) {
    __syncthreads();
    exchange.put(own);
    __syncthreads();
    if (member < half) {
      const State other = exchange.get(int(threadIdx.x) + half * p.across());
      own.n = larger(own.n, other.n);
#pragma unroll
      for (int e = 0; e < WIDE; e++) own.a.x[e] += other.a.x[e];
    }
  }
  if (member || window >= s.windows) return;
#pragma unroll
  for (int e = 0; e < WIDE; e++) own.a.x[e] *= own.n;
  results(p, found, s.columns).write(head * s.windows + window, own.a);
}

// The rows' cotangent: their weight times that of their window.
template <class T>
__global__ void __launch_bounds__(THREADS, 2)
    pooled_vjp(const T* __restrict__ weights, const T* __restrict__ given,
               T* __restrict__ found, Windows s) {
  const Place p = {s.bits};
  const i64 head = i64(blockIdx.x) / s.blocks;
  const Results<const scalar> from = results(p, given, s.columns);
  const Results<scalar> to = results(p, found, s.columns);
  weights += head / s.heads * s.weights;
#pragma unroll 4
  for (int i = 0; i < RUN; i++) {
    const i64 row = i64(blockIdx.x) % s.blocks * p.tile() + i * p.lanes() + p.lane();
    if (row >= s.count) return;
    const scalar weight = weights[row];
    Columns x = from.read(head * s.windows + row / s.scale);
#pragma unroll
    for (int e = 0; e < WIDE; e++) x.x[e] = weight > 0 ? x.x[e] * weight : scalar(0);
    to.write(head * s.count + row, x);
  }
}

// Moments of the keys (batch, heads, rows, columns): each key is read once. A block has a chunk of
// the rows of a head; the states of chunks are merged by a second kernel.

// As pdcore_backends/cupy/statistics.py packs it. Strides count entries.
struct Layout {
  i64 keys[3];  // by sequence, head, row
  int batch, heads, rows, columns;
  int chunks, tiles;  // of a head, and of a chunk
  int shared;         // whether all sequences have one state
  int bits;           // of `Place`
};

#define KEYS const T *__restrict__ keys, const bool *__restrict__ mask
#define KEYS_OF_BLOCK keys_of(p, keys, mask, s, i64(blockIdx.x) / s.chunks)
#define CHUNK (i64(blockIdx.x) % s.chunks)

// RUN rows of a thread.
struct Run {
  Columns x[RUN];
  unsigned real;  // a bit for each

  DEVICE_MEMBER bool has(int i) const { return real >> i & 1; }

  // Two passes over the registers.
  DEVICE_MEMBER State moments() const {
    State found = nothing();
    const int count = __popc(real);
    if (!count) return found;
    found.n = count;
#pragma unroll
    for (int i = 0; i < RUN; i++)
#pragma unroll
      for (int e = 0; e < WIDE; e++) found.a.x[e] += x[i].x[e];
#pragma unroll
    for (int e = 0; e < WIDE; e++) found.a.x[e] /= found.n;
#pragma unroll
    for (int i = 0; i < RUN; i++)
#pragma unroll
      for (int e = 0; e < WIDE; e++) {
        const scalar off = has(i) ? x[i].x[e] - found.a.x[e] : scalar(0);
        found.b.x[e] += off * off;
        found.c.x[e] += off;
      }
#pragma unroll
    for (int e = 0; e < WIDE; e++) {
      const scalar left = found.c.x[e], step = left / found.n;
      const scalar mean = found.a.x[e] + step;
      found.b.x[e] = larger(0, found.b.x[e] - left * step);
      found.c.x[e] = step - (mean - found.a.x[e]);
      found.a.x[e] = mean;
    }
    return found;
  }
};

// The keys of a head, of which a thread has WIDE columns.
template <class T>
struct Keys {
  const T* first;
  const bool* mask;
  i64 pitch;
  int rows, left;
  bool packs;

  DEVICE_MEMBER bool real(i64 row) const { return row < rows && (!mask || mask[row]); }

  // Rows from `row` on; zeros where there is no real key, so that nothing of a padded one is read.
  DEVICE_MEMBER Run run(i64 row) const {
    Run found;
    found.real = 0;
#pragma unroll
    for (int i = 0; i < RUN; i++) {
      const bool is = real(row + i);
      found.x[i] = is ? load(first + (row + i) * pitch, left, packs) : zeros();
      found.real |= unsigned(is) << i;
    }
    return found;
  }
};

template <class T>
DEVICE Keys<T> keys_of(Place p, const T* keys, const bool* mask, const Layout& s, i64 head) {
  const i64 sequence = head / s.heads;
  const int column = p.column();
  Keys<T> found;
  found.first = keys + sequence * s.keys[0] + head % s.heads * s.keys[1] + column;
  found.mask = mask ? mask + sequence * s.rows : nullptr;
  found.pitch = s.keys[2];
  found.rows = s.rows;
  found.left = s.columns - column;
  found.packs = in_packs(found.first, s.keys[2]);
  return found;
}

template <class T>
__global__ void __launch_bounds__(THREADS, 2)
    moments_of_chunks(KEYS, scalar* __restrict__ n, scalar* __restrict__ sums, Layout s) {
  const Place p = {s.bits};
  const Exchange exchange = shared_exchange();
  const Keys<T> head = KEYS_OF_BLOCK;
  State own = nothing();
  for (int tile = 0; tile < s.tiles; tile++) {
    const i64 row = (CHUNK * s.tiles + tile) * p.tile() + p.lane() * RUN;
    Moments::merge(own, head.run(row).moments());
  }
  reduce<Moments>(p, own, exchange);
  if (p.lane() == 0)
    states(p, n, sums, gridDim.x, s.columns).write(blockIdx.x, own);
}

// Merge the chunks of a head, and with `shared` those of all sequences: mean, var and n.
template <class Merged>
__global__ void __launch_bounds__(THREADS, 2)
    moments_merged(scalar* __restrict__ n, scalar* __restrict__ sums,
                   scalar* __restrict__ all_n, scalar* __restrict__ all_mean,
                   scalar* __restrict__ all_var, Layout s) {
  const Place p = {s.bits};
  const Exchange exchange = shared_exchange();
  const States given = states(p, n, sums, i64(s.batch) * s.heads * s.chunks, s.columns);
  const i64 count = i64(s.shared ? s.batch : 1) * s.chunks;
  State own = nothing();
#pragma unroll 4
  for (i64 i = p.lane(); i < count; i += p.lanes()) {
    const i64 head = i / s.chunks * s.heads + blockIdx.x;
    Merged::merge(own, given.read(head * s.chunks + i % s.chunks));
  }
  reduce<Merged>(p, own, exchange);
  if (p.lane()) return;
#pragma unroll
  for (int e = 0; e < WIDE; e++) own.b.x[e] = variance(own.b.x[e], own.n);
  if (p.column() == 0) all_n[blockIdx.x] = own.n;
  results(p, all_mean, s.columns).write(blockIdx.x, own.a);
  results(p, all_var, s.columns).write(blockIdx.x, own.b);
}

// The keys' cotangent, (d_mean + 2 d_var (k - mean)) / n at real keys; without `d_mean` or `d_var`,
// that is 0.
template <class T>
__global__ void __launch_bounds__(THREADS, 2)
    moments_vjp(KEYS, const scalar* __restrict__ n, const scalar* __restrict__ mean,
                const scalar* __restrict__ d_mean, const scalar* __restrict__ d_var,
                scalar* __restrict__ d_keys, Layout s) {
  const Place p = {s.bits};
  const i64 at = i64(blockIdx.x) / s.chunks;
  const i64 state = s.shared ? at % s.heads : at;
  const Keys<T> head = KEYS_OF_BLOCK;
  const Results<scalar> found = results(p, d_keys + at * s.rows * s.columns, s.columns);
  const scalar share = n[state] > 0 ? 1 / n[state] : scalar(0);
  const Columns centre = results(p, mean, s.columns).read(state);
  const Columns level = d_mean ? results(p, d_mean, s.columns).read(state) : zeros();
  const Columns slope = d_var ? results(p, d_var, s.columns).read(state) : zeros();
  for (int tile = 0; tile < s.tiles; tile++) {
    const i64 row = (CHUNK * s.tiles + tile) * p.tile() + p.lane() * RUN;
    Run run = head.run(row);
#pragma unroll
    for (int i = 0; i < RUN; i++) {
      if (row + i >= s.rows) continue;
#pragma unroll
      for (int e = 0; e < WIDE; e++)
        run.x[i].x[e] = run.has(i) ? (level.x[e] + 2 * slope.x[e] * (run.x[i].x[e] - centre.x[e])) *
                                         share
                                   : scalar(0);
      found.write(row + i, run.x[i]);
    }
  }
}

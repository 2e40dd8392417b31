// Sums over the rows of arrays (batch, heads, rows, columns) with contiguous columns. The arrays
// may have 16-bit entries; sums and results have the type `scalar`.
//
// A block computes columns of one head. A thread holds WIDE columns; the threads with the same
// columns, their lanes, read different rows. The sums of the lanes are added in a fixed order.
//
// Every kernel is a template, because each is compiled in a program without the others.

constexpr int RUN = 8;  // rows that a thread reads at a time into registers

typedef Vector<WIDE> Columns;

DEVICE Columns zeros() {
  Columns found;
#pragma unroll
  for (int e = 0; e < WIDE; e++) found.x[e] = 0;
  return found;
}

// Whether every row is aligned, so that WIDE entries can be read in one load.
template <class T>
DEVICE bool in_packs(const T* first, i64 pitch) {
  return (reinterpret_cast<i64>(first) | pitch * i64(sizeof(T))) % i64(sizeof(Vector<WIDE, T>)) == 0;
}

// WIDE columns, of which `left` exist; the others are 0.
template <class T>
DEVICE Columns load(const T* from, int left, bool packs) {
  Columns found = zeros();
  if (packs && left >= WIDE) {
    const Vector<WIDE, T> whole = read<WIDE>(from);
#pragma unroll
    for (int e = 0; e < WIDE; e++) found.x[e] = Stored<T>::read(whole.x[e]);
  } else {
#pragma unroll
    for (int e = 0; e < WIDE; e++)
      if (e < left) found.x[e] = Stored<T>::read(from[e]);
  }
  return found;
}

DEVICE void store(scalar* to, const Columns& x, int left, bool packs) {
  if (packs && left >= WIDE) {
    *reinterpret_cast<Columns*>(to) = x;
  } else {
#pragma unroll
    for (int e = 0; e < WIDE; e++)
      if (e < left) to[e] = x.x[e];
  }
}

// A contiguous array of scalars, of which a thread has WIDE columns.
template <class T>
struct Results {
  T* first;  // the first column of the thread
  int columns, left;
  bool packs;

  DEVICE_MEMBER Columns read(i64 row) const { return load(first + row * columns, left, packs); }
  DEVICE_MEMBER void write(i64 row, const Columns& x) const {
    store(first + row * columns, x, left, packs);
  }
};

// The position of a thread in a block with 1 << bits threads along the columns, at most 32.
struct Place {
  int bits;

  DEVICE_MEMBER int across() const { return 1 << bits; }
  DEVICE_MEMBER int lanes() const { return THREADS >> bits; }
  DEVICE_MEMBER int tile() const { return lanes() * RUN; }  // rows that a block reads at a time
  DEVICE_MEMBER int lane() const { return int(threadIdx.x) >> bits; }
  DEVICE_MEMBER int beside() const { return int(threadIdx.x) & (across() - 1); }
  DEVICE_MEMBER int column() const { return ((int(blockIdx.y) << bits) + beside()) * WIDE; }
};

template <class T>
DEVICE Results<T> results(Place p, T* first, int columns) {
  return {first + p.column(), columns, columns - p.column(), in_packs(first, columns)};
}

// ---- states of rows: a count, and three numbers for each column

struct State {
  scalar n;
  Columns a, b, c;
};

DEVICE State nothing() { return {0, zeros(), zeros(), zeros()}; }

// The variance of n keys; NaN, not inf, beyond the range of its dtype: 1 / inf would hide every key.
DEVICE scalar variance(scalar m2, scalar n) {
  const scalar var = n > 0 ? m2 / n : scalar(0);
  return var + 0 * var;
}

// Means a + c and centred second moments b, merged by Chan's update, as in pdcore.statistics. b
// depends on the distance of two means; c is the rounding error of a, without which b would lose
// digits in proportion to |mean| / deviation.
struct Moments {
  static DEVICE_MEMBER void merge(State& x, const State& y) {
    if (!(y.n > 0)) return;
    const scalar n = x.n + y.n;
    const scalar weight = y.n / n;
#pragma unroll
    for (int e = 0; e < WIDE; e++) {
      const scalar delta = (y.a.x[e] - x.a.x[e]) + (y.c.x[e] - x.c.x[e]);
      const scalar step = x.c.x[e] + delta * weight;
      const scalar mean = x.a.x[e] + step;
      const scalar stepped = mean - x.a.x[e];
      const scalar lost = (x.a.x[e] - (mean - stepped)) + (step - stepped);
      x.b.x[e] = x.n > 0 ? x.b.x[e] + (y.b.x[e] + delta * delta * (x.n * weight)) : y.b.x[e];
      x.a.x[e] = x.n > 0 ? mean : y.a.x[e];
      x.c.x[e] = x.n > 0 ? lost : y.c.x[e];
    }
    x.n = n;
  }
};

// Sums a and b.
struct Totals {
  static DEVICE_MEMBER void merge(State& x, const State& y) {
    x.n += y.n;
#pragma unroll
    for (int e = 0; e < WIDE; e++) {
      x.a.x[e] += y.a.x[e];
      x.b.x[e] += y.b.x[e];
    }
  }
};

// States of chunks in global memory: a, b and c, each (count, columns), and n once for every block,
// so that no block waits for the n of another.
struct States {
  scalar* n;
  Results<scalar> a, b, c;
  bool counts;  // whether this thread writes n

  DEVICE_MEMBER State read(i64 i) const { return {n[i], a.read(i), b.read(i), c.read(i)}; }
  DEVICE_MEMBER void write(i64 i, const State& x) const {
    if (counts) n[i] = x.n;
    a.write(i, x.a);
    b.write(i, x.b);
    c.write(i, x.c);
  }
};

DEVICE States states(Place p, scalar* n, scalar* sums, i64 count, int columns) {
  return {n + blockIdx.y * count, results(p, sums, columns),
          results(p, sums + count * columns, columns),
          results(p, sums + 2 * count * columns, columns), p.beside() == 0};
}

// Shared memory in which threads exchange states.
struct Exchange {
  scalar *n, *a, *b, *c;

  DEVICE_MEMBER void put(const State& x) const {
    n[threadIdx.x] = x.n;
    *reinterpret_cast<Columns*>(a + threadIdx.x * WIDE) = x.a;
    *reinterpret_cast<Columns*>(b + threadIdx.x * WIDE) = x.b;
    *reinterpret_cast<Columns*>(c + threadIdx.x * WIDE) = x.c;
  }
  DEVICE_MEMBER State get(int thread) const {
    return {n[thread], read<WIDE>(a + thread * WIDE), read<WIDE>(b + thread * WIDE),
            read<WIDE>(c + thread * WIDE)};
  }
};

DEVICE Exchange shared_exchange() {
  __shared__ scalar n[THREADS];
  __shared__ __align__(16) scalar a[THREADS * WIDE];
  __shared__ __align__(16) scalar b[THREADS * WIDE];
  __shared__ __align__(16) scalar c[THREADS * WIDE];
  return {n, a, b, c};
}

// Merge the states of all lanes into that of the first lane.
template <class Merged>
DEVICE void reduce(Place p, State& own, const Exchange& exchange) {
  for (int half = p.lanes() / 2; half; half /= 2) {
    __syncthreads();
    exchange.put(own);
    __syncthreads();
    if (p.lane() < half) Merged::merge(own, exchange.get(int(threadIdx.x) + half * p.across()));
  }
}

// Return the merged state of the lanes before this one; `all` gets that of all lanes.
template <class Merged>
DEVICE State scan(Place p, State own, State& all, const Exchange& exchange) {
  for (int step = 1; step < p.lanes(); step *= 2) {
    __syncthreads();
    exchange.put(own);
    __syncthreads();
    if (p.lane() >= step) {
      State before = exchange.get(int(threadIdx.x) - step * p.across());
      Merged::merge(before, own);
      own = before;
    }
  }
  __syncthreads();
  exchange.put(own);
  __syncthreads();
  all = exchange.get(THREADS - p.across() + p.beside());
  return p.lane() ? exchange.get(int(threadIdx.x) - p.across()) : nothing();
}

// Replace the state of each chunk of a head by the merged state of the chunks before it, in place
// except for n, which threads share; one block per head.
template <class Merged>
__global__ void __launch_bounds__(THREADS, 2)
    chunks_scanned(scalar* __restrict__ n, scalar* __restrict__ sums,
                   scalar* __restrict__ n_before, int chunks, int columns, int bits) {
  const Place p = {bits};
  const Exchange exchange = shared_exchange();
  const i64 count = i64(gridDim.x) * chunks;
  const States given = states(p, n, sums, count, columns);
  const States found = states(p, n_before, sums, count, columns);
  const i64 first = i64(blockIdx.x) * chunks;
  State carry = nothing();
  for (i64 base = 0; base < chunks; base += p.tile()) {
    const i64 begin = base + p.lane() * RUN;
    const i64 end = smaller(begin + RUN, chunks);
    State own = nothing(), all;
    for (i64 i = begin; i < end; i++) Merged::merge(own, given.read(first + i));
    State before = carry;
    Merged::merge(before, scan<Merged>(p, own, all, exchange));
    for (i64 i = begin; i < end; i++) {
      const State here = given.read(first + i);
      found.write(first + i, before);
      Merged::merge(before, here);
    }
    Merged::merge(carry, all);
  }
}

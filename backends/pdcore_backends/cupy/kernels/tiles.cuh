// Tiles of a matrix product on CUDA cores, for `scalar` float or double: a square of 16 by 16
// threads, each with EACH by EACH entries of a tile. Rows are copied to shared memory DEPTH columns
// at a time, and read again from the caches for each tile. So any number of columns fits in 48 KiB
// of shared memory, which every device allows by default.

#define DEVICE static __device__ __forceinline__
#define DEVICE_MEMBER __device__ __forceinline__

typedef long long i64;

constexpr int SIDE = 16;              // threads along each side of a tile
constexpr int THREADS = SIDE * SIDE;  // threads of a block
constexpr bool SINGLE = sizeof(scalar) == 4;
constexpr int EACH = SINGLE ? 4 : 2;            // rows, and columns, of a tile per thread
constexpr int SIZE = SIDE * EACH;               // rows, and columns, of a tile
constexpr int WIDE = 16 / int(sizeof(scalar));  // entries in one load of 16 bytes
constexpr int DEPTH = 32;                       // columns of both factors staged at a time
constexpr int STRIP = 16;                       // rows of the second factor staged at a time
// With this pitch, the rows that 8 threads read at once, 16 bytes each, start 4 banks apart.
constexpr int PITCH = DEPTH + WIDE;
constexpr int WEIGHT_PITCH = SIZE + WIDE;

#define MINUS_INFINITY (scalar(__int_as_float(int(0xff800000))))
#define WHOLE_WARP 0xffffffffu

DEVICE float exponential(float x) { return expf(x); }
DEVICE double exponential(double x) { return exp(x); }
DEVICE float logarithm(float x) { return logf(x); }
DEVICE double logarithm(double x) { return log(x); }
DEVICE scalar larger(scalar a, scalar b) { return a > b ? a : b; }
DEVICE i64 smaller(i64 a, i64 b) { return a < b ? a : b; }
DEVICE i64 no_less(i64 a, i64 b) { return a > b ? a : b; }

// Division by a positive number, rounded down and up.
DEVICE i64 floor_div(i64 a, i64 b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }
DEVICE i64 ceil_div(i64 a, i64 b) { return -floor_div(-a, b); }

// Conversions between T, the type in memory (`scalar` or 16 bits), and `scalar`.
template <class T>
struct Stored {
  static DEVICE_MEMBER scalar read(T x) { return ptx::to_float(x); }
  static DEVICE_MEMBER T of(scalar x) { return ptx::from_float<T>(x); }
};

template <>
struct Stored<scalar> {
  static DEVICE_MEMBER scalar read(scalar x) { return x; }
  static DEVICE_MEMBER scalar of(scalar x) { return x; }
};

template <int COUNT, class T = scalar>
struct __align__(COUNT * sizeof(T)) Vector {
  T x[COUNT];
};

template <int COUNT, class T>
DEVICE Vector<COUNT, T> read(const T* from) {
  return *reinterpret_cast<const Vector<COUNT, T>*>(from);
}

// Rows of one head, with contiguous columns.
template <class T>
struct RowsOf {
  const T* first;
  i64 pitch;
  int count, columns;
  bool aligned;  // every row is aligned, so that WIDE entries can be read in one load
};
typedef RowsOf<scalar> Rows;

template <class T>
DEVICE RowsOf<T> rows_at(const T* first, i64 pitch, int count, int columns) {
  const i64 bytes = reinterpret_cast<i64>(first) | pitch * i64(sizeof(T));
  return {first, pitch, count, columns, bytes % (WIDE * int(sizeof(T))) == 0};
}

// The position of a thread in the square.
DEVICE int down() { return int(threadIdx.x) / SIDE; }
DEVICE int across() { return int(threadIdx.x) % SIDE; }

// Reduce over the 16 threads of a row of the square, half of a warp; all of them get the result.
DEVICE scalar sum_across(scalar x) {
#pragma unroll
  for (int step = SIDE / 2; step; step /= 2) x += __shfl_xor_sync(WHOLE_WARP, x, step);
  return x;
}

DEVICE scalar largest_across(scalar x) {
#pragma unroll
  for (int step = SIDE / 2; step; step /= 2) x = larger(x, __shfl_xor_sync(WHOLE_WARP, x, step));
  return x;
}

// Copy HEIGHT rows of WIDTH columns to shared memory; rows that do not exist are zeros.
template <int HEIGHT, int WIDTH, int TO_PITCH, class T>
DEVICE void stage(scalar* to, const RowsOf<T>& x, int row, int column) {
  constexpr int STEPS = WIDTH / WIDE;
#pragma unroll
  for (int i = int(threadIdx.x); i < HEIGHT * STEPS; i += THREADS) {
    const int r = i / STEPS, c = i % STEPS * WIDE;
    const int left = x.columns - column - c;
    Vector<WIDE> found;
#pragma unroll
    for (int e = 0; e < WIDE; e++) found.x[e] = 0;
    if (row + r < x.count && left > 0) {
      const T* from = x.first + (row + r) * x.pitch + column + c;
      if (x.aligned && left >= WIDE) {
        const Vector<WIDE, T> whole = read<WIDE>(from);
#pragma unroll
        for (int e = 0; e < WIDE; e++) found.x[e] = Stored<T>::read(whole.x[e]);
      } else {
#pragma unroll
        for (int e = 0; e < WIDE; e++)
          if (e < left) found.x[e] = Stored<T>::read(from[e]);
      }
    }
    *reinterpret_cast<Vector<WIDE>*>(to + r * TO_PITCH + c) = found;
  }
}

// s[i][j] = a[down + SIDE i] . b[across + SIDE j], with rows counted from a_row and b_row. `staged`
// has 2 SIZE PITCH entries; other threads may still read its old content before the first barrier.
// a and b are `RowsOf` some type, or of another type that `stage` takes.
template <class A, class B>
DEVICE void products(scalar (&s)[EACH][EACH], const A& a, int a_row, const B& b, int b_row,
                     scalar* staged) {
#pragma unroll
  for (int i = 0; i < EACH; i++)
#pragma unroll
    for (int j = 0; j < EACH; j++) s[i][j] = 0;
  scalar* other = staged + SIZE * PITCH;
  for (int column = 0; column < a.columns; column += DEPTH) {
    __syncthreads();
    stage<SIZE, DEPTH, PITCH>(staged, a, a_row, column);
    stage<SIZE, DEPTH, PITCH>(other, b, b_row, column);
    __syncthreads();
#pragma unroll 2
    for (int d = 0; d < DEPTH; d += WIDE) {
      Vector<WIDE> x[EACH], y[EACH];
#pragma unroll
      for (int i = 0; i < EACH; i++) {
        x[i] = read<WIDE>(staged + (down() + SIDE * i) * PITCH + d);
        y[i] = read<WIDE>(other + (across() + SIDE * i) * PITCH + d);
      }
#pragma unroll
      for (int i = 0; i < EACH; i++)
#pragma unroll
        for (int j = 0; j < EACH; j++)
#pragma unroll
          for (int e = 0; e < WIDE; e++) s[i][j] += x[i].x[e] * y[j].x[e];
    }
  }
}

// COLUMNS columns of a product, of which a thread holds EACH rows with OWN columns. The columns are
// read in vectors, so that adjacent threads have no bank conflicts.
template <int COLUMNS>
struct Sums {
  static constexpr int OWN = COLUMNS / SIDE;
  static constexpr int GRAIN = OWN < WIDE ? OWN : WIDE;
  scalar x[EACH][OWN];

  DEVICE_MEMBER void clear() {
#pragma unroll
    for (int i = 0; i < EACH; i++)
#pragma unroll
      for (int c = 0; c < OWN; c++) x[i][c] = 0;
  }

  // The column of entry c of a thread.
  static DEVICE_MEMBER int column(int c) {
    return (c / GRAIN * SIDE + across()) * GRAIN + c % GRAIN;
  }

  // Add weights . v, for rows of v from v_row and columns from v_column; `weights` is the tile
  // (SIZE, SIZE) in shared memory. `staged` has STRIP COLUMNS entries; see `products` for its use.
  template <class V>
  DEVICE_MEMBER void add(const scalar* weights, const V& v, int v_row, int v_column,
                         scalar* staged) {
    for (int strip = 0; strip < SIZE; strip += STRIP) {
      __syncthreads();
      stage<STRIP, COLUMNS, COLUMNS>(staged, v, v_row + strip, v_column);
      __syncthreads();
#pragma unroll 1
      for (int j = 0; j < STRIP; j += WIDE) {
        Vector<WIDE> w[EACH];
#pragma unroll
        for (int i = 0; i < EACH; i++)
          w[i] = read<WIDE>(weights + (down() + SIDE * i) * WEIGHT_PITCH + strip + j);
#pragma unroll
        for (int e = 0; e < WIDE; e++)
#pragma unroll
          for (int c = 0; c < OWN; c += GRAIN) {
            const Vector<GRAIN> y = read<GRAIN>(staged + (j + e) * COLUMNS + column(c));
#pragma unroll
            for (int i = 0; i < EACH; i++)
#pragma unroll
              for (int g = 0; g < GRAIN; g++) x[i][c + g] += w[i].x[e] * y.x[g];
          }
      }
    }
  }

  // Write the rows from `row` on of a contiguous array (count, columns).
  template <class T>
  DEVICE_MEMBER void write(T* to, int row, int count, int first_column, int columns) const {
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const int r = row + down() + SIDE * i;
#pragma unroll
      for (int c = 0; c < OWN; c++) {
        const int at = first_column + column(c);
        if (r < count && at < columns) to[i64(r) * columns + at] = Stored<T>::of(x[i][c]);
      }
    }
  }
};

// Shared memory of a kernel, in entries: the factors of either product, and a tile of weights.
template <int COLUMNS>
struct Memory {
  static constexpr int STAGED = 2 * SIZE * PITCH > STRIP * COLUMNS ? 2 * SIZE * PITCH
                                                                   : STRIP * COLUMNS;
  static constexpr int BYTES = (STAGED + SIZE * WEIGHT_PITCH) * int(sizeof(scalar));
};

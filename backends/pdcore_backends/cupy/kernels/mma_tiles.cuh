// Tiles of a matrix product on tensor cores, for `element` ptx::f16 or ptx::bf16 with sums in
// float: each of WARPS warps has some rows of a tile, and multiplies 16 by 8 by 16 at a time.
// Needs sm_80. "ptx.cuh", "tiles.cuh" and "operands.cuh" are included before this text.

typedef q_type element;

constexpr int WARPS = 4;
constexpr int MMA_THREADS = 32 * WARPS;
constexpr int CHUNK = 8;  // entries of one copy, 16 bytes
constexpr float LOG2E = 1.44269504f, LN2 = 0.69314718f;

DEVICE int warp() { return int(threadIdx.x) / 32; }
DEVICE int lane() { return int(threadIdx.x) % 32; }

// Contiguous rows of WIDTH entries in shared memory. The chunks of a row are permuted, so that 8
// rows that ldmatrix reads at one column are in 8 different groups of 4 banks.
template <int WIDTH>
struct Tile {
  static_assert(WIDTH % 32 == 0, "chunks are permuted within groups of 4 or 8");
  static constexpr int CHUNKS = WIDTH / CHUNK;
  static constexpr int GROUP = WIDTH % 64 == 0 ? 64 : 32;  // entries
  element* first;

  // The offset of the chunk that begins at a column.
  static DEVICE_MEMBER int place(int row, int column) {
    const int turn = GROUP == 64 ? row % 8 : row / 2 % 4;
    return row * WIDTH + (column / CHUNK ^ turn) * CHUNK;
  }

  // An address 8 i rows below and 16 j columns to the right: constant steps need no registers.
  DEVICE_MEMBER element* at(int place, int rows, int columns) const {
    return first + ((place ^ columns % GROUP) + columns / GROUP * GROUP + rows * WIDTH);
  }

  // The tile from a row on, which is a multiple of 8.
  DEVICE_MEMBER Tile from(int row) const { return {first + row * WIDTH}; }

  // Start to copy HEIGHT rows; rows that do not exist are zeros.
  template <int HEIGHT>
  DEVICE_MEMBER void load(const RowsOf<element>& x, int row) const {
    // Threads copy all chunks of a row at once where their number divides that of the threads.
    constexpr int BESIDE = MMA_THREADS % CHUNKS == 0 ? CHUNKS : 4;
    constexpr int ROWS = HEIGHT < MMA_THREADS / BESIDE ? HEIGHT : MMA_THREADS / BESIDE;
    static_assert(HEIGHT % ROWS == 0 && ROWS % 8 == 0, "a copy is so many rows below the last");
    const int r = int(threadIdx.x) / BESIDE, c = int(threadIdx.x) % BESIDE * CHUNK;
    if (r >= ROWS) return;
#pragma unroll
    for (int column = 0; column < WIDTH; column += BESIDE * CHUNK) {
      element* const to = first + place(r, c) + column;
      const element* from = x.first + (row + r) * x.pitch + column + c;
#pragma unroll
      for (int down = 0; down < HEIGHT; down += ROWS) {
        const bool there = row + r + down < x.count;
        ptx::cp_async<16>(to + down * WIDTH, there ? from : x.first, there ? 16 : 0);
        from += ROWS * x.pitch;
      }
    }
  }
};

// A 16 by 16 block of a tile: the left operand of a product, or with `transposed` the right operand
// of two products that sum over the rows of the tile.
template <bool transposed = false, int WIDTH>
DEVICE void load_block(unsigned (&x)[4], const Tile<WIDTH>& tile, int row, int column) {
  const int place = tile.place(lane() % 16, lane() / 16 * 8);
  ptx::ldmatrix<transposed>(x, tile.at(place, row, column));
}

// A 16 by 16 block with the middle quarters exchanged: the right operand of two products that sum
// over the columns of the tile, or with `transposed` the left operand of the transposed block.
template <bool transposed = false, int WIDTH>
DEVICE void load_exchanged(unsigned (&x)[4], const Tile<WIDTH>& tile, int row, int column) {
  const int place = tile.place(lane() % 8 + lane() / 16 * 8, lane() / 8 % 2 * 8);
  ptx::ldmatrix<transposed>(x, tile.at(place, row, column));
}

// Write two adjacent numbers, as 16-bit numbers or unchanged.
template <class T>
DEVICE void write_pair(T* to, float first, float second) {
  *reinterpret_cast<unsigned*>(to) = ptx::pack<T>(first, second);
}

DEVICE void write_pair(float* to, float first, float second) {
  *reinterpret_cast<Vector<2>*>(to) = {first, second};
}

// A warp's part of a product: 16 M rows and 8 N columns. With g = lane / 4 and p = 2 (lane % 4), a
// lane's entries x[m][n] are columns 8 n + p, 8 n + p + 1 of row 16 m + g (0, 1) and of row
// 16 m + g + 8 (2, 3).
template <int M, int N>
struct Product {
  static_assert(N % 2 == 0, "the right operand comes for two products at once");
  float x[M][N][4];

  DEVICE_MEMBER void clear() {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) x[m][n][e] = 0;
  }

  // The row and the column of entry e of x[m][n].
  static DEVICE_MEMBER int row(int m, int e) { return 16 * m + lane() / 4 + e / 2 * 8; }
  static DEVICE_MEMBER int column(int n, int e) { return 8 * n + lane() % 4 * 2 + e % 2; }

  DEVICE_MEMBER void multiply(int m, int n, const unsigned (&a)[4], const unsigned (&b)[4]) {
    const unsigned low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
    ptx::mma_m16n8k16<element>(x[m][n], a, low, x[m][n]);
    ptx::mma_m16n8k16<element>(x[m][n + 1], a, high, x[m][n + 1]);
  }

  // x = a b^T
  template <int WIDTH>
  DEVICE_MEMBER void of(const Tile<WIDTH>& a, const Tile<WIDTH>& b) {
    clear();
#pragma unroll
    for (int c = 0; c < WIDTH; c += 16) {
      unsigned left[M][4];
#pragma unroll
      for (int m = 0; m < M; m++) load_block(left[m], a, 16 * m, c);
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        unsigned right[4];
        load_exchanged(right, b, 8 * n, c);
#pragma unroll
        for (int m = 0; m < M; m++) multiply(m, n, left[m], right);
      }
    }
  }

  // x += w b, where w is another product, rounded in its registers.
  template <int K>
  DEVICE_MEMBER void add(const Product<M, K>& w, const Tile<8 * N>& b) {
#pragma unroll
    for (int k = 0; k < K; k += 2) {
      unsigned left[M][4];
#pragma unroll
      for (int m = 0; m < M; m++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          left[m][i] = ptx::pack<element>(w.x[m][k + i / 2][i % 2 * 2],
                                          w.x[m][k + i / 2][i % 2 * 2 + 1]);
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        unsigned right[4];
        load_block<true>(right, b, 8 * k, 8 * n);
#pragma unroll
        for (int m = 0; m < M; m++) multiply(m, n, left[m], right);
      }
    }
  }

  DEVICE_MEMBER void scale(float factor) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) x[m][n][e] *= factor;
  }

  // Write the rows from `row` on of a contiguous array (count, 8 N).
  template <class T>
  DEVICE_MEMBER void write(T* to, int row0, int count) const {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        const int r = row0 + row(m, e);
        if (r >= count) continue;
#pragma unroll
        for (int n = 0; n < N; n++)
          write_pair(to + i64(r) * (8 * N) + column(n, e), x[m][n][e], x[m][n][e + 1]);
      }
  }
};

// Reduce over the 4 lanes that hold a row of a product; all lanes get the result.
DEVICE float sum_in_row(float x) {
  x += __shfl_xor_sync(WHOLE_WARP, x, 1);
  return x + __shfl_xor_sync(WHOLE_WARP, x, 2);
}

DEVICE float largest_in_row(float x) {
  x = larger(x, __shfl_xor_sync(WHOLE_WARP, x, 1));
  return larger(x, __shfl_xor_sync(WHOLE_WARP, x, 2));
}

// Feature maps and sums over chunks, for the contraction by features. `phi`, `phi_slope` and
// LOG_FEATURES are defined before this text. Rows hold x, or log phi(x) with LOG_FEATURES.
//
// The state of a head is sum_j phi(k_j) v_j^T, (dim, value_dim), followed by sum_j phi(k_j). It is
// stored for every chunk: entry c of the (count + 1) entries is the sum over the chunks before c.
// Log features are relative to their maxima, which are stored in the same way, (count + 1, dim),
// -inf where there is no key; the keys of chunk c are relative to the maxima of entry c + 1.

struct Chunks {
  int key_size, key_count, row_size, row_count;  // sizes are multiples of SIZE
};

DEVICE i64 state_pitch(const Shape& s) {
  return ceil_div(i64(s.dim) * (s.value_dim + i64(1)), WIDE) * WIDE;
}

// Rows that are mapped by phi while they are copied to shared memory.
template <class T, class Map>
struct Mapped : RowsOf<T> {
  Map map;
};

template <class T, class Map>
DEVICE Mapped<T, Map> mapped(const RowsOf<T>& x, const Map& map) {
  Mapped<T, Map> found;
  static_cast<RowsOf<T>&>(found) = x;
  found.map = map;
  return found;
}

template <int HEIGHT, int WIDTH, int TO_PITCH, class T, class Map>
DEVICE void stage(scalar* to, const Mapped<T, Map>& x, int row, int column) {
  stage<HEIGHT, WIDTH, TO_PITCH>(to, static_cast<const RowsOf<T>&>(x), row, column);
  // A thread maps the entries that it has copied itself, so no barrier is needed before.
  constexpr int STEPS = WIDTH / WIDE;
#pragma unroll
  for (int i = int(threadIdx.x); i < HEIGHT * STEPS; i += THREADS) {
    const int r = i / STEPS, c = i % STEPS * WIDE;
    if (row + r >= x.count) continue;
#pragma unroll
    for (int e = 0; e < WIDE; e++) {
      scalar& entry = to[r * TO_PITCH + c + e];
      if (column + c + e < x.columns) entry = x.map(entry, row + r, column + c + e);
    }
  }
}

// phi of x relative to exp(less - top); 0 for a log feature that is -inf in all keys.
DEVICE scalar relative(scalar x, scalar top, scalar less) {
  return top == MINUS_INFINITY ? scalar(0) : exponential(x - less);
}

// phi(k), 0 for a key that is not real.
struct OfKeys {
  const bool* mask;
  const scalar* top;

  DEVICE_MEMBER scalar operator()(scalar x, int key, int feature) const {
    if (mask && !mask[key]) return 0;
#if LOG_FEATURES
    return relative(x, top[feature], top[feature]);
#else
    return phi(x);
#endif
  }

  DEVICE_MEMBER scalar slope(scalar x, int key, int feature) const {
#if LOG_FEATURES
    return (*this)(x, key, feature);
#else
    return mask && !mask[key] ? scalar(0) : phi_slope(x);
#endif
  }
};

// phi(q); log features are relative to the maxima of the keys and to a shift of every row.
struct OfQueries {
  const scalar *top, *shifts;
  int first;

  DEVICE_MEMBER scalar operator()(scalar x, int row, int feature) const {
#if LOG_FEATURES
    return relative(x + top[feature], top[feature], shifts[row - first]);
#else
    return phi(x);
#endif
  }
};

// phi(q) divided by the sum of the weights of its row, for pullbacks; 0 where the sum is 0.
struct OfRows {
  const scalar *top, *level;

  DEVICE_MEMBER scalar operator()(scalar x, int row, int feature) const {
    if (level[row] == MINUS_INFINITY) return 0;
#if LOG_FEATURES
    return relative(x + top[feature], top[feature], level[row]);
#else
    return phi(x) * exponential(-level[row]);
#endif
  }

  DEVICE_MEMBER scalar slope(scalar x, int row, int feature) const {
#if LOG_FEATURES
    return (*this)(x, row, feature);
#else
    return level[row] == MINUS_INFINITY ? scalar(0) : phi_slope(x) * exponential(-level[row]);
#endif
  }
};

// The parts of a tile: the state of entry `entry`, none where it is 0, and the keys or rows `first`
// to `last` directly.
struct Window {
  int entry, first, last;
};

// For SIZE rows: all of them see the keys of the state, some of them see keys up to `last`.
DEVICE Window keys_for(const Head& head, int row0, const Chunks& cut) {
  const int keys = head.shape->keys, all = head.keys_of(row0, row0 + 1).last;
  if (all == keys) return {cut.key_count, keys, keys};
  const int entry = all / cut.key_size;
  return {entry, entry * cut.key_size, head.keys_of(row0, row0 + SIZE).last};
}

// For SIZE keys: the rows of the state, which are the last rows, see all of them.
DEVICE Window rows_for(const Head& head, int key0, const Chunks& cut) {
  const Shape& s = *head.shape;
  const int last_key = int(smaller(i64(key0) + SIZE, s.keys)) - 1;
  const int all = head.rows_of(last_key, last_key + 1).first;
  const int chunk = int(ceil_div(all, cut.row_size));
  const int last = int(smaller(i64(chunk) * cut.row_size, s.rows));
  return {cut.row_count - chunk, head.rows_of(key0, key0 + 1).first / SIZE * SIZE, last};
}

// The entry of the maxima over the keys of the state and those read directly.
DEVICE int highest_entry(const Window& at, const Chunks& cut) {
  return at.entry == cut.key_count ? at.entry : int(ceil_div(at.last, cut.key_size));
}

// The maxima of an entry; null without LOG_FEATURES.
DEVICE const scalar* top_at(const scalar* tops, i64 pair, int entry, const Shape& s,
                            const Chunks& cut) {
  return tops ? tops + (pair * (cut.key_count + 1) + entry) * s.dim : nullptr;
}

// One entry of a head's states.
struct State {
  Rows rows;
  const scalar* sums;
};

DEVICE State state_at(const scalar* states, i64 pair, int count, int entry, const Shape& s) {
  const scalar* first = states + (pair * (count + 1) + entry) * state_pitch(s);
  return {rows_at(first, s.value_dim, s.dim, s.value_dim), first + i64(s.dim) * s.value_dim};
}

// The largest log phi(q) + top of SIZE rows, 0 where all are -inf.
DEVICE void row_maxima(const RowsOf<q_type>& q, int row0, const scalar* top, scalar* found) {
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int row = row0 + down() + SIDE * i;
    scalar most = MINUS_INFINITY;
    if (row < q.count)
      for (int f = across(); f < q.columns; f += SIDE)
        most = larger(most, Stored<q_type>::read(q.first[row * q.pitch + f]) + top[f]);
    most = largest_across(most);
    if (across() == 0) found[down() + SIDE * i] = most == MINUS_INFINITY ? scalar(0) : most;
  }
  __syncthreads();
}

// Copy a tile to where `Sums` reads weights.
DEVICE void keep(scalar* weights, const scalar (&w)[EACH][EACH]) {
  __syncthreads();  // a product without columns has no barrier, and the last tile may still be read
#pragma unroll
  for (int i = 0; i < EACH; i++)
#pragma unroll
    for (int j = 0; j < EACH; j++)
      weights[(down() + SIDE * i) * WEIGHT_PITCH + across() + SIDE * j] = w[i][j];
}

// Add x . state, for rows of x from x_row on, and add x . (sums of the state) to `totals`, of which
// a thread has some rows. `weights` is a tile in shared memory.
template <int COLUMNS, class X>
DEVICE void add_state(Sums<COLUMNS>& sums, scalar (&totals)[EACH], const X& x, int x_row,
                      const State& state, int column0, scalar* weights, scalar* staged) {
  for (int f0 = 0; f0 < x.columns; f0 += SIZE) {
    __syncthreads();
    stage<SIZE, SIZE, WEIGHT_PITCH>(weights, x, x_row, f0);
    __syncthreads();
    for (int f = across(); f < SIZE && f0 + f < x.columns; f += SIDE)
#pragma unroll
      for (int i = 0; i < EACH; i++)
        totals[i] += weights[(down() + SIDE * i) * WEIGHT_PITCH + f] * state.sums[f0 + f];
    sums.add(weights, state.rows, f0, column0, staged);
  }
}

// Add y . state^T, the inner products of y with rows of the state, to the columns from column0 on.
template <int COLUMNS, class Y>
DEVICE void add_transposed(Sums<COLUMNS>& sums, const Y& y, int y_row, const State& state,
                           int column0, scalar* weights, scalar* staged) {
#pragma unroll
  for (int slab = 0; slab < COLUMNS; slab += SIZE) {
    if (column0 + slab >= state.rows.count) break;
    scalar s[EACH][EACH];
    products(s, y, y_row, state.rows, column0 + slab, staged);
    keep(weights, s);
    __syncthreads();
#pragma unroll
    for (int c = 0; c < Sums<COLUMNS>::OWN; c++) {
      const int column = Sums<COLUMNS>::column(c) - slab;
      if (column < 0 || column >= SIZE) continue;
#pragma unroll
      for (int i = 0; i < EACH; i++)
        sums.x[i][c] += weights[(down() + SIDE * i) * WEIGHT_PITCH + column];
    }
  }
}

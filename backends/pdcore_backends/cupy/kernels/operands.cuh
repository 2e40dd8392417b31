// The operands of a contraction by scores, as in `Operands` and `Visibility` of pdcore, and the
// weight of a key for a row. `log_kappa`, its slopes, `Place`, VALUES, TABLES, PLACES, LOG_WEIGHT
// and the types of arrays, `q_type` and so on, are defined before this text.

// pdcore_backends/cupy/operands.py packs it. Strides are in entries; a bound of -1 means none.
struct Shape {
  i64 q[4];     // strides by sequence, key head, query head of a key head, row
  i64 k[3];     // by sequence, key head, row
  i64 v[3];
  i64 bias[5];  // by sequence, key head, query head, row, key; 0 for a broadcast axis
  i64 mask[5];
  i64 key_mask, real;  // by sequence
  i64 offset;          // position of query 0 if it is the same for all sequences
  i64 ahead, left;     // how far a query sees after and before its position
  i64 first_key;       // the index of key 0, as dropout counts
  double scale;        // log w = scale * s, unless there is an expression
  double factor;       // of a weight that dropout keeps
  int batch, heads, group, rows, keys;
  int length, span;    // keys before pooling, and the number of them in a pooled key
  int dim, value_dim;
  int has_sign;
  unsigned least;      // dropout keeps a weight whose number is at least this
  int bias_extent[5];  // the shape of the bias
};

#define INPUTS                                                                                    \
  const q_type *__restrict__ q, const k_type *__restrict__ k, const v_type *__restrict__ v,       \
      const scalar *__restrict__ key_bias, const bias_type *__restrict__ bias,                    \
      const bool *__restrict__ key_mask, const bool *__restrict__ real,                           \
      const bool *__restrict__ mask, const i64 *__restrict__ offsets,                             \
      const scalar *__restrict__ values, const scalar *__restrict__ tables,                       \
      const i64 *__restrict__ q_labels, const i64 *__restrict__ k_labels,                         \
      const unsigned *__restrict__ lanes
#define INPUT_NAMES                                                                               \
  {q,       k,      v,      key_bias, bias,     key_mask, real,                                   \
   mask,    offsets, values, tables,   q_labels, k_labels, lanes}

struct Inputs {
  const q_type* q;
  const k_type* k;
  const v_type* v;
  const scalar* key_bias;
  const bias_type* bias;
  const bool *key_mask, *real, *mask;
  const i64* offsets;
  const scalar *values, *tables;  // VALUES and TABLES numbers of each query head
  const i64 *q_labels, *k_labels;
  const unsigned* lanes;  // the two words of each row of weights
};

// A range of keys or rows, from `first` to before `last`.
struct Range {
  int first, last;

  DEVICE_MEMBER bool has(int i) const { return i >= first && i < last; }
};

DEVICE Range range(i64 first, i64 last, int count) {
  first = no_less(first, 0);
  last = no_less(last, 0);
  return {int(smaller(first, count)), int(smaller(last, count))};
}

// One query head of one sequence.
struct Head {
  const Shape* shape;
  RowsOf<q_type> q;
  RowsOf<k_type> k;
  RowsOf<v_type> v;
  const scalar *key_bias, *values, *tables;
  const bias_type* bias;
  const bool *key_mask, *real, *mask;
  const i64 *q_labels, *k_labels;
  const unsigned* lanes;
  i64 offset;

  // The range of keys that some of the rows first .. last - 1 see by position; empty without rows.
  DEVICE_MEMBER Range keys_of(int first, int last) const {
    const Shape& s = *shape;
    last = int(smaller(last, s.rows));
    if (first >= last) return {0, 0};
    i64 low = 0, high = s.keys;
    if (s.ahead >= 0) high = floor_div(last + offset + s.ahead, s.span);
    if (s.left >= 0) low = ceil_div(first + offset - s.left, s.span);
    return range(low, high, s.keys);
  }

  // The range of rows that see some of the keys first .. last - 1 by position; empty without keys.
  DEVICE_MEMBER Range rows_of(int first, int last) const {
    const Shape& s = *shape;
    last = int(smaller(last, s.keys));
    if (first >= last) return {0, 0};
    i64 low = 0, high = s.rows;
    if (s.ahead >= 0) low = (first + i64(1)) * s.span - 1 - offset - s.ahead;
    if (s.left >= 0) high = (last - i64(1)) * s.span - offset + s.left + 1;
    return range(low, high, s.rows);
  }

  // Whether the masks allow a key for a row: `mask` must allow all real keys of a pooled key.
  DEVICE_MEMBER bool unmasked(int row, int key) const {
    const Shape& s = *shape;
    if (key_mask && !key_mask[key]) return false;
    if (!mask) return true;
    const bool* allowed = mask + row * s.mask[3];
    const int first = key * s.span, last = int(smaller(i64(first) + s.span, s.length));
    for (int t = first; t < last; t++)
      if (!allowed[t * s.mask[4]] && (!real || real[t])) return false;
    return true;
  }

  // What log kappa reads of a row and a key beside their inner product.
  DEVICE_MEMBER Place place(int row, int key) const {
    Place at = {};
#if PLACES
    at.tables = tables;
    at.distance = scalar(key - row - offset);
    if (q_labels) {
      at.query_label = scalar(q_labels[row]);
      at.key_label = scalar(k_labels[key]);
    }
#endif
    return at;
  }

  // What dropout multiplies a weight by, 0 if it drops it; docs/semantics.md defines the words.
  DEVICE_MEMBER scalar kept(int row, int key) const {
#if DROPOUT
    if (row >= shape->rows) return 0;
    unsigned x = unsigned(shape->first_key + i64(key) * shape->span) * 0x9E3779B9u;
    x += lanes[2 * i64(row)];
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 15)) + lanes[2 * i64(row) + 1];
    x *= 0x846CA68Bu;
    x = (x ^ (x >> 16)) * 0x9E3779B1u;
    return (x ^ (x >> 15)) >= shape->least ? scalar(shape->factor) : scalar(0);
#else
    return 1;
#endif
  }

  // log kappa with the biases, for a key that the row sees.
  DEVICE_MEMBER scalar log_weight(scalar s, int row, int key) const {
    scalar found = log_kappa(s, scalar(shape->scale), values, place(row, key));
    if (key_bias) found += key_bias[key];
    if (bias)
      found += Stored<bias_type>::read(bias[row * shape->bias[3] + key * shape->bias[4]]);
    return found;
  }
};

DEVICE Head head_at(const Inputs& x, const Shape& s, i64 b, i64 h, i64 g) {
  Head found;
  found.shape = &s;
  found.q = rows_at(x.q + b * s.q[0] + h * s.q[1] + g * s.q[2], s.q[3], s.rows, s.dim);
  found.k = rows_at(x.k + b * s.k[0] + h * s.k[1], s.k[2], s.keys, s.dim);
  found.v = rows_at(x.v + b * s.v[0] + h * s.v[1], s.v[2], s.keys, s.value_dim);
  found.key_bias = x.key_bias ? x.key_bias + (b * s.heads + h) * s.keys : nullptr;
  found.bias = x.bias ? x.bias + b * s.bias[0] + h * s.bias[1] + g * s.bias[2] : nullptr;
  found.values = x.values ? x.values + (h * s.group + g) * VALUES : nullptr;
  found.tables = x.tables ? x.tables + (h * s.group + g) * TABLES : nullptr;
  found.q_labels = x.q_labels ? x.q_labels + b * s.rows : nullptr;
  found.k_labels = x.k_labels ? x.k_labels + b * s.keys : nullptr;
  found.lanes = x.lanes ? x.lanes + ((b * s.heads + h) * s.group + g) * s.rows * 2 : nullptr;
  found.key_mask = x.key_mask ? x.key_mask + b * s.key_mask : nullptr;
  found.real = x.real ? x.real + b * s.real : nullptr;
  found.mask = x.mask ? x.mask + b * s.mask[0] + h * s.mask[1] + g * s.mask[2] : nullptr;
  found.offset = x.offsets ? x.offsets[b] : s.offset;
  return found;
}

DEVICE int tiles_of(int count) { return (count + SIZE - 1) / SIZE; }

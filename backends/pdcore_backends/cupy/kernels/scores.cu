// The contraction by scores: an online softmax over tiles of keys, or a plain sum of weights.
//
// A block has SIZE rows of one query head and COLUMNS columns of the values. Rows of a query head
// lie without gaps in out and level; where query heads are, their `Group` says.

template <int COLUMNS>
__global__ void __launch_bounds__(THREADS, 1)
    scores_forward(const __grid_constant__ Groups groups) {
  extern __shared__ __align__(16) char memory[];
  scalar* staged = reinterpret_cast<scalar*>(memory);
  scalar* weights = staged + Memory<COLUMNS>::STAGED;
  // Blocks of a head follow one another, since its keys stay in the cache, from the last rows on,
  // which see most under causal. The group of most keys comes first.
  const Group& group = groups.x[groups.of_block(blockIdx.x)];
  const Shape& shape = group.shape;
  const int tiles = tiles_of(shape.rows), block = int(blockIdx.x - group.first);
  const int at = block / tiles;
  const int row0 = (tiles - 1 - block % tiles) * SIZE;
  const int column0 = int(blockIdx.y) * COLUMNS;
  const int g = at % shape.group, h = at / shape.group % shape.heads;
  const int b = at / shape.group / shape.heads;
  const Head head = head_at(group.inputs, shape, b, h, g);
  const Range keys = head.keys_of(row0, row0 + SIZE);

  Sums<COLUMNS> sums;
  sums.clear();
  scalar peak[EACH], total[EACH];
  Range near[EACH];  // what each row sees by position
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    near[i] = head.keys_of(row0 + down() + SIDE * i, row0 + down() + SIDE * i + 1);
    peak[i] = MINUS_INFINITY;
    total[i] = 0;
  }
  for (int key0 = keys.first / SIZE * SIZE; key0 < keys.last; key0 += SIZE) {
    scalar s[EACH][EACH];
    products(s, head.q, row0, head.k, key0, staged);
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const int row = row0 + down() + SIDE * i;
      scalar* beside = weights + (down() + SIDE * i) * WEIGHT_PITCH + across();
      scalar more = 0;
#if LOG_WEIGHT
      scalar top = MINUS_INFINITY;
#pragma unroll
      for (int j = 0; j < EACH; j++) {
        const int key = key0 + across() + SIDE * j;
        const bool seen = near[i].has(key) && head.unmasked(row, key);
        s[i][j] = seen ? head.log_weight(s[i][j], row, key) : MINUS_INFINITY;
        top = larger(top, s[i][j]);
      }
      const scalar higher = larger(peak[i], largest_across(top));
      const scalar base = higher == MINUS_INFINITY ? scalar(0) : higher;  // -inf - -inf is NaN
      const scalar shrink = exponential(peak[i] - base);
      peak[i] = higher;
      total[i] *= shrink;
#pragma unroll
      for (int c = 0; c < Sums<COLUMNS>::OWN; c++) sums.x[i][c] *= shrink;
#pragma unroll
      for (int j = 0; j < EACH; j++) {
        const scalar p = exponential(s[i][j] - base);
        beside[SIDE * j] = p * head.kept(row, key0 + across() + SIDE * j);
        more += p;
      }
#else
#pragma unroll
      for (int j = 0; j < EACH; j++) {
        const int key = key0 + across() + SIDE * j;
        const scalar p = near[i].has(key) && head.unmasked(row, key) ? s[i][j] : scalar(0);
        beside[SIDE * j] = p;
        more += p;
      }
#endif
      total[i] += sum_across(more);
    }
    sums.add(weights, head.v, key0, column0, staged);
  }
  const i64 place = b * group.place[0] + h * group.place[1] + g;
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int row = row0 + down() + SIDE * i;
    const scalar base = peak[i] == MINUS_INFINITY ? scalar(0) : peak[i];
    if (blockIdx.y == 0 && across() == 0 && row < shape.rows)
      group.level[place * shape.rows + row] = shape.has_sign   ? scalar(0)
                                              : total[i] == 0 ? MINUS_INFINITY
                                                              : base + logarithm(total[i]);
    if (shape.has_sign) continue;
#pragma unroll
    for (int c = 0; c < Sums<COLUMNS>::OWN; c++)
      sums.x[i][c] = total[i] == 0 ? scalar(0) : sums.x[i][c] / total[i];
  }
  sums.write(group.out + place * shape.rows * shape.value_dim, row0, shape.rows, column0,
             shape.value_dim);
}

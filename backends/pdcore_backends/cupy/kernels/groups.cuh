// Groups of heads of one scale each, which one launch contracts; pdcore_backends/cupy/grouped.py
// packs them.

// Key heads of one scale: their operands, and where the results of the first head are written.
struct Group {
  Inputs inputs;
  const float *centre, *factor, *gap;  // of `QueryFold`, null where it is not used
  out_type* out;
  scalar* level;
  i64 place[2];  // steps in query heads of the result, per sequence and per key head
  i64 first;     // block
  Shape shape;
};

// All groups of a launch, in the order of their blocks.
constexpr int GROUPS = 8;
struct Groups {
  Group x[GROUPS];
  i64 count;

  DEVICE_MEMBER int of_block(i64 block) const {
    int n = 0;
    while (n + 1 < count && block >= x[n + 1].first) n++;
    return n;
  }
};

// Head groups of different scales, which one launch contracts, as
// pdcore_backends/cupy/grouped.py packs them.

// Key heads that are contracted alike: what they read, and where the results of the first one go.
struct Group {
  Inputs inputs;
  const float *centre, *factor, *gap;  // of `QueryFold`, where it is used
  out_type* out;
  scalar* level;
  i64 place[2];  // query heads among the results by sequence, and by key head
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

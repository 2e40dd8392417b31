// What tensor cores and ldmatrix do, by the layouts of the PTX documentation.
#include "block.h"
#include "flush.h"

namespace cuda_on_cpu {

namespace {

struct Fragments {
  float* d;
  const unsigned* a;
  const unsigned* b;
  const float* c;
};

struct Rows {
  unsigned* result;
  const uint16_t* row;
};

void need_whole_warp(const char* name, int line) {
  const unsigned live = block.warps[self->warp].live;
  if (live != 0xffffffffu)
    fail("%s in line %d: all lanes of the warp must take part, %08x are there", name, line, live);
}

// Lane l holds the elements of rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next.
struct Place {
  int group, pair;
  explicit Place(int lane) : group(lane / 4), pair(lane % 4 * 2) {}
};

template <bool bf16>
void multiply(Thread* lanes, unsigned, int) {
  const Subnormals kept(true);  // as tensor cores do, whatever the options
  double a[16][16], b[16][8], d[16][8];
  const auto value = [](unsigned word, int half) {
    const uint16_t bits = uint16_t(word >> 16 * half);
    return double(bf16 ? bf16_to_float(bits) : f16_to_float(bits));
  };
  for (int lane = 0; lane < 32; lane++) {
    const Place at(lane);
    const auto& offer = *static_cast<Fragments*>(lanes[lane].offer);
    for (int half = 0; half < 2; half++) {
      for (int r = 0; r < 4; r++)
        a[at.group + r % 2 * 8][at.pair + half + r / 2 * 8] = value(offer.a[r], half);
      for (int r = 0; r < 2; r++) b[at.pair + half + r * 8][at.group] = value(offer.b[r], half);
    }
    for (int r = 0; r < 4; r++) d[at.group + r / 2 * 8][at.pair + r % 2] = offer.c[r];
  }
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 8; j++)
      for (int k = 0; k < 16; k++) d[i][j] += a[i][k] * b[k][j];
  for (int lane = 0; lane < 32; lane++) {
    const Place at(lane);
    float* out = static_cast<Fragments*>(lanes[lane].offer)->d;
    for (int r = 0; r < 4; r++) out[r] = float(d[at.group + r / 2 * 8][at.pair + r % 2]);
  }
}

// Lane 8 m + i brings row i of matrix m; lane l takes elements 2 (l % 4) and the next of row l / 4.
void exchange(Thread* lanes, unsigned, int parameter) {
  const int matrices = parameter / 2;
  const bool transposed = parameter % 2;
  for (int lane = 0; lane < 32; lane++) {
    const Place at(lane);
    for (int m = 0; m < matrices; m++) {
      unsigned word = 0;
      for (int half = 0; half < 2; half++) {
        const int row = transposed ? at.pair + half : at.group;
        const int column = transposed ? at.group : at.pair + half;
        const auto* source = static_cast<Rows*>(lanes[8 * m + row].offer)->row;
        word |= unsigned(source[column]) << 16 * half;
      }
      static_cast<Rows*>(lanes[lane].offer)->result[m] = word;
    }
  }
}

}  // namespace

void mma_m16n8k16(bool bf16, float* d, const unsigned* a, const unsigned* b, const float* c,
                  int line) {
  need_whole_warp("mma", line);
  Fragments offer{d, a, b, c};
  collective(0xffffffffu, "mma", line, bf16, &offer, bf16 ? multiply<true> : multiply<false>);
}

void exchange_rows(unsigned* result, int matrices, bool transposed, const uint16_t* row, int line) {
  need_whole_warp("ldmatrix", line);
  Rows offer{result, row};
  collective(0xffffffffu, "ldmatrix", line, 2 * matrices + transposed, &offer, exchange);
}

}  // namespace cuda_on_cpu

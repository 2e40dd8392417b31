// The running block, which the parts of the runtime share.
#pragma once
#include <vector>

#include "memory.h"
#include "runtime.h"
#include "sanitizers.h"

namespace cuda_on_cpu {

using Work = void (*)(Thread* lanes, unsigned arrived, int parameter);

// An operation of a warp that some of its lanes have not reached yet.
struct Collective {
  unsigned mask, arrived;
  const char* name;
  int line, parameter;
  Work work;  // null for __syncwarp, which orders memory
};

struct Warp {
  unsigned live;
  Collective pending[32];
  int n_pending;
  char order;  // for ThreadSanitizer: what happened before its __syncwarp
};

struct Barrier {
  int arrived, line, votes;
  char order;
};

// Static shared variables, one for each declaration and instance of a template.
struct Static {
  const void* key;
  Buffer memory;
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barrier;
  int live;
  Buffer dynamic;
  size_t dynamic_alignment, shared_limit;
  std::vector<Static> statics;
};

extern Block block;
extern std::vector<Buffer> regions;  // the arrays of the caller

// Let the other threads run; `wait` until another makes the caller ready.
void yield();
void wait(const char* name, int line);

// One operation of the lanes in `mask`: the last lane that arrives does the `work` for all.
void collective(unsigned mask, const char* name, int line, int parameter, void* offer, Work work);

void leave(Thread& thread);  // other threads no longer wait for this one
void reset_shared();
void release_shared();

}  // namespace cuda_on_cpu

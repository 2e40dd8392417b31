// Barriers of blocks and warps, shuffles, votes.
#include "block.h"

namespace cuda_on_cpu {

namespace {

struct Shuffle {
  uint64_t value;
  int source;
};

// What happened before each arrival happened before each departure, and nothing later did. So each
// thread synchronizes with the thread that releases it, not with the barrier, where the next round may
// have started.
void open_barrier() {
  Barrier& barrier = block.barrier;
  acquire(&barrier.order);
  for (Thread& thread : block.threads) {
    if (!thread.at_barrier) continue;
    thread.at_barrier = false;
    thread.votes = barrier.votes;
    thread.state = State::ready;
    release(&thread.order);
  }
  barrier.arrived = barrier.votes = 0;
}

void finish(Warp& warp, int which) {
  const Collective done = warp.pending[which];
  warp.pending[which] = warp.pending[--warp.n_pending];
  Thread* lanes = &block.threads[(&warp - block.warps.data()) * 32];
  const bool orders = done.work == nullptr;
  if (orders)
    acquire(&warp.order);
  else
    done.work(lanes, done.arrived, done.parameter);
  for (int i = 0; i < 32; i++) {
    if (!(done.arrived >> i & 1)) continue;
    lanes[i].state = State::ready;
    if (orders) release(&lanes[i].order);
  }
}

Collective& join(Warp& warp, unsigned mask, const char* name, int line, int parameter,
                 Work work) {
  for (int i = 0; i < warp.n_pending; i++) {
    Collective& other = warp.pending[i];
    if (!(other.mask & mask)) continue;
    if (other.mask != mask || other.name != name || other.line != line ||
        other.parameter != parameter)
      fail("divergent: %s in line %d with mask %08x, while lanes %08x wait in %s, line %d, mask %08x",
           name, line, mask, other.arrived, other.name, other.line, other.mask);
    return other;
  }
  warp.pending[warp.n_pending] = {mask, 0, name, line, parameter, work};
  return warp.pending[warp.n_pending++];
}

void shuffle_work(Thread* lanes, unsigned arrived, int) {
  uint64_t values[32];
  for (int i = 0; i < 32; i++)
    if (arrived >> i & 1) values[i] = static_cast<Shuffle*>(lanes[i].offer)->value;
  for (int i = 0; i < 32; i++) {
    if (!(arrived >> i & 1)) continue;
    auto* offer = static_cast<Shuffle*>(lanes[i].offer);
    if (!(arrived >> offer->source & 1))
      fail("lane %d reads lane %d, which is not among the lanes that take part, %08x: undefined", i,
           offer->source, arrived);
    offer->value = values[offer->source];
  }
}

void vote_work(Thread* lanes, unsigned arrived, int) {
  unsigned result = 0;
  for (int i = 0; i < 32; i++)
    if (arrived >> i & 1 && *static_cast<unsigned*>(lanes[i].offer)) result |= 1u << i;
  for (int i = 0; i < 32; i++)
    if (arrived >> i & 1) *static_cast<unsigned*>(lanes[i].offer) = result;
}

}  // namespace

int block_barrier(int line, int predicate) {
  Barrier& barrier = block.barrier;
  Thread& me = *self;
  if (barrier.arrived && barrier.line != line)
    fail("divergent: __syncthreads in line %d, while %d threads wait in that of line %d", line,
         barrier.arrived, barrier.line);
  barrier.line = line;
  barrier.arrived++;
  barrier.votes += predicate != 0;
  me.at_barrier = true;
  release(&barrier.order);
  if (barrier.arrived == block.live)
    open_barrier();
  else
    wait("__syncthreads", line);
  acquire(&me.order);
  return me.votes;
}

void collective(unsigned mask, const char* name, int line, int parameter, void* offer, Work work) {
  Thread& me = *self;
  Warp& warp = block.warps[me.warp];
  if (!(mask >> me.lane & 1))
    fail("%s in line %d: lane %u is not in its own mask, %08x", name, line, me.lane, mask);
  me.offer = offer;
  Collective& mine = join(warp, mask, name, line, parameter, work);
  const int which = int(&mine - warp.pending);
  mine.arrived |= 1u << me.lane;
  me.line = line;
  if (mine.arrived == (mask & warp.live))
    finish(warp, which);
  else
    wait(name, line);
}

void leave(Thread& thread) {
  Warp& warp = block.warps[thread.warp];
  warp.live &= ~(1u << thread.lane);
  block.live--;
  if (block.barrier.arrived && block.barrier.arrived == block.live) open_barrier();
  for (int i = warp.n_pending; i-- > 0;) {
    const Collective& other = warp.pending[i];
    if (other.arrived == (other.mask & warp.live)) finish(warp, i);
  }
}

void warp_barrier(unsigned mask, int line) {
  release(&block.warps[self->warp].order);
  collective(mask, "__syncwarp", line, 0, nullptr, nullptr);
  acquire(&self->order);
}

uint64_t shuffle(unsigned mask, uint64_t value, int source, const char* name, int line) {
  Shuffle offer{value, source};
  collective(mask, name, line, 0, &offer, shuffle_work);
  return offer.value;
}

unsigned vote(unsigned mask, int predicate, const char* name, int line) {
  unsigned offer = predicate != 0;
  collective(mask, name, line, 0, &offer, vote_work);
  return offer;
}

}  // namespace cuda_on_cpu

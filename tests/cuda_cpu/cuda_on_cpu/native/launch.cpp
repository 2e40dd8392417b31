// A launch: arrays copied in, the blocks of the grid one after the other, arrays copied back.
#include <stdio.h>

#include <algorithm>

#include "block.h"
#include "flush.h"
#include "scheduler.h"

namespace cuda_on_cpu {

uint3 block_index, block_dim, grid_dim;

namespace {

char* stacks;
size_t n_stacks;

void take_stacks(size_t count) {
#ifndef CUDA_ON_CPU_THREAD  // there, a stack that was used has a history
  if (stacks && count <= n_stacks) return;
#endif
  if (stacks) release_stacks(stacks, n_stacks);
  stacks = allocate_stacks(count);
  n_stacks = count;
}

// Every module has its own runtime: if all of them kept their stacks, some hundred modules would
// need more memory maps than a process may have.
void drop_stacks() {
#ifndef CUDA_ON_CPU_ADDRESS  // there, what is noted of a stack would outlive it
  if (stacks) release_stacks(stacks, n_stacks);
  stacks = nullptr;
#endif
}

void copy_in(Launch& launch) {
  for (int i = 0; i < launch.n_regions; i++) {
    const Region& region = launch.regions[i];
    char name[32];
    snprintf(name, sizeof name, "argument %d", region.argument);
    regions.push_back(allocate(region.bytes, 16, name));
    copy(regions.back().begin, region.host, region.bytes);
  }
  for (int i = 0; i < launch.n_pointers; i++) {
    const Pointer& pointer = launch.pointers[i];
    *static_cast<char**>(launch.arguments[pointer.argument]) =
        regions[pointer.region].begin + pointer.offset;
  }
}

void check_outside(const Buffer& buffer) {
  if (const long offset = written_outside(buffer))
    record("out of bounds: byte %ld of %s, which has %zu, was written", offset, buffer.name,
           buffer.bytes);
}

void copy_out(Launch& launch) {
  for (int i = 0; i < launch.n_regions; i++) {
    check_outside(regions[i]);
    if (launch.regions[i].written)
      copy(launch.regions[i].host, regions[i].begin, launch.regions[i].bytes);
    release_memory(regions[i]);
  }
  regions.clear();
}

void reset_threads(const Launch& launch) {
  const unsigned nx = launch.block[0], ny = launch.block[1];
  for (Warp& warp : block.warps) warp = Warp{};
  for (unsigned i = 0; i < block.threads.size(); i++) {
    Thread& thread = block.threads[i];
    thread.index = {i % nx, i / nx % ny, i / nx / ny};
    thread.id = i;
    thread.lane = i % 32;
    thread.warp = i / 32;
    thread.state = State::ready;
    thread.at_barrier = false;
    thread.n_copies = thread.group = 0;
    thread.fake_stack = nullptr;
    block.warps[thread.warp].live |= 1u << thread.lane;
  }
  block.barrier = Barrier{};
  block.live = int(block.threads.size());
}

void run_block(Launch& launch) {
  take_stacks(block.threads.size());
  reset_shared();
  reset_threads(launch);
  make_fibers(launch.body, launch.arguments, stacks);
  run_fibers();
  check_outside(block.dynamic);
  for (const Static& variable : block.statics) check_outside(variable.memory);
  end_fibers();
}

std::vector<unsigned long> block_order(unsigned long count, Schedule schedule) {
  std::vector<unsigned long> order(count);
  for (unsigned long i = 0; i < count; i++) order[i] = i;
  if (schedule == Schedule::reversed || schedule == Schedule::greedy_reversed)
    std::reverse(order.begin(), order.end());
  if (schedule == Schedule::random)
    for (unsigned long i = count; i > 1; i--) std::swap(order[i - 1], order[random_below(i)]);
  return order;
}

}  // namespace

const char* run(Launch* launch) {
  const auto [nx, ny, nz] = launch->grid;
  const unsigned threads = launch->block[0] * launch->block[1] * launch->block[2];
  const auto schedule = Schedule(launch->schedule);
  clear_failure();
  grid_dim = {nx, ny, nz};
  block_dim = {launch->block[0], launch->block[1], launch->block[2]};
  copy_in(*launch);
  enter_scheduler(schedule, launch->seed);
  block.threads.assign(threads, Thread{});
  block.warps.assign((threads + 31) / 32, Warp{});
  block.dynamic_alignment = launch->alignment;
  block.shared_limit = launch->shared_limit;
  block.dynamic = allocate(launch->shared, launch->alignment, "dynamic shared memory");
  catch_faults();
  {
    const Subnormals subnormals(!launch->flushes);
    for (const unsigned long i : block_order(1ul * nx * ny * nz, schedule)) {
      block_index = {unsigned(i % nx), unsigned(i / nx % ny), unsigned(i / nx / ny)};
      run_block(*launch);
      if (failed()) break;
    }
  }
  restore_faults();
  join_fibers();
  drop_stacks();
  release_shared();
  copy_out(*launch);
  return failure();
}

}  // namespace cuda_on_cpu

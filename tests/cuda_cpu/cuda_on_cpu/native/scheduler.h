// Fibres: a CUDA thread each, on a stack of its own.
#pragma once
#include "runtime.h"

namespace cuda_on_cpu {

void enter_scheduler(Schedule schedule, unsigned seed);
void make_fibers(void (*body)(void** arguments), void** arguments, char* stacks);
void run_fibers();
void end_fibers();
void join_fibers();  // of all blocks of a launch
unsigned long random_below(unsigned long bound);

bool failed();
void clear_failure();
const char* failure();
void record(const char* format, ...) __attribute__((format(printf, 1, 2)));

void catch_faults();
void restore_faults();

}  // namespace cuda_on_cpu

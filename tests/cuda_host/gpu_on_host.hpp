// gpu_on_host.hpp - runs CUDA kernels on the host (C++20), to test and sanitise them where there is no GPU.
//
// platform.cuh includes it where the compiler is not nvcc. One fiber per CUDA thread; threads change only where they
// wait, so a run is repeatable. What it finds:
//
//   -fsanitize=thread (g++)      races within and between blocks: missing __syncthreads, __syncwarp, __threadfence, or
//                                atomics. Order exists only at launches and these calls, whatever the schedule.
//   -fsanitize=address,undefined accesses beyond global, shared and dynamic shared memory; misaligned vector loads;
//                                memory.hpp: host pointers in kernels, device pointers outside
//   every build                  deadlocks, divergent barriers and warp calls, bad masks, too much shared memory: named
//                                with file and line, exit status 86. Shared memory starts as NaN / -1.
//
// Environment, read once per process:
//
//   DCMERGE_HOST_ORDER          of blocks, threads and lanes: forward (default), reverse, random
//   DCMERGE_HOST_SEED           of random; default 1
//   DCMERGE_HOST_SHARED_BYTES   per block at most; default 232448 (sm_90, sm_100), sm_75: 65536, sm_80: 166912,
//                               sm_120: 101376
//
// Stricter than CUDA: no thread may return before a barrier of its block, and no mask may name lanes that returned or
// that the block does not have. Not modelled: blocks that run kFiberSets apart are ordered; memory that is weaker
// than sequentially consistent; streams (a launch has run when it returns); __launch_bounds__, registers and spills;
// spinning (hangs); contraction to fused multiply-adds and fast-math; bank conflicts and every other cost.
#pragma once

#include "arithmetic.hpp"
#include "block.hpp"
#include "launch.hpp"
#include "memory.hpp"
#include "types.hpp"
#include "warp.hpp"

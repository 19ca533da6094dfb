// runner_test.cpp - the runner itself: that it runs kernels as a GPU does. That it reports what they do wrong is shown
// by the bugs that tests/test_cuda_host.py plants in samples.cuh.

#include <numeric>
#include <thread>

#include "check.h"
#include "cuda/platform.cuh"

namespace dcmerge {
namespace {

using cuda::launch;

constexpr unsigned kFull = 0xffffffffu;
constexpr unsigned kManyThreads = cuda::host::kThreadSanitizer ? 256 : 1024;  // there, a thread costs 1 MB

// out[thread] = how many threads of the block, whether one, whether all have an odd x. Any size of block.
__global__ void odd_in_block(const int* x, int* out) {
    const int odd = x[threadIdx.x] % 2;
    const int count = __syncthreads_count(odd);
    const int any = __syncthreads_or(odd);
    const int all = __syncthreads_and(odd);
    out[threadIdx.x] = count * 4 + any * 2 + all;
}

void votes_of_blocks() {
    for (const unsigned threads : {1u, 31u, 64u, 100u, kManyThreads})
        for (const int odd : {0, 1, 2}) {  // none, all, every second
            std::vector<int> x(threads);
            for (unsigned i = 0; i < threads; ++i) x[i] = odd == 2 ? static_cast<int>(i % 2) : odd;
            const int count = std::accumulate(x.begin(), x.end(), 0);
            std::vector<int> out(threads, -1);
            launch("odd_in_block", odd_in_block, dim3(1), dim3(threads), 0, nullptr, x.data(), out.data());
            const int all = count == static_cast<int>(threads);
            for (const int found : out) CHECK(found == count * 4 + (count != 0) * 2 + all);
        }
}

// What every lane of one warp gets from each kind of shuffle.
template <typename T>
__global__ void shuffles(const T* x, T* out, int width) {
    const T mine = x[threadIdx.x];
    out[threadIdx.x] = __shfl_sync(kFull, mine, 3, width);
    out[32 + threadIdx.x] = __shfl_down_sync(kFull, mine, 3, width);
    out[64 + threadIdx.x] = __shfl_up_sync(kFull, mine, 3u, width);
    out[96 + threadIdx.x] = __shfl_xor_sync(kFull, mine, 5, width);
}

template <typename T>
void shuffles_of() {
    std::vector<T> x(32);
    for (size_t i = 0; i < 32; ++i) x[i] = static_cast<T>(T(1) / T(3) + T(1'000'003) * T(i));
    for (const int width : {1, 2, 4, 8, 16, 32}) {
        std::vector<T> out(128);
        launch("shuffles", shuffles<T>, dim3(1), dim3(32), 0, nullptr, x.data(), out.data(), width);
        for (int lane = 0; lane < 32; ++lane) {
            const int first = lane / width * width;
            const auto at = [&](int source) { return x[static_cast<size_t>(source)]; };
            const auto found = [&](int kind) { return out[static_cast<size_t>(32 * kind + lane)]; };
            CHECK(found(0) == at(first + 3 % width));
            CHECK(found(1) == at(lane + 3 < first + width ? lane + 3 : lane));
            CHECK(found(2) == at(lane - 3 >= first ? lane - 3 : lane));
            CHECK(found(3) == at((lane ^ 5) < first + width ? lane ^ 5 : lane));
        }
    }
}

// Lanes by their number mod 3 meet a different number of times, the whole warp in between.
__global__ void masks(unsigned* out) {
    const unsigned kind = threadIdx.x % 3;
    const unsigned mask = (kind == 0 ? 0x49249249u : kind == 1 ? 0x92492492u : 0x24924924u);
    unsigned sum = 0;
    for (unsigned round = 0; round < 5; ++round) {
        for (unsigned i = 0; i <= kind + round % 2; ++i) {
            sum += __ballot_sync(mask, threadIdx.x / 3 % 2 == 0);
            sum += __any_sync(mask, threadIdx.x == kind) != 0 ? 1 : 0;
        }
        if (__all_sync(kFull, round < 5)) ++sum;
    }
    out[threadIdx.x] = sum;
}

void meetings_by_mask() {
    std::vector<unsigned> out(32);
    launch("masks", masks, dim3(1), dim3(32), 0, nullptr, out.data());
    for (unsigned lane = 0; lane < 32; ++lane) {
        const unsigned kind = lane % 3;
        unsigned votes = 0;
        for (unsigned other = kind; other < 32; other += 3) votes |= (other / 3 % 2 == 0 ? 1u : 0u) << other;
        const unsigned meetings = 5 * (kind + 1) + 2;
        CHECK(out[lane] == meetings * (votes + 1) + 5);
    }
}

__global__ void where_am_i(unsigned* visits, dim3 grid, dim3 block) {
    const bool as_launched = gridDim.x == grid.x && gridDim.y == grid.y && gridDim.z == grid.z &&
                             blockDim.x == block.x && blockDim.y == block.y && blockDim.z == block.z;
    const unsigned b = (blockIdx.z * grid.y + blockIdx.y) * grid.x + blockIdx.x;
    const unsigned t = (threadIdx.z * block.y + threadIdx.y) * block.x + threadIdx.x;
    if (as_launched) visits[b * block.x * block.y * block.z + t] += 1;
}

void every_thread_once() {
    for (const dim3 grid : {dim3(1), dim3(7), dim3(3, 2, 4), dim3(1, 1, 9)})
        for (const dim3 block : {dim3(1), dim3(48), dim3(5, 3, 2)}) {
            std::vector<unsigned> visits(grid.x * grid.y * grid.z * block.x * block.y * block.z);
            launch("where_am_i", where_am_i, grid, block, 0, nullptr, visits.data(), grid, block);
            for (const unsigned visit : visits) CHECK(visit == 1);
        }
}

__global__ void atomics(unsigned long long* sum, unsigned long long* largest, unsigned* high, int* most) {
    const unsigned long long mine = (1ull << 40) + threadIdx.x;
    atomicAdd(sum, mine);
    atomicMax(largest, mine);
    atomicMax(high, 0x80000000u + threadIdx.x);
    atomicMax(most, static_cast<int>(threadIdx.x) - 40);
}

void wide_atomics() {
    std::vector<unsigned long long> wide = {5, 0};
    std::vector<unsigned> high = {1};
    std::vector<int> most = {-50};
    launch("atomics", atomics, dim3(2), dim3(33), 0, nullptr, wide.data(), wide.data() + 1, high.data(), most.data());
    CHECK(wide[0] == 5 + 66 * (1ull << 40) + 32 * 33 && wide[1] == (1ull << 40) + 32);
    CHECK(high[0] == 0x80000020u && most[0] == -8);
}

// Shared memory is not what the block before left.
__global__ void undefined_at_start(const float* garbage, unsigned* found) {
    GPU_SHARED(float, left, [8]);
    GPU_DYN_SHARED(float, dynamic);
    if (threadIdx.x < 8)
        found[blockIdx.x * 8 + threadIdx.x] = __float_as_uint(left[threadIdx.x] + dynamic[threadIdx.x]);
    __syncthreads();
    if (threadIdx.x < 8) left[threadIdx.x] = dynamic[threadIdx.x] = garbage[0];
}

void shared_memory_of_a_block_is_its_own() {
    const float garbage = 1;
    std::vector<unsigned> found(6 * 8);
    launch("undefined_at_start", undefined_at_start, dim3(6), dim3(32), 8 * sizeof(float), nullptr, &garbage,
           found.data());
    for (const unsigned bits : found) CHECK(std::isnan(__uint_as_float(bits)));
}

__global__ void nothing() {}

bool refused(dim3 grid, dim3 block, int64_t shared_bytes) {
    try {
        launch("an operation", nothing, grid, block, static_cast<size_t>(shared_bytes), nullptr);
    } catch (const std::runtime_error& error) {
        CHECK(std::strncmp(error.what(), "an operation: cudaError", 23) == 0);
        return true;
    }
    return false;
}

void sizes_that_no_gpu_takes() {
    CHECK(!refused(dim3(1), dim3(kManyThreads), cuda::shared_bytes_per_block()));
    CHECK(refused(dim3(1), dim3(kManyThreads), cuda::shared_bytes_per_block() + 1));
    CHECK(refused(dim3(1), dim3(1025), 0) && refused(dim3(1), dim3(32, 33), 0) && refused(dim3(1), dim3(1, 1, 65), 0));
    CHECK(refused(dim3(1), dim3(0), 0) && refused(dim3(1), dim3(1, 0), 0) && refused(dim3(0), dim3(1), 0));
    CHECK(refused(dim3(1u << 31), dim3(1), 0) && refused(dim3(1, 65536), dim3(1), 0));
    CHECK(refused(dim3(1, 1, 65536), dim3(1), 0) && refused(dim3(1, 0), dim3(1), 0) &&
          refused(dim3(1, 1, 0), dim3(1), 0));
    CHECK(!refused(dim3(1, 3, 5), dim3(2, 2, 64), 0));
}

// out[i] = the sum of the block's numbers, by a loop of barriers.
__global__ void sums_by_barriers(const int* x, int* out) {
    GPU_SHARED(int, sums, [64]);
    sums[threadIdx.x] = x[threadIdx.x];
    for (unsigned step = 32; step != 0; step /= 2) {
        __syncthreads();
        if (threadIdx.x < step) sums[threadIdx.x] += sums[threadIdx.x + step];
    }
    __syncthreads();
    out[blockIdx.x * 64 + threadIdx.x] = sums[0];
}

void launches_from_many_threads() {
    std::vector<std::thread> threads;
    for (int i = 0; i < 3; ++i)
        threads.emplace_back([i] {
            std::vector<int> x(64);
            std::iota(x.begin(), x.end(), i);
            for (int repeat = 0; repeat < 3; ++repeat) {
                std::vector<int> out(3 * 64, -1);
                launch("sums_by_barriers", sums_by_barriers, dim3(3), dim3(64), 0, nullptr, x.data(), out.data());
                for (const int sum : out) CHECK(sum == 64 * i + 64 * 63 / 2);
            }
        });
    for (std::thread& thread : threads) thread.join();
}

void zeroes() {
    std::vector<int> x(5, 1);
    cuda::fill_zero("zeroes", x.data() + 1, 3 * sizeof(int), nullptr);
    cuda::fill_zero("zeroes", nullptr, 0, nullptr);
    CHECK(x == std::vector<int>({1, 0, 0, 0, 1}));
}

}  // namespace

void test_runner() {
    votes_of_blocks();
    shuffles_of<int>();
    shuffles_of<float>();
    shuffles_of<unsigned long long>();
    shuffles_of<double>();
    meetings_by_mask();
    every_thread_once();
    wide_atomics();
    shared_memory_of_a_block_is_its_own();
    sizes_that_no_gpu_takes();
    launches_from_many_threads();
    zeroes();
}

}  // namespace dcmerge

// cub_baseline.cu - selection and histograms of magnitudes by NVIDIA's CUB: what the kernels here are timed against.
//
//   dcm_cub_kth_by_sort        magnitudes sorted in descending order (DeviceRadixSort; rows of at most 65536 elements
//                              together, by DeviceSegmentedRadixSort), then the wanted one
//   dcm_cub_kth_by_histogram   digits of 16 bits: DeviceHistogram, DeviceScan of its counts from the top, and a search
//   dcm_cub_histogram          DeviceHistogram of one digit
//
// Every function returns a cudaError_t. With temp null it only writes the bytes of temporary memory that it needs. All
// pointers but `bytes` are device memory; itemsize is 4 (float) or 8 (double).

#include <thrust/iterator/counting_iterator.h>
#include <thrust/iterator/reverse_iterator.h>
#include <thrust/iterator/transform_iterator.h>

#include <cstdint>
#include <cstring>
#include <cub/device/device_histogram.cuh>
#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>
#include <cub/device/device_segmented_radix_sort.cuh>

namespace {

using Count = unsigned long long;

constexpr int kThreads = 256;
constexpr int kDigitBits = 16;
constexpr int64_t kShortRow = 65536;

template <typename Key>
constexpr int kKeyBits = 8 * sizeof(Key) - 1;

// Pieces of one allocation, in order; with none, only their sizes are added up.
struct Pieces {
    char* base;
    size_t used = 0;

    template <typename T>
    T* take(size_t count) {
        used = (used + 255) / 256 * 256;
        T* piece = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
        used += count * sizeof(T);
        return piece;
    }
};

// What a search has found so far: leading bits of the key, and the rank among those that have them, 1 the largest.
struct Found {
    Count prefix;
    Count rank;
};

template <typename Key>
struct DigitOf {
    int shift;
    int width;
    const Found* found;  // null: every element counts

    // -1, outside of all bins, for a key with other leading bits
    __host__ __device__ int operator()(Key bits) const {
        const Key key = bits & (~Key{0} >> 1);
        const Count prefix = found == nullptr ? 0 : found->prefix;
        if (found != nullptr && (Count{key} >> (shift + width)) != prefix) return -1;
        return static_cast<int>((key >> shift) & ((Key{1} << width) - 1));
    }
};

struct RowBegin {
    int64_t length;
    __host__ __device__ int64_t operator()(int64_t row) const { return row * length; }
};

template <typename Key>
__global__ void take_magnitudes(const Key* x, Key* keys, int64_t count) {
    const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
    if (i < count) keys[i] = x[i] & (~Key{0} >> 1);
}

template <typename Key>
__global__ void copy_ranked(const Key* sorted, int64_t rows, int64_t length, int64_t count, Key* out) {
    const int64_t row = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
    if (row < rows) out[row] = sorted[row * length + count - 1];
}

__global__ void begin_search(Found* found, int64_t count) { *found = {0, static_cast<Count>(count)}; }

// above[i]: how many elements are in the i + 1 highest bins.
__global__ void search(const Count* above, int width, const Found* found, Found* next) {
    const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    const int bins = 1 << width;
    if (i >= bins) return;
    const Count before = i == 0 ? 0 : above[i - 1];
    if (before < found->rank && found->rank <= above[i])
        *next = {found->prefix << width | static_cast<Count>(bins - 1 - i), found->rank - before};
}

template <typename Key>
__global__ void write_key(const Found* found, Key* out) {
    *out = static_cast<Key>(found->prefix);
}

unsigned blocks_of(int64_t count) { return static_cast<unsigned>((count + kThreads - 1) / kThreads); }

template <typename Key>
cudaError_t sort_rows(void* temp, size_t& bytes, const Key* keys, Key* sorted, int64_t rows, int64_t length,
                      cudaStream_t stream) {
    if (length <= kShortRow) {
        const auto begin = thrust::make_transform_iterator(thrust::make_counting_iterator<int64_t>(0), RowBegin{length});
        return cub::DeviceSegmentedRadixSort::SortKeysDescending(temp, bytes, keys, sorted, rows * length, rows, begin,
                                                                 begin + 1, 0, kKeyBits<Key>, stream);
    }
    cudaError_t status = cudaSuccess;
    for (int64_t row = 0; row < (temp == nullptr ? 1 : rows) && status == cudaSuccess; ++row)
        status = cub::DeviceRadixSort::SortKeysDescending(temp, bytes, keys + row * length, sorted + row * length,
                                                          length, 0, kKeyBits<Key>, stream);
    return status;
}

template <typename Key>
cudaError_t kth_by_sort(void* temp, size_t* bytes, const Key* x, int64_t rows, int64_t length, int64_t count, Key* out,
                        cudaStream_t stream) {
    size_t sorting = 0;
    const cudaError_t asked = sort_rows<Key>(nullptr, sorting, nullptr, nullptr, rows, length, stream);
    if (asked != cudaSuccess) return asked;
    Pieces pieces{static_cast<char*>(temp)};
    Key* keys = pieces.take<Key>(rows * length);
    Key* sorted = pieces.take<Key>(rows * length);
    char* scratch = pieces.take<char>(sorting);
    if (temp == nullptr) {
        *bytes = pieces.used;
        return cudaSuccess;
    }
    take_magnitudes<<<blocks_of(rows * length), kThreads, 0, stream>>>(x, keys, rows * length);
    const cudaError_t status = sort_rows(scratch, sorting, keys, sorted, rows, length, stream);
    if (status != cudaSuccess) return status;
    copy_ranked<<<blocks_of(rows), kThreads, 0, stream>>>(sorted, rows, length, count, out);
    return cudaGetLastError();
}

template <typename Key>
cudaError_t count_digit(void* temp, size_t& bytes, const Key* x, int64_t length, DigitOf<Key> digit, Count* counts,
                        cudaStream_t stream) {
    const int bins = 1 << digit.width;
    return cub::DeviceHistogram::HistogramEven(temp, bytes, thrust::make_transform_iterator(x, digit), counts, bins + 1,
                                               0, bins, static_cast<int>(length), stream);
}

cudaError_t sum_from_top(void* temp, size_t& bytes, Count* counts, int width, Count* above, cudaStream_t stream) {
    const int bins = 1 << width;
    return cub::DeviceScan::InclusiveSum(temp, bytes, thrust::make_reverse_iterator(counts + bins), above, bins, stream);
}

template <typename Key>
cudaError_t kth_by_histogram(void* temp, size_t* bytes, const Key* x, int64_t rows, int64_t length, int64_t count,
                             Key* out, cudaStream_t stream) {
    constexpr int kDigits = (kKeyBits<Key> + kDigitBits - 1) / kDigitBits;
    size_t counting = 0;
    size_t summing = 0;
    cudaError_t status = count_digit<Key>(nullptr, counting, x, length, {0, kDigitBits, nullptr}, nullptr, stream);
    if (status == cudaSuccess) status = sum_from_top(nullptr, summing, nullptr, kDigitBits, nullptr, stream);
    if (status != cudaSuccess) return status;
    Pieces pieces{static_cast<char*>(temp)};
    Count* counts = pieces.take<Count>(1 << kDigitBits);
    Count* above = pieces.take<Count>(1 << kDigitBits);
    Found* found = pieces.take<Found>(kDigits + 1);
    char* count_scratch = pieces.take<char>(counting);
    char* sum_scratch = pieces.take<char>(summing);
    if (temp == nullptr) {
        *bytes = pieces.used;
        return cudaSuccess;
    }
    for (int64_t row = 0; row < rows; ++row) {
        begin_search<<<1, 1, 0, stream>>>(found, count);
        int shift = kKeyBits<Key>;
        for (int index = 0; index < kDigits; ++index) {
            const int width = shift < kDigitBits ? shift : kDigitBits;
            shift -= width;
            const DigitOf<Key> digit{shift, width, found + index};
            status = count_digit(count_scratch, counting, x + row * length, length, digit, counts, stream);
            if (status == cudaSuccess) status = sum_from_top(sum_scratch, summing, counts, width, above, stream);
            if (status != cudaSuccess) return status;
            search<<<blocks_of(1 << width), kThreads, 0, stream>>>(above, width, found + index, found + index + 1);
        }
        write_key<<<1, 1, 0, stream>>>(found + kDigits, out + row);
    }
    return cudaGetLastError();
}

template <typename Key>
cudaError_t histogram(void* temp, size_t* bytes, const Key* x, int64_t length, int shift, int width, Count* out,
                      cudaStream_t stream) {
    size_t counting = *bytes;
    const cudaError_t status = count_digit<Key>(temp, counting, x, length, {shift, width, nullptr}, out, stream);
    if (temp == nullptr) *bytes = counting;
    return status;
}

}  // namespace

extern "C" {

int dcm_cub_kth_by_sort(void* temp, size_t* bytes, const void* x, int64_t rows, int64_t length, int64_t count,
                        void* out, int itemsize, void* stream) {
    const auto queue = static_cast<cudaStream_t>(stream);
    return itemsize == 4 ? kth_by_sort(temp, bytes, static_cast<const uint32_t*>(x), rows, length, count,
                                       static_cast<uint32_t*>(out), queue)
                         : kth_by_sort(temp, bytes, static_cast<const uint64_t*>(x), rows, length, count,
                                       static_cast<uint64_t*>(out), queue);
}

int dcm_cub_kth_by_histogram(void* temp, size_t* bytes, const void* x, int64_t rows, int64_t length, int64_t count,
                             void* out, int itemsize, void* stream) {
    const auto queue = static_cast<cudaStream_t>(stream);
    return itemsize == 4 ? kth_by_histogram(temp, bytes, static_cast<const uint32_t*>(x), rows, length, count,
                                            static_cast<uint32_t*>(out), queue)
                         : kth_by_histogram(temp, bytes, static_cast<const uint64_t*>(x), rows, length, count,
                                            static_cast<uint64_t*>(out), queue);
}

int dcm_cub_histogram(void* temp, size_t* bytes, const void* x, int64_t length, int shift, int width, void* out,
                      int itemsize, void* stream) {
    const auto queue = static_cast<cudaStream_t>(stream);
    const auto counts = static_cast<Count*>(out);
    return itemsize == 4
               ? histogram(temp, bytes, static_cast<const uint32_t*>(x), length, shift, width, counts, queue)
               : histogram(temp, bytes, static_cast<const uint64_t*>(x), length, shift, width, counts, queue);
}

const char* dcm_cub_error(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

}  // extern "C"

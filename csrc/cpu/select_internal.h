// select_internal.h - the selection in one row, for kernels that select in what they have just computed.
#pragma once

#include <cstdint>

namespace dcmerge::cpu {

// The k-th largest magnitude of row[0 .. length), 1 <= k <= length.
template <typename Float>
Float select_row(const Float* row, int64_t length, int64_t k, int threads);

// The largest magnitude of row[0 .. length), 0 of none.
template <typename Float>
Float largest_magnitude(const Float* row, int64_t length);

}  // namespace dcmerge::cpu

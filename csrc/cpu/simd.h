// Vector code without intrinsics. A function marked LVRPO_MULTIVERSION is compiled for AVX-512, AVX2 and the baseline,
// and the loader picks one when the library is opened; its loops are vectorised by the compiler, so everything they call
// must be LVRPO_INLINE. A lambda inside such a function is a function of its own and would stay at the baseline: give
// parallel_for a lambda that calls the multiversioned function, not the other way round.
#pragma once

#include <cstdint>

#include "common/math.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define LVRPO_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define LVRPO_MULTIVERSION
#endif

namespace lvrpo {

// Asks for memory that is read soon; any address will do. The hardware looks ahead on its own but not beyond a page, and
// at the speed of these loops that is a stall per page.
template <typename scalar_t>
LVRPO_INLINE void prefetch(const scalar_t* from, int64_t count) {
  constexpr int64_t line = 64 / sizeof(scalar_t);
  for (int64_t i = 0; i < count; i += line) __builtin_prefetch(from + i);
}

}  // namespace lvrpo

// Where log-ratios stop, for every loss that has ratios.
#pragma once

#include "common/math.h"

namespace lvrpo {

// The log-ratio to take an exponential of; an infinite limit is none, and a NaN stays a NaN.
template <typename acc>
LVRPO_INLINE acc saturate(acc log_ratio, acc limit) {
  return log_ratio < -limit ? -limit : log_ratio > limit ? limit : log_ratio;
}

// Whether it is past the limit, where its gradient is 0.
template <typename acc>
LVRPO_INLINE bool is_saturated(acc log_ratio, acc limit) {
  return log_ratio < -limit || log_ratio > limit;
}

}  // namespace lvrpo

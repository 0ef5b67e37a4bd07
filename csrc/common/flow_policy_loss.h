// One (image, step) pair of flow_policy_loss, from three sums over its elements to its terms of the loss and the metrics,
// one copy for the CPU and for CUDA. Formulas: docs/ops/flow_policy_loss.md.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>

#include "common/latents.h"
#include "common/log_ratio.h"
#include "common/math.h"
#include "common/names.h"
#include "common/tensors.h"

namespace lvrpo::flow {

// What they mean is said in lvrpo/params/flow.py.
LVRPO_CHOICES(Variant, ppo, guard, dppo)
LVRPO_CHOICES(KlForm, velocity_mse, gaussian, no_dt, dmu2)
LVRPO_TABLE(Numbers, double, clip_low, clip_high, adv_clip, log_ratio_scale, log_ratio_limit, tau, beta);
// Those of FlowLossMetrics; a minimum has its sign turned.
LVRPO_TABLE(MetricSums, double, policy_loss, kl_velocity_mse, kl_gaussian, kl_no_dt, kl_dmu2, kl_old, ratio_mean,
            abs_log_ratio, clip_fraction_low, clip_fraction_high, active_samples);
LVRPO_TABLE(MetricExtremes, double, ratio_min, ratio_max);

inline constexpr double INF = std::numeric_limits<double>::infinity();

struct Params : Numbers {
  Variant variant;
  KlForm kl;

  Params(int64_t variant, int64_t kl, const Tensor& numbers)
      : variant(as_choice<Variant>(variant, "variant")), kl(as_choice<KlForm>(kl, "kl")) {
    check_dtype(numbers, ScalarType::Double, "numbers");
    check_contiguous(numbers, "numbers");
    check_size(numbers, 0, COLUMNS_OF<Numbers>, "numbers");
    static_cast<Numbers&>(*this) = *reinterpret_cast<const Numbers*>(numbers.const_data_ptr<double>());
  }
};

// What a call has one of per sample.
template <typename acc>
struct Samples {
  SampleNumbers<acc> c_v, std, dt, advantages;
  SampleNumbers<acc> weights;  // null: ones
  const bool* mask;            // null: all count

  // A deterministic step has no density; the Python layer refuses it where it may look at values, like a weight that is
  // not finite.
  LVRPO_INLINE bool is_active(int64_t n) const {
    return (mask == nullptr || mask[n]) && std[n] > acc(0) && std[n] < acc(INF);
  }
  LVRPO_INLINE double weight(int64_t n) const {
    const double weight = weights.numbers ? static_cast<double>(weights[n]) : 1.0;
    return weight < INF ? weight : 0.0;
  }
};

// The tensors behind Samples.
template <typename acc>
class SampleTensors {
 public:
  SampleTensors(int64_t samples, const Tensor& c_v, const Tensor& std, const Tensor& dt, const Tensor& advantages,
                const std::optional<Tensor>& policy_weights, const std::optional<Tensor>& mask)
      : c_v_(c_v, samples, "c_v"), std_(std, samples, "std"), dt_(dt, samples, "dt"),
        advantages_(advantages, samples, "advantages") {
    check_size(advantages, 0, samples, "advantages");
    if (policy_weights) {
      check_size(*policy_weights, 0, samples, "policy_weights");
      weights_.emplace(*policy_weights, samples, "policy_weights");
    }
    if (mask) {
      check_dtype(*mask, ScalarType::Bool, "mask");
      check_size(*mask, 0, samples, "mask");
      mask_ = dense(*mask);
    }
  }

  Samples<acc> numbers() const {
    return {c_v_.numbers(), std_.numbers(), dt_.numbers(), advantages_.numbers(),
            weights_ ? weights_->numbers() : SampleNumbers<acc>{nullptr, 0},
            mask_ ? mask_->const_data_ptr<bool>() : nullptr};
  }

 private:
  PerSample<acc> c_v_, std_, dt_, advantages_;
  std::optional<PerSample<acc>> weights_;
  std::optional<Tensor> mask_;
};

struct Sums {
  double noise = 0;      // z (v - v_old)
  double old = 0;        // (v - v_old)^2
  double reference = 0;  // (v - v_ref)^2

  LVRPO_INLINE Sums& operator+=(const Sums& other) {
    noise += other.noise;
    old += other.old;
    reference += other.reference;
    return *this;
  }
  LVRPO_INLINE friend Sums operator+(Sums a, const Sums& b) { return a += b; }
};

// The nearest finite number: infinity times the 0 of two equal velocities would be NaN.
LVRPO_INLINE double finite(double x) {
  constexpr double largest = std::numeric_limits<double>::max();
  return std::clamp(x, -largest, largest);
}

// d loss / d velocity = noise z + old (v - v_old) + reference (v - v_ref).
template <typename acc>
struct Direction {
  acc noise, old, reference;

  LVRPO_INLINE bool is_zero() const { return noise == acc(0) && old == acc(0) && reference == acc(0); }
  LVRPO_INLINE bool is_finite() const {
    return std::isfinite(noise) && std::isfinite(old) && std::isfinite(reference);
  }
  LVRPO_INLINE acc gradient(acc v, acc v_old, acc z) const { return noise * z + old * (v - v_old); }
  LVRPO_INLINE acc gradient(acc v, acc v_old, acc z, acc v_ref) const {
    return gradient(v, v_old, z) + reference * (v - v_ref);
  }
};

// Times the gradient of the loss. In fp32 it may overflow, for a std so small that its factors are too large: then the
// one that follows holds it.
template <typename acc>
LVRPO_INLINE Direction<acc> scaled(const double* direction, acc upstream) {
  return {upstream * static_cast<acc>(direction[0]), upstream * static_cast<acc>(direction[1]),
          upstream * static_cast<acc>(direction[2])};
}
LVRPO_INLINE Direction<double> scaled_finite(const double* direction, double upstream) {
  return {finite(upstream * direction[0]), finite(upstream * direction[1]), finite(upstream * direction[2])};
}

struct Sample {
  double elements, c_v, std, abs_dt, advantage;
  Sums sums;
  double c, s;  // c_v and std in units of a power of two next to the std, of which no square is 0 or infinite

  LVRPO_INLINE Sample(double elements, double c_v, double std, double dt, double advantage, const Sums& sums)
      : elements(elements), c_v(c_v), std(std), abs_dt(std::abs(dt)), advantage(advantage), sums(sums) {
    constexpr double far = 1e150;
    int exponent;
    s = std::frexp(std, &exponent);
    c = std::clamp(std::ldexp(c_v, -exponent), -far, far);
  }
  template <typename acc>
  LVRPO_INLINE Sample(const Samples<acc>& all, int64_t n, int64_t elements, const Sums& sums)
      : Sample(static_cast<double>(elements), all.c_v[n], all.std[n], all.dt[n], all.advantages[n], sums) {}

  LVRPO_INLINE double kl_old() const { return c * c * sums.old / (2 * s * s * elements); }

  // Every form is a factor times the mean of (v - v_ref)^2.
  LVRPO_INLINE double kl_factor(KlForm form) const {
    switch (form) {
      case KlForm::velocity_mse: return 1;
      case KlForm::gaussian: return c * c / (2 * s * s);
      case KlForm::no_dt: return c * c / (2 * s * s) * abs_dt;
      case KlForm::dmu2: return c_v * c_v;
    }
    return std::numeric_limits<double>::quiet_NaN();
  }
  LVRPO_INLINE double kl(KlForm form) const { return kl_factor(form) * sums.reference / elements; }
};

struct Policy {
  double loss, log_ratio, ratio;
  bool low, high;             // the gradient is cut, at A < 0 or at A > 0
  double dnoise, dold;        // d loss / d v = dnoise z + dold (v - v_old)
};

// `weight` multiplies loss and gradient; 0 takes both, whatever the advantage is.
LVRPO_INLINE Policy policy_of(const Sample& x, const Params& params, double weight) {
  const double scale = params.log_ratio_scale > 0 ? params.log_ratio_scale * x.elements : 1;
  // log rho = noise sums.noise + old sums.old / 2
  const bool guard = params.variant == Variant::guard;
  const double noise = guard ? scale * x.c_v / x.elements : scale * x.c / (x.s * x.elements);
  const double old = guard ? 0 : -scale * x.c * x.c / (x.s * x.s * x.elements);
  Policy p{};
  p.log_ratio = noise * x.sums.noise + old * x.sums.old / 2;
  p.ratio = std::exp(saturate(p.log_ratio, params.log_ratio_limit));

  const double a = std::clamp(x.advantage, -params.adv_clip, params.adv_clip);
  double at_low = 0, at_high = 0;
  switch (params.variant) {
    case Variant::dppo: {
      const bool diverged = x.kl_old() >= params.tau;
      p.low = diverged && a < 0 && p.ratio < 1;
      p.high = diverged && a > 0 && p.ratio > 1;
      break;
    }
    case Variant::ppo:
    case Variant::guard:
      at_low = 1 - params.clip_low;
      at_high = 1 + params.clip_high;
      p.low = a < 0 && p.ratio < at_low;
      p.high = a > 0 && p.ratio > at_high;
  }
  if (guard) weight = x.abs_dt > 0 ? weight / x.abs_dt : 0;
  // Dropped, not multiplied: the advantage may be NaN, and without a limit the ratio infinite.
  if (!(weight > 0 && std::abs(x.advantage) < INF) || a == 0) return p;
  p.loss = -a * (p.low ? at_low : p.high ? at_high : p.ratio) * weight;
  const bool flat = p.low || p.high || is_saturated(p.log_ratio, params.log_ratio_limit);
  const double dlog_ratio = flat ? 0 : -a * p.ratio * weight;
  p.dnoise = dlog_ratio * noise;
  p.dold = dlog_ratio * old;
  return p;
}

// What the samples that count add up to.
struct Totals {
  MetricSums sums{};
  double loss = 0, lowest = INF, highest = -INF;

  // `share` divides the loss by the denominator. Writes the sample's direction.
  LVRPO_INLINE void add(const Sample& sample, const Params& params, double weight, double share, double* direction) {
    const Policy policy = policy_of(sample, params, weight);
    loss += share * (params.beta > 0 ? policy.loss + params.beta * sample.kl(params.kl) : policy.loss);
    direction[0] = finite(share * policy.dnoise);
    direction[1] = finite(share * policy.dold);
    direction[2] = finite(share * params.beta * 2 * sample.kl_factor(params.kl) / sample.elements);
    const double ratio = finite(policy.ratio);
    lowest = ratio < lowest ? ratio : lowest;
    highest = ratio > highest ? ratio : highest;
    sums.policy_loss += policy.loss;
    sums.kl_velocity_mse += sample.kl(KlForm::velocity_mse);
    sums.kl_gaussian += sample.kl(KlForm::gaussian);
    sums.kl_no_dt += sample.kl(KlForm::no_dt);
    sums.kl_dmu2 += sample.kl(KlForm::dmu2);
    sums.kl_old += sample.kl_old();
    sums.ratio_mean += ratio;
    sums.abs_log_ratio += std::abs(policy.log_ratio);
    sums.clip_fraction_low += policy.low;
    sums.clip_fraction_high += policy.high;
    sums.active_samples += 1;
  }

  LVRPO_INLINE void write(double* to_sums, double* to_extremes) const {
    *reinterpret_cast<MetricSums*>(to_sums) = sums;
    *reinterpret_cast<MetricExtremes*>(to_extremes) = {-lowest, highest};
  }
};

}  // namespace lvrpo::flow

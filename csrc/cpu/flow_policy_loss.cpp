// Three sums per sample carry everything the loss and its metrics need; the gradient is one more elementwise pass.
// Formulas: docs/ops/flow_policy_loss.md.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/log_ratio.h"
#include "common/names.h"
#include "cpu/simd.h"
#include "cpu/latents.h"

namespace lvrpo {
namespace {

using std::optional;

// What they mean is said in lvrpo/params/flow.py.
LVRPO_CHOICES(Variant, ppo, guard, dppo)
LVRPO_CHOICES(KlForm, velocity_mse, gaussian, no_dt, dmu2)
LVRPO_TABLE(Numbers, double, clip_low, clip_high, adv_clip, log_ratio_scale, log_ratio_limit, tau, beta);
// Those of FlowLossMetrics; a minimum has its sign turned.
LVRPO_TABLE(MetricSums, double, policy_loss, kl_velocity_mse, kl_gaussian, kl_no_dt, kl_dmu2, kl_old, ratio_mean,
            abs_log_ratio, clip_fraction_low, clip_fraction_high, active_samples);
LVRPO_TABLE(MetricExtremes, double, ratio_min, ratio_max);

const DeclareNames DECLARE("flow_policy_loss", {{"variant", names_of(Variant{})}, {"kl", names_of(KlForm{})}},
                           {{"numbers", Numbers::NAMES},
                            {"sums", MetricSums::NAMES},
                            {"extremes", MetricExtremes::NAMES}});

constexpr double INF = std::numeric_limits<double>::infinity();

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

struct Sums {
  double noise = 0;      // z (v - v_old)
  double old = 0;        // (v - v_old)^2
  double reference = 0;  // (v - v_ref)^2

  Sums& operator+=(const Sums& other) {
    noise += other.noise;
    old += other.old;
    reference += other.reference;
    return *this;
  }
};

template <typename scalar_t, typename acc>
LVRPO_MULTIVERSION Sums block_sums(const scalar_t* v, const acc* v_old, const acc* z, const acc* v_ref, int64_t n) {
  double noise = 0, old = 0, reference = 0;
#pragma omp simd reduction(+ : noise, old)
  for (int64_t i = 0; i < n; ++i) {
    const double d = static_cast<double>(static_cast<acc>(v[i])) - static_cast<double>(v_old[i]);
    noise += static_cast<double>(z[i]) * d;
    old += d * d;
  }
  if (v_ref != nullptr) {
#pragma omp simd reduction(+ : reference)
    for (int64_t i = 0; i < n; ++i) {
      const double d = static_cast<double>(static_cast<acc>(v[i])) - static_cast<double>(v_ref[i]);
      reference += d * d;
    }
  }
  return {noise, old, reference};
}

// The nearest finite number: infinity times the 0 of two equal velocities would be NaN.
inline double finite(double x) {
  constexpr double largest = std::numeric_limits<double>::max();
  return std::clamp(x, -largest, largest);
}

// d loss / d velocity = noise z + old (v - v_old) + reference (v - v_ref).
template <typename acc>
struct Direction {
  acc noise, old, reference;
  bool is_zero() const { return noise == acc(0) && old == acc(0) && reference == acc(0); }
  bool is_finite() const { return std::isfinite(noise) && std::isfinite(old) && std::isfinite(reference); }
};

// acc is double for a std so small that its factors are too large for a float.
template <typename scalar_t, typename data_t, typename acc>
LVRPO_MULTIVERSION void block_gradient(const scalar_t* v, const data_t* v_old, const data_t* z, const data_t* v_ref,
                                       scalar_t* dv, int64_t n, Direction<acc> by) {
  if (v_ref == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i)
      dv[i] = static_cast<scalar_t>(by.noise * z[i] + by.old * (static_cast<acc>(v[i]) - v_old[i]));
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const acc x = static_cast<acc>(v[i]);
    dv[i] = static_cast<scalar_t>(by.noise * z[i] + by.old * (x - v_old[i]) + by.reference * (x - v_ref[i]));
  }
}

// One (image, step) pair, from its sums to its terms of the loss and the metrics.
struct Sample {
  double elements, c_v, std, abs_dt, advantage;
  Sums sums;
  double c, s;  // c_v and std in units of a power of two next to the std, of which no square is 0 or infinite

  Sample(double elements, double c_v, double std, double dt, double advantage, const Sums& sums)
      : elements(elements), c_v(c_v), std(std), abs_dt(std::abs(dt)), advantage(advantage), sums(sums) {
    constexpr double far = 1e150;
    int exponent;
    s = std::frexp(std, &exponent);
    c = std::clamp(std::ldexp(c_v, -exponent), -far, far);
  }

  double kl_old() const { return c * c * sums.old / (2 * s * s * elements); }

  // Every form is a factor times the mean of (v - v_ref)^2.
  double kl_factor(KlForm form) const {
    switch (form) {
      case KlForm::velocity_mse: return 1;
      case KlForm::gaussian: return c * c / (2 * s * s);
      case KlForm::no_dt: return c * c / (2 * s * s) * abs_dt;
      case KlForm::dmu2: return c_v * c_v;
    }
    return std::numeric_limits<double>::quiet_NaN();
  }
  double kl(KlForm form) const { return kl_factor(form) * sums.reference / elements; }
};

struct Policy {
  double loss, log_ratio, ratio;
  bool low, high;             // the gradient is cut, at A < 0 or at A > 0
  double dnoise, dold;        // d loss / d v = dnoise z + dold (v - v_old)
};

// `weight` multiplies loss and gradient; 0 takes both, whatever the advantage is.
Policy policy_of(const Sample& x, const Params& params, double weight) {
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

std::tuple<Tensor, Tensor, Tensor, Tensor> flow_policy_loss_fwd(
    Tensor velocity, Tensor velocity_old, Tensor noise, optional<Tensor> velocity_ref, Tensor c_v, Tensor std,
    Tensor dt, Tensor advantages, optional<Tensor> mask, optional<Tensor> policy_weights, optional<Tensor> denominator,
    Tensor numbers, int64_t variant, int64_t kl) {
  const Params params(variant, kl, numbers);
  const LatentBlocks size(velocity);
  velocity = torch::stable::contiguous(velocity);
  velocity_old = size.contiguous(velocity_old, "velocity_old");
  noise = size.contiguous(noise, "noise");
  if (velocity_ref) velocity_ref = size.contiguous(*velocity_ref, "velocity_ref");
  check_size(advantages, 0, size.samples, "advantages");
  if (mask) {
    check_dtype(*mask, ScalarType::Bool, "mask");
    check_size(*mask, 0, size.samples, "mask");
    mask = torch::stable::contiguous(*mask);
  }
  if (policy_weights) check_size(*policy_weights, 0, size.samples, "policy_weights");
  LVRPO_CHECK(!denominator || denominator->numel() == 1, "denominator must hold one number");
  Tensor loss = torch::stable::new_empty(velocity_old, {});
  Tensor sums = torch::stable::new_empty(velocity_old, {COLUMNS_OF<MetricSums>}, ScalarType::Double);
  Tensor extremes = torch::stable::new_empty(velocity_old, {COLUMNS_OF<MetricExtremes>}, ScalarType::Double);
  Tensor directions = torch::stable::new_empty(velocity_old, {size.samples, 3}, ScalarType::Double);

  LVRPO_DISPATCH_FLOATING(velocity.scalar_type(), scalar_t, [&] {
    using acc = acc_t<scalar_t>;
    const PerSample<acc> factor(c_v, size.samples, "c_v"), deviation(std, size.samples, "std");
    const PerSample<acc> step(dt, size.samples, "dt"), advantage(advantages, size.samples, "advantages");
    optional<PerSample<acc>> weights;
    if (policy_weights) weights.emplace(*policy_weights, size.samples, "policy_weights");
    const bool* counts = mask ? mask->const_data_ptr<bool>() : nullptr;
    // A deterministic step has no density; the Python layer refuses it where it may look at values, like a weight that
    // is not finite.
    const auto is_active = [&](int64_t n) {
      return (counts == nullptr || counts[n]) && deviation[n] > acc(0) && deviation[n] < acc(INF);
    };
    const auto weight_of = [&](int64_t n) {
      const double weight = weights ? static_cast<double>((*weights)[n]) : 1.0;
      return weight < INF ? weight : 0.0;
    };

    const scalar_t* v = velocity.const_data_ptr<scalar_t>();
    const acc* v_old = data<acc>(velocity_old, "velocity_old");
    const acc* z = data<acc>(noise, "noise");
    const acc* v_ref = velocity_ref ? data<acc>(*velocity_ref, "velocity_ref") : nullptr;
    std::vector<Sums> partial(size.blocks());
    size.for_each_block([&](int64_t block, int64_t sample, int64_t begin, int64_t n) {
      if (!is_active(sample)) return;
      partial[block] =
          block_sums<scalar_t, acc>(v + begin, v_old + begin, z + begin, v_ref ? v_ref + begin : nullptr, n);
    });

    double active = 0;
    for (int64_t n = 0; n < size.samples; ++n) active += is_active(n);
    const double total = denominator ? static_cast<double>(data<acc>(*denominator, "denominator")[0]) : active;
    const double share = total > 0 ? 1 / total : 0;
    double* direction = directions.mutable_data_ptr<double>();
    std::fill_n(direction, 3 * size.samples, 0.0);
    MetricSums sum{};
    double total_loss = 0, lowest = INF, highest = -INF;
    for (int64_t n = 0; n < size.samples; ++n) {
      if (!is_active(n)) continue;
      const Sample sample(size.elements, factor[n], deviation[n], step[n], advantage[n], size.sum_of(partial, n));
      const Policy policy = policy_of(sample, params, weight_of(n));
      total_loss += share * (params.beta > 0 ? policy.loss + params.beta * sample.kl(params.kl) : policy.loss);
      direction[3 * n] = finite(share * policy.dnoise);
      direction[3 * n + 1] = finite(share * policy.dold);
      direction[3 * n + 2] = finite(share * params.beta * 2 * sample.kl_factor(params.kl) / sample.elements);
      const double ratio = finite(policy.ratio);
      lowest = std::min(lowest, ratio);
      highest = std::max(highest, ratio);
      sum.policy_loss += policy.loss;
      sum.kl_velocity_mse += sample.kl(KlForm::velocity_mse);
      sum.kl_gaussian += sample.kl(KlForm::gaussian);
      sum.kl_no_dt += sample.kl(KlForm::no_dt);
      sum.kl_dmu2 += sample.kl(KlForm::dmu2);
      sum.kl_old += sample.kl_old();
      sum.ratio_mean += ratio;
      sum.abs_log_ratio += std::abs(policy.log_ratio);
      sum.clip_fraction_low += policy.low;
      sum.clip_fraction_high += policy.high;
    }
    sum.active_samples = active;
    *reinterpret_cast<MetricSums*>(sums.mutable_data_ptr<double>()) = sum;
    *reinterpret_cast<MetricExtremes*>(extremes.mutable_data_ptr<double>()) = {-lowest, highest};
    loss.mutable_data_ptr<acc>()[0] = static_cast<acc>(total_loss);
  });
  return {loss, sums, extremes, directions};
}

Tensor flow_policy_loss_bwd(Tensor dloss, Tensor velocity, Tensor velocity_old, Tensor noise,
                            optional<Tensor> velocity_ref, Tensor directions) {
  const LatentBlocks size(velocity);
  velocity = torch::stable::contiguous(velocity);
  velocity_old = size.contiguous(velocity_old, "velocity_old");
  noise = size.contiguous(noise, "noise");
  directions = torch::stable::contiguous(directions);
  if (velocity_ref) velocity_ref = size.contiguous(*velocity_ref, "velocity_ref");
  LVRPO_CHECK(dloss.numel() == 1, "dloss must hold one number");
  LVRPO_CHECK(directions.numel() == 3 * size.samples, "directions must be [N, 3]");
  Tensor dvelocity = torch::stable::empty_like(velocity);

  LVRPO_DISPATCH_FLOATING(velocity.scalar_type(), scalar_t, [&] {
    using acc = acc_t<scalar_t>;
    const acc upstream = data<acc>(dloss, "dloss")[0];
    const double* d = data<double>(directions, "directions");
    const scalar_t* v = velocity.const_data_ptr<scalar_t>();
    const acc* v_old = data<acc>(velocity_old, "velocity_old");
    const acc* z = data<acc>(noise, "noise");
    const acc* v_ref = velocity_ref ? data<acc>(*velocity_ref, "velocity_ref") : nullptr;
    scalar_t* dv = dvelocity.mutable_data_ptr<scalar_t>();
    size.for_each_block([&](int64_t, int64_t sample, int64_t begin, int64_t n) {
      const double* f = d + 3 * sample;
      const Direction<acc> by{upstream * static_cast<acc>(f[0]), upstream * static_cast<acc>(f[1]),
                              upstream * static_cast<acc>(f[2])};
      const acc* ref = v_ref ? v_ref + begin : nullptr;
      if (by.is_zero()) {  // without weight it may hold NaN
        std::fill_n(dv + begin, n, scalar_t(0));
      } else if (by.is_finite()) {
        block_gradient<scalar_t, acc, acc>(v + begin, v_old + begin, z + begin, ref, dv + begin, n, by);
      } else {
        const double u = upstream;
        block_gradient<scalar_t, acc, double>(v + begin, v_old + begin, z + begin, ref, dv + begin, n,
                                              {finite(u * f[0]), finite(u * f[1]), finite(u * f[2])});
      }
    });
  });
  return dvelocity;
}

}  // namespace
}  // namespace lvrpo

STABLE_TORCH_LIBRARY_IMPL(lvrpo, CPU, m) {
  m.impl("flow_policy_loss_fwd", TORCH_BOX(&lvrpo::flow_policy_loss_fwd));
  m.impl("flow_policy_loss_bwd", TORCH_BOX(&lvrpo::flow_policy_loss_bwd));
}

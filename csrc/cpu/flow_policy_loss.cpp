// Three sums per sample carry everything the loss and its metrics need; the gradient is one more elementwise pass.
// Formulas: docs/ops/flow_policy_loss.md.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/flow_policy_loss.h"
#include "common/tensors.h"
#include "cpu/latents.h"
#include "cpu/noise.h"
#include "cpu/simd.h"

namespace lvrpo {
namespace {

using namespace flow;
using std::optional;

const DeclareNames DECLARE("flow_policy_loss", {{"variant", names_of(Variant{})}, {"kl", names_of(KlForm{})}},
                           {{"numbers", Numbers::NAMES},
                            {"sums", MetricSums::NAMES},
                            {"extremes", MetricExtremes::NAMES}});

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

// acc is double for a std so small that its factors are too large for a float.
template <typename scalar_t, typename data_t, typename acc>
LVRPO_MULTIVERSION void block_gradient(const scalar_t* v, const data_t* v_old, const data_t* z, const data_t* v_ref,
                                       scalar_t* dv, int64_t n, Direction<acc> by) {
  if (v_ref == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i)
      dv[i] = static_cast<scalar_t>(by.gradient(static_cast<acc>(v[i]), v_old[i], z[i]));
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < n; ++i)
    dv[i] = static_cast<scalar_t>(by.gradient(static_cast<acc>(v[i]), v_old[i], z[i], v_ref[i]));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> flow_policy_loss_fwd(
    Tensor velocity, Tensor velocity_old, Tensor noise, optional<Tensor> velocity_ref, Tensor c_v, Tensor std,
    Tensor dt, Tensor advantages, optional<Tensor> mask, optional<Tensor> policy_weights, optional<Tensor> denominator,
    Tensor numbers, int64_t variant, int64_t kl) {
  const Params params(variant, kl, numbers);
  const LatentBlocks size(velocity);
  velocity = dense(velocity);
  velocity_old = size.contiguous(velocity_old, "velocity_old");
  const NoiseTensor given(noise, size);
  if (velocity_ref) velocity_ref = size.contiguous(*velocity_ref, "velocity_ref");
  LVRPO_CHECK(!denominator || denominator->numel() == 1, "denominator must hold one number");
  Tensor loss = make_empty(velocity_old, {});
  Tensor sums = make_empty(velocity_old, {COLUMNS_OF<MetricSums>}, ScalarType::Double);
  Tensor extremes = make_empty(velocity_old, {COLUMNS_OF<MetricExtremes>}, ScalarType::Double);
  Tensor directions = make_empty(velocity_old, {size.samples, 3}, ScalarType::Double);

  LVRPO_DISPATCH_FLOATING(velocity.scalar_type(), scalar_t, [&] {
    using acc = acc_t<scalar_t>;
    const SampleTensors<acc> tensors(size.samples, c_v, std, dt, advantages, policy_weights, mask);
    const Samples<acc> samples = tensors.numbers();
    const scalar_t* v = velocity.const_data_ptr<scalar_t>();
    const acc* v_old = data<acc>(velocity_old, "velocity_old");
    const Noise<acc> z = given.pointers<acc>();
    const acc* v_ref = velocity_ref ? data<acc>(*velocity_ref, "velocity_ref") : nullptr;
    std::vector<Sums> partial(size.blocks());
    size.for_each_block([&](int64_t block, int64_t sample, int64_t begin, int64_t n) {
      if (!samples.is_active(sample)) return;
      DrawnBlock<acc> drawn;
      const acc* here = block_of(z, size, sample, begin, n, drawn);
      partial[block] = block_sums<scalar_t, acc>(v + begin, v_old + begin, here, v_ref ? v_ref + begin : nullptr, n);
    });

    double active = 0;
    for (int64_t n = 0; n < size.samples; ++n) active += samples.is_active(n);
    const double total = denominator ? static_cast<double>(data<acc>(*denominator, "denominator")[0]) : active;
    const double share = total > 0 ? 1 / total : 0;
    double* direction = directions.mutable_data_ptr<double>();
    std::fill_n(direction, 3 * size.samples, 0.0);
    Totals totals;
    for (int64_t n = 0; n < size.samples; ++n) {
      if (!samples.is_active(n)) continue;
      const Sample sample(samples, n, size.elements, size.sum_of(partial, n));
      totals.add(sample, params, samples.weight(n), share, direction + 3 * n);
    }
    totals.write(sums.mutable_data_ptr<double>(), extremes.mutable_data_ptr<double>());
    loss.mutable_data_ptr<acc>()[0] = static_cast<acc>(totals.loss);
  });
  return {loss, sums, extremes, directions};
}

Tensor flow_policy_loss_bwd(Tensor dloss, Tensor velocity, Tensor velocity_old, Tensor noise,
                            optional<Tensor> velocity_ref, Tensor directions) {
  const LatentBlocks size(velocity);
  velocity = dense(velocity);
  velocity_old = size.contiguous(velocity_old, "velocity_old");
  const NoiseTensor given(noise, size);
  directions = dense(directions);
  if (velocity_ref) velocity_ref = size.contiguous(*velocity_ref, "velocity_ref");
  LVRPO_CHECK(dloss.numel() == 1, "dloss must hold one number");
  LVRPO_CHECK(directions.numel() == 3 * size.samples, "directions must be [N, 3]");
  Tensor dvelocity = make_empty(velocity, velocity.sizes());

  LVRPO_DISPATCH_FLOATING(velocity.scalar_type(), scalar_t, [&] {
    using acc = acc_t<scalar_t>;
    const acc upstream = data<acc>(dloss, "dloss")[0];
    const double* d = data<double>(directions, "directions");
    const scalar_t* v = velocity.const_data_ptr<scalar_t>();
    const acc* v_old = data<acc>(velocity_old, "velocity_old");
    const Noise<acc> z = given.pointers<acc>();
    const acc* v_ref = velocity_ref ? data<acc>(*velocity_ref, "velocity_ref") : nullptr;
    scalar_t* dv = dvelocity.mutable_data_ptr<scalar_t>();
    size.for_each_block([&](int64_t, int64_t sample, int64_t begin, int64_t n) {
      const double* f = d + 3 * sample;
      const Direction<acc> by = scaled(f, upstream);
      const acc* ref = v_ref ? v_ref + begin : nullptr;
      if (by.is_zero()) {  // without weight it may hold NaN
        std::fill_n(dv + begin, n, scalar_t(0));
        return;
      }
      DrawnBlock<acc> drawn;
      const acc* here = block_of(z, size, sample, begin, n, drawn);
      if (by.is_finite()) {
        block_gradient<scalar_t, acc, acc>(v + begin, v_old + begin, here, ref, dv + begin, n, by);
      } else {
        block_gradient<scalar_t, acc, double>(v + begin, v_old + begin, here, ref, dv + begin, n,
                                              scaled_finite(f, upstream));
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

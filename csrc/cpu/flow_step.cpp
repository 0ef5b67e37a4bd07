// One pass over the latents, forward and backward. Formulas: docs/ops/flow_step.md.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/tensors.h"
#include "cpu/latents.h"
#include "cpu/noise.h"
#include "cpu/simd.h"

namespace lvrpo {
namespace {

using std::optional;

template <typename acc>
struct Step {
  acc c_x, c_v, std;
};

// Writes x_next and returns the sum of noise^2, which is all of the log-density that depends on the elements.
template <typename scalar_t, typename acc>
LVRPO_MULTIVERSION double stochastic_step(const scalar_t* v, const acc* x, const acc* z, acc* x_next, int64_t n,
                                          Step<acc> step) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    x_next[i] = step.c_x * x[i] + step.c_v * static_cast<acc>(v[i]) + step.std * z[i];
    sum += static_cast<double>(z[i]) * static_cast<double>(z[i]);
  }
  return sum;
}

template <typename scalar_t, typename acc>
LVRPO_MULTIVERSION void deterministic_step(const scalar_t* v, const acc* x, acc* x_next, int64_t n, Step<acc> step) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x_next[i] = step.c_x * x[i] + step.c_v * static_cast<acc>(v[i]);
}

// d mean = dx_next + dlogprob z / (std D); noise_factor is 0 and z null for a deterministic step.
template <typename acc>
LVRPO_MULTIVERSION void step_gradient(const acc* dx_next, const acc* z, acc* dv, acc* dx, int64_t n, Step<acc> step,
                                      acc noise_factor) {
  if (z == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      dv[i] = step.c_v * dx_next[i];
      dx[i] = step.c_x * dx_next[i];
    }
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const acc dmean = dx_next[i] + noise_factor * z[i];
    dv[i] = step.c_v * dmean;
    dx[i] = step.c_x * dmean;
  }
}

template <typename acc>
class Steps {
 public:
  Steps(const Tensor& c_x, const Tensor& c_v, const Tensor& std, int64_t samples)
      : c_x_(c_x, samples, "c_x"), c_v_(c_v, samples, "c_v"), std_(std, samples, "std") {}
  Step<acc> operator[](int64_t n) const { return {c_x_[n], c_v_[n], std_[n]}; }

 private:
  PerSample<acc> c_x_, c_v_, std_;
};

std::tuple<Tensor, Tensor> flow_step_fwd(Tensor velocity, Tensor x_t, optional<Tensor> noise, Tensor c_x, Tensor c_v,
                                         Tensor std) {
  const LatentBlocks size(velocity);
  velocity = dense(velocity);
  x_t = size.contiguous(x_t, "x_t");
  const NoiseTensor given(noise, size);
  Tensor x_next = make_empty(x_t, x_t.sizes());
  Tensor logprob = make_empty(x_t, {size.samples});

  LVRPO_DISPATCH_FLOATING(velocity.scalar_type(), scalar_t, [&] {
    using acc = acc_t<scalar_t>;
    const Steps<acc> steps(c_x, c_v, std, size.samples);
    const scalar_t* v = velocity.const_data_ptr<scalar_t>();
    const acc* x = data<acc>(x_t, "x_t");
    const Noise<acc> z = given.pointers<acc>();
    acc* out = x_next.mutable_data_ptr<acc>();
    std::vector<double> partial(size.blocks());
    size.for_each_block([&](int64_t block, int64_t sample, int64_t begin, int64_t n) {
      const Step<acc> step = steps[sample];
      if (z.is_given() && step.std > acc(0)) {
        DrawnBlock<acc> drawn;
        const acc* here = block_of(z, size, sample, begin, n, drawn);
        partial[block] = stochastic_step<scalar_t, acc>(v + begin, x + begin, here, out + begin, n, step);
      } else {
        deterministic_step<scalar_t, acc>(v + begin, x + begin, out + begin, n, step);
      }
    });
    acc* logprob_ptr = logprob.mutable_data_ptr<acc>();
    for (int64_t sample = 0; sample < size.samples; ++sample) {
      const double s = steps[sample].std;
      if (!z.is_given() || !(s > 0)) {
        logprob_ptr[sample] = acc(0);
        continue;
      }
      const double mean_square = size.sum_of(partial, sample) / static_cast<double>(size.elements);
      constexpr double HALF_LOG_2PI = 0.91893853320467274178;
      logprob_ptr[sample] = static_cast<acc>(-0.5 * mean_square - std::log(s) - HALF_LOG_2PI);
    }
  });
  return {x_next, logprob};
}

std::tuple<Tensor, Tensor> flow_step_bwd(Tensor dx_next, Tensor dlogprob, optional<Tensor> noise, Tensor c_x,
                                         Tensor c_v, Tensor std) {
  const LatentBlocks size(dx_next);
  dx_next = dense(dx_next);
  dlogprob = dense(dlogprob);
  check_size(dlogprob, 0, size.samples, "dlogprob");
  const NoiseTensor given(noise, size);
  Tensor dvelocity = make_empty(dx_next, dx_next.sizes()), dx_t = make_empty(dx_next, dx_next.sizes());

  LVRPO_DISPATCH_ACC(dx_next.scalar_type(), acc, [&] {
    const Steps<acc> steps(c_x, c_v, std, size.samples);
    const acc* dx = dx_next.const_data_ptr<acc>();
    const acc* dlp = data<acc>(dlogprob, "dlogprob");
    const Noise<acc> z = given.pointers<acc>();
    acc* dv_ptr = dvelocity.mutable_data_ptr<acc>();
    acc* dx_ptr = dx_t.mutable_data_ptr<acc>();
    size.for_each_block([&](int64_t, int64_t sample, int64_t begin, int64_t n) {
      const Step<acc> step = steps[sample];
      const bool stochastic = z.is_given() && step.std > acc(0);
      const acc factor = stochastic ? dlp[sample] / (step.std * static_cast<acc>(size.elements)) : acc(0);
      // Without a gradient of the log-prob the noise is not read: it may be NaN.
      DrawnBlock<acc> drawn;
      const acc* here = factor != acc(0) ? block_of(z, size, sample, begin, n, drawn) : nullptr;
      step_gradient<acc>(dx + begin, here, dv_ptr + begin, dx_ptr + begin, n, step, factor);
    });
  });
  return {dvelocity, dx_t};
}

}  // namespace
}  // namespace lvrpo

STABLE_TORCH_LIBRARY_IMPL(lvrpo, CPU, m) {
  m.impl("flow_step_fwd", TORCH_BOX(&lvrpo::flow_step_fwd));
  m.impl("flow_step_bwd", TORCH_BOX(&lvrpo::flow_step_bwd));
}

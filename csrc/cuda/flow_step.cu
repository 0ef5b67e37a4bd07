// One pass over the latents, forward and backward. Formulas: docs/ops/flow_step.md.
//
// A block takes a slice of one sample. The sums of the slices go to memory and are added in their order, so that the bits
// of a log-prob depend on the shape alone.
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "common/latents.h"
#include "cuda/device.cuh"

namespace lvrpo {
namespace {

using std::optional;

constexpr int THREADS = 256;
// Elements of a slice: enough for every thread to have 16, so that the reduction costs little.
constexpr int64_t SLICE = 16 * THREADS;
constexpr double HALF_LOG_2PI = 0.91893853320467274178;

template <typename acc>
struct Steps {
  SampleNumbers<acc> c_x, c_v, std;
};

int64_t slices_of(const Latents& size) { return (size.elements + SLICE - 1) / SLICE; }

// log of the density by the mean square of the noise.
template <typename acc>
__device__ __forceinline__ acc logprob_of(double squares, int64_t elements, acc std) {
  return static_cast<acc>(-0.5 * (squares / static_cast<double>(elements)) - log(static_cast<double>(std)) - HALF_LOG_2PI);
}

// parts [N, slices] takes the sums of noise^2 where there are several slices.
template <typename scalar_t, typename acc>
__global__ __launch_bounds__(THREADS) void step_kernel(const scalar_t* velocity, const acc* x_t, const acc* noise,
                                                       Steps<acc> steps, int64_t elements, int64_t slices, acc* x_next,
                                                       acc* logprob, double* parts) {
  const int64_t sample = blockIdx.x / slices, slice = blockIdx.x % slices;
  const int64_t last = slice + 1 < slices ? SLICE : elements - slice * SLICE, begin = sample * elements + slice * SLICE;
  const acc c_x = steps.c_x[sample], c_v = steps.c_v[sample], std = steps.std[sample];
  const bool stochastic = noise != nullptr && std > acc(0);
  double squares = 0;
  for (int64_t i = threadIdx.x; i < last; i += THREADS) {
    const acc mean = c_x * x_t[begin + i] + c_v * load(velocity + begin + i);
    // The noise of a deterministic step is not read: it may be NaN.
    const acc z = stochastic ? noise[begin + i] : acc(0);
    x_next[begin + i] = stochastic ? mean + std * z : mean;
    squares += static_cast<double>(z) * static_cast<double>(z);
  }
  squares = over_block(squares, Add{}, shared_memory<double>());
  if (threadIdx.x != 0) return;
  if (slices > 1) {
    parts[blockIdx.x] = squares;
  } else {
    logprob[sample] = stochastic ? logprob_of(squares, elements, std) : acc(0);
  }
}

template <typename acc>
__global__ __launch_bounds__(THREADS) void logprob_kernel(const double* parts, SampleNumbers<acc> std, bool has_noise,
                                                          int64_t samples, int64_t elements, int64_t slices,
                                                          acc* logprob) {
  const int64_t sample = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (sample >= samples) return;
  double squares = 0;
  for (int64_t slice = 0; slice < slices; ++slice) squares += parts[sample * slices + slice];
  const acc s = std[sample];
  logprob[sample] = has_noise && s > acc(0) ? logprob_of(squares, elements, s) : acc(0);
}

// d mean = dx_next + dlogprob z / (std D).
template <typename acc>
__global__ __launch_bounds__(THREADS) void gradient_kernel(const acc* dx_next, const acc* dlogprob, const acc* noise,
                                                           Steps<acc> steps, int64_t elements, int64_t slices,
                                                           acc* dvelocity, acc* dx_t) {
  const int64_t sample = blockIdx.x / slices, slice = blockIdx.x % slices;
  const int64_t last = slice + 1 < slices ? SLICE : elements - slice * SLICE, begin = sample * elements + slice * SLICE;
  const acc c_x = steps.c_x[sample], c_v = steps.c_v[sample], std = steps.std[sample];
  const bool stochastic = noise != nullptr && std > acc(0);
  const acc factor = stochastic ? dlogprob[sample] / (std * static_cast<acc>(elements)) : acc(0);
  for (int64_t i = threadIdx.x; i < last; i += THREADS) {
    // Without a gradient of the log-prob the noise is not read: it may be NaN.
    const acc of_noise = factor != acc(0) ? factor * noise[begin + i] : acc(0);
    const acc dmean = dx_next[begin + i] + of_noise;
    dvelocity[begin + i] = c_v * dmean;
    dx_t[begin + i] = c_x * dmean;
  }
}

std::tuple<Tensor, Tensor> flow_step_fwd(Tensor velocity, Tensor x_t, optional<Tensor> noise, Tensor c_x, Tensor c_v,
                                         Tensor std) {
  const Latents size(velocity);
  velocity = torch::stable::contiguous(velocity);
  x_t = size.contiguous(x_t, "x_t");
  if (noise) noise = size.contiguous(*noise, "noise");
  Tensor x_next = torch::stable::empty_like(x_t);
  Tensor logprob = torch::stable::new_empty(x_t, {size.samples});
  const int64_t slices = slices_of(size);
  Tensor parts = torch::stable::new_empty(x_t, {slices > 1 ? size.samples * slices : 0}, ScalarType::Double);

  const OnDeviceOf device(velocity);
  LVRPO_DISPATCH_FLOATING(velocity.scalar_type(), scalar_t, [&] {
    using acc = acc_t<scalar_t>;
    const PerSample<acc> of_x(c_x, size.samples, "c_x"), of_v(c_v, size.samples, "c_v"), of_noise(std, size.samples, "std");
    const Steps<acc> steps{of_x.numbers(), of_v.numbers(), of_noise.numbers()};
    double* sums = parts.mutable_data_ptr<double>();
    launch(device, {size.samples * slices, THREADS, sizeof(double) * THREADS / WARP}, step_kernel<scalar_t, acc>,
           velocity.const_data_ptr<scalar_t>(), data<acc>(x_t, "x_t"), noise ? data<acc>(*noise, "noise") : nullptr, steps,
           size.elements, slices, x_next.mutable_data_ptr<acc>(), logprob.mutable_data_ptr<acc>(), sums);
    if (slices > 1)
      launch(device, {(size.samples + THREADS - 1) / THREADS, THREADS}, logprob_kernel<acc>, sums, steps.std,
             noise.has_value(), size.samples, size.elements, slices, logprob.mutable_data_ptr<acc>());
  });
  return {x_next, logprob};
}

std::tuple<Tensor, Tensor> flow_step_bwd(Tensor dx_next, Tensor dlogprob, optional<Tensor> noise, Tensor c_x, Tensor c_v,
                                         Tensor std) {
  const Latents size(dx_next);
  dx_next = torch::stable::contiguous(dx_next);
  dlogprob = torch::stable::contiguous(dlogprob);
  check_size(dlogprob, 0, size.samples, "dlogprob");
  if (noise) noise = size.contiguous(*noise, "noise");
  Tensor dvelocity = torch::stable::empty_like(dx_next), dx_t = torch::stable::empty_like(dx_next);
  const int64_t slices = slices_of(size);

  const OnDeviceOf device(dx_next);
  LVRPO_DISPATCH_ACC(dx_next.scalar_type(), acc, [&] {
    const PerSample<acc> of_x(c_x, size.samples, "c_x"), of_v(c_v, size.samples, "c_v"), of_noise(std, size.samples, "std");
    const Steps<acc> steps{of_x.numbers(), of_v.numbers(), of_noise.numbers()};
    launch(device, {size.samples * slices, THREADS}, gradient_kernel<acc>, dx_next.const_data_ptr<acc>(),
           data<acc>(dlogprob, "dlogprob"), noise ? data<acc>(*noise, "noise") : nullptr, steps, size.elements, slices,
           dvelocity.mutable_data_ptr<acc>(), dx_t.mutable_data_ptr<acc>());
  });
  return {dvelocity, dx_t};
}

}  // namespace
}  // namespace lvrpo

LVRPO_CUDA_LIBRARY(m) {
  m.impl("flow_step_fwd", TORCH_BOX(&lvrpo::flow_step_fwd));
  m.impl("flow_step_bwd", TORCH_BOX(&lvrpo::flow_step_bwd));
}

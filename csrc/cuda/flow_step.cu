// One pass over the latents, forward and backward. Formulas: docs/ops/flow_step.md.
//
// A block takes a slice of one sample. The sums of the slices go to memory and are added in their order, so that the bits
// of a log-prob depend on the shape alone.

#include <optional>
#include <tuple>
#include <type_traits>

#include "common/tensors.h"
#include "cuda/latents.cuh"
#include "cuda/noise.cuh"

namespace lvrpo {
namespace {

using std::optional;

constexpr double HALF_LOG_2PI = 0.91893853320467274178;

template <typename acc>
struct Steps {
  SampleNumbers<acc> c_x, c_v, std;
};

// log of the density by the mean square of the noise.
template <typename acc>
__device__ __forceinline__ acc logprob_of(double squares, int64_t elements, acc std) {
  return static_cast<acc>(-0.5 * (squares / static_cast<double>(elements)) - log(static_cast<double>(std)) - HALF_LOG_2PI);
}

// Writes a slice of x_next and returns this thread's share of the sum of noise^2. The noise of a deterministic step is not
// read: it may be NaN.
template <bool STOCHASTIC, typename Source, typename scalar_t, typename acc>
__device__ __forceinline__ double step_slice(const Slice& slice, const scalar_t* velocity, const acc* x_t,
                                             const SampleNoise<Source, acc>& noise, acc c_x, acc c_v, acc std,
                                             acc* x_next) {
  constexpr int SIZE = Pack<scalar_t>::SIZE;
  const int64_t begin = slice.begin;
  const bool aligned = is_aligned(velocity + begin) && is_aligned(x_t + begin) && is_aligned(x_next + begin) &&
                       (!STOCHASTIC || noise.is_aligned_at(begin));
  double squares = 0;
  slice.for_each_chunk<SIZE, Source::IN_FLIGHT>(aligned, [&](auto range, int64_t at) {
    Chunk<scalar_t, SIZE> v;
    Chunk<acc, SIZE> x, z, next;
    v.read(velocity + at, range);
    x.read(x_t + at, range);
    if constexpr (STOCHASTIC) noise.read(z, range, at);
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      const acc mean = c_x * x[i] + c_v * v[i];
      if constexpr (STOCHASTIC) {
        next.set(i, mean + std * z[i]);
        squares += static_cast<double>(z[i]) * static_cast<double>(z[i]);
      } else {
        next.set(i, mean);
      }
    }
    next.write(x_next + at, range);
  });
  return squares;
}

// All [N, elements], logprob [N]. parts [N, slices] takes the sums of noise^2 where there are several slices.
template <typename Source, typename scalar_t, typename acc>
__global__ __launch_bounds__(SLICE_THREADS) void step_kernel(const scalar_t* __restrict__ velocity,
                                                             const acc* __restrict__ x_t, Noise<acc> noise,
                                                             Steps<acc> steps, int64_t elements, int64_t slices,
                                                             acc* __restrict__ x_next, acc* logprob, double* parts) {
  const Slice slice(elements, slices);
  const acc c_x = steps.c_x[slice.sample], c_v = steps.c_v[slice.sample], std = steps.std[slice.sample];
  const bool stochastic = noise.is_given() && std > acc(0);
  const SampleNoise<Source, acc> own(noise, slice.sample, elements);
  double squares = stochastic ? step_slice<true>(slice, velocity, x_t, own, c_x, c_v, std, x_next)
                              : step_slice<false>(slice, velocity, x_t, own, c_x, c_v, std, x_next);
  squares = over_block(squares, Add{}, shared_memory<double>());
  if (threadIdx.x != 0) return;
  if (slices > 1) {
    parts[blockIdx.x] = squares;
  } else {
    logprob[slice.sample] = stochastic ? logprob_of(squares, elements, std) : acc(0);
  }
}

template <typename acc>
__global__ __launch_bounds__(SLICE_THREADS) void logprob_kernel(const double* parts, SampleNumbers<acc> std,
                                                                bool has_noise, int64_t samples, int64_t elements,
                                                                int64_t slices, int lanes, acc* logprob) {
  const int64_t sample = (static_cast<int64_t>(blockIdx.x) * SLICE_THREADS + threadIdx.x) / lanes;
  const double squares = over_slices(parts + sample * slices, slices, lanes, sample < samples);
  if (sample >= samples || lane() % lanes != 0) return;
  const acc s = std[sample];
  logprob[sample] = has_noise && s > acc(0) ? logprob_of(squares, elements, s) : acc(0);
}

// d mean = dx_next + factor z. Without a gradient of the log-prob the noise is not read: it may be NaN.
template <bool HAS_NOISE, typename Source, typename acc>
__device__ __forceinline__ void gradient_slice(const Slice& slice, const acc* dx_next,
                                               const SampleNoise<Source, acc>& noise, acc factor, acc c_x, acc c_v,
                                               acc* dvelocity, acc* dx_t) {
  constexpr int SIZE = Pack<acc>::SIZE;
  const int64_t begin = slice.begin;
  const bool aligned = is_aligned(dx_next + begin) && is_aligned(dvelocity + begin) && is_aligned(dx_t + begin) &&
                       (!HAS_NOISE || noise.is_aligned_at(begin));
  const auto write = [&](auto range, int64_t at) {
    Chunk<acc, SIZE> dx, z, dv;
    dx.read(dx_next + at, range);
    if constexpr (HAS_NOISE) noise.read(z, range, at);
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      acc dmean = dx[i];
      if constexpr (HAS_NOISE) dmean += factor * z[i];
      dv.set(i, c_v * dmean);
      dx.set(i, c_x * dmean);
    }
    dv.write(dvelocity + at, range);
    dx.write(dx_t + at, range);
  };
  constexpr bool draws = HAS_NOISE && std::is_same_v<Source, Drawn>;
  slice.for_each_chunk<SIZE, Source::IN_FLIGHT>(aligned, write, draws ? 0 : ahead_of(dvelocity + begin));
}

// All [N, elements], dlogprob [N].
template <typename Source, typename acc>
__global__ __launch_bounds__(SLICE_THREADS) void gradient_kernel(const acc* __restrict__ dx_next, const acc* dlogprob,
                                                                 Noise<acc> noise, Steps<acc> steps, int64_t elements,
                                                                 int64_t slices,
                                                                 acc* __restrict__ dvelocity, acc* __restrict__ dx_t) {
  const Slice slice(elements, slices);
  const acc c_x = steps.c_x[slice.sample], c_v = steps.c_v[slice.sample], std = steps.std[slice.sample];
  const bool stochastic = noise.is_given() && std > acc(0);
  const SampleNoise<Source, acc> own(noise, slice.sample, elements);
  // d log-prob / d mean = z / (std D)
  const acc factor = stochastic ? dlogprob[slice.sample] / (std * static_cast<acc>(elements)) : acc(0);
  if (factor != acc(0)) {
    gradient_slice<true>(slice, dx_next, own, factor, c_x, c_v, dvelocity, dx_t);
  } else {
    gradient_slice<false>(slice, dx_next, own, factor, c_x, c_v, dvelocity, dx_t);
  }
}

std::tuple<Tensor, Tensor> flow_step_fwd(Tensor velocity, Tensor x_t, optional<Tensor> noise, Tensor c_x, Tensor c_v,
                                         Tensor std) {
  const Latents size(velocity);
  velocity = dense(velocity);
  x_t = size.contiguous(x_t, "x_t");
  const NoiseTensor given(noise, size);
  Tensor x_next = make_empty(x_t, x_t.sizes());
  Tensor logprob = make_empty(x_t, {size.samples});
  const int64_t slices = slices_of(size);
  Tensor parts = make_empty(x_t, {slices > 1 ? size.samples * slices : 0}, ScalarType::Double);

  const OnDeviceOf device(velocity);
  LVRPO_DISPATCH_FLOATING(velocity.scalar_type(), scalar_t, [&] {
    using acc = acc_t<scalar_t>;
    const PerSample<acc> of_x(c_x, size.samples, "c_x"), of_v(c_v, size.samples, "c_v"), of_noise(std, size.samples, "std");
    const Steps<acc> steps{of_x.numbers(), of_v.numbers(), of_noise.numbers()};
    double* sums = parts.mutable_data_ptr<double>();
    const Noise<acc> z = given.pointers<acc>();
    const auto step = z.is_drawn() ? step_kernel<Drawn, scalar_t, acc> : step_kernel<Stored, scalar_t, acc>;
    launch(device, {size.samples * slices, SLICE_THREADS, sizeof(double) * SLICE_THREADS / WARP}, step,
           velocity.const_data_ptr<scalar_t>(), data<acc>(x_t, "x_t"), z, steps, size.elements, slices,
           x_next.mutable_data_ptr<acc>(), logprob.mutable_data_ptr<acc>(), sums);
    if (slices == 1) return;
    const int lanes = lanes_of(slices);
    launch(device, {(size.samples * lanes + SLICE_THREADS - 1) / SLICE_THREADS, SLICE_THREADS}, logprob_kernel<acc>, sums,
           steps.std, noise.has_value(), size.samples, size.elements, slices, lanes, logprob.mutable_data_ptr<acc>());
  });
  return {x_next, logprob};
}

std::tuple<Tensor, Tensor> flow_step_bwd(Tensor dx_next, Tensor dlogprob, optional<Tensor> noise, Tensor c_x, Tensor c_v,
                                         Tensor std) {
  const Latents size(dx_next);
  dx_next = dense(dx_next);
  dlogprob = dense(dlogprob);
  check_size(dlogprob, 0, size.samples, "dlogprob");
  const NoiseTensor given(noise, size);
  Tensor dvelocity = make_empty(dx_next, dx_next.sizes()), dx_t = make_empty(dx_next, dx_next.sizes());
  const int64_t slices = slices_of(size);

  const OnDeviceOf device(dx_next);
  LVRPO_DISPATCH_ACC(dx_next.scalar_type(), acc, [&] {
    const PerSample<acc> of_x(c_x, size.samples, "c_x"), of_v(c_v, size.samples, "c_v"), of_noise(std, size.samples, "std");
    const Steps<acc> steps{of_x.numbers(), of_v.numbers(), of_noise.numbers()};
    const Noise<acc> z = given.pointers<acc>();
    const auto gradient = z.is_drawn() ? gradient_kernel<Drawn, acc> : gradient_kernel<Stored, acc>;
    launch(device, {size.samples * slices, SLICE_THREADS}, gradient, dx_next.const_data_ptr<acc>(),
           data<acc>(dlogprob, "dlogprob"), z, steps, size.elements, slices, dvelocity.mutable_data_ptr<acc>(),
           dx_t.mutable_data_ptr<acc>());
  });
  return {dvelocity, dx_t};
}

}  // namespace
}  // namespace lvrpo

LVRPO_CUDA_LIBRARY(m) {
  m.impl("flow_step_fwd", TORCH_BOX(&lvrpo::flow_step_fwd));
  m.impl("flow_step_bwd", TORCH_BOX(&lvrpo::flow_step_bwd));
}

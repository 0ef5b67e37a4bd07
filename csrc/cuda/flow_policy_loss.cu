// Three sums per sample carry everything the loss and its metrics need; the gradient is one more elementwise pass.
// Formulas: docs/ops/flow_policy_loss.md.
//
// A block sums a slice of one sample, in fp64; one block adds the slices, forms the terms of the samples and adds those.

#include <algorithm>
#include <optional>
#include <tuple>
#include <type_traits>

#include "common/flow_policy_loss.h"
#include "common/tensors.h"
#include "cuda/latents.cuh"
#include "cuda/noise.cuh"

namespace lvrpo {
namespace {

using namespace flow;
using std::optional;

// Of the one block that forms the terms: many samples at once, and registers enough for their fp64.
constexpr int TERMS_THREADS = 512;

// All of them [N, elements]; v_ref may be absent.
template <typename scalar_t, typename acc>
struct Velocities {
  const scalar_t* v;
  const acc *v_old, *v_ref;

  __device__ __forceinline__ bool are_aligned(int64_t at) const {
    return is_aligned(v + at) && is_aligned(v_old + at) && is_aligned(v_ref ? v_ref + at : nullptr);
  }
};

// A chunk of each, SIZE elements that stand next to each other.
template <typename scalar_t, typename acc, bool HAS_REF>
struct Elements {
  static constexpr int SIZE = Pack<scalar_t>::SIZE;
  Chunk<scalar_t, SIZE> v;
  Chunk<acc, SIZE> v_old, z, v_ref;

  template <typename Source, typename Range>
  __device__ __forceinline__ Elements(const Velocities<scalar_t, acc>& from, const SampleNoise<Source, acc>& noise,
                                      Range range, int64_t at) {
    v.read(from.v + at, range);
    v_old.read(from.v_old + at, range);
    noise.read(z, range, at);
    if constexpr (HAS_REF) v_ref.read(from.v_ref + at, range);
  }
};

// parts [N, slices]: those of samples that do not count are not written.
template <bool HAS_REF, typename Source, typename scalar_t, typename acc>
__global__ __launch_bounds__(SLICE_THREADS) void sums_kernel(Velocities<scalar_t, acc> latents, Noise<acc> noise,
                                                             Samples<acc> samples, int64_t elements, int64_t slices,
                                                             Sums* parts) {
  using Here = Elements<scalar_t, acc, HAS_REF>;
  const Slice slice(elements, slices);
  if (!samples.is_active(slice.sample)) return;
  const SampleNoise<Source, acc> own(noise, slice.sample, elements);
  const bool aligned = latents.are_aligned(slice.begin) && own.is_aligned_at(slice.begin);
  Sums sums;
  slice.for_each_chunk<Here::SIZE, Source::IN_FLIGHT>(aligned, [&](auto range, int64_t at) {
    const Here here(latents, own, range, at);
#pragma unroll
    for (int i = 0; i < Here::SIZE; ++i) {
      const double v = here.v[i], d = v - static_cast<double>(here.v_old[i]);
      sums.noise += static_cast<double>(here.z[i]) * d;
      sums.old += d * d;
      if constexpr (HAS_REF) {
        const double of_ref = v - static_cast<double>(here.v_ref[i]);
        sums.reference += of_ref * of_ref;
      }
    }
  });
  sums = over_block(sums, Add{}, shared_memory<Sums>());
  if (threadIdx.x == 0) parts[blockIdx.x] = sums;
}

template <typename Source, typename scalar_t, typename acc>
auto sums_kernel_of(bool has_ref) {
  return has_ref ? sums_kernel<true, Source, scalar_t, acc> : sums_kernel<false, Source, scalar_t, acc>;
}

struct Join {
  __device__ __forceinline__ Totals operator()(const Totals& a, const Totals& b) const {
    Totals both = a;
    double* to = reinterpret_cast<double*>(&both.sums);
    const double* from = reinterpret_cast<const double*>(&b.sums);
#pragma unroll
    for (int i = 0; i < COLUMNS_OF<MetricSums>; ++i) to[i] += from[i];
    both.loss += b.loss;
    both.lowest = b.lowest < a.lowest ? b.lowest : a.lowest;
    both.highest = b.highest > a.highest ? b.highest : a.highest;
    return both;
  }
};

// What the loss is divided by: on the device, or a number.
template <typename acc>
struct Denominator {
  bool given;
  const acc* place;  // null: the number
  double number;

  __device__ __forceinline__ double value(double active) const {
    return !given ? active : place != nullptr ? static_cast<double>(*place) : number;
  }
};

// loss [1], sums [columns of MetricSums], extremes [columns of MetricExtremes], directions [N, 3]. Of one block.
template <typename acc>
__global__ __launch_bounds__(TERMS_THREADS) void terms_kernel(Samples<acc> samples, const Sums* parts,
                                                              Denominator<acc> denominator, Params params, int64_t count,
                                                              int64_t elements, int64_t slices, int lanes, acc* loss,
                                                              double* sums, double* extremes, double* directions) {
  double active = 0;
  for (int64_t n = threadIdx.x; n < count; n += blockDim.x) active += samples.is_active(n);
  active = over_block(active, Add{}, shared_memory<double>());
  const double total = denominator.value(active), share = total > 0 ? 1 / total : 0;

  Totals totals;
  const int64_t together = blockDim.x / lanes;
  for (int64_t first = 0; first < count; first += together) {
    const int64_t n = first + threadIdx.x / lanes;
    const bool is_active = n < count && samples.is_active(n);
    const Sums of_sample = over_slices(parts + n * slices, slices, lanes, is_active);
    double direction[3] = {0, 0, 0};
    if (is_active)
      totals.add(Sample(samples, n, elements, of_sample), params, samples.weight(n), share, direction);
    if (n < count && lane() % lanes == 0)
      for (int i = 0; i < 3; ++i) directions[3 * n + i] = direction[i];
  }

  totals = over_warp(totals, Join{}, lanes);
  Totals* by_warp = shared_memory<Totals>();
  if (lane() == 0) by_warp[warp()] = totals;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int other = 1; other < static_cast<int>(blockDim.x) / WARP; ++other) totals = Join{}(totals, by_warp[other]);
  totals.write(sums, extremes);
  *loss = static_cast<acc>(totals.loss);
}

// dv [N, elements].
template <bool HAS_REF, typename Source, typename by_t, typename scalar_t, typename acc>
__device__ __forceinline__ void write_gradient(const Slice& slice, const Velocities<scalar_t, acc>& latents,
                                               const SampleNoise<Source, acc>& noise, const Direction<by_t>& by,
                                               scalar_t* dv) {
  using Here = Elements<scalar_t, acc, HAS_REF>;
  const bool aligned = latents.are_aligned(slice.begin) && noise.is_aligned_at(slice.begin);
  const int ahead = std::is_same_v<Source, Drawn> ? 0 : ahead_of(dv + slice.begin);
  const auto write = [&](auto range, int64_t at) {
    const Here here(latents, noise, range, at);
    Chunk<scalar_t, Here::SIZE> gradient;
#pragma unroll
    for (int i = 0; i < Here::SIZE; ++i) {
      if constexpr (HAS_REF) {
        gradient.set(i, static_cast<acc>(by.gradient(here.v[i], here.v_old[i], here.z[i], here.v_ref[i])));
      } else {
        gradient.set(i, static_cast<acc>(by.gradient(here.v[i], here.v_old[i], here.z[i])));
      }
    }
    gradient.write(dv + at, range);
  };
  slice.for_each_chunk<Here::SIZE, Source::IN_FLIGHT>(aligned, write, ahead);
}

template <typename scalar_t>
__device__ __forceinline__ void write_zeros(const Slice& slice, scalar_t* dv) {
  constexpr int SIZE = Pack<scalar_t>::SIZE;
  Chunk<scalar_t, SIZE> zeros;
#pragma unroll
  for (int i = 0; i < SIZE; ++i) zeros.set(i, acc_t<scalar_t>(0));
  const auto write = [&](auto range, int64_t at) { zeros.write(dv + at, range); };
  slice.for_each_chunk<SIZE>(true, write, ahead_of(dv + slice.begin));
}

template <bool HAS_REF, typename Source, typename scalar_t, typename acc>
__global__ __launch_bounds__(SLICE_THREADS) void gradient_kernel(const acc* __restrict__ dloss,
                                                                 Velocities<scalar_t, acc> latents, Noise<acc> noise,
                                                                 const double* __restrict__ directions, int64_t elements,
                                                                 int64_t slices, scalar_t* __restrict__ dv) {
  const Slice slice(elements, slices);
  const double* direction = directions + 3 * slice.sample;
  const Direction<acc> by = scaled(direction, *dloss);
  const SampleNoise<Source, acc> own(noise, slice.sample, elements);
  if (by.is_zero()) {  // without weight it may hold NaN
    write_zeros(slice, dv);
  } else if (by.is_finite()) {
    write_gradient<HAS_REF>(slice, latents, own, by, dv);
  } else {
    write_gradient<HAS_REF>(slice, latents, own, scaled_finite(direction, *dloss), dv);
  }
}

template <typename Source, typename scalar_t, typename acc>
auto gradient_kernel_of(bool has_ref) {
  return has_ref ? gradient_kernel<true, Source, scalar_t, acc> : gradient_kernel<false, Source, scalar_t, acc>;
}

// Checked and contiguous; the tensors live as long as it does.
struct Inputs {
  Latents size;
  Tensor velocity, velocity_old;
  NoiseTensor noise;
  optional<Tensor> velocity_ref;

  Inputs(const Tensor& v, const Tensor& v_old, const Tensor& z, const optional<Tensor>& v_ref)
      : size(v), velocity(dense(v)), velocity_old(size.contiguous(v_old, "velocity_old")), noise(z, size) {
    if (v_ref) velocity_ref = size.contiguous(*v_ref, "velocity_ref");
  }

  template <typename scalar_t, typename acc = acc_t<scalar_t>>
  Velocities<scalar_t, acc> pointers() const {
    return {velocity.const_data_ptr<scalar_t>(), data<acc>(velocity_old, "velocity_old"),
            velocity_ref ? data<acc>(*velocity_ref, "velocity_ref") : nullptr};
  }
};

template <typename acc>
Denominator<acc> as_denominator(const optional<Tensor>& tensor, const OnDeviceOf& device) {
  if (!tensor) return {false, nullptr, 0};
  LVRPO_CHECK(tensor->numel() == 1, "denominator must hold one number");
  const acc* place = data<acc>(*tensor, "denominator");
  if (device.reads(*tensor)) return {true, place, 0};
  return {true, nullptr, static_cast<double>(*place)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> flow_policy_loss_fwd(
    Tensor velocity, Tensor velocity_old, Tensor noise, optional<Tensor> velocity_ref, Tensor c_v, Tensor std,
    Tensor dt, Tensor advantages, optional<Tensor> mask, optional<Tensor> policy_weights, optional<Tensor> denominator,
    Tensor numbers, int64_t variant, int64_t kl) {
  const Params params(variant, kl, numbers);
  const Inputs inputs(velocity, velocity_old, noise, velocity_ref);
  const Latents& size = inputs.size;
  const int64_t slices = slices_of(size);
  const int lanes = lanes_of(slices);
  Tensor loss = make_empty(velocity_old, {});
  Tensor sums = make_empty(velocity_old, {COLUMNS_OF<MetricSums>}, ScalarType::Double);
  Tensor extremes = make_empty(velocity_old, {COLUMNS_OF<MetricExtremes>}, ScalarType::Double);
  Tensor directions = make_empty(velocity_old, {size.samples, 3}, ScalarType::Double);
  constexpr int64_t columns = sizeof(Sums) / sizeof(double);
  Tensor parts = make_empty(velocity_old, {size.samples * slices, columns}, ScalarType::Double);

  const OnDeviceOf device(inputs.velocity);
  LVRPO_DISPATCH_FLOATING(inputs.velocity.scalar_type(), scalar_t, [&] {
    using acc = acc_t<scalar_t>;
    const SampleTensors<acc> tensors(size.samples, c_v, std, dt, advantages, policy_weights, mask);
    const Samples<acc> samples = tensors.numbers();
    Sums* of_slices = reinterpret_cast<Sums*>(parts.mutable_data_ptr<double>());
    const Noise<acc> z = inputs.noise.pointers<acc>();
    const auto sum = z.is_drawn() ? sums_kernel_of<Drawn, scalar_t, acc>(velocity_ref.has_value())
                                  : sums_kernel_of<Stored, scalar_t, acc>(velocity_ref.has_value());
    launch(device, {size.samples * slices, SLICE_THREADS, sizeof(Sums) * SLICE_THREADS / WARP}, sum,
           inputs.pointers<scalar_t>(), z, samples, size.elements, slices, of_slices);
    // As many threads as there is work for, a warp at least.
    const int64_t wanted = (size.samples * lanes + WARP - 1) / WARP * WARP;
    const int threads = static_cast<int>(std::clamp<int64_t>(wanted, WARP, TERMS_THREADS));
    launch(device, {1, threads, static_cast<int64_t>(sizeof(Totals)) * threads / WARP}, terms_kernel<acc>, samples,
           of_slices, as_denominator<acc>(denominator, device), params, size.samples, size.elements, slices, lanes,
           loss.mutable_data_ptr<acc>(), sums.mutable_data_ptr<double>(), extremes.mutable_data_ptr<double>(),
           directions.mutable_data_ptr<double>());
  });
  return {loss, sums, extremes, directions};
}

Tensor flow_policy_loss_bwd(Tensor dloss, Tensor velocity, Tensor velocity_old, Tensor noise,
                            optional<Tensor> velocity_ref, Tensor directions) {
  const Inputs inputs(velocity, velocity_old, noise, velocity_ref);
  const Latents& size = inputs.size;
  directions = dense(directions);
  LVRPO_CHECK(dloss.numel() == 1, "dloss must hold one number");
  LVRPO_CHECK(directions.numel() == 3 * size.samples, "directions must be [N, 3]");
  Tensor dvelocity = make_empty(inputs.velocity, inputs.velocity.sizes());
  const int64_t slices = slices_of(size);

  const OnDeviceOf device(inputs.velocity);
  LVRPO_DISPATCH_FLOATING(inputs.velocity.scalar_type(), scalar_t, [&] {
    using acc = acc_t<scalar_t>;
    const Noise<acc> z = inputs.noise.pointers<acc>();
    const auto gradient = z.is_drawn() ? gradient_kernel_of<Drawn, scalar_t, acc>(velocity_ref.has_value())
                                       : gradient_kernel_of<Stored, scalar_t, acc>(velocity_ref.has_value());
    launch(device, {size.samples * slices, SLICE_THREADS}, gradient, data<acc>(dloss, "dloss"),
           inputs.pointers<scalar_t>(), z, data<double>(directions, "directions"), size.elements, slices,
           dvelocity.mutable_data_ptr<scalar_t>());
  });
  return dvelocity;
}

}  // namespace
}  // namespace lvrpo

LVRPO_CUDA_LIBRARY(m) {
  m.impl("flow_policy_loss_fwd", TORCH_BOX(&lvrpo::flow_policy_loss_fwd));
  m.impl("flow_policy_loss_bwd", TORCH_BOX(&lvrpo::flow_policy_loss_bwd));
}

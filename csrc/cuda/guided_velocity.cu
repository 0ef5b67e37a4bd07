// Two norms, of a sample or of its rows, then one elementwise pass; backward the same with one more sum.
// Formulas: docs/ops/guided_velocity.md.
//
// Over a whole sample a block takes a slice of it, in two launches: the sums, and the pass, whose warps add the sums of the
// slices themselves. Over rows a few lanes take a row and read it twice, the second time from the cache.

#include <algorithm>
#include <optional>
#include <tuple>

#include "common/guided_velocity.h"
#include "common/tensors.h"
#include "cuda/latents.cuh"

namespace lvrpo {
namespace {

using namespace guidance;
using std::optional;

// The upstream gradient is null in the forward.
template <typename scalar_t, typename acc>
struct Arguments {
  Branches<scalar_t> from;
  const acc* dout;
  const bool* mask;  // null: all are guided
  Push<acc> push;

  __device__ __forceinline__ bool is_guided(int64_t sample) const { return mask == nullptr || mask[sample]; }
  __device__ __forceinline__ bool are_aligned(int64_t at) const {
    return is_aligned(from.v + at) && is_aligned(from.no_text + at) && is_aligned(from.no_image + at) &&
           is_aligned(dout ? dout + at : nullptr);
  }
};

template <typename scalar_t, typename acc, bool BACKWARD>
struct Elements {
  static constexpr int SIZE = Pack<scalar_t>::SIZE;
  Chunk<scalar_t, SIZE> v, no_text, no_image;
  Chunk<acc, SIZE> dout;

  template <typename Range>
  __device__ __forceinline__ Elements(const Arguments<scalar_t, acc>& all, Range range, int64_t at) {
    v.read(all.from.v + at, range);
    no_text.read(all.from.no_text + at, range);
    no_image.read(all.from.no_image + at, range);
    if constexpr (BACKWARD) dout.read(all.dout + at, range);
  }

  __device__ __forceinline__ void add_to(Sums& sums, const Push<acc>& push) const {
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      const double given = v[i], pushed = push.pushed(v[i], no_text[i], no_image[i]);
      sums.given += given * given;
      sums.pushed += pushed * pushed;
      if constexpr (BACKWARD) sums.along += pushed * static_cast<double>(push.upstream(dout[i]));
    }
  }
};

// Where the forward writes; a sample that is not guided keeps its velocity, whose branches are not read.
template <typename scalar_t, typename acc>
struct Guided {
  static constexpr bool BACKWARD = false;
  acc* out;

  __device__ __forceinline__ bool are_aligned(int64_t at) const { return is_aligned(out + at); }
  template <typename Range>
  __device__ __forceinline__ void write(const Arguments<scalar_t, acc>& all, const Factors<acc>& by, Range range,
                                        int64_t at) const {
    const Elements<scalar_t, acc, false> here(all, range, at);
    Chunk<acc, here.SIZE> guided;
#pragma unroll
    for (int i = 0; i < here.SIZE; ++i) {
      const acc pushed = all.push.pushed(here.v[i], here.no_text[i], here.no_image[i]);
      guided.set(i, all.push.finished(by.renorm * pushed, here.no_image[i]));
    }
    guided.write(out + at, range);
  }
  template <typename Range>
  __device__ __forceinline__ void keep(const Arguments<scalar_t, acc>& all, Range range, int64_t at) const {
    constexpr int SIZE = Pack<scalar_t>::SIZE;
    Chunk<scalar_t, SIZE> v;
    Chunk<acc, SIZE> kept;
    v.read(all.from.v + at, range);
#pragma unroll
    for (int i = 0; i < SIZE; ++i) kept.set(i, v[i]);
    kept.write(out + at, range);
  }
};

// Where the backward does.
template <typename scalar_t, typename acc>
struct Gradients {
  static constexpr bool BACKWARD = true;
  BranchGradients<scalar_t> to;

  __device__ __forceinline__ bool are_aligned(int64_t at) const {
    return is_aligned(to.v + at) && is_aligned(to.no_text ? to.no_text + at : nullptr) &&
           is_aligned(to.no_image ? to.no_image + at : nullptr);
  }
  template <typename Range>
  __device__ __forceinline__ void write(const Arguments<scalar_t, acc>& all, const Factors<acc>& by, Range range,
                                        int64_t at) const {
    const Elements<scalar_t, acc, true> here(all, range, at);
    Chunk<scalar_t, here.SIZE> v, no_text, no_image;
#pragma unroll
    for (int i = 0; i < here.SIZE; ++i) {
      const Gradient<acc> d(all.push, by, here.v[i], here.no_text[i], here.no_image[i], here.dout[i]);
      v.set(i, d.v), no_text.set(i, d.no_text), no_image.set(i, d.no_image);
    }
    v.write(to.v + at, range);
    if (to.no_text != nullptr) no_text.write(to.no_text + at, range);
    if (to.no_image != nullptr) no_image.write(to.no_image + at, range);
  }
  template <typename Range>
  __device__ __forceinline__ void keep(const Arguments<scalar_t, acc>& all, Range range, int64_t at) const {
    constexpr int SIZE = Pack<scalar_t>::SIZE;
    Chunk<acc, SIZE> d;
    Chunk<scalar_t, SIZE> kept, zeros;
    d.read(all.dout + at, range);
#pragma unroll
    for (int i = 0; i < SIZE; ++i) kept.set(i, d[i]), zeros.set(i, acc(0));
    kept.write(to.v + at, range);
    if (to.no_text != nullptr) zeros.write(to.no_text + at, range);
    if (to.no_image != nullptr) zeros.write(to.no_image + at, range);
  }
};

// parts [N, slices]: those of samples that are not guided are not written.
template <bool BACKWARD, typename scalar_t, typename acc>
__global__ __launch_bounds__(SLICE_THREADS) void sums_kernel(Arguments<scalar_t, acc> all, int64_t elements,
                                                             int64_t slices, Sums* parts) {
  using Here = Elements<scalar_t, acc, BACKWARD>;
  const Slice slice(elements, slices);
  if (!all.is_guided(slice.sample)) return;
  Sums sums;
  slice.for_each_chunk<Here::SIZE>(all.are_aligned(slice.begin), [&](auto range, int64_t at) {
    Here(all, range, at).add_to(sums, all.push);
  });
  sums = over_block(sums, Add{}, shared_memory<Sums>());
  if (threadIdx.x == 0) parts[blockIdx.x] = sums;
}

// parts is null where nothing is renormalised.
template <typename To, typename scalar_t, typename acc>
__global__ __launch_bounds__(SLICE_THREADS) void sample_kernel(Arguments<scalar_t, acc> all, Params params,
                                                               const Sums* parts, int64_t elements, int64_t slices,
                                                               To to) {
  constexpr int SIZE = Pack<scalar_t>::SIZE;
  const Slice slice(elements, slices);
  const bool aligned = all.are_aligned(slice.begin) && to.are_aligned(slice.begin);
  if (!all.is_guided(slice.sample)) {
    slice.for_each_chunk<SIZE>(aligned, [&](auto range, int64_t at) { to.keep(all, range, at); });
    return;
  }
  const Sums sums =
      over_slices(parts ? parts + slice.sample * slices : nullptr, parts ? slices : 0, WARP, true);
  const Factors<acc> by(params, sums);
  slice.for_each_chunk<SIZE>(aligned, [&](auto range, int64_t at) { to.write(all, by, range, at); });
}

// body(Whole or Part, first element) of a lane's chunks of a row.
template <int SIZE, typename Body>
__device__ __forceinline__ void for_each_chunk_of_row(int64_t begin, int64_t channels, int lanes, bool aligned,
                                                      const Body& body) {
  for (int64_t at = lane() % lanes * SIZE; at < channels; at += lanes * SIZE) {
    const int64_t rest = channels - at;
    if (aligned && rest >= SIZE) {
      body(Whole{}, begin + at);
    } else {
      body(Part{0, rest < SIZE ? static_cast<int>(rest) : SIZE}, begin + at);
    }
  }
}

// rows [N * rows of a sample, channels], each of `lanes` that stand side by side.
template <typename To, typename scalar_t, typename acc>
__global__ __launch_bounds__(SLICE_THREADS) void row_kernel(Arguments<scalar_t, acc> all, Params params, int64_t rows,
                                                            int64_t rows_of_sample, int64_t channels, int lanes, To to) {
  using Here = Elements<scalar_t, acc, To::BACKWARD>;
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * SLICE_THREADS + threadIdx.x) / lanes, begin = row * channels;
  const bool is_row = row < rows, is_guided = is_row && all.is_guided(row / rows_of_sample);
  const bool aligned = all.are_aligned(begin) && to.are_aligned(begin);
  Sums sums;
  if (is_guided)
    for_each_chunk_of_row<Here::SIZE>(begin, channels, lanes, aligned, [&](auto range, int64_t at) {
      Here(all, range, at).add_to(sums, all.push);
    });
  const Factors<acc> by(params, over_warp(sums, Add{}, 1, lanes));
  if (!is_row) return;
  for_each_chunk_of_row<Here::SIZE>(begin, channels, lanes, aligned, [&](auto range, int64_t at) {
    is_guided ? to.write(all, by, range, at) : to.keep(all, range, at);
  });
}

// Lanes that share a row: each has a chunk, in rows that are short.
int lanes_of_row(int64_t channels, int size) {
  int lanes = 1;
  while (lanes < WARP && lanes * size < channels) lanes *= 2;
  return lanes;
}

template <typename To, typename scalar_t, typename acc>
void run(const OnDeviceOf& device, const Inputs& inputs, const Params& params, const Arguments<scalar_t, acc>& all, To to) {
  const Latents& size = inputs.size;
  if (params.by_row()) {
    const int64_t channels = std::max<int64_t>(1, inputs.channels), rows_of_sample = size.elements / channels;
    const int64_t rows = size.samples * rows_of_sample;
    const int lanes = lanes_of_row(channels, Pack<scalar_t>::SIZE);
    launch(device, {(rows * lanes + SLICE_THREADS - 1) / SLICE_THREADS, SLICE_THREADS}, row_kernel<To, scalar_t, acc>, all,
           params, rows, rows_of_sample, channels, lanes, to);
    return;
  }
  const int64_t slices = slices_of(size), blocks = size.samples * slices;
  const bool has_sums = params.renorm != Renorm::none;
  constexpr int64_t columns = sizeof(Sums) / sizeof(double);
  Tensor parts = make_empty(inputs.velocity, {has_sums ? blocks : 0, columns}, ScalarType::Double);
  Sums* sums = has_sums ? reinterpret_cast<Sums*>(parts.mutable_data_ptr<double>()) : nullptr;
  if (has_sums)
    launch(device, {blocks, SLICE_THREADS, sizeof(Sums) * SLICE_THREADS / WARP},
           sums_kernel<To::BACKWARD, scalar_t, acc>, all, size.elements, slices, sums);
  launch(device, {blocks, SLICE_THREADS}, sample_kernel<To, scalar_t, acc>, all, params, sums, size.elements, slices, to);
}

Tensor guided_velocity_fwd(Tensor velocity, Tensor without_text, optional<Tensor> without_image, optional<Tensor> guided,
                           Tensor numbers, int64_t renorm) {
  const Params params(renorm, numbers, without_image.has_value());
  const Inputs inputs(velocity, without_text, without_image, guided);
  const OnDeviceOf device(inputs.velocity);
  Tensor result;
  LVRPO_DISPATCH_FLOATING(inputs.velocity.scalar_type(), scalar_t, [&] {
    using acc = acc_t<scalar_t>;
    result = make_empty(inputs.velocity, inputs.velocity.sizes(), acc_dtype<scalar_t>);
    const Arguments<scalar_t, acc> all{Branches<scalar_t>(inputs), nullptr, inputs.mask(), Push<acc>(params)};
    run(device, inputs, params, all, Guided<scalar_t, acc>{result.mutable_data_ptr<acc>()});
  });
  return result;
}

std::tuple<Tensor, Tensor, Tensor> guided_velocity_bwd(Tensor dout, Tensor velocity, Tensor without_text,
                                                       optional<Tensor> without_image, optional<Tensor> guided,
                                                       Tensor numbers, bool with_branches, int64_t renorm) {
  const Params params(renorm, numbers, without_image.has_value());
  const Inputs inputs(velocity, without_text, without_image, guided);
  dout = inputs.size.contiguous(dout, "dout");
  const GradientTensors gradients(inputs, with_branches);
  const OnDeviceOf device(inputs.velocity);
  LVRPO_DISPATCH_FLOATING(inputs.velocity.scalar_type(), scalar_t, [&] {
    using acc = acc_t<scalar_t>;
    const Arguments<scalar_t, acc> all{Branches<scalar_t>(inputs), data<acc>(dout, "dout"), inputs.mask(),
                                       Push<acc>(params)};
    run(device, inputs, params, all, Gradients<scalar_t, acc>{gradients.pointers<scalar_t>()});
  });
  return gradients.tensors();
}

}  // namespace
}  // namespace lvrpo

LVRPO_CUDA_LIBRARY(m) {
  m.impl("guided_velocity_fwd", TORCH_BOX(&lvrpo::guided_velocity_fwd));
  m.impl("guided_velocity_bwd", TORCH_BOX(&lvrpo::guided_velocity_bwd));
}

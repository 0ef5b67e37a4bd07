// Two norms, of a sample or of its rows, then one elementwise pass; backward the same with one more sum.
// Formulas: docs/ops/guided_velocity.md.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/guided_velocity.h"
#include "common/tensors.h"
#include "cpu/simd.h"
#include "cpu/latents.h"

namespace lvrpo {
namespace {

using namespace guidance;
using std::optional;

const DeclareNames DECLARE("guided_velocity", {{"renorm", names_of(Renorm{})}}, {{"numbers", Numbers::NAMES}});

template <typename scalar_t, typename acc>
LVRPO_MULTIVERSION Sums sums_of(Branches<scalar_t> at, const acc* dout, int64_t n, Push<acc> push) {
  double given = 0, pushed = 0, along = 0;
  if (dout == nullptr) {
#pragma omp simd reduction(+ : given, pushed)
    for (int64_t i = 0; i < n; ++i) {
      const acc v = static_cast<acc>(at.v[i]);
      const double g = push.pushed(v, static_cast<acc>(at.no_text[i]), static_cast<acc>(at.no_image[i]));
      given += static_cast<double>(v) * static_cast<double>(v);
      pushed += g * g;
    }
    return {given, pushed, 0};
  }
#pragma omp simd reduction(+ : given, pushed, along)
  for (int64_t i = 0; i < n; ++i) {
    const acc v = static_cast<acc>(at.v[i]);
    const double g = push.pushed(v, static_cast<acc>(at.no_text[i]), static_cast<acc>(at.no_image[i]));
    given += static_cast<double>(v) * static_cast<double>(v);
    pushed += g * g;
    along += g * static_cast<double>(push.upstream(dout[i]));
  }
  return {given, pushed, along};
}

template <typename scalar_t, typename acc>
LVRPO_MULTIVERSION void write_guided(Branches<scalar_t> at, acc* out, int64_t n, Push<acc> push, acc renorm) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const acc no_image = static_cast<acc>(at.no_image[i]);
    out[i] = push.finished(renorm * push.pushed(static_cast<acc>(at.v[i]), static_cast<acc>(at.no_text[i]), no_image),
                           no_image);
  }
}

template <typename scalar_t, typename acc>
LVRPO_MULTIVERSION void write_gradient(Branches<scalar_t> at, const acc* dout, BranchGradients<scalar_t> to, int64_t n,
                                       Push<acc> push, Factors<acc> by) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Gradient<acc> d(push, by, static_cast<acc>(at.v[i]), static_cast<acc>(at.no_text[i]),
                          static_cast<acc>(at.no_image[i]), dout[i]);
    to.v[i] = static_cast<scalar_t>(d.v);
    if (to.no_text) to.no_text[i] = static_cast<scalar_t>(d.no_text);
    if (to.no_image) to.no_image[i] = static_cast<scalar_t>(d.no_image);
  }
}

// write(first element, number of elements, factors) of everything that is guided, keep(first element, number of elements)
// of the rest. dout is null in the forward.
template <typename scalar_t, typename acc, typename Write, typename Keep>
void for_each_part(const Inputs& inputs, const Params& params, const acc* dout, const Write& write, const Keep& keep) {
  const LatentBlocks size(inputs.velocity);
  const Branches<scalar_t> branches(inputs);
  const Push<acc> push(params);
  const bool* mask = inputs.mask();
  const auto sum = [&](int64_t begin, int64_t n) {
    return sums_of<scalar_t, acc>(branches.at(begin), dout ? dout + begin : nullptr, n, push);
  };
  std::vector<Sums> partial(size.blocks());
  const bool by_row = params.by_row();
  if (!by_row && params.renorm != Renorm::none)
    size.for_each_block([&](int64_t block, int64_t sample, int64_t begin, int64_t n) {
      if (!mask || mask[sample]) partial[block] = sum(begin, n);
    });
  if (!by_row) {
    size.for_each_block([&](int64_t, int64_t sample, int64_t begin, int64_t n) {
      if (mask && !mask[sample]) return keep(begin, n);
      write(begin, n, Factors<acc>(params, size.sum_of(partial, sample)));
    });
    return;
  }
  const int64_t channels = std::max<int64_t>(1, inputs.channels), rows = size.elements / channels;
  torch::stable::parallel_for(0, size.samples * rows, 1 + 16384 / channels, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const int64_t begin = row * channels;
      if (mask && !mask[row / rows]) {
        keep(begin, channels);
      } else {
        write(begin, channels, Factors<acc>(params, sum(begin, channels)));
      }
    }
  });
}

Tensor guided_velocity_fwd(Tensor velocity, Tensor without_text, optional<Tensor> without_image, optional<Tensor> guided,
                           Tensor numbers, int64_t renorm) {
  const Params params(renorm, numbers, without_image.has_value());
  const Inputs inputs(velocity, without_text, without_image, guided);
  Tensor result;
  LVRPO_DISPATCH_FLOATING(inputs.velocity.scalar_type(), scalar_t, [&] {
    using acc = acc_t<scalar_t>;
    result = make_empty(inputs.velocity, inputs.velocity.sizes(), acc_dtype<scalar_t>);
    const Branches<scalar_t> branches(inputs);
    const Push<acc> push(params);
    acc* out = result.mutable_data_ptr<acc>();
    for_each_part<scalar_t, acc>(
        inputs, params, nullptr,
        [&](int64_t begin, int64_t n, const Factors<acc>& by) {
          write_guided<scalar_t, acc>(branches.at(begin), out + begin, n, push, by.renorm);
        },
        [&](int64_t begin, int64_t n) {
          for (int64_t i = begin; i < begin + n; ++i) out[i] = static_cast<acc>(branches.v[i]);
        });
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
  LVRPO_DISPATCH_FLOATING(inputs.velocity.scalar_type(), scalar_t, [&] {
    using acc = acc_t<scalar_t>;
    const acc* d = data<acc>(dout, "dout");
    const Branches<scalar_t> branches(inputs);
    const Push<acc> push(params);
    const BranchGradients<scalar_t> to = gradients.pointers<scalar_t>();
    for_each_part<scalar_t, acc>(
        inputs, params, d,
        [&](int64_t begin, int64_t n, const Factors<acc>& by) {
          write_gradient<scalar_t, acc>(branches.at(begin), d + begin, to.at(begin), n, push, by);
        },
        [&](int64_t begin, int64_t n) {
          for (int64_t i = begin; i < begin + n; ++i) to.v[i] = static_cast<scalar_t>(d[i]);
          if (to.no_text) std::fill_n(to.no_text + begin, n, scalar_t(0));
          if (to.no_image) std::fill_n(to.no_image + begin, n, scalar_t(0));
        });
  });
  return gradients.tensors();
}

}  // namespace
}  // namespace lvrpo

STABLE_TORCH_LIBRARY_IMPL(lvrpo, CPU, m) {
  m.impl("guided_velocity_fwd", TORCH_BOX(&lvrpo::guided_velocity_fwd));
  m.impl("guided_velocity_bwd", TORCH_BOX(&lvrpo::guided_velocity_bwd));
}

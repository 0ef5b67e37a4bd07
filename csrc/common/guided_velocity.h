// Classifier-free guidance of one element, and the factors of its renormalisation, one copy for the CPU and for CUDA.
// Formulas: docs/ops/guided_velocity.md.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>

#include "common/latents.h"
#include "common/math.h"
#include "common/names.h"
#include "common/tensors.h"

namespace lvrpo::guidance {

// What they mean is said in lvrpo/params/flow.py.
LVRPO_CHOICES(Renorm, none, global, channel, text_channel)
LVRPO_TABLE(Numbers, double, text_scale, image_scale, renorm_min);

// Keeps the quotient of two norms finite; BAGEL's.
inline constexpr double EPS = 1e-8;

struct Params : Numbers {
  Renorm renorm;

  Params(int64_t renorm, const Tensor& numbers, bool has_image) : renorm(as_choice<Renorm>(renorm, "renorm")) {
    check_dtype(numbers, ScalarType::Double, "numbers");
    check_contiguous(numbers, "numbers");
    check_size(numbers, 0, COLUMNS_OF<Numbers>, "numbers");
    static_cast<Numbers&>(*this) = *reinterpret_cast<const Numbers*>(numbers.const_data_ptr<double>());
    if (!has_image) image_scale = 1;
  }
  bool by_row() const { return renorm == Renorm::channel || renorm == Renorm::text_channel; }
};

// How far the velocity is pushed: from the one without the text, then from the one without the image. `pushed` is what the
// renormalisation multiplies. Where there is no image branch, any number stands for it.
template <typename acc>
struct Push {
  acc text, image;      // the scales less 1
  bool is_image_first;  // the image's push comes before the renormalisation

  explicit Push(const Params& params)
      : text(static_cast<acc>(params.text_scale - 1)), image(static_cast<acc>(params.image_scale - 1)),
        is_image_first(params.renorm != Renorm::text_channel) {}

  LVRPO_INLINE acc pushed(acc v, acc no_text, acc no_image) const {
    const acc by_text = v + text * (v - no_text);
    return is_image_first ? by_text + image * (by_text - no_image) : by_text;
  }
  LVRPO_INLINE acc finished(acc renormed, acc no_image) const {
    return is_image_first ? renormed : renormed + image * (renormed - no_image);
  }
  // d / d renormed
  LVRPO_INLINE acc upstream(acc dout) const { return is_image_first ? dout : dout + image * dout; }
};

// Over a sample, or over a row of its channels.
struct Sums {
  double given = 0;   // v^2
  double pushed = 0;  // pushed^2
  double along = 0;   // pushed times its upstream gradient

  LVRPO_INLINE Sums& operator+=(const Sums& other) {
    given += other.given;
    pushed += other.pushed;
    along += other.along;
    return *this;
  }
  LVRPO_INLINE friend Sums operator+(Sums a, const Sums& b) { return a += b; }
};

// 1 / norm as a number of `acc`; 0 for a norm of 0, whose gradient is 0 then.
template <typename acc>
LVRPO_INLINE acc inverse_of(double norm) {
  constexpr double largest = std::numeric_limits<acc>::max();
  const double inverse = 1 / norm;
  return norm > 0 ? static_cast<acc>(inverse > largest ? largest : inverse) : acc(0);
}

// renorm = |v| / (|pushed| + EPS), held in [renorm_min, 1]. `slope` is d loss / d |v|, 0 where renorm is held, and
// -renorm times it d loss / d |pushed|. The inverse norms are apart from it: their product may be past a float.
template <typename acc>
struct Factors {
  acc renorm, slope, of_given, of_pushed;

  LVRPO_INLINE Factors(const Params& params, const Sums& sums)
      : renorm(acc(1)), slope(acc(0)), of_given(acc(0)), of_pushed(acc(0)) {
    if (params.renorm == Renorm::none) return;
    const double given = std::sqrt(sums.given), pushed = std::sqrt(sums.pushed), quotient = given / (pushed + EPS);
    const bool is_low = quotient < params.renorm_min, is_high = quotient > 1;
    renorm = static_cast<acc>(is_low ? params.renorm_min : is_high ? 1.0 : quotient);
    if (is_low || is_high) return;
    slope = static_cast<acc>(sums.along / (pushed + EPS));
    of_given = inverse_of<acc>(given);
    of_pushed = inverse_of<acc>(pushed);
  }
};

template <typename acc>
struct Gradient {
  acc v, no_text, no_image;

  LVRPO_INLINE Gradient(const Push<acc>& push, const Factors<acc>& by, acc at_v, acc at_no_text, acc at_no_image,
                        acc dout) {
    const acc pushed = push.pushed(at_v, at_no_text, at_no_image);
    const acc dpushed = by.renorm * push.upstream(dout) - by.renorm * by.slope * (pushed * by.of_pushed);
    const acc dby_text = push.is_image_first ? dpushed + push.image * dpushed : dpushed;
    no_image = -push.image * (push.is_image_first ? dpushed : dout);
    no_text = -push.text * dby_text;
    v = dby_text + push.text * dby_text + by.slope * (at_v * by.of_given);
  }
};

// The tensors of a call, checked and contiguous, and the shape that they have.
struct Inputs {
  Latents size;
  int64_t channels;
  Tensor velocity, without_text;
  std::optional<Tensor> without_image, guided;

  Inputs(const Tensor& v, const Tensor& no_text, const std::optional<Tensor>& no_image, const std::optional<Tensor>& mask)
      : size(v), channels(v.size(v.dim() - 1)), velocity(dense(v)),
        without_text(size.contiguous(no_text, "without_text")) {
    LVRPO_CHECK(v.dim() >= 2, "velocity must be [N, ..., C]");
    if (no_image) without_image = size.contiguous(*no_image, "without_image");
    if (mask) {
      check_dtype(*mask, ScalarType::Bool, "guided");
      check_size(*mask, 0, size.samples, "guided");
      guided = dense(*mask);
    }
    check_dtype(no_text, v.scalar_type(), "without_text");
    if (no_image) check_dtype(*no_image, v.scalar_type(), "without_image");
  }
  const bool* mask() const { return guided ? guided->const_data_ptr<bool>() : nullptr; }
};

// All [N, elements]. Without an image branch the velocity itself stands for it.
template <typename scalar_t>
struct Branches {
  const scalar_t *v, *no_text, *no_image;

  explicit Branches(const Inputs& inputs)
      : v(inputs.velocity.const_data_ptr<scalar_t>()), no_text(inputs.without_text.const_data_ptr<scalar_t>()),
        no_image(inputs.without_image ? inputs.without_image->const_data_ptr<scalar_t>() : v) {}
  LVRPO_INLINE Branches at(int64_t first) const {
    Branches from = *this;
    from.v += first, from.no_text += first, from.no_image += first;
    return from;
  }
};

// Gradients of the branches, null where nobody asked.
template <typename scalar_t>
struct BranchGradients {
  scalar_t *v, *no_text, *no_image;

  LVRPO_INLINE BranchGradients at(int64_t first) const {
    return {v + first, no_text ? no_text + first : nullptr, no_image ? no_image + first : nullptr};
  }
};

class GradientTensors {
 public:
  GradientTensors(const Inputs& inputs, bool with_branches)
      : has_text_(with_branches), has_image_(with_branches && inputs.without_image), v_(like(inputs.velocity, true)),
        no_text_(like(inputs.velocity, has_text_)), no_image_(like(inputs.velocity, has_image_)) {}

  template <typename scalar_t>
  BranchGradients<scalar_t> pointers() const {
    return {v_.mutable_data_ptr<scalar_t>(), has_text_ ? no_text_.mutable_data_ptr<scalar_t>() : nullptr,
            has_image_ ? no_image_.mutable_data_ptr<scalar_t>() : nullptr};
  }
  std::tuple<Tensor, Tensor, Tensor> tensors() const { return {v_, no_text_, no_image_}; }

 private:
  static Tensor like(const Tensor& velocity, bool is_wanted) {
    return is_wanted ? make_empty(velocity, velocity.sizes()) : make_empty(velocity, {0});
  }

  bool has_text_, has_image_;
  Tensor v_, no_text_, no_image_;
};

}  // namespace lvrpo::guidance

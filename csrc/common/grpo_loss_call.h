// The arguments of grpo_loss_fwd on the host, the same for the CPU and for CUDA: checked, and as kernels take them.
#pragma once


#include <optional>

#include "common/check.h"
#include "common/grpo_loss.h"
#include "common/tensors.h"

namespace lvrpo {

// As in the schema.
struct GrpoLossCall {
  Tensor logprobs;
  std::optional<Tensor> old_logprobs;
  Tensor advantages, cu_seqlens;
  std::optional<Tensor> ref_logprobs, entropy, mask, policy_weights;
  Tensor numbers;
  bool advantage_per_token, count_empty;
  int64_t ratio, surrogate, kl, kl_factor, kl_gradient, aggregation;

  int64_t tokens() const { return logprobs.size(0); }
  int64_t sequences() const { return cu_seqlens.size(0) - 1; }

  // Before anything else: shapes and dtypes are right, memory is dense. No value is read.
  void prepare() {
    LVRPO_CHECK(logprobs.dim() == 1 && advantages.dim() == 1 && cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1,
                "logprobs, advantages and cu_seqlens must have one dimension");
    check_dtype(cu_seqlens, ScalarType::Long, "cu_seqlens");
    check_dtype(numbers, ScalarType::Double, "numbers");
    check_size(numbers, 0, COLUMNS_OF<Numbers>, "numbers");
    const ScalarType dtype = logprobs.scalar_type();
    check_dtype(advantages, dtype, "advantages");
    check_device(advantages, logprobs, "advantages");
    check_device(cu_seqlens, logprobs, "cu_seqlens");
    LVRPO_CHECK(numbers.is_cpu(), "numbers must be on the CPU");
    check_size(advantages, 0, advantage_per_token ? tokens() : sequences(), "advantages");
    for (Tensor* tensor : {&logprobs, &advantages, &cu_seqlens, &numbers}) *tensor = dense(*tensor);
    prepare_tokens(old_logprobs, dtype, "old_logprobs");
    prepare_tokens(ref_logprobs, dtype, "ref_logprobs");
    prepare_tokens(entropy, dtype, "entropy");
    prepare_tokens(policy_weights, dtype, "policy_weights");
    prepare_tokens(mask, ScalarType::Bool, "mask");
  }

  template <typename acc>
  Tokens<acc> inputs() const {
    return {logprobs.const_data_ptr<acc>(),
            data_of<acc>(old_logprobs),
            advantages.const_data_ptr<acc>(),
            data_of<acc>(ref_logprobs),
            data_of<acc>(entropy),
            data_of<acc>(policy_weights),
            data_of<bool>(mask),
            advantage_per_token};
  }

  Numbers named() const { return *reinterpret_cast<const Numbers*>(numbers.const_data_ptr<double>()); }

  template <typename acc>
  Loss<acc> loss() const {
    const Numbers by = named();
    const auto real = [](double x) { return static_cast<acc>(x); };
    const Policy<acc> policy{real(by.clip_low),
                             real(by.clip_high),
                             real(1.0 - by.clip_low),
                             real(1.0 + by.clip_high),
                             real(by.ratio_cap),
                             {real(by.shape_pos_0), real(by.shape_pos_1)},
                             {real(by.shape_neg_0), real(by.shape_neg_1)}};
    const acc limit = real(by.log_ratio_limit);
    const KLForm<acc> form{as_choice<KLFactor>(kl_factor, "kl_factor"),
                           as_choice<KLGradient>(kl_gradient, "kl_gradient") == KLGradient::k2, limit,
                           real(by.kl_log_ratio_limit), real(by.kl_limit)};
    const Loss<acc> loss{as_choice<Ratio>(ratio, "ratio"), as_choice<Surrogate>(surrogate, "surrogate"),
                         as_choice<KL>(kl, "kl"), policy, form, limit, real(by.beta), real(by.entropy_coef)};
    LVRPO_CHECK(!advantage_per_token || !loss.whole_sequence(), "advantages must be [B]");
    return loss;
  }

  Aggregate aggregate() const {
    const Numbers by = named();
    return {as_choice<Aggregation>(aggregation, "aggregation"), count_empty, by.max_length, by.denominator};
  }

 private:
  void prepare_tokens(std::optional<Tensor>& tensor, ScalarType dtype, const char* name) const {
    if (!tensor) return;
    check_dtype(*tensor, dtype, name);
    check_device(*tensor, logprobs, name);
    check_size(*tensor, 0, tokens(), name);
    tensor = dense(*tensor);
  }
  template <typename T>
  static const T* data_of(const std::optional<Tensor>& tensor) {
    return tensor ? tensor->const_data_ptr<T>() : nullptr;
  }
};

}  // namespace lvrpo

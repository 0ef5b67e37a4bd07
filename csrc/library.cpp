// lvrpo._C: build facts for Python, and every C++ op's schema on one page. Kernels register themselves in
// csrc/cpu/<op>.cpp and csrc/cuda/<op>.cu; fakes and autograd are in lvrpo/ops/<op>.py.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>

#include <string>

#include "common/names.h"

STABLE_TORCH_LIBRARY(lvrpo, m) {
  // An int that is a choice is the position of its name in lvrpo._C.choices().

  // Numbers that a step may change come as one fp64 tensor on the CPU: a graph holds a float as a constant. Here they are
  // temperature, softcap (0 means none) and ignore_index. entropy and sum_squares are empty unless asked for.
  m.def(
      "gather_logprobs_fwd(Tensor logits, Tensor token_ids, Tensor? row_index, Tensor? vocab_range, Tensor numbers, "
      "bool with_entropy, bool with_sum_squares) "
      "-> (Tensor logprobs, Tensor lse, Tensor entropy, Tensor sum_squares)");
  // dlogits has the shape of logits and any floating dtype, and may be the logits themselves.
  m.def(
      "gather_logprobs_bwd(Tensor(a!) dlogits, Tensor dlogprobs, Tensor? dentropy, Tensor logits, Tensor token_ids, "
      "Tensor? row_index, Tensor? vocab_range, Tensor lse, Tensor? entropy, Tensor numbers) -> ()");
  // noise, here and below, is standard normals, or int64 [N, 2]: the seed and the subsequence of the stream that a sample's
  // are drawn from. It is absent when every step is deterministic.
  m.def(
      "flow_step_fwd(Tensor velocity, Tensor x_t, Tensor? noise, Tensor c_x, Tensor c_v, Tensor std) "
      "-> (Tensor x_next, Tensor logprob)");
  m.def(
      "flow_step_bwd(Tensor dx_next, Tensor dlogprob, Tensor? noise, Tensor c_x, Tensor c_v, Tensor std) "
      "-> (Tensor dvelocity, Tensor dx_t)");
  // numbers [7] fp64: clip_low, clip_high, adv_clip, log_ratio_scale (0 means "mean"), log_ratio_limit, tau, beta; limits
  // may be infinite. sums and extremes are those of FlowLossMetrics; directions [N, 3] fp64 are the factors of noise,
  // velocity - velocity_old and velocity - velocity_ref in d loss / d velocity.
  m.def(
      "flow_policy_loss_fwd(Tensor velocity, Tensor velocity_old, Tensor noise, Tensor? velocity_ref, Tensor c_v, "
      "Tensor std, Tensor dt, Tensor advantages, Tensor? mask, Tensor? policy_weights, Tensor? denominator, "
      "Tensor numbers, int variant, int kl) -> (Tensor loss, Tensor sums, Tensor extremes, Tensor directions)");
  m.def(
      "flow_policy_loss_bwd(Tensor dloss, Tensor velocity, Tensor velocity_old, Tensor noise, Tensor? velocity_ref, "
      "Tensor directions) -> Tensor dvelocity");
  // numbers [3] fp64: text_scale, image_scale, renorm_min; guided is bool [N]. The gradients of the branches are empty unless
  // asked for, and that of an image branch that is absent.
  m.def(
      "guided_velocity_fwd(Tensor velocity, Tensor without_text, Tensor? without_image, Tensor? guided, Tensor numbers, "
      "int renorm) -> Tensor");
  m.def(
      "guided_velocity_bwd(Tensor dout, Tensor velocity, Tensor without_text, Tensor? without_image, Tensor? guided, "
      "Tensor numbers, bool with_branches, int renorm) "
      "-> (Tensor dvelocity, Tensor dwithout_text, Tensor dwithout_image)");
  // q_lo ... runs are the tables of a SpanMask, with positions where it has a window, and query_tiles ... key_parts those of
  // its schedule, which kernels on a GPU need. numbers [3] fp64, on the CPU: scale, softcap and window (0: none).
  m.def(
      "packed_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor q_lo, Tensor q_hi, Tensor rows, Tensor spans, "
      "Tensor runs, Tensor? positions, Tensor? query_tiles, Tensor numbers) -> (Tensor out, Tensor lse)");
  m.def(
      "packed_attention_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor q_lo, Tensor q_hi, Tensor rows, Tensor spans, Tensor runs, Tensor? positions, Tensor? query_tiles, "
      "Tensor? key_work, Tensor? key_rows, Tensor? key_parts, Tensor numbers) "
      "-> (Tensor dq, Tensor dk, Tensor dv)");
  // numbers are ddof, eps, std_floor and clip, which may be infinite. stats [5, K] are share, constant_groups, mean, std,
  // applicable.
  m.def(
      "normalize_advantages(Tensor rewards, Tensor offsets, Tensor weights, Tensor? lengths, Tensor numbers, "
      "int combine, int baseline, int scale, int whiten) "
      "-> (Tensor values, Tensor per_reward, Tensor stats, Tensor all_zero)");
  // mask is bool; advantages are [T] or [B], as advantage_per_token says. statistics are the sums and then the extremes of
  // LossMetrics, fp64. dlogprobs and dentropy are the derivatives of the loss: its backward only scales them.
  m.def(
      "grpo_loss_fwd(Tensor logprobs, Tensor? old_logprobs, Tensor advantages, Tensor cu_seqlens, "
      "Tensor? ref_logprobs, Tensor? entropy, Tensor? mask, Tensor? policy_weights, Tensor numbers, "
      "bool advantage_per_token, bool count_empty, int ratio, int surrogate, int kl, int kl_factor, int kl_gradient, "
      "int aggregation) -> (Tensor loss, Tensor statistics, Tensor dlogprobs, Tensor dentropy)");
  // For a ratio per token, on a GPU: row r predicts token r, and its gradient is written in the pass that finds its
  // log-prob. advantages and factors are [R], the latter what the aggregation multiplies a token's term by.
  m.def(
      "logits_grpo_loss_rows(Tensor(a!) dlogits, Tensor logits, Tensor token_ids, Tensor? vocab_range, "
      "Tensor? old_logprobs, Tensor advantages, Tensor cu_seqlens, Tensor? ref_logprobs, Tensor mask, "
      "Tensor? policy_weights, Tensor factors, Tensor softmax_numbers, Tensor loss_numbers, int ratio, int surrogate, "
      "int kl, int kl_factor, int kl_gradient) -> (Tensor logprobs, Tensor lse, Tensor entropy)");
  // On a GPU, where the host does not read the factor []: scaled is the gradient itself, which a factor of 1 leaves
  // alone, or contiguous like it, of its dtype or of 16 bits for one of fp32. The factor is fp32, and fp64 for fp64.
  m.def("scale_gradient(Tensor(a!) scaled, Tensor gradient, Tensor factor) -> ()");
}

namespace {

// The widest instruction set this CPU runs, among those the ops are compiled for.
std::string cpu_capability() {
#if defined(__x86_64__) && defined(__GNUC__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl")) return "avx512";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "avx2";
#endif
  return "baseline";
}

// What the CUDA ops are compiled for, as nvcc names it: sm_90a is machine code, compute_90 is PTX for newer GPUs.
std::string cuda_architectures() {
#ifdef LVRPO_CUDA_ARCHITECTURES
#define LVRPO_TEXT_OF(...) #__VA_ARGS__
#define LVRPO_TEXT(...) LVRPO_TEXT_OF(__VA_ARGS__)
  return LVRPO_TEXT(LVRPO_CUDA_ARCHITECTURES);
#else
  return "";
#endif
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = std::string(__VERSION__);
  info["stable_abi"] = "torch >= 2.10";
  info["cuda"] = pybind11::str(cuda_architectures()).attr("replace")(",", " ").attr("split")();
  return info;
}

// {op: {choice or table: names in their order}}
pybind11::dict as_dict(const lvrpo::NameLists& lists) {
  pybind11::dict by_op;
  for (const auto& [op, named] : lists) {
    pybind11::dict of_op;
    for (const auto& [name, names] : named) of_op[name.c_str()] = pybind11::str(names).attr("split")(", ");
    by_op[op.c_str()] = of_op;
  }
  return by_op;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled ops of lvrpo; importing it registers torch.ops.lvrpo.*";
  m.def("build_info", &build_info, "How this extension was built.");
  m.def("choices", [] { return as_dict(lvrpo::Names::all().choices); },
        "{op: {argument: names}}: the names of choices, each at the position that stands for it.");
  m.def("tables", [] { return as_dict(lvrpo::Names::all().tables); },
        "{op: {tensor: names}}: the names of what a tensor holds, in their order.");
  m.def("cpu_capability", &cpu_capability, "'avx512', 'avx2' or 'baseline': what the CPU ops run as here.");
}

// Argument checks of the C++ ops: the Python layer gives users the readable ValueError, these keep a direct caller of
// torch.ops.lvrpo.* from reading memory that is not there.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#define LVRPO_CHECK(condition, ...) STD_TORCH_CHECK(condition, "lvrpo: ", __VA_ARGS__)

namespace lvrpo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_contiguous(const Tensor& t, const char* name) {
  LVRPO_CHECK(t.is_contiguous(), name, " must be contiguous");
}

inline void check_dtype(const Tensor& t, ScalarType expected, const char* name) {
  LVRPO_CHECK(t.scalar_type() == expected, name, " is ", torch::headeronly::toString(t.scalar_type()), ", expected ",
              torch::headeronly::toString(expected));
}

// A pointer to the memory of another device reads something else.
inline void check_device(const Tensor& t, const Tensor& like, const char* name) {
  LVRPO_CHECK(t.device() == like.device(), name, " is on another device");
}

inline void check_size(const Tensor& t, int64_t dim, int64_t expected, const char* name) {
  LVRPO_CHECK(t.dim() > dim && t.size(dim) == expected, name, " must have size ", expected, " in dimension ", dim);
}

}  // namespace lvrpo

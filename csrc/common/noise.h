// The noise of a batch of latents: standard normals [N, ...], or int64 [N, 2], the seed and the subsequence of the stream
// that a sample's are drawn from.
#pragma once

#include <cstdint>
#include <optional>

#include "common/check.h"
#include "common/latents.h"
#include "common/philox.h"
#include "common/tensors.h"

namespace lvrpo {

// One of the two; none where no step draws any.
template <typename acc>
struct Noise {
  const acc* stored;       // [N, elements]
  const int64_t* streams;  // [N, 2]

  LVRPO_INLINE bool is_drawn() const { return streams != nullptr; }
  LVRPO_INLINE bool is_given() const { return stored != nullptr || is_drawn(); }
  LVRPO_INLINE philox::Stream stream(int64_t sample) const {
    return {static_cast<uint64_t>(streams[2 * sample]), static_cast<uint64_t>(streams[2 * sample + 1])};
  }
};

// Checked and contiguous; the tensor lives as long as it does.
class NoiseTensor {
 public:
  NoiseTensor(const std::optional<Tensor>& noise, const Latents& size) {
    if (!noise) return;
    is_streams_ = noise->scalar_type() == ScalarType::Long;
    if (is_streams_) {
      LVRPO_CHECK(noise->dim() == 2 && noise->size(0) == size.samples && noise->size(1) == 2,
                  "streams of noise must be [N, 2]");
    }
    tensor_ = is_streams_ ? dense(*noise) : size.contiguous(*noise, "noise");
  }

  template <typename acc>
  Noise<acc> pointers() const {
    if (!tensor_) return {nullptr, nullptr};
    if (is_streams_) return {nullptr, tensor_->const_data_ptr<int64_t>()};
    return {data<acc>(*tensor_, "noise"), nullptr};
  }

 private:
  std::optional<Tensor> tensor_;
  bool is_streams_ = false;
};

}  // namespace lvrpo

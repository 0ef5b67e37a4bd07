// A gradient times a factor that the host does not read: what the backward of a fused loss has left to do
// (CompiledBackend.scaled in lvrpo/backends/cpp.py).
#include "cuda/latents.cuh"

namespace lvrpo {
namespace {

// gradient and scaled [size], factor []. In place a factor of 1, as it is unless a loss is scaled, leaves nothing to
// do. As many blocks as run at once go over all slices: one for each of gigabytes would take long to do nothing.
template <typename T, typename G, typename acc = acc_t<T>>
__global__ __launch_bounds__(SLICE_THREADS) void scale_kernel(const T* gradient, const acc* factor_of, int64_t size,
                                                              G* scaled) {
  const acc factor = *factor_of;
  if (static_cast<const void*>(gradient) == scaled && factor == acc(1)) return;
  constexpr int SIZE = std::max(Pack<T>::SIZE, Pack<G>::SIZE), CHUNKS = SLICE / (SIZE * SLICE_THREADS);
  const auto write = [&](const Chunk<T, SIZE>& x, auto range, int64_t at) {
    acc products[SIZE];
#pragma unroll
    for (int i = 0; i < SIZE; ++i) products[i] = x[i] * factor;
    Chunk<G, SIZE> y;
#pragma unroll
    for (int i = 0; i < y.PACKS; ++i) y.packs[i].set(products + i * y.PER_PACK);
    y.write(scaled + at, range);
  };

  const int ahead = ahead_of(scaled);
  const bool aligned = is_aligned(gradient - ahead);
  constexpr int NEXT = SLICE_THREADS * SIZE;
  for (int64_t slice = blockIdx.x * int64_t(SLICE) - ahead; slice < size; slice += gridDim.x * int64_t(SLICE)) {
    const int64_t first = slice + static_cast<int>(threadIdx.x) * SIZE;
    if (aligned && slice >= 0 && slice + SLICE <= size) {
      // All are read before one is written, which in the same memory the compiler may not reorder.
      Chunk<T, SIZE> x[CHUNKS];
#pragma unroll
      for (int i = 0; i < CHUNKS; ++i) x[i].read(gradient + first + i * NEXT, Whole{});
#pragma unroll
      for (int i = 0; i < CHUNKS; ++i) write(x[i], Whole{}, first + i * NEXT);
    } else {
      for (int64_t at = first; at < std::min(size, slice + SLICE); at += NEXT) {
        const Part part{at < 0 ? static_cast<int>(-at) : 0, size - at < SIZE ? static_cast<int>(size - at) : SIZE};
        Chunk<T, SIZE> x;
        x.read(gradient + at, part);
        write(x, part, at);
      }
    }
  }
}

template <typename T, typename G>
void run(const Tensor& gradient, const Tensor& factor, const Tensor& scaled) {
  const OnDeviceOf device(gradient);
  const int64_t size = gradient.numel();
  const auto kernel = scale_kernel<T, G>;
  const int64_t blocks = std::min((size + SLICE - 1) / SLICE, resident_blocks(device, kernel, SLICE_THREADS, 0));
  launch(device, {blocks, SLICE_THREADS}, kernel, gradient.const_data_ptr<T>(), factor.const_data_ptr<acc_t<T>>(), size,
         scaled.mutable_data_ptr<G>());
}

void scale_gradient(Tensor scaled, Tensor gradient, Tensor factor) {
  const ScalarType from = gradient.scalar_type(), to = scaled.scalar_type();
  check_contiguous(scaled, "scaled");
  check_contiguous(gradient, "gradient");
  LVRPO_CHECK(scaled.numel() == gradient.numel(), "scaled has ", scaled.numel(), " elements, expected ",
              gradient.numel(), ", as the gradient has");
  LVRPO_CHECK(factor.numel() == 1, "factor has ", factor.numel(), " elements, expected 1");
  check_dtype(factor, from == ScalarType::Double ? ScalarType::Double : ScalarType::Float, "factor");
  check_device(scaled, gradient, "scaled");
  check_device(factor, gradient, "factor");
  if (from == to) {
    LVRPO_DISPATCH_FLOATING(from, scalar_t, [&] { run<scalar_t, scalar_t>(gradient, factor, scaled); });
    return;
  }
  check_dtype(gradient, ScalarType::Float, "gradient of another dtype than scaled");
  if (to == ScalarType::BFloat16) return run<float, BFloat16>(gradient, factor, scaled);
  check_dtype(scaled, ScalarType::Half, "scaled");
  run<float, Half>(gradient, factor, scaled);
}

}  // namespace
}  // namespace lvrpo

LVRPO_CUDA_LIBRARY(m) { m.impl("scale_gradient", TORCH_BOX(&lvrpo::scale_gradient)); }

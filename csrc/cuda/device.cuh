// What kernels need of CUDA: launches on the stream and the device of a tensor, shared memory, clusters, reductions and
// loads of 16 bytes. Compiled as C++ with -DLVRPO_EMULATE, a .cu file runs on the CPU, thread for thread
// (tests/cuda/emulate.h); this file and common/ alone tell the two apart.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "common/check.h"
#include "common/convert.h"
#include "common/dispatch.h"
#include "common/math.h"

#ifdef LVRPO_EMULATE
#include "emulate.h"
#define LVRPO_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(lvrpo_emulated, CPU, m)
#else
#include <cooperative_groups.h>
#include <cuda_runtime.h>
#include <dlfcn.h>
#define LVRPO_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(lvrpo, CUDA, m)
#endif

namespace lvrpo {

inline constexpr int WARP = 32;
inline constexpr unsigned ALL_LANES = 0xffffffffu;

// ---- Launches ----

#ifndef LVRPO_EMULATE
inline void check_cuda(cudaError_t error, const char* what) {
  LVRPO_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

// Never launched: its attributes tell what this library was compiled for.
template <typename = void>
__global__ void empty_kernel() {}
#endif

// While it lives, the device of a tensor is the current one.
class OnDeviceOf {
 public:
#ifdef LVRPO_EMULATE
  explicit OnDeviceOf(const Tensor&) {}
  // As an H100 has; a test may want fewer, to reach the forms for many rows with few.
  int processors() const { return emulate::setting("LVRPO_EMULATE_PROCESSORS", 132); }
  // Ten times the major compute capability and the minor one: those of the device, or of the PTX where that is older, as
  // then the kernels have no clusters on any device.
  int capability() const { return emulate::setting("LVRPO_EMULATE_CAPABILITY", 90); }
  bool reads(const Tensor&) const { return true; }
#else
  explicit OnDeviceOf(const Tensor& tensor) : index_(tensor.get_device_index()), guard_(index_) {
    // Looked up, so that this library loads beside a torch without CUDA; and in torch's own library, because torch keeps
    // its symbols to itself: a weak reference would stay null.
    using Getter = AOTITorchError (*)(int32_t, void**);
    static const Getter current_stream = [] {
      void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
      void* found = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
      LVRPO_CHECK(found, "this torch has no CUDA");
      return reinterpret_cast<Getter>(found);
    }();
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(current_stream(index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  int processors() const { return attribute(cudaDevAttrMultiProcessorCount); }
  int capability() const {
    cudaFuncAttributes compiled{};
    check_cuda(cudaFuncGetAttributes(&compiled, empty_kernel<>), "cudaFuncGetAttributes");
    const int major = attribute(cudaDevAttrComputeCapabilityMajor), minor = attribute(cudaDevAttrComputeCapabilityMinor);
    return std::min(10 * major + minor, compiled.ptxVersion);
  }
  cudaStream_t stream() const { return stream_; }
  // Whether kernels read it where it is, rather than the host.
  bool reads(const Tensor& tensor) const { return tensor.is_cuda(); }

 private:
  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, which, index_), "cudaDeviceGetAttribute");
    return value;
  }

  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
#endif
};

// Blocks, threads of each, bytes of its shared memory, blocks that form a cluster; and whether all blocks run at once, so
// that they can meet in sync_grid: then no more than resident_blocks of them.
struct Launch {
  int64_t blocks;
  int threads;
  int64_t shared = 0;
  int cluster = 1;
  bool cooperative = false;
};

#ifndef LVRPO_EMULATE
// More shared memory than every kernel may have is asked for first.
template <typename... Parameters>
void allow_shared_memory(void (*kernel)(Parameters...), int64_t bytes) {
  if (bytes > 48 << 10)
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
               "shared memory");
}
#endif

// Blocks of a kernel that run at once on a device that does nothing else.
template <typename... Parameters>
int64_t resident_blocks(const OnDeviceOf& device, void (*kernel)(Parameters...), int threads, int64_t shared) {
#ifdef LVRPO_EMULATE
  return emulate::setting("LVRPO_EMULATE_RESIDENT", 4);  // few: each of their threads has a stack
#else
  allow_shared_memory(kernel, shared);
  int of_processor = 0;
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_processor, kernel, threads, shared), "occupancy");
  return static_cast<int64_t>(of_processor) * device.processors();
#endif
}

template <typename... Parameters, typename... Args>
void launch(const OnDeviceOf& device, const Launch& size, void (*kernel)(Parameters...), Args... args) {
  if (size.blocks == 0) return;
  LVRPO_CHECK(size.blocks <= std::numeric_limits<int32_t>::max(), "too many blocks: ", size.blocks);
#ifdef LVRPO_EMULATE
  const auto blocks = static_cast<unsigned>(size.blocks);
  // All blocks of a cooperative launch are alive together, as a cluster's are.
  const unsigned together = size.cooperative ? blocks : size.cluster;
  emulate::launch(blocks, size.threads, size.shared, together, [=] { kernel(Parameters(args)...); });
#else
  allow_shared_memory(kernel, size.shared);
  cudaLaunchAttribute attributes[2];
  unsigned count = 0;
  if (size.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {static_cast<unsigned>(size.cluster), 1, 1};
  }
  if (size.cooperative) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count++].val.cooperative = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(size.blocks));
  config.blockDim = dim3(size.threads);
  config.dynamicSmemBytes = size.shared;
  config.stream = device.stream();
  config.attrs = attributes;
  config.numAttrs = count;
  check_cuda(cudaLaunchKernelEx(&config, kernel, Parameters(args)...), "launch");
#endif
}

// ---- Shared memory and clusters ----

// The shared memory of a block, Launch::shared bytes of it.
template <typename T>
__device__ __forceinline__ T* shared_memory() {
#ifdef LVRPO_EMULATE
  return static_cast<T*>(emulate::shared_memory());
#else
  extern __shared__ __align__(16) unsigned char lvrpo_shared_memory[];
  return reinterpret_cast<T*>(lvrpo_shared_memory);
#endif
}

#if defined(LVRPO_EMULATE) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
#define LVRPO_HAS_CLUSTERS
#endif

// The same place in the shared memory of another block of the cluster.
template <typename T>
__device__ __forceinline__ T* shared_memory_of(T* place, unsigned rank) {
#ifdef LVRPO_EMULATE
  return static_cast<T*>(emulate::shared_memory_of(place, rank));
#elif defined(LVRPO_HAS_CLUSTERS)
  return static_cast<T*>(__cluster_map_shared_rank(place, rank));
#else
  return place;
#endif
}

__device__ __forceinline__ unsigned rank_in_cluster() {
#ifdef LVRPO_EMULATE
  return emulate::rank_in_cluster();
#elif defined(LVRPO_HAS_CLUSTERS)
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}

// Waits for all threads of all blocks of the cluster, and shows each what the others wrote before.
__device__ __forceinline__ void sync_cluster() {
#ifdef LVRPO_EMULATE
  emulate::sync_cluster();
#elif defined(LVRPO_HAS_CLUSTERS)
  // Not .aligned, which promises that a warp comes here as one: after a branch of its lanes it need not.
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
#else
  __syncthreads();
#endif
}

// The same for all threads of all blocks of a cooperative launch.
__device__ __forceinline__ void sync_grid() {
#ifdef LVRPO_EMULATE
  emulate::sync_cluster();
#else
  cooperative_groups::this_grid().sync();
#endif
}

// ---- Reductions: the order is that of the lanes and warps, whatever else runs ----

__device__ __forceinline__ int lane() { return threadIdx.x % WARP; }
__device__ __forceinline__ int warp() { return threadIdx.x / WARP; }

struct Add {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Largest {  // a NaN loses
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return b > a ? b : a;
  }
};

// A value of any trivial type, from the lane whose number differs in these bits; in words, as the hardware moves them.
template <typename T>
__device__ __forceinline__ T from_lane_xor(T value, int bits) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) % sizeof(uint32_t) == 0);
  uint32_t words[sizeof(T) / sizeof(uint32_t)];
  memcpy(words, &value, sizeof(T));
#pragma unroll
  for (uint32_t& word : words) word = __shfl_xor_sync(ALL_LANES, word, bits);
  memcpy(&value, words, sizeof(T));
  return value;
}

// join(a, b) over a warp, in every lane; or over each of its groups of `to` lanes, of which those of every `from` hold the
// same already; both powers of two. All lanes take part.
template <typename T, typename Join>
__device__ __forceinline__ T over_warp(T value, const Join& join, int from = 1, int to = WARP) {
#pragma unroll
  for (int bits = to / 2; bits >= from; bits /= 2) {
    const T other = from_lane_xor(value, bits);
    // The lower lane's comes first in both, so that all lanes have the same bits.
    value = lane() & bits ? join(other, value) : join(value, other);
  }
  return value;
}

// join(a, b) over a block of whole warps, in every thread. All threads take part; `scratch` is shared memory of a T per
// warp that nobody else uses until they have all come out.
template <typename T, typename Join>
__device__ __forceinline__ T over_block(T value, const Join& join, T* scratch) {
  value = over_warp(value, join);
  if (lane() == 0) scratch[warp()] = value;
  __syncthreads();
  T total = scratch[0];
  for (int other = 1; other < static_cast<int>(blockDim.x) / WARP; ++other) total = join(total, scratch[other]);
  __syncthreads();
  return total;
}

// ---- Loads and stores of 16 bytes ----

// 16 bytes of which some may be around an array, and are not used: allocations are whole multiples of them.
#ifdef LVRPO_EMULATE
using emulate::aligned_16;
#else
__device__ __forceinline__ uint4 aligned_16(const uint4* at) { return *at; }
#endif

template <typename T>
struct alignas(16) Pack {
  static constexpr int SIZE = 16 / sizeof(T);
  uint32_t word[4];

  // From an address that is a multiple of 16.
  __device__ __forceinline__ void read(const T* from) { set(*reinterpret_cast<const uint4*>(from)); }
  __device__ __forceinline__ void write(T* to) const {
    // As one number: nvcc takes a uint4 apart, and does not always find its four words together again.
    const uint64_t low = static_cast<uint64_t>(word[1]) << 32 | word[0], high = static_cast<uint64_t>(word[3]) << 32 | word[2];
    *reinterpret_cast<unsigned __int128*>(to) = static_cast<unsigned __int128>(high) << 64 | low;
  }
  // From any address of a T: out of the two aligned packs that hold it, of which the second is not touched if the first
  // has all.
  __device__ __forceinline__ void read_unaligned(const T* from) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(from), begin = at & ~uintptr_t(15);
    if (at == begin) return read(from);
    const unsigned bytes = static_cast<unsigned>(at - begin), words = bytes / 4, bits = bytes % 4 * 8;
    // From the pointer and not from its number, of which nvcc would not know in what memory it is.
    const uint4* aligned = reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(from) - bytes);
    Pack low, high;
    low.set(aligned_16(aligned));
    high.set(aligned_16(aligned + 1));
    uint32_t all[8];
#pragma unroll
    for (int i = 0; i < 4; ++i) all[i] = low.word[i], all[4 + i] = high.word[i];
    // By words & 2 and words & 1, because registers have no index.
#pragma unroll
    for (int step = 2; step >= 1; step /= 2)
#pragma unroll
      for (int i = 0; i < 8 - step; ++i) all[i] = words & step ? all[i + step] : all[i];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      word[i] = static_cast<uint32_t>((static_cast<uint64_t>(all[i + 1]) << 32 | all[i]) >> bits);
  }

  __device__ __forceinline__ void set(const uint4& four) {
    word[0] = four.x, word[1] = four.y, word[2] = four.z, word[3] = four.w;
  }
  __device__ __forceinline__ acc_t<T> operator[](int i) const {
    T value;
    memcpy(&value, reinterpret_cast<const char*>(word) + i * sizeof(T), sizeof(T));
    return load(&value);
  }
  __device__ __forceinline__ void set(int i, acc_t<T> value) {
    T rounded;
    store(&rounded, value);
    memcpy(reinterpret_cast<char*>(word) + i * sizeof(T), &rounded, sizeof(T));
  }
  // All SIZE elements; narrow ones by pairs, as the hardware rounds them.
  __device__ __forceinline__ void set(const acc_t<T>* values) {
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
#ifdef __CUDA_ARCH__
      if constexpr (sizeof(T) == 2) {
        if (i % 2 == 1) continue;
        if constexpr (std::is_same_v<T, BFloat16>)
          asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word[i / 2]) : "f"(values[i + 1]), "f"(values[i]));
        else
          asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word[i / 2]) : "f"(values[i + 1]), "f"(values[i]));
        continue;
      }
#endif
      set(i, values[i]);
    }
  }
  // The largest element; a NaN loses.
  __device__ __forceinline__ acc_t<T> largest() const {
#ifdef __CUDA_ARCH__
    if constexpr (sizeof(T) == 2) {  // two at a time
      uint32_t pair = word[0];
#pragma unroll
      for (int i = 1; i < 4; ++i) {
        if constexpr (std::is_same_v<T, BFloat16>)
          asm("max.bf16x2 %0, %0, %1;" : "+r"(pair) : "r"(word[i]));
        else
          asm("max.f16x2 %0, %0, %1;" : "+r"(pair) : "r"(word[i]));
      }
      Pack both{{pair}};
      return fmaxf(both[0], both[1]);
    }
#endif
    acc_t<T> largest = (*this)[0];
#pragma unroll
    for (int i = 1; i < SIZE; ++i) largest = fmax(largest, (*this)[i]);
    return largest;
  }
};

template <typename T>
LVRPO_INLINE bool is_aligned(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

}  // namespace lvrpo

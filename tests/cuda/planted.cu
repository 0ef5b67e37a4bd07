// Kernels with one planted fault each, and the same kernels without it: `planted NAME right` or `planted NAME wrong` runs
// one in the emulation and exits with 1 where its result is wrong. tests/cuda/test_emulation.py says who must catch what.
#include <cstdio>
#include <cstring>
#include <map>
#include <numeric>
#include <string>
#include <vector>

#include "emulate.h"

namespace {

constexpr unsigned THREADS = 64, BLOCKS = 2;
constexpr unsigned ALL = 0xffffffffu;

__device__ float* shared() { return static_cast<float*>(emulate::shared_memory()); }

// in and out have a number per thread of all blocks, in counts up from 0.
using Kernel = void (*)(bool right, const float* in, float* out);

__device__ unsigned me() { return blockIdx.x * THREADS + threadIdx.x; }

__global__ void missing_barrier(bool right, const float* in, float* out) {
  shared()[threadIdx.x] = in[me()];
  if (right) __syncthreads();
  out[me()] = shared()[THREADS - 1 - threadIdx.x] + 2 * threadIdx.x - (THREADS - 1.f);
}

__global__ void race_on_shared_memory(bool right, const float* in, float* out) {
  if (threadIdx.x == 0) shared()[0] = 0;
  __syncthreads();
  if (right)
    atomicAdd(shared(), 1.f);
  else
    shared()[0] += 1;
  __syncthreads();
  out[me()] = shared()[0] - THREADS + in[me()];
}

__global__ void race_on_global_memory(bool right, const float* in, float* out) {
  out[right ? me() : me() / 2] = in[right ? me() : me() / 2];
  if (!right) out[me()] = in[me()];
}

__global__ void read_beyond_global_memory(bool right, const float* in, float* out) {
  const unsigned next = me() + 1;
  out[me()] = in[right ? std::min(next, BLOCKS * THREADS - 1) : next] * 0 + in[me()];
}

__global__ void write_beyond_global_memory(bool right, const float* in, float* out) {
  out[me()] = in[me()];
  if (!right) out[me() + 1] = in[me()] + 1;
}

__global__ void read_beyond_shared_memory(bool right, const float* in, float* out) {
  shared()[threadIdx.x] = in[me()];
  __syncthreads();
  const unsigned next = threadIdx.x + 1;
  out[me()] = shared()[right ? next % THREADS : next] * 0 + in[me()];
}

__global__ void write_beyond_shared_memory(bool right, const float* in, float* out) {
  shared()[right ? threadIdx.x : threadIdx.x + 1] = in[me()];
  out[me()] = in[me()];
}

__global__ void unwritten_shared_memory(bool right, const float* in, float* out) {
  if (right) shared()[threadIdx.x] = 0;
  out[me()] = shared()[threadIdx.x] + in[me()];
}

// 16 bytes from an address that is no multiple of 16: the hardware traps.
__global__ void misaligned_pack(bool right, const float* in, float* out) {
  const float* at = in + (right ? 4 : 1);
  const uint4 four = *reinterpret_cast<const uint4*>(at);
  float first;
  std::memcpy(&first, &four.x, sizeof(float));
  out[me()] = first - *at + in[me()];
}

__global__ void divergent_barrier(bool right, const float* in, float* out) {
  if (right || threadIdx.x < THREADS / 2) __syncthreads();
  out[me()] = in[me()];
}

__global__ void barriers_in_two_branches(bool right, const float* in, float* out) {
  if (right || threadIdx.x < THREADS / 2) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[me()] = in[me()];
}

__global__ void divergent_shuffle(bool right, const float* in, float* out) {
  float value = in[me()];
  if (right || threadIdx.x % emulate::LANES < 16) value = __shfl_xor_sync(ALL, value, 1);
  value = __shfl_xor_sync(ALL, value, right ? 1 : 0);
  out[me()] = value;
}

__global__ void lanes_that_have_returned(bool right, const float* in, float* out) {
  out[me()] = in[me()];
  if (!right && threadIdx.x % emulate::LANES >= 16) return;
  __ballot_sync(ALL, true);
}

// Both blocks are a cluster.
__global__ void neighbour_before_a_barrier(bool right, const float* in, float* out) {
  shared()[threadIdx.x] = in[me()];
  if (right) emulate::sync_cluster();
  const float* other = static_cast<float*>(emulate::shared_memory_of(shared(), 1 - emulate::rank_in_cluster()));
  const float sign = emulate::rank_in_cluster() == 0 ? 1 : -1;
  out[me()] = other[threadIdx.x] - sign * THREADS;
  emulate::sync_cluster();
}

__global__ void neighbour_that_has_ended(bool right, const float* in, float* out) {
  shared()[threadIdx.x] = in[me()];
  const float* other = static_cast<float*>(emulate::shared_memory_of(shared(), 1 - emulate::rank_in_cluster()));
  emulate::sync_cluster();
  const float sign = emulate::rank_in_cluster() == 0 ? 1 : -1;
  out[me()] = other[threadIdx.x] - sign * THREADS;
  if (right) emulate::sync_cluster();
}

const std::map<std::string, Kernel> KERNELS = {
#define NAMED(kernel) {#kernel, kernel}
    NAMED(missing_barrier),
    NAMED(race_on_shared_memory),
    NAMED(race_on_global_memory),
    NAMED(read_beyond_global_memory),
    NAMED(write_beyond_global_memory),
    NAMED(read_beyond_shared_memory),
    NAMED(write_beyond_shared_memory),
    NAMED(unwritten_shared_memory),
    NAMED(misaligned_pack),
    NAMED(divergent_barrier),
    NAMED(barriers_in_two_branches),
    NAMED(divergent_shuffle),
    NAMED(lanes_that_have_returned),
    NAMED(neighbour_before_a_barrier),
    NAMED(neighbour_that_has_ended),
};

}  // namespace

int main(int count, char** arguments) {
  if (count < 3) {
    for (const auto& [name, kernel] : KERNELS) std::puts(name.c_str());
    return 0;
  }
  const Kernel kernel = KERNELS.at(arguments[1]);
  const bool right = std::strcmp(arguments[2], "right") == 0;
  std::vector<float> in(BLOCKS * THREADS), out(BLOCKS * THREADS, -1);
  std::iota(in.begin(), in.end(), 0.f);
  const unsigned cluster = std::strncmp(arguments[1], "neighbour", 9) == 0 ? BLOCKS : 1;
  // Twice, as an op has several launches.
  for (int launch = 0; launch < 2; ++launch)
    emulate::launch(BLOCKS, THREADS, THREADS * sizeof(float), cluster,
                    [kernel, right, from = in.data(), to = out.data()] { kernel(right, from, to); });
  return in == out ? 0 : 1;
}

// Runs the kernels of a .cu file on the CPU, thread for thread, where it is compiled as C++ with -DLVRPO_EMULATE.
//
// Every CUDA thread is a fiber with a stack of its own. The blocks of a cluster, or of a cooperative launch, are alive
// together, clusters come one after another, and a barrier hands the CPU to the next fiber. What the hardware leaves open,
// which thread goes first between two barriers, is a permutation that LVRPO_EMULATE_SEED chooses. Shared memory begins as
// NaN.
//
// It finds wrong results; a barrier or a shuffle that not all threads reach at the same place, saying who waits where; with
// -fsanitize=address what is read or written out of bounds; with -fsanitize=thread races, in shared memory too: to it a
// fiber is a thread, and only barriers, shuffles and atomics order two of them. It does not find what depends on warps
// that run in step, on two clusters that run at once, on caches, or on what nvcc makes of the code; nor how fast it is.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <type_traits>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define LVRPO_TSAN(...) __VA_ARGS__
#define LVRPO_UNSEEN __attribute__((no_sanitize_thread, noinline))  // the emulator's own state is nobody's race
#else
#define LVRPO_TSAN(...)
#define LVRPO_UNSEEN
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __noinline__
#define __restrict__ __restrict

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace emulate {

// A GPU's allocations are multiples of 16 bytes, the heap's need not be: what a kernel reads around an array's last
// elements, in the same 16 bytes, is no fault there.
__attribute__((no_sanitize_address, noinline)) inline uint4 aligned_16(const uint4* at) { return *at; }

constexpr unsigned LANES = 32;
constexpr size_t STACK = 64 << 10;

inline int setting(const char* variable, int otherwise) {
  const char* value = std::getenv(variable);
  return value ? std::atoi(value) : otherwise;
}

// ---- Fibers ----

#if defined(__x86_64__)
// Saves the registers that a callee has to keep on the stack that is left, and takes them from the one that is entered.
extern "C" void lvrpo_switch_stack(void** left, void* entered);
asm(R"(
.text
.p2align 4
.weak lvrpo_switch_stack
.type lvrpo_switch_stack, @function
lvrpo_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size lvrpo_switch_stack, .-lvrpo_switch_stack
)");
struct Context {
  void* stack = nullptr;
  LVRPO_UNSEEN void start(char* memory, void (*entry)()) {
    void** top = reinterpret_cast<void**>(memory + STACK - 64);  // a multiple of 16 when `entry` begins
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    stack = top - 6;
  }
  LVRPO_UNSEEN static void enter(Context& from, Context& to) { lvrpo_switch_stack(&from.stack, to.stack); }
};
#else
struct Context {
  ucontext_t context;
  LVRPO_UNSEEN void start(char* memory, void (*entry)()) {
    getcontext(&context);
    context.uc_stack = {memory, 0, STACK};
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  LVRPO_UNSEEN static void enter(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};
#endif

struct Barrier {
  unsigned members = 0, arrived = 0, phase = 0;
  const char* where = nullptr;  // those who have arrived wait
  // What orders threads, to ThreadSanitizer: one for even phases and one for odd ones, because who is the first to arrive at
  // the next barrier must not seem ordered before those who have yet to leave this one.
  uint64_t order[2] = {};
};

struct Warp {
  Barrier barrier;
  uint64_t slot[LANES];
};

struct Block {
  dim3 index;
  unsigned rank;
  unsigned running;
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<uint64_t> shared;  // of exactly the bytes that were asked for, up to 7 more
};

struct Fiber {
  Context context;
  dim3 thread;
  Block* block;
  Warp* warp;
  unsigned next;  // in the ring in which they take turns
  bool done;
  const char* waits;
  LVRPO_TSAN(void* tsan = nullptr;)
};

// What runs now: a cluster.
struct Machine {
  dim3 grid, size;
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  Fiber* fiber = nullptr;  // the same: what a vector's own functions read, ThreadSanitizer sees
  unsigned count = 0;
  std::unique_ptr<char[]> stacks;
  unsigned stacked = 0;  // fibers that have one
  Barrier barrier;  // of all blocks
  std::function<void()> body;
  Context host;
  unsigned current = 0, running = 0, idle = 0;
  std::mt19937 order{static_cast<unsigned>(setting("LVRPO_EMULATE_SEED", 0))};
  LVRPO_TSAN(void* tsan_host = nullptr;)
};

inline thread_local Machine machine;
LVRPO_UNSEEN inline Fiber& self() { return machine.fiber[machine.current]; }

LVRPO_UNSEEN inline void enter(Context& from, unsigned to) {
  machine.current = to;
  LVRPO_TSAN(__tsan_switch_to_fiber(machine.fiber[to].tsan, __tsan_switch_to_fiber_no_sync);)
  Context::enter(from, machine.fiber[to].context);
}

// ---- Barriers ----

[[noreturn]] inline void give_up(const char* why) {
  std::fprintf(stderr, "emulate: %s\n", why);
  for (const Fiber& fiber : machine.fibers)
    std::fprintf(stderr, "  block %u, thread %u: %s\n", fiber.block->index.x, fiber.thread.x,
                 fiber.done ? "has returned" : fiber.waits);
  std::abort();
}

LVRPO_UNSEEN inline void yield() {
  if (++machine.idle > 2 * machine.count) give_up("threads wait for others that never come");
  Fiber& from = self();
  unsigned to = from.next;
  while (machine.fiber[to].done) to = machine.fiber[to].next;
  if (to != machine.current) enter(from.context, to);
}

LVRPO_UNSEEN inline void wait(Barrier& barrier, const char* where) {
  const unsigned phase = barrier.phase;
  LVRPO_TSAN(__tsan_release(&barrier.order[phase % 2]);)
  self().waits = where;
  if (barrier.arrived++ == 0) barrier.where = where;
  if (barrier.where != where && std::strcmp(barrier.where, where) != 0) give_up("threads wait in different places");
  while (barrier.phase == phase) {
    if (barrier.arrived >= barrier.members) {
      barrier.arrived = 0;
      ++barrier.phase;
      machine.idle = 0;
    } else {
      yield();
    }
  }
  self().waits = "runs";
  LVRPO_TSAN(__tsan_acquire(&barrier.order[phase % 2]);)
}

LVRPO_UNSEEN inline void sync_block(const char* where) { wait(self().block->barrier, where); }
LVRPO_UNSEEN inline void sync_warp(const char* where) { wait(self().warp->barrier, where); }
LVRPO_UNSEEN inline void sync_cluster() { wait(machine.barrier, "waits for its cluster"); }

// ---- What kernels call ----

LVRPO_UNSEEN inline unsigned lane() { return self().thread.x % LANES; }
LVRPO_UNSEEN inline unsigned rank_in_cluster() { return self().block->rank; }
LVRPO_UNSEEN inline void* shared_memory() { return self().block->shared.data(); }
LVRPO_UNSEEN inline void* shared_memory_of(void* place, unsigned rank) {
  if (machine.blocks.at(rank).running == 0) give_up("the shared memory of a block that has ended is used");
  const char* own = reinterpret_cast<const char*>(self().block->shared.data());
  return reinterpret_cast<char*>(machine.blocks.at(rank).shared.data()) + (static_cast<char*>(place) - own);
}

// All lanes take part: a mask that names fewer is not told apart.
template <typename T>
LVRPO_UNSEEN T shuffle(T value, unsigned source, const char* where) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  Warp& warp = *self().warp;
  std::memcpy(&warp.slot[lane()], &value, sizeof(T));
  sync_warp(where);
  T got;
  std::memcpy(&got, &warp.slot[source < LANES ? source : lane()], sizeof(T));
  sync_warp(where);
  return got;
}

LVRPO_UNSEEN inline unsigned ballot(bool vote, const char* where) {
  Warp& warp = *self().warp;
  warp.slot[lane()] = vote;
  sync_warp(where);
  unsigned votes = 0;
  for (unsigned i = 0; i < std::min(LANES, machine.size.x - self().thread.x / LANES * LANES); ++i)
    votes |= static_cast<unsigned>(warp.slot[i]) << i;
  sync_warp(where);
  return votes;
}

// ---- Launches ----

LVRPO_UNSEEN inline void run_thread() {
  LVRPO_TSAN(__tsan_acquire(&machine.grid);)  // what was written before the launch
  machine.body();
  Fiber& fiber = self();
  LVRPO_TSAN(__tsan_release(&fiber.block->running);)
  if (--fiber.block->running == 0) {
    LVRPO_TSAN(__tsan_acquire(&fiber.block->running);)
    std::vector<uint64_t>().swap(fiber.block->shared);  // it ends with its block, whoever of the cluster still reads it
  }
  LVRPO_TSAN(__tsan_release(&machine.host);)  // not to the threads that have yet to begin
  fiber.done = true;
  machine.idle = 0;
  if (--machine.running == 0) {
    LVRPO_TSAN(__tsan_switch_to_fiber(machine.tsan_host, __tsan_switch_to_fiber_no_sync);)
    Context::enter(fiber.context, machine.host);
  }
  yield();
  std::abort();  // nobody comes back to a thread that has returned
}

LVRPO_UNSEEN inline void prepare_block(Block& block, unsigned index, unsigned rank, unsigned threads, size_t shared) {
  block.index = {index, 0, 0};
  block.rank = rank;
  block.running = threads;
  block.barrier = {threads};
  block.warps.assign((threads + LANES - 1) / LANES, {});
  for (unsigned i = 0; i < threads; ++i) ++block.warps[i / LANES].barrier.members;
  block.shared = std::vector<uint64_t>((shared + 7) / 8, ~uint64_t(0));  // new memory each time, for AddressSanitizer
}

template <typename Body>
void launch(unsigned blocks, unsigned threads, size_t shared, unsigned cluster, Body body) {
  Machine& m = machine;
  const unsigned count = cluster * threads;
  m.grid = {blocks}, m.size = {threads}, m.body = body;
  m.blocks.resize(cluster);
  m.fibers = std::vector<Fiber>(count);
  m.fiber = m.fibers.data(), m.count = count;
  if (m.stacked < count) m.stacks.reset(new char[count * STACK]), m.stacked = count;  // not filled: most is never touched
  LVRPO_TSAN(m.tsan_host = __tsan_get_current_fiber();)
  LVRPO_TSAN(for (Fiber& fiber : m.fibers) fiber.tsan = __tsan_create_fiber(0);)
  std::vector<unsigned> turns(count);
  std::iota(turns.begin(), turns.end(), 0u);
  for (unsigned first = 0; first < blocks; first += cluster) {
    for (unsigned rank = 0; rank < cluster; ++rank) prepare_block(m.blocks[rank], first + rank, rank, threads, shared);
    m.barrier = {count}, m.running = count, m.idle = 0;
    std::shuffle(turns.begin(), turns.end(), m.order);
    for (unsigned i = 0; i < count; ++i) {
      Fiber& fiber = m.fibers[i];
      fiber.thread = {i % threads, 0, 0};
      fiber.block = &m.blocks[i / threads], fiber.warp = &fiber.block->warps[fiber.thread.x / LANES];
      fiber.done = false, fiber.waits = "runs";
      fiber.context.start(m.stacks.get() + i * STACK, run_thread);
      m.fibers[turns[i]].next = turns[(i + 1) % count];
    }
    LVRPO_TSAN(__tsan_release(&machine.grid);)
    enter(m.host, turns[0]);
    LVRPO_TSAN(__tsan_acquire(&machine.host);)
  }
  LVRPO_TSAN(for (Fiber& fiber : m.fibers) __tsan_destroy_fiber(fiber.tsan);)
}

}  // namespace emulate

#define LVRPO_WHERE(what) what " at " __FILE__ ":" LVRPO_TEXT(__LINE__)
#define LVRPO_TEXT(x) LVRPO_TEXT_OF(x)
#define LVRPO_TEXT_OF(x) #x

#define threadIdx (emulate::self().thread)
#define blockIdx (emulate::self().block->index)
#define blockDim (emulate::machine.size)
#define gridDim (emulate::machine.grid)
#define __syncthreads() emulate::sync_block(LVRPO_WHERE("waits for its block"))
#define __syncwarp(...) emulate::sync_warp(LVRPO_WHERE("waits for its warp"))
#define __shfl_sync(mask, value, source) emulate::shuffle(value, source, LVRPO_WHERE("shuffles"))
#define __shfl_xor_sync(mask, value, bits) emulate::shuffle(value, emulate::lane() ^ (bits), LVRPO_WHERE("shuffles"))
#define __shfl_up_sync(mask, value, by) emulate::shuffle(value, emulate::lane() - (by), LVRPO_WHERE("shuffles"))
#define __shfl_down_sync(mask, value, by) emulate::shuffle(value, emulate::lane() + (by), LVRPO_WHERE("shuffles"))
#define __ballot_sync(mask, vote) emulate::ballot(vote, LVRPO_WHERE("votes"))
#define __any_sync(mask, vote) (emulate::ballot(vote, LVRPO_WHERE("votes")) != 0)
#define __threadfence() std::atomic_thread_fence(std::memory_order_seq_cst)

template <typename T>
inline T atomicAdd(T* to, std::type_identity_t<T> value) {
  return std::atomic_ref<T>(*to).fetch_add(value, std::memory_order_acq_rel);
}

template <typename T>
inline T atomicExch(T* to, std::type_identity_t<T> value) {
  return std::atomic_ref<T>(*to).exchange(value, std::memory_order_acq_rel);
}

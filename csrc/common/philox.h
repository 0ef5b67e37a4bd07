// Standard normals of a counter-based stream, each of which can be drawn without the others, one copy for the CPU and for
// CUDA: Philox 4x32-10 (Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405) and Box-Muller in fp64, so that what
// rounding leaves in fp32 does not depend on who computes it. Counter and key are cuRAND's: the key is a seed, the counter
// (element / 4, subsequence).
#pragma once

#include <cmath>
#include <cstdint>

#include "common/math.h"

namespace lvrpo::philox {

struct Words {
  uint32_t a, b, c, d;
};

struct Key {
  uint32_t low, high;
};

LVRPO_INLINE uint32_t low_word(uint64_t x) { return static_cast<uint32_t>(x); }
LVRPO_INLINE uint32_t high_word(uint64_t x) { return static_cast<uint32_t>(x >> 32); }

// The words of a counter. A recursion, since GCC vectorises no loop with a loop in it.
template <int ROUNDS = 10>
LVRPO_INLINE Words words_of(Words x, Key key) {
  if constexpr (ROUNDS == 0) {
    return x;
  } else {
    const uint64_t of_a = uint64_t(0xD2511F53u) * x.a, of_c = uint64_t(0xCD9E8D57u) * x.c;
    const Words next = {high_word(of_c) ^ x.b ^ key.low, low_word(of_c), high_word(of_a) ^ x.d ^ key.high, low_word(of_a)};
    return words_of<ROUNDS - 1>(next, {key.low + 0x9E3779B9u, key.high + 0xBB67AE85u});
  }
}

// The word and a half, which no conversion of vectors takes as it is unsigned.
LVRPO_INLINE double in_middle(uint32_t word) {
  return static_cast<double>(static_cast<int32_t>(word ^ 0x80000000u)) + 2147483648.5;
}

// ln x of a positive normal number, to one unit in the last place; the polynomial is fdlibm's.
LVRPO_INLINE double log_of(double x) {
  constexpr uint64_t least = 0x3fe6a09e667f3bcdu;  // sqrt(1/2): x = 2^n m with m from there to sqrt(2)
  constexpr uint64_t bias = 1024, whole = 0x4330000000000000u;  // 2^52, which has an integer in its low bits
  const uint64_t biased = (bits_as<uint64_t>(x) - least + (bias << 52)) >> 52;
  const double n = bits_as<double>(biased | whole) - (4503599627370496.0 + bias);
  const double f = bits_as<double>(bits_as<uint64_t>(x) - (biased << 52) + (bias << 52)) - 1;
  const double s = f / (2 + f), z = s * s;
  double r = 1.479819860511658591e-01;
  r = r * z + 1.531383769920937332e-01;
  r = r * z + 1.818357216161805012e-01;
  r = r * z + 2.222219843214978396e-01;
  r = r * z + 2.857142874366239149e-01;
  r = r * z + 3.999999999940941908e-01;
  r = r * z + 6.666666666666735130e-01;
  const double half = 0.5 * f * f;
  constexpr double ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10;
  return n * ln2_high - ((half - (s * (half + r * z) + n * ln2_low)) - f);
}

struct Direction {
  double cos, sin;
};

// Of an angle in [0, 2 pi], to one unit in the last place; the polynomials are fdlibm's.
LVRPO_INLINE Direction direction_of(double angle) {
  constexpr double round = 0x1.8p52;
  const double shifted = angle * 6.36619772367581382433e-01 + round, n = shifted - round;
  const uint64_t quarter = bits_as<uint64_t>(shifted);
  // pi / 2 in three parts, of which the first two have so few digits that their products with n are exact.
  double x = angle - n * 1.57079632673412561417e+00;
  x = x - n * 6.07710050630396597660e-11;
  x = x - n * 2.02226624879595063154e-21;
  const double z = x * x;
  double c = -1.13596475577881948265e-11;
  c = c * z + 2.08757232129817482790e-09;
  c = c * z - 2.75573143513906633035e-07;
  c = c * z + 2.48015872894767294178e-05;
  c = c * z - 1.38888888888741095749e-03;
  c = c * z + 4.16666666666666019037e-02;
  c = 1 - (0.5 * z - z * z * c);
  double s = 1.58969099521155010221e-10;
  s = s * z - 2.50507602534068634195e-08;
  s = s * z + 2.75573137070700676789e-06;
  s = s * z - 1.98412698298579493134e-04;
  s = s * z + 8.33333333332248946124e-03;
  s = s * z - 1.66666666666666324348e-01;
  s = x + x * z * s;
  const double cos = (quarter & 1) ? s : c, sin = (quarter & 1) ? c : s;
  return {((quarter + 1) & 2) ? -cos : cos, (quarter & 2) ? -sin : sin};
}

// Two standard normals.
struct Pair {
  float first, second;
};

LVRPO_INLINE Pair box_muller(uint32_t one, uint32_t two) {
  constexpr double words = 4294967296.0, two_pi = 6.28318530717958647692;
  const double radius = std::sqrt(-2 * log_of(in_middle(one) / words));
  const Direction direction = direction_of(two_pi * (in_middle(two) / words));
  return {static_cast<float>(radius * direction.cos), static_cast<float>(radius * direction.sin)};
}

// A stream, of which four numbers at a time are drawn.
struct Stream {
  uint64_t seed, subsequence;

  // Elements 4 index to 4 index + 3.
  template <typename acc>
  LVRPO_INLINE void draw(uint64_t index, acc* z) const {
    const Words words = words_of({low_word(index), high_word(index), low_word(subsequence), high_word(subsequence)},
                                 {low_word(seed), high_word(seed)});
    const Pair one = box_muller(words.a, words.b), two = box_muller(words.c, words.d);
    z[0] = one.first;
    z[1] = one.second;
    z[2] = two.first;
    z[3] = two.second;
  }
};

}  // namespace lvrpo::philox

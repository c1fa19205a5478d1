// What the loops share. Every field of an argument struct has 8 bytes, as Python packs them.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace fxopt {

// Fewer elements than this are not worth waking threads for; ATen's own grain.
constexpr int64_t GRAIN = 1 << 15;
// Rows whose sums are added up on their own: by these, not by threads, results do not depend on how
// many of these there are.
constexpr int64_t BLOCK = 32;

constexpr int64_t NO_NORM = 0, LAYER = 1;  // and 2, RMS

// A tensor of rows of features that lie one behind the other; null for none.
struct Rows {
  float* data;
  int64_t group;  // stride between groups of rows; of an operand with one row for all, 0
  int64_t row;    // stride within a group

  float* at(int64_t g, int64_t r) const { return data ? data + g * group + r * row : nullptr; }
};

// e^x to about an ulp, in code that vectorizes. NaN stays NaN; what overflows is infinite.
inline float exponential(float x) {
  x = x > 100.f ? 100.f : x;
  x = x < -110.f ? -110.f : x;
  const float n = __builtin_rintf(x * 1.44269504f);
  const float f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.f;
  // In two steps, as 2^n may be out of range where the result is not.
  const int32_t i = static_cast<int32_t>(n), half = i >> 1;
  const int32_t first = (half + 127) << 23, second = (i - half + 127) << 23;
  float a, b;
  std::memcpy(&a, &first, 4);
  std::memcpy(&b, &second, 4);
  return p * a * b;
}

// Mean (0 unless the norm is LAYER) and reciprocal deviation, summed in double.
inline void statistics(const float* v, int64_t n, int64_t norm, double eps, float& mean,
                       float& rstd) {
  double sum = 0, squares = 0;
  if (norm == LAYER) {
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += v[i];
  }
  const double center = sum / n;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < n; ++i) squares += (v[i] - center) * (v[i] - center);
  mean = static_cast<float>(center);
  rstd = static_cast<float>(1 / std::sqrt(squares / n + eps));
}

}  // namespace fxopt

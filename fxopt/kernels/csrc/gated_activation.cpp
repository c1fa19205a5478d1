// gated_activation and its backward. The formulas are those of native_gated_activation.py.

#include "loops.h"

using namespace fxopt;

namespace {

constexpr float GELU_LINEAR = 1.5957691216057308f, GELU_CUBIC = 0.044715f * GELU_LINEAR;

// sigmoid(z), and 1 - sigmoid(z) without the bits that the difference would lose.
struct Logistic {
  float cdf, tail;

  explicit Logistic(float z) {
    const float e = exponential(-std::fabs(z)), larger = 1.f / (1.f + e), smaller = e * larger;
    cdf = z < 0 ? smaller : larger;
    tail = z < 0 ? larger : smaller;
  }
};

// The value, and the slope with it: the same bits.
struct GeluTanh {
  static float value(float x) {
    return Logistic(x * (GELU_LINEAR + GELU_CUBIC * x * x)).cdf * x;
  }
  static float slope(float x, float& value) {
    const float q = GELU_LINEAR + GELU_CUBIC * x * x;
    const Logistic p(x * q);
    value = p.cdf * x;
    return p.cdf + p.tail * p.cdf * x * (3.f * q - 2.f * GELU_LINEAR);
  }
};

struct Silu {
  static float value(float x) { return Logistic(x).cdf * x; }
  static float slope(float x, float& value) {
    const Logistic p(x);
    value = p.cdf * x;
    return p.cdf * (1.f + x * p.tail);
  }
};

struct Forward {
  int64_t num_rows, num_features, activation;
  Rows gate, up;
  const float* bias;
  float* y;
};

struct Backward {
  int64_t num_rows, num_features, activation;
  Rows grad, gate, up, dgate, dup;
  const float* bias;
  float *y, *dbias;
};

template <typename F>
void forward(const Forward& a) {
  const int64_t n = a.num_features;
#pragma omp parallel for if (a.num_rows * n > GRAIN)
  for (int64_t r = 0; r < a.num_rows; ++r) {
    const float *gate = a.gate.at(0, r), *up = a.up.at(0, r);
    float* y = a.y + r * n;
    if (a.bias) {
      for (int64_t i = 0; i < n; ++i) y[i] = F::value(gate[i] + a.bias[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) y[i] = F::value(gate[i]);
    }
    if (up)
      for (int64_t i = 0; i < n; ++i) y[i] *= up[i];
  }
}

template <typename F>
void backward(const Backward& a) {
  const int64_t n = a.num_features, num_blocks = (a.num_rows + BLOCK - 1) / BLOCK;
  std::vector<double> sums(a.dbias ? num_blocks * n : 0);
#pragma omp parallel if (a.num_rows * n > GRAIN)
  {
    std::vector<float> room(2 * n);
    float *slope = room.data(), *value = slope + n;
#pragma omp for
    for (int64_t block = 0; block < num_blocks; ++block) {
      const int64_t first = block * BLOCK;
      const int64_t end = first + BLOCK < a.num_rows ? first + BLOCK : a.num_rows;
      for (int64_t r = first; r < end; ++r) {
        const float *grad = a.grad.at(0, r), *gate = a.gate.at(0, r), *up = a.up.at(0, r);
        float *dgate = a.dgate.at(0, r), *dup = a.dup.at(0, r), *y = a.y ? a.y + r * n : nullptr;
        if (a.bias) {
          for (int64_t i = 0; i < n; ++i) slope[i] = F::slope(gate[i] + a.bias[i], value[i]);
        } else {
          for (int64_t i = 0; i < n; ++i) slope[i] = F::slope(gate[i], value[i]);
        }
        if (up) {
          for (int64_t i = 0; i < n; ++i) dgate[i] = grad[i] * up[i] * slope[i];
          for (int64_t i = 0; i < n; ++i) dup[i] = grad[i] * value[i];
          if (y)
            for (int64_t i = 0; i < n; ++i) y[i] = value[i] * up[i];
        } else {
          for (int64_t i = 0; i < n; ++i) dgate[i] = grad[i] * slope[i];
          if (y) std::memcpy(y, value, n * sizeof(float));
        }
        if (a.dbias) {
          double* sum = sums.data() + block * n;
          for (int64_t i = 0; i < n; ++i) sum[i] += dgate[i];
        }
      }
    }
  }
  if (!a.dbias) return;
  for (int64_t block = 1; block < num_blocks; ++block)
    for (int64_t i = 0; i < n; ++i) sums[i] += sums[block * n + i];
  for (int64_t i = 0; i < n; ++i) a.dbias[i] = static_cast<float>(sums[i]);
}

}  // namespace

extern "C" void gated_activation(const Forward* a) {
  a->activation ? forward<Silu>(*a) : forward<GeluTanh>(*a);
}

extern "C" void gated_activation_backward(const Backward* a) {
  a->activation ? backward<Silu>(*a) : backward<GeluTanh>(*a);
}

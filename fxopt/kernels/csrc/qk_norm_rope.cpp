// One section of qk_norm_rope, and its backward. The formulas are those of qk_norm_rope.py.
//
// D of a template is a head dim that is known when this is compiled, 0 where it is not; N likewise
// the size of a group that is normed.

#include <type_traits>

#include "loops.h"

using namespace fxopt;

namespace {

constexpr int64_t INTERLEAVED = 1;              // and 2, by halves; 0, none
constexpr int64_t CHANNELS = 0, PAIRS = 1;      // and 2, matrices

// [B, S, H, d], channels one behind the other; null for none.
struct Heads {
  float* data;
  int64_t sample, token, head;

  float* at(int64_t b, int64_t s, int64_t h) const {
    return data + b * sample + s * token + h * head;
  }
};

struct Table {
  const float* data;
  int64_t sample, token, head, channel;
};

struct Section {
  int64_t num_samples, num_tokens, num_heads, head_dim, norm, across_heads;
  double eps, weight_offset;
  Heads x;
  const float *x_bias, *weight, *bias;
  int64_t rotation, tables, num_rotated, first_token, end_token;
  Table cos, sin;

  int64_t group_size() const { return across_heads ? num_heads * head_dim : head_dim; }
  bool rotates(int64_t s) const { return rotation && s >= first_token && s < end_token; }
};

struct Forward {
  Section section;
  Heads out;
  float *mean, *rstd;
};

struct Backward {
  Section section;
  Heads grad;
  const float *mean, *rstd;
  float *dx, *dx_bias, *dweight, *dbias;
};

// Every `step`-th entry of a table's row, by a sign.
struct Entries {
  const float* data;
  int64_t step;
  float sign;

  void read(int64_t num_pairs, float* to) const {
    if (step == 1) {
      for (int64_t i = 0; i < num_pairs; ++i) to[i] = sign * data[i];
    } else if (step == 2) {
      for (int64_t i = 0; i < num_pairs; ++i) to[i] = sign * data[2 * i];
    } else {
      for (int64_t i = 0; i < num_pairs; ++i) to[i] = sign * data[step * i];
    }
  }
};

// (p, q) -> (p cos_p + q sin_p, q cos_q + p sin_q) for the pairs of a token's head.
struct Turn {
  std::vector<float> cos_p, cos_q, sin_p, sin_q;

  explicit Turn(int64_t num_pairs)
      : cos_p(num_pairs), cos_q(num_pairs), sin_p(num_pairs), sin_q(num_pairs) {}

  void read(const Section& a, int64_t b, int64_t s, int64_t h) {
    const int64_t num_pairs = a.num_rotated / 2, row = s - a.first_token;
    const Table &c = a.cos, &t = a.sin;
    const float* cos = c.data + b * c.sample + row * c.token + h * c.head;
    const float* sin = t.data + b * t.sample + row * t.token + h * t.head;
    if (a.tables == PAIRS) {
      fill({cos, c.channel, 1}, {cos, c.channel, 1}, {sin, t.channel, -1}, {sin, t.channel, 1});
    } else if (a.tables == CHANNELS) {
      const bool neighbours = a.rotation == INTERLEAVED;
      const int64_t apart = neighbours ? 1 : num_pairs, step = neighbours ? 2 : 1;
      fill({cos, step * c.channel, 1}, {cos + apart * c.channel, step * c.channel, 1},
           {sin, step * t.channel, -1}, {sin + apart * t.channel, step * t.channel, 1});
    } else {
      fill({cos, 2 * c.channel, 1}, {sin + t.channel, 2 * t.channel, 1},
           {sin, 2 * t.channel, 1}, {cos + c.channel, 2 * c.channel, 1});
    }
  }

  // out may not be n.
  template <int64_t D>
  void apply(const Section& a, const float* n, float* out, bool transposed) const {
    const int64_t num_pairs = (D ? D : a.num_rotated) / 2;
    const float *cp = cos_p.data(), *cq = cos_q.data();
    const float *sp = (transposed ? sin_q : sin_p).data(), *sq = (transposed ? sin_p : sin_q).data();
    if (a.rotation == INTERLEAVED) {
#pragma omp simd
      for (int64_t i = 0; i < num_pairs; ++i) {
        const float p = n[2 * i], q = n[2 * i + 1];
        out[2 * i] = p * cp[i] + q * sp[i];
        out[2 * i + 1] = q * cq[i] + p * sq[i];
      }
    } else {
#pragma omp simd
      for (int64_t i = 0; i < num_pairs; ++i) {
        const float p = n[i], q = n[i + num_pairs];
        out[i] = p * cp[i] + q * sp[i];
        out[i + num_pairs] = q * cq[i] + p * sq[i];
      }
    }
    if (!D)
      std::memcpy(out + a.num_rotated, n + a.num_rotated,
                  (a.head_dim - a.num_rotated) * sizeof(float));
  }

 private:
  void fill(Entries cp, Entries cq, Entries sp, Entries sq) {
    const int64_t num_pairs = cos_p.size();
    cp.read(num_pairs, cos_p.data());
    cq.read(num_pairs, cos_q.data());
    sp.read(num_pairs, sin_p.data());
    sq.read(num_pairs, sin_q.data());
  }
};

// All heads of a token, with the bias of what made them, one behind the other.
template <int64_t D>
void read_token(const Section& a, int64_t b, int64_t s, float* v) {
  const int64_t d = D ? D : a.head_dim;
  for (int64_t h = 0; h < a.num_heads; ++h) {
    const float* x = a.x.at(b, s, h);
    if (a.x_bias) {
      for (int64_t i = 0; i < d; ++i) v[h * d + i] = x[i] + a.x_bias[h * d + i];
    } else {
      for (int64_t i = 0; i < d; ++i) v[h * d + i] = x[i];
    }
  }
}

// Rotates, or turns back, the heads of a token where they are to be rotated.
template <int64_t D, typename In, typename Out>
void turn_token(const Section& a, Turn& turn, int64_t b, int64_t s, bool transposed, In in,
                Out out) {
  const bool rotates = a.rotates(s), by_head = a.cos.head || a.sin.head;
  for (int64_t h = 0; h < a.num_heads; ++h) {
    if (!rotates) {
      std::memcpy(out(h), in(h), (D ? D : a.head_dim) * sizeof(float));
      continue;
    }
    if (h == 0 || by_head) turn.read(a, b, s, h);
    if (D && a.num_rotated == D) {
      turn.apply<D>(a, in(h), out(h), transposed);
    } else {
      turn.apply<0>(a, in(h), out(h), transposed);
    }
  }
}

// Norms and parameters of a group of N elements, in place.
template <int64_t N>
void norm_group(const Forward& a, int64_t index, int64_t size, float* v) {
  const Section& o = a.section;
  const int64_t n = N ? N : size;
  if (o.norm != NO_NORM) {
    float mean, rstd;
    statistics(v, n, o.norm, o.eps, mean, rstd);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) v[i] = (v[i] - mean) * rstd;
    if (o.norm == LAYER) a.mean[index] = mean;
    a.rstd[index] = rstd;
  }
  const float offset = static_cast<float>(o.weight_offset);
  if (o.weight) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) v[i] *= o.weight[i] + offset;
  }
  if (o.bias) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) v[i] += o.bias[i];
  }
}

template <int64_t D>
void forward_token(const Forward& a, int64_t b, int64_t s, Turn& turn, float* v) {
  const Section& o = a.section;
  const int64_t token = b * o.num_tokens + s, d = D ? D : o.head_dim;
  read_token<D>(o, b, s, v);
  if (o.across_heads) {
    norm_group<0>(a, token, o.num_heads * d, v);
  } else {
    for (int64_t h = 0; h < o.num_heads; ++h)
      norm_group<D>(a, token * o.num_heads + h, d, v + h * d);
  }
  turn_token<D>(
      o, turn, b, s, false, [&](int64_t h) { return v + h * d; },
      [&](int64_t h) { return a.out.at(b, s, h); });
}

// Sums over a block of tokens.
struct Sums {
  double *weight, *bias, *x_bias;
};

// Gradients of a group of N elements: `g` that of what was rotated, `v` the values before the norm.
template <int64_t N>
void backward_group(const Backward& a, int64_t index, int64_t size, float* g, float* v, float* dx,
                    double* dweight, double* dbias, double* dx_bias) {
  const Section& o = a.section;
  const int64_t n = N ? N : size;
  if (dbias) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) dbias[i] += g[i];
  }
  if (o.norm != NO_NORM) {
    const float mean = o.norm == LAYER ? a.mean[index] : 0.f, rstd = a.rstd[index];
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) v[i] = (v[i] - mean) * rstd;
  }
  if (dweight) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) dweight[i] += static_cast<double>(g[i]) * v[i];
  }
  if (o.weight) {
    const float offset = static_cast<float>(o.weight_offset);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) g[i] *= o.weight[i] + offset;
  }
  if (o.norm == NO_NORM) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) dx[i] = g[i];
  } else {
    double sum = 0, dot = 0;
#pragma omp simd reduction(+ : sum, dot)
    for (int64_t i = 0; i < n; ++i) {
      sum += g[i];
      dot += static_cast<double>(g[i]) * v[i];
    }
    const float of_mean = o.norm == LAYER ? static_cast<float>(sum / n) : 0.f;
    const float of_rstd = static_cast<float>(dot / n), rstd = a.rstd[index];
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) dx[i] = (g[i] - of_mean - v[i] * of_rstd) * rstd;
  }
  if (dx_bias) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) dx_bias[i] += dx[i];
  }
}

template <int64_t D>
void backward_token(const Backward& a, int64_t b, int64_t s, Turn& turn, std::vector<float>& room,
                    Sums sums) {
  const Section& o = a.section;
  const int64_t d = D ? D : o.head_dim, width = o.num_heads * d;
  const int64_t token = b * o.num_tokens + s;
  float *g = room.data(), *v = g + width, *dx = a.dx ? a.dx + token * width : v;
  turn_token<D>(
      o, turn, b, s, true, [&](int64_t h) { return a.grad.at(b, s, h); },
      [&](int64_t h) { return g + h * d; });
  if (o.norm != NO_NORM || o.weight) read_token<D>(o, b, s, v);
  double *dweight = a.dweight ? sums.weight : nullptr, *dbias = a.dbias ? sums.bias : nullptr;
  double* dx_bias = a.dx_bias ? sums.x_bias : nullptr;
  if (o.across_heads) {
    backward_group<0>(a, token, width, g, v, dx, dweight, dbias, dx_bias);
    return;
  }
  for (int64_t h = 0; h < o.num_heads; ++h, g += d, v += d, dx += d)
    backward_group<D>(a, token * o.num_heads + h, d, g, v, dx, dweight, dbias,
                      dx_bias ? dx_bias + h * d : nullptr);
}

void store(float* grad, const double* sums, int64_t n) {
  if (grad)
    for (int64_t i = 0; i < n; ++i) grad[i] = static_cast<float>(sums[i]);
}

template <int64_t D>
void forward(const Forward& a) {
  const Section& o = a.section;
  const int64_t width = o.num_heads * o.head_dim, num_tokens = o.num_samples * o.num_tokens;
#pragma omp parallel if (num_tokens * width > GRAIN)
  {
    std::vector<float> room(width);
    Turn turn(o.num_rotated / 2);
#pragma omp for
    for (int64_t token = 0; token < num_tokens; ++token)
      forward_token<D>(a, token / o.num_tokens, token % o.num_tokens, turn, room.data());
  }
}

template <int64_t D>
void backward(const Backward& a) {
  const Section& o = a.section;
  const int64_t width = o.num_heads * o.head_dim, n = o.group_size();
  const int64_t num_tokens = o.num_samples * o.num_tokens;
  const int64_t num_blocks = (num_tokens + BLOCK - 1) / BLOCK, size = 2 * n + width;
  std::vector<double> sums(num_blocks * size);
#pragma omp parallel if (num_tokens * width > GRAIN)
  {
    std::vector<float> room(2 * width);
    Turn turn(o.num_rotated / 2);
#pragma omp for
    for (int64_t block = 0; block < num_blocks; ++block) {
      const int64_t first = block * BLOCK;
      const int64_t end = first + BLOCK < num_tokens ? first + BLOCK : num_tokens;
      double* own = sums.data() + block * size;
      for (int64_t token = first; token < end; ++token)
        backward_token<D>(a, token / o.num_tokens, token % o.num_tokens, turn, room,
                          {own, own + n, own + 2 * n});
    }
  }
  for (int64_t block = 1; block < num_blocks; ++block)
    for (int64_t i = 0; i < size; ++i) sums[i] += sums[block * size + i];
  store(a.dweight, sums.data(), n);
  store(a.dbias, sums.data() + n, n);
  store(a.dx_bias, sums.data() + 2 * n, width);
}

// `run` with the head dim as a constant, where loops of that many steps are to have no remainder.
template <typename Run>
void for_head_dim(int64_t head_dim, Run run) {
  switch (head_dim) {
    case 32: return run(std::integral_constant<int64_t, 32>());
    case 64: return run(std::integral_constant<int64_t, 64>());
    case 128: return run(std::integral_constant<int64_t, 128>());
    default: return run(std::integral_constant<int64_t, 0>());
  }
}

}  // namespace

extern "C" void qk_norm_rope(const Forward* a) {
  for_head_dim(a->section.head_dim, [a](auto d) { forward<decltype(d)::value>(*a); });
}

extern "C" void qk_norm_rope_backward(const Backward* a) {
  for_head_dim(a->section.head_dim, [a](auto d) { backward<decltype(d)::value>(*a); });
}

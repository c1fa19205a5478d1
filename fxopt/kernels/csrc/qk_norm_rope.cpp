// One section of qk_norm_rope, and its backward. The formulas are those of qk_norm_rope.py.

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
    for (int64_t i = 0; i < num_pairs; ++i) {
      if (a.tables == PAIRS) {
        cos_p[i] = cos_q[i] = cos[i * c.channel];
        sin_q[i] = sin[i * t.channel];
        sin_p[i] = -sin_q[i];
      } else if (a.tables == CHANNELS) {
        const bool neighbours = a.rotation == INTERLEAVED;
        const int64_t p = neighbours ? 2 * i : i, q = neighbours ? p + 1 : i + num_pairs;
        cos_p[i] = cos[p * c.channel];
        cos_q[i] = cos[q * c.channel];
        sin_p[i] = -sin[p * t.channel];
        sin_q[i] = sin[q * t.channel];
      } else {
        cos_p[i] = cos[2 * i * c.channel];
        sin_q[i] = cos[(2 * i + 1) * c.channel];
        sin_p[i] = sin[2 * i * t.channel];
        cos_q[i] = sin[(2 * i + 1) * t.channel];
      }
    }
  }

  // out may not be n.
  void apply(const Section& a, const float* n, float* out, bool transposed) const {
    const int64_t num_pairs = a.num_rotated / 2;
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
    std::memcpy(out + a.num_rotated, n + a.num_rotated,
                (a.head_dim - a.num_rotated) * sizeof(float));
  }
};

// All heads of a token, with the bias of what made them, one behind the other.
void read_token(const Section& a, int64_t b, int64_t s, float* v) {
  const int64_t d = a.head_dim;
  for (int64_t h = 0; h < a.num_heads; ++h) {
    const float* x = a.x.at(b, s, h);
    if (a.x_bias) {
      for (int64_t i = 0; i < d; ++i) v[h * d + i] = x[i] + a.x_bias[h * d + i];
    } else {
      std::memcpy(v + h * d, x, d * sizeof(float));
    }
  }
}

// Rotates, or turns back, the heads of a token where they are to be rotated.
template <typename In, typename Out>
void turn_token(const Section& a, Turn& turn, int64_t b, int64_t s, bool transposed, In in,
                Out out) {
  const bool rotates = a.rotates(s), by_head = a.cos.head || a.sin.head;
  for (int64_t h = 0; h < a.num_heads; ++h) {
    if (!rotates) {
      std::memcpy(out(h), in(h), a.head_dim * sizeof(float));
      continue;
    }
    if (h == 0 || by_head) turn.read(a, b, s, h);
    turn.apply(a, in(h), out(h), transposed);
  }
}

// Sums over a block of tokens.
struct Sums {
  double *weight, *bias, *x_bias;
};

void backward_token(const Backward& a, int64_t b, int64_t s, Turn& turn, std::vector<float>& room,
                    Sums sums) {
  const Section& o = a.section;
  const int64_t d = o.head_dim, width = o.num_heads * d, n = o.group_size();
  const int64_t token = b * o.num_tokens + s, num_groups = width / n;
  float *g = room.data(), *v = g + width, *dx = a.dx ? a.dx + token * width : v;
  turn_token(
      o, turn, b, s, true, [&](int64_t h) { return a.grad.at(b, s, h); },
      [&](int64_t h) { return g + h * d; });
  if (o.norm != NO_NORM || o.weight) read_token(o, b, s, v);
  for (int64_t group = 0; group < num_groups; ++group, g += n, v += n, dx += n) {
    if (a.dbias)
      for (int64_t i = 0; i < n; ++i) sums.bias[i] += g[i];
    if (o.norm != NO_NORM) {
      const int64_t index = token * num_groups + group;
      const float mean = o.norm == LAYER ? a.mean[index] : 0.f, rstd = a.rstd[index];
      for (int64_t i = 0; i < n; ++i) v[i] = (v[i] - mean) * rstd;
    }
    if (a.dweight)
      for (int64_t i = 0; i < n; ++i) sums.weight[i] += static_cast<double>(g[i]) * v[i];
    if (o.weight) {
      const float offset = static_cast<float>(o.weight_offset);
      for (int64_t i = 0; i < n; ++i) g[i] *= o.weight[i] + offset;
    }
    if (o.norm == NO_NORM) {
      std::memcpy(dx, g, n * sizeof(float));
    } else {
      double sum = 0, dot = 0;
#pragma omp simd reduction(+ : sum, dot)
      for (int64_t i = 0; i < n; ++i) {
        sum += g[i];
        dot += static_cast<double>(g[i]) * v[i];
      }
      const float of_mean = o.norm == LAYER ? static_cast<float>(sum / n) : 0.f;
      const float of_rstd = static_cast<float>(dot / n);
      const float rstd = a.rstd[token * num_groups + group];
      for (int64_t i = 0; i < n; ++i) dx[i] = (g[i] - of_mean - v[i] * of_rstd) * rstd;
    }
    if (a.dx_bias)
      for (int64_t i = 0; i < n; ++i) sums.x_bias[group * n + i] += dx[i];
  }
}

void store(float* grad, const double* sums, int64_t n) {
  if (grad)
    for (int64_t i = 0; i < n; ++i) grad[i] = static_cast<float>(sums[i]);
}

}  // namespace

extern "C" void qk_norm_rope(const Forward* arguments) {
  const Forward& a = *arguments;
  const Section& o = a.section;
  const int64_t d = o.head_dim, width = o.num_heads * d, n = o.group_size();
  const int64_t num_tokens = o.num_samples * o.num_tokens, num_groups = width / n;
#pragma omp parallel if (num_tokens * width > GRAIN)
  {
    std::vector<float> room(width);
    Turn turn(o.num_rotated / 2);
#pragma omp for
    for (int64_t token = 0; token < num_tokens; ++token) {
      const int64_t b = token / o.num_tokens, s = token % o.num_tokens;
      float* v = room.data();
      read_token(o, b, s, v);
      for (int64_t group = 0; group < num_groups; ++group, v += n) {
        if (o.norm != NO_NORM) {
          const int64_t index = token * num_groups + group;
          float mean, rstd;
          statistics(v, n, o.norm, o.eps, mean, rstd);
          for (int64_t i = 0; i < n; ++i) v[i] = (v[i] - mean) * rstd;
          if (o.norm == LAYER) a.mean[index] = mean;
          a.rstd[index] = rstd;
        }
        const float offset = static_cast<float>(o.weight_offset);
        if (o.weight)
          for (int64_t i = 0; i < n; ++i) v[i] *= o.weight[i] + offset;
        if (o.bias)
          for (int64_t i = 0; i < n; ++i) v[i] += o.bias[i];
      }
      turn_token(
          o, turn, b, s, false, [&](int64_t h) { return room.data() + h * d; },
          [&](int64_t h) { return a.out.at(b, s, h); });
    }
  }
}

extern "C" void qk_norm_rope_backward(const Backward* arguments) {
  const Backward& a = *arguments;
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
        backward_token(a, token / o.num_tokens, token % o.num_tokens, turn, room,
                       {own, own + n, own + 2 * n});
    }
  }
  for (int64_t block = 1; block < num_blocks; ++block)
    for (int64_t i = 0; i < size; ++i) sums[i] += sums[block * size + i];
  store(a.dweight, sums.data(), n);
  store(a.dbias, sums.data() + n, n);
  store(a.dx_bias, sums.data() + 2 * n, width);
}

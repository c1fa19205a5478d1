// norm_modulate and its backward in one pass over the rows each. The formulas are those of
// norm_modulate.py.

#include "loops.h"

using namespace fxopt;

namespace {

struct Operands {
  Rows gate, scale, shift;
  const float *weight, *bias, *x_bias;
  double weight_offset, scale_offset;
};

struct Forward {
  int64_t num_groups, num_rows, num_features, norm;
  double eps;
  Rows x, residual;
  Operands operands;
  float *y, *h, *mean, *rstd;
};

struct Backward {
  int64_t num_groups, num_rows, num_features, norm;
  Rows grad_y, grad_h, h, x;
  Operands operands;
  const float *mean, *rstd;
  float *dh, *dx, *y;
  // A row for each group, at a stride of num_features, or one for all.
  Rows dgate, dscale, dshift, dweight, dbias, dx_bias;
};

// Of one group: h = residual + gate * x + addend; y = n * factor + offset, dn = dy * factor.
struct Maps {
  std::vector<float> gate, addend, factor, offset;

  Maps(const Operands& o, int64_t g, int64_t n) : gate(n, 1), addend(n), factor(n, 1), offset(n) {
    const float *gate_D = o.gate.at(g, 0), *scale = o.scale.at(g, 0), *shift = o.shift.at(g, 0);
    for (int64_t i = 0; i < n; ++i) {
      if (gate_D) gate[i] = gate_D[i];
      if (o.x_bias) addend[i] = gate[i] * o.x_bias[i];
      const float outer = scale ? scale[i] + static_cast<float>(o.scale_offset) : 1.f;
      factor[i] = o.weight ? (o.weight[i] + static_cast<float>(o.weight_offset)) * outer : outer;
      offset[i] = (o.bias ? o.bias[i] * outer : 0.f) + (shift ? shift[i] : 0.f);
    }
  }
};

// Those of all groups, made once where they are alike.
class AllMaps {
 public:
  AllMaps(const Operands& o, int64_t num_groups, int64_t num_features)
      : are_alike(!(o.gate.group || o.scale.group || o.shift.group)) {
    const int64_t num_maps = are_alike ? 1 : num_groups;
    maps.reserve(num_maps);
    for (int64_t g = 0; g < num_maps; ++g) maps.emplace_back(o, g, num_features);
  }
  const Maps& operator[](int64_t g) const { return maps[are_alike ? 0 : g]; }

 private:
  bool are_alike;
  std::vector<Maps> maps;
};

// Sums over a block of rows, which Totals needs.
struct Sums {
  double *dy_n, *dy, *dv_x, *dv;

  Sums(double* room, int64_t n) : dy_n(room), dy(room + n), dv_x(room + 2 * n), dv(room + 3 * n) {}
};

void backward_row(const Backward& a, const Maps& maps, int64_t g, int64_t r, Sums sums,
                  std::vector<float>& room) {
  const int64_t n = a.num_features, index = g * a.num_rows + r;
  const float *grad_y = a.grad_y.at(g, r), *grad_h = a.grad_h.at(g, r);
  float *normed = room.data(), *dv = normed + n, *dh = a.dh ? a.dh + index * n : dv;
  if (a.norm != NO_NORM) {
    const float mean = a.norm == LAYER ? a.mean[index] : 0.f, rstd = a.rstd[index];
    const float *h = a.h.at(g, r), *factor = maps.factor.data(), *offset = maps.offset.data();
    for (int64_t i = 0; i < n; ++i) normed[i] = (h[i] - mean) * rstd;
    if (a.y) {
      float* y = a.y + index * n;
      for (int64_t i = 0; i < n; ++i) y[i] = normed[i] * factor[i] + offset[i];
    }
    if (grad_y) {
      double sum = 0, dot = 0;
#pragma omp simd reduction(+ : sum, dot)
      for (int64_t i = 0; i < n; ++i) {
        const double dn = grad_y[i] * factor[i];
        sum += dn;
        dot += dn * normed[i];
      }
      const float of_mean = a.norm == LAYER ? static_cast<float>(sum / n) : 0.f;
      const float of_rstd = static_cast<float>(dot / n);
      for (int64_t i = 0; i < n; ++i)
        dh[i] = (grad_y[i] * factor[i] - of_mean - normed[i] * of_rstd) * rstd;
      if (grad_h)
        for (int64_t i = 0; i < n; ++i) dh[i] += grad_h[i];
      if (a.dscale.data || a.dweight.data)
        for (int64_t i = 0; i < n; ++i) sums.dy_n[i] += static_cast<double>(grad_y[i]) * normed[i];
      if (a.dscale.data || a.dshift.data || a.dbias.data)
        for (int64_t i = 0; i < n; ++i) sums.dy[i] += grad_y[i];
    }
  }
  const float* dvalue = grad_y ? dh : grad_h;
  if (!dvalue) return;
  if (a.dx) {
    float *dx = a.dx + index * n;
    const float* gate = maps.gate.data();
    for (int64_t i = 0; i < n; ++i) dx[i] = dvalue[i] * gate[i];
  }
  if (a.dgate.data) {
    const float* x = a.x.at(g, r);
    for (int64_t i = 0; i < n; ++i) sums.dv_x[i] += static_cast<double>(dvalue[i]) * x[i];
  }
  if (a.dx_bias.data || (a.dgate.data && a.operands.x_bias))
    for (int64_t i = 0; i < n; ++i) sums.dv[i] += dvalue[i];
}

void add(const Rows& grad, std::vector<double>& total, int64_t g, int64_t i, double value) {
  if (!grad.data) return;
  total[i] += value;
  if (grad.group) {  // a row of its own
    grad.at(g, 0)[i] = static_cast<float>(total[i]);
    total[i] = 0;
  }
}

void store(const Rows& grad, const std::vector<double>& total) {
  if (grad.data && !grad.group)
    for (size_t i = 0; i < total.size(); ++i) grad.data[i] = static_cast<float>(total[i]);
}

// Gradients of the operands, by the sums of all blocks of each group.
void reduce(const Backward& a, const AllMaps& maps, std::vector<double>& sums,
            int64_t num_blocks) {
  const int64_t n = a.num_features;
  const Operands& o = a.operands;
  std::vector<double> dgate(n), dscale(n), dshift(n), dweight(n), dbias(n), dx_bias(n);
  for (int64_t g = 0; g < a.num_groups; ++g) {
    double* total = sums.data() + g * num_blocks * 4 * n;
    for (int64_t block = 1; block < num_blocks; ++block) {
      const double* next = total + block * 4 * n;
      for (int64_t i = 0; i < 4 * n; ++i) total[i] += next[i];
    }
    const Sums of(total, n);
    const float *scale = o.scale.at(g, 0), *gate = maps[g].gate.data();
    for (int64_t i = 0; i < n; ++i) {
      const double inner = o.weight ? o.weight[i] + o.weight_offset : 1;
      const double outer = scale ? scale[i] + o.scale_offset : 1;
      add(a.dgate, dgate, g, i, of.dv_x[i] + (o.x_bias ? o.x_bias[i] * of.dv[i] : 0));
      add(a.dscale, dscale, g, i, of.dy_n[i] * inner + (o.bias ? o.bias[i] * of.dy[i] : 0));
      add(a.dshift, dshift, g, i, of.dy[i]);
      add(a.dweight, dweight, g, i, of.dy_n[i] * outer);
      add(a.dbias, dbias, g, i, of.dy[i] * outer);
      add(a.dx_bias, dx_bias, g, i, of.dv[i] * gate[i]);
    }
  }
  store(a.dgate, dgate);
  store(a.dscale, dscale);
  store(a.dshift, dshift);
  store(a.dweight, dweight);
  store(a.dbias, dbias);
  store(a.dx_bias, dx_bias);
}

}  // namespace

extern "C" void norm_modulate(const Forward* arguments) {
  const Forward& a = *arguments;
  const int64_t n = a.num_features, num_rows = a.num_groups * a.num_rows;
  const AllMaps maps(a.operands, a.num_groups, n);
#pragma omp parallel for if (num_rows * n > GRAIN)
  for (int64_t index = 0; index < num_rows; ++index) {
    const int64_t g = index / a.num_rows, r = index % a.num_rows;
    const float *x = a.x.at(g, r), *residual = a.residual.at(g, r), *v = x;
    if (residual) {
      const float *gate = maps[g].gate.data(), *addend = maps[g].addend.data();
      float* h = a.h + index * n;
      for (int64_t i = 0; i < n; ++i) h[i] = residual[i] + gate[i] * x[i] + addend[i];
      v = h;
    }
    if (a.norm == NO_NORM) continue;
    float mean, rstd, *y = a.y + index * n;
    statistics(v, n, a.norm, a.eps, mean, rstd);
    const float *factor = maps[g].factor.data(), *offset = maps[g].offset.data();
    for (int64_t i = 0; i < n; ++i) y[i] = (v[i] - mean) * rstd * factor[i] + offset[i];
    if (a.norm == LAYER) a.mean[index] = mean;
    a.rstd[index] = rstd;
  }
}

extern "C" void norm_modulate_backward(const Backward* arguments) {
  const Backward& a = *arguments;
  const int64_t n = a.num_features, num_blocks = (a.num_rows + BLOCK - 1) / BLOCK;
  const AllMaps maps(a.operands, a.num_groups, n);
  std::vector<double> sums(a.num_groups * num_blocks * 4 * n);
#pragma omp parallel if (a.num_groups * a.num_rows * n > GRAIN)
  {
    std::vector<float> room(2 * n);
#pragma omp for
    for (int64_t task = 0; task < a.num_groups * num_blocks; ++task) {
      const int64_t g = task / num_blocks, first = task % num_blocks * BLOCK;
      const int64_t end = first + BLOCK < a.num_rows ? first + BLOCK : a.num_rows;
      const Sums own(sums.data() + task * 4 * n, n);
      for (int64_t r = first; r < end; ++r) backward_row(a, maps[g], g, r, own, room);
    }
  }
  reduce(a, maps, sums, num_blocks);
}

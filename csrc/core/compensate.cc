#include "core/compensate.h"

#include <cmath>
#include <vector>

#include "core/float_bits.h"
#include "core/for_rows.h"

namespace afpq {
namespace {

// Rows that are worked on side by side: one vector register of floats (or a few), so that each
// number of H is loaded once for all of them.
constexpr size_t kLanes = 16;
constexpr int kMaxSweeps = 8;  // descent converges in three or four

// One float for each row of a block.
struct Lanes {
  float at[kLanes];
};

// dst += factor * lanes, for `count` columns of a matrix whose row of factors is given.
void add_outer(const float* factors, size_t count, const Lanes& lanes, Lanes* dst) {
  for (size_t j = 0; j < count; ++j) {
    for (size_t lane = 0; lane < kLanes; ++lane) dst[j].at[lane] += factors[j] * lanes.at[lane];
  }
}

// Up to kLanes rows of a weight. All arrays are [k] of Lanes.
class RowBlock {
 public:
  RowBlock(const InputMoments& moments, const Format& format, ScaleKind kind)
      : moments_(moments),
        format_(format),
        kind_(kind),
        max_integer_(static_cast<float>(format.max_integer())),
        first_normal_(std::ldexp(1.0f, format.mantissa_bits)),
        target_(moments.k),
        product_(moments.k),
        value_(moments.k),
        gradient_(moments.k) {}

  void run(const float* target, size_t num_rows, int num_refits, float* scales, float* values,
           double* errors) {
    load(target, num_rows, scales);
    round_with_feedback();
    descend();
    std::vector<Lanes> best = value_;
    Lanes best_scale = scale_;
    measure(best_error_);
    for (int i = 0; i < num_refits && refit(); ++i) {
      descend();
      double error[kLanes];
      measure(error);
      bool better = false;
      for (size_t lane = 0; lane < num_rows; ++lane) {
        if (!(error[lane] < best_error_[lane])) continue;
        better = true;
        best_error_[lane] = error[lane];
        best_scale.at[lane] = scale_.at[lane];
        for (size_t j = 0; j < k(); ++j) best[j].at[lane] = value_[j].at[lane];
      }
      if (!better) break;
    }
    for (size_t lane = 0; lane < num_rows; ++lane) {
      scales[lane] = best_scale.at[lane];
      errors[lane] = best_error_[lane];
      for (size_t j = 0; j < k(); ++j) values[lane * k() + j] = best[j].at[lane];
    }
  }

 private:
  size_t k() const { return moments_.k; }

  // Lanes without a row hold zeros.
  void load(const float* target, size_t num_rows, const float* scales) {
    for (size_t j = 0; j < k(); ++j) {
      for (size_t lane = 0; lane < kLanes; ++lane) {
        target_[j].at[lane] = lane < num_rows ? target[lane * k() + j] : 0.0f;
      }
    }
    for (size_t lane = 0; lane < kLanes; ++lane)
      scale_.at[lane] = lane < num_rows ? scales[lane] : 1.0f;
    for (size_t j = 0; j < k(); ++j) product_[j] = Lanes{};
    for (size_t i = 0; i < k(); ++i)
      add_outer(moments_.second + i * k(), k(), target_[i], product_.data());
  }

  // The nearest values. Adding and subtracting 1.5 * 2^23 * q rounds to a multiple of q, the
  // spacing of the binade: see fast_error in scale_search.cc.
  Lanes nearest(const Lanes& x) const {
    const float magic = 12582912.0f / first_normal_;
    Lanes result;
    for (size_t lane = 0; lane < kLanes; ++lane) {
      const float ratio = x.at[lane] / scale_.at[lane];
      const float size = std::fabs(ratio);
      const float clipped = size < max_integer_ ? size : max_integer_;
      const float power = float_of(bits_of(clipped) & 0x7F800000u);
      const float shift = (power > first_normal_ ? power : first_normal_) * magic;
      const float integer = (clipped + shift) - shift;
      const float kept = format_.is_signed || ratio > 0 ? integer : 0.0f;
      result.at[lane] = std::copysign(kept, ratio) * scale_.at[lane] + 0.0f;
    }
    return result;
  }

  void round_with_feedback() {
    gradient_ = target_;  // the targets that earlier weights leave to later ones
    for (size_t i = 0; i < k(); ++i) {
      value_[i] = nearest(gradient_[i]);
      Lanes lost;
      for (size_t lane = 0; lane < kLanes; ++lane) {
        lost.at[lane] = target_[i].at[lane] - value_[i].at[lane];
      }
      add_outer(moments_.feedback + i * k() + i + 1, k() - i - 1, lost, gradient_.data() + i + 1);
    }
    update_gradient();
  }

  // gradient = H (value - target), half the derivative of the error.
  void update_gradient() {
    for (size_t j = 0; j < k(); ++j) gradient_[j] = Lanes{};
    for (size_t i = 0; i < k(); ++i) {
      Lanes change;
      for (size_t lane = 0; lane < kLanes; ++lane) {
        change.at[lane] = value_[i].at[lane] - target_[i].at[lane];
      }
      add_outer(moments_.second + i * k(), k(), change, gradient_.data());
    }
  }

  void descend() {
    for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
      bool moved = false;
      for (size_t j = 0; j < k(); ++j) moved |= move(j);
      if (!moved) break;
    }
  }

  bool move(size_t j) {
    const float* row = moments_.second + j * k();
    const float inverse = 1.0f / row[j];
    Lanes wanted;
    for (size_t lane = 0; lane < kLanes; ++lane) {
      wanted.at[lane] = value_[j].at[lane] - gradient_[j].at[lane] * inverse;
    }
    const Lanes next = nearest(wanted);
    Lanes change;
    bool moved = false;
    for (size_t lane = 0; lane < kLanes; ++lane) {
      // Only a gain that rounding errors cannot pretend counts, or two neighbours might swap for
      // ever.
      const float before = std::fabs(value_[j].at[lane] - wanted.at[lane]);
      const float after = std::fabs(next.at[lane] - wanted.at[lane]);
      const bool gains = after < 0.999f * before;
      change.at[lane] = gains ? next.at[lane] - value_[j].at[lane] : 0.0f;
      value_[j].at[lane] = gains ? next.at[lane] : value_[j].at[lane];
      moved |= gains;
    }
    if (moved) add_outer(row, k(), change, gradient_.data());
    return moved;
  }

  // The best scale for the present integers I: value H target / value H value times the present
  // one. False if no row gets another scale.
  bool refit() {
    bool changed = false;
    for (size_t lane = 0; lane < kLanes; ++lane) {
      double along = 0, square = 0;
      for (size_t j = 0; j < k(); ++j) {
        const double v = value_[j].at[lane], p = product_[j].at[lane];
        along += v * p;
        square += v * (gradient_[j].at[lane] + p);
      }
      if (!(along > 0 && square > 0)) continue;
      const float scale = round_scale(format_, kind_, scale_.at[lane] * (along / square));
      if (scale == scale_.at[lane]) continue;
      changed = true;
      const float ratio = scale / scale_.at[lane];
      for (size_t j = 0; j < k(); ++j) {
        value_[j].at[lane] = std::nearbyint(value_[j].at[lane] / scale_.at[lane]) * scale;
        gradient_[j].at[lane] =
            ratio * (gradient_[j].at[lane] + product_[j].at[lane]) - product_[j].at[lane];
      }
      scale_.at[lane] = scale;
    }
    return changed;
  }

  void measure(double* errors) const {
    for (size_t lane = 0; lane < kLanes; ++lane) {
      double sum = 0;
      for (size_t j = 0; j < k(); ++j) {
        sum +=
            (static_cast<double>(value_[j].at[lane]) - target_[j].at[lane]) * gradient_[j].at[lane];
      }
      errors[lane] = sum > 0 ? sum : 0;
    }
  }

  const InputMoments moments_;
  const Format format_;
  const ScaleKind kind_;
  const float max_integer_;
  const float first_normal_;
  std::vector<Lanes> target_;
  std::vector<Lanes> product_;  // H target
  std::vector<Lanes> value_;
  std::vector<Lanes> gradient_;  // H (value - target)
  Lanes scale_;
  double best_error_[kLanes];
};

}  // namespace

void round_compensated(const float* target, size_t n, const InputMoments& moments,
                       const Format& format, ScaleKind kind, int num_refits, size_t num_threads,
                       float* scales, float* values, double* errors) {
  const size_t num_blocks = ceil_div(n, kLanes), k = moments.k;
  for_rows(num_blocks, num_threads, [&](size_t begin, size_t end) {
    RowBlock block(moments, format, kind);
    for (size_t b = begin; b < end; ++b) {
      const size_t first = b * kLanes, rows = std::min(kLanes, n - first);
      block.run(target + first * k, rows, num_refits, scales + first, values + first * k,
                errors + first);
    }
  });
}

}  // namespace afpq

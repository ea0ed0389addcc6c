#include "core/scale_search.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/float_bits.h"
#include "core/for_rows.h"

namespace afpq {
namespace {

constexpr size_t kLanes = 16;  // partial sums of the float error: enough to fill vector units
constexpr double kLargestFactor = 1.06;  // of max |w| / max I: a little above "the maximum fits"
constexpr double kGridStep = 0.955;      // ratio of neighbours on the grid
constexpr double kFineStep = 0.9886;     // kGridStep^(1/4)
constexpr int kFinePoints = 3;           // on either side of the best grid point

// The code of the nearest magnitude to `ratio` = |x| / scale, ties to the even code. With q = 2^j
// the spacing of the binade of `ratio` (1 among the subnormals), the code below is (j << M) +
// floor(ratio / q); all steps are exact.
int nearest_code(double ratio, int mantissa_bits, double max_integer, int last_code) {
  if (ratio >= max_integer) return last_code;
  const double first_normal = std::ldexp(1.0, mantissa_bits);
  const int j = ratio < 2 * first_normal ? 0 : std::ilogb(ratio) - mantissa_bits;
  const double steps = std::ldexp(ratio, -j);
  const double below = std::floor(steps);
  const int code = (j << mantissa_bits) + static_cast<int>(below);
  const double rest = steps - below;
  return code + (rest > 0.5 || (rest == 0.5 && (code & 1)) ? 1 : 0);
}

int last_magnitude(const Format& format) {
  return (1 << (format.exponent_bits + format.mantissa_bits)) - 1;
}

double exact_error(const float* weight, const float* energy, size_t k, const Format& format,
                   float scale) {
  const double max_integer = static_cast<double>(format.max_integer());
  const int last_code = last_magnitude(format);
  double sum = 0;
  for (size_t i = 0; i < k; ++i) {
    double value = weight[i];
    double nearest = 0;
    if (format.is_signed || value > 0) {
      value = std::fabs(value);
      const int code = nearest_code(value / scale, format.mantissa_bits, max_integer, last_code);
      nearest = static_cast<double>(format.integer(code)) * scale;
    }
    const double difference = value - nearest;
    sum += (energy ? energy[i] : 1.0) * (difference * difference);
  }
  return sum;
}

// The same in float and in units of the scale, fast and good enough to compare scales. `weight`
// holds magnitudes; both arrays are padded with zeros to a multiple of kLanes.
//
// Rounding to the spacing q of a binade: adding and subtracting 1.5 * 2^23 * q leaves a multiple of
// q. The power of two below t is its float32 exponent field; where it is below 2^M (subnormals), q
// is 1.
float fast_error(const float* weight, const float* energy, size_t padded_k, float inverse_scale,
                 int mantissa_bits, float max_integer) {
  const float first_normal = float_of(static_cast<uint32_t>(127 + mantissa_bits) << 23);
  const float magic = 12582912.0f / first_normal;
  float sums[kLanes] = {};
  for (size_t i = 0; i < padded_k; i += kLanes) {
    for (size_t lane = 0; lane < kLanes; ++lane) {
      const float t = weight[i + lane] * inverse_scale;
      const float clipped = t < max_integer ? t : max_integer;
      const float power = float_of(bits_of(clipped) & 0x7F800000u);
      const float shift = (power > first_normal ? power : first_normal) * magic;
      const float nearest = (clipped + shift) - shift;
      const float difference = t - nearest;
      sums[lane] += energy[i + lane] * (difference * difference);
    }
  }
  for (size_t half = kLanes / 2; half > 0; half /= 2) {
    for (size_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }
  return sums[0];
}

// One row of a search: its magnitudes and energies, padded, and the best scale so far.
class RowSearch {
 public:
  RowSearch(const Format& format, ScaleKind kind, size_t k)
      : format_(format),
        kind_(kind),
        padded_k_((k + kLanes - 1) / kLanes * kLanes),
        weight_(padded_k_),
        energy_(padded_k_) {}

  float run(const float* weight, const float* energy, size_t k) {
    const float largest = load(weight, energy, k);
    if (!(largest > 0)) return round_scale(format_, kind_, 1.0);
    const double fitting = largest / static_cast<double>(format_.max_integer());
    best_scale_ = 0;
    if (kind_ == ScaleKind::kInteger) {
      const int exponent = std::ilogb(fitting);
      for (int e = exponent + 1; e >= exponent - 3; --e) attempt(std::ldexp(1.0, e));
      return best_scale_;
    }
    // Formats of two or three bits clip deep into the tail of a distribution; wider ones never gain
    // by it.
    const double smallest_factor = last_magnitude(format_) <= 3 ? 0.12 : 0.3;
    double best = fitting;
    for (double f = kLargestFactor; f >= smallest_factor; f *= kGridStep) {
      if (attempt(fitting * f)) best = fitting * f;
    }
    double up = best, down = best;
    for (int i = 0; i < kFinePoints; ++i) {
      attempt(up /= kFineStep);
      attempt(down *= kFineStep);
    }
    return best_scale_;
  }

 private:
  // Returns the largest magnitude.
  float load(const float* weight, const float* energy, size_t k) {
    float largest = 0;
    for (size_t i = 0; i < k; ++i) {
      // Unsigned formats send negative values to 0 whatever the scale is.
      const float w = format_.is_signed ? std::fabs(weight[i]) : std::max(weight[i], 0.0f);
      weight_[i] = w;
      energy_[i] = energy ? energy[i] : 1.0f;
      largest = std::max(largest, w);
    }
    return largest;
  }

  bool attempt(double wanted) {
    const float scale = round_scale(format_, kind_, wanted);
    const float inverse_scale = 1.0f / scale;
    const float units =
        fast_error(weight_.data(), energy_.data(), padded_k_, inverse_scale, format_.mantissa_bits,
                   static_cast<float>(format_.max_integer()));
    const double error = static_cast<double>(units) * scale * scale;
    if (best_scale_ > 0 && !(error < best_error_)) return false;
    best_scale_ = scale;
    best_error_ = error;
    return true;
  }

  const Format format_;
  const ScaleKind kind_;
  const size_t padded_k_;
  std::vector<float> weight_;
  std::vector<float> energy_;
  float best_scale_ = 0;
  double best_error_ = 0;
};

const float* energy_row(const WeightView& view, size_t row) {
  if (!view.energy) return nullptr;
  return view.energy + row * view.num_energy_rows / view.n * view.k;
}

}  // namespace

float round_scale(const Format& format, ScaleKind kind, double scale) {
  // Scales are normal floats, and the largest value of the format is finite.
  constexpr double kSmallest = 1.1754943508222875e-38, kLargest = 3.4028234663852886e+38;
  const double limit = kLargest / static_cast<double>(format.max_integer());
  if (kind == ScaleKind::kReal) {
    const float wanted = static_cast<float>(std::min(std::max(scale, kSmallest), limit));
    const uint32_t bits = bits_of(wanted) & 0xFFFF0000u;
    const uint32_t rest = bits_of(wanted) & 0xFFFFu;
    const uint32_t half = 0x8000u - ((bits >> 16) & 1u);  // ties to even
    const float above = float_of(bits + 0x10000u);
    return rest > half && above <= limit ? above : float_of(bits);
  }
  // exponent_bias = 1 - M - log2(scale) has to fit into int8 as well.
  const double power = std::nearbyint(std::log2(scale));
  const double low = std::max(1.0 - format.mantissa_bits - 127, -126.0);
  const double high = std::min(1.0 - format.mantissa_bits + 128, 1.0 * std::ilogb(limit));
  return static_cast<float>(
      std::ldexp(1.0, static_cast<int>(std::min(std::max(power, low), high))));
}

void search_scales(const WeightView& view, const Format& format, ScaleKind kind, size_t num_threads,
                   float* scales, double* errors) {
  for_rows(view.n, num_threads, [&](size_t begin, size_t end) {
    RowSearch search(format, kind, view.k);
    for (size_t r = begin; r < end; ++r) {
      const float* weight = view.weight + r * view.k;
      const float* energy = energy_row(view, r);
      scales[r] = search.run(weight, energy, view.k);
      errors[r] = exact_error(weight, energy, view.k, format, scales[r]);
    }
  });
}

void scale_errors(const WeightView& view, const Format& format, const float* scales,
                  size_t num_scales, size_t num_threads, double* errors) {
  for_rows(view.n, num_threads, [&](size_t begin, size_t end) {
    for (size_t r = begin; r < end; ++r) {
      const float scale = scales[num_scales == 1 ? 0 : r];
      errors[r] = exact_error(view.weight + r * view.k, energy_row(view, r), view.k, format, scale);
    }
  });
}

void encode_rows(const float* values, size_t n, size_t k, const Format& format, const float* scales,
                 size_t num_scales, size_t num_threads, uint8_t* codes) {
  const double max_integer = static_cast<double>(format.max_integer());
  const int last_code = last_magnitude(format);
  for_rows(n, num_threads, [&](size_t begin, size_t end) {
    for (size_t r = begin; r < end; ++r) {
      const double scale = scales[num_scales == 1 ? 0 : r];
      for (size_t i = r * k; i < (r + 1) * k; ++i) {
        int code = nearest_code(std::fabs(static_cast<double>(values[i])) / scale,
                                format.mantissa_bits, max_integer, last_code);
        if (values[i] < 0) code = !format.is_signed ? 0 : code > 0 ? code + last_code + 1 : 0;
        codes[i] = static_cast<uint8_t>(code);
      }
    }
  });
}

}  // namespace afpq

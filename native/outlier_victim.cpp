// Outlier-victim pairs: rounding to codes of 4 or 8 bits, the search for scales, and back; see
// arithmetic/formats/outlier_victim.py. Rows are deinterleaved into left and right halves of pairs, so that the rounding
// of 16 pairs is a straight vector loop.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

#include "clones.hpp"

namespace nb = nanobind;

namespace bitwright {
namespace {

using Reals = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using RealsOut = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Doubles = nb::ndarray<const double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using DoublesOut = nb::ndarray<double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Codes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using CodesOut = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

#if defined(__GNUC__)
#define BITWRIGHT_INLINE inline __attribute__((always_inline))  // into clones, for their instruction set
#else
#define BITWRIGHT_INLINE inline
#endif

static_assert(std::endian::native == std::endian::little);  // two codes are stored as one number
constexpr size_t kLanes = 16;
constexpr size_t kChunk = 2048;  // pairs rounded at a time

// Grids of a format, in units of the integers. `flint`: normal values 0 1 2 3 4 6 8 16 instead of integers.
struct Grid {
    int bits, mantissa, bias;
    float top, first, last, edge;
    bool flint, left;
};

BITWRIGHT_INLINE float normal_value(float m, float top, bool flint) {
    if (!flint) return std::min(__builtin_rintf(m), top);
    const float small = __builtin_ceilf(m - 0.5f), middle = 2 * __builtin_ceilf(m * 0.5f - 0.5f);  // ties down
    const float v = m > 3.5f ? std::min(std::max(middle, 4.0f), 8.0f) : small;
    return m > 12.0f ? 16.0f : v;
}

// Nearest biased float, ties to the smaller one, within first .. last.
BITWRIGHT_INLINE float outlier_value(float m, float first, float last, int32_t low, int32_t drop) {
    const float bounded = std::min(std::max(m, first), last);
    const int32_t exponent = std::max(std::bit_cast<int32_t>(bounded) & 0x7f800000, low);
    const float step = std::bit_cast<float>(exponent - drop);
    const float inverse = std::bit_cast<float>(0x7f000000 - (exponent - drop));
    return std::max(__builtin_ceilf(bounded * inverse - 0.5f) * step, first);
}

// Magnitudes of the rounded values of `kLanes` pairs whose scaled magnitudes are l and r.
template <bool Flint, bool Left>
BITWRIGHT_INLINE void round_lanes(const float* l, const float* r, const Grid& g, float* ql, float* qr) {
    const int32_t low = (127 + g.mantissa + g.bias) << 23, drop = g.mantissa << 23;
    const float top = g.top, first = g.first, last = g.last, edge = g.edge;
    for (size_t i = 0; i < kLanes; ++i) {
        const bool lo = l[i] > edge, ro = r[i] > edge;
        const bool right_wins = ro & (!lo | (!Left & (r[i] > l[i])));
        const bool left_wins = lo & !right_wins;
        const float nl = normal_value(l[i], top, Flint), nr = normal_value(r[i], top, Flint);
        const float ol = outlier_value(l[i], first, last, low, drop), orr = outlier_value(r[i], first, last, low, drop);
        ql[i] = right_wins ? 0.0f : left_wins ? ol : nl;
        qr[i] = left_wins ? 0.0f : right_wins ? orr : nr;
    }
}

// Squared error, in units of the scale, of `pairs` (a multiple of kLanes) with magnitudes l, r under `scale`.
template <bool Flint, bool Left>
BITWRIGHT_INLINE double squared_error(const float* l, const float* r, size_t pairs, float scale, const Grid& g) {
    float sums[kLanes] = {};
    float ml[kLanes], mr[kLanes], ql[kLanes], qr[kLanes];
    for (size_t at = 0; at < pairs; at += kLanes) {
        for (size_t i = 0; i < kLanes; ++i) {
            ml[i] = l[at + i] / scale;
            mr[i] = r[at + i] / scale;
        }
        round_lanes<Flint, Left>(ml, mr, g, ql, qr);
        for (size_t i = 0; i < kLanes; ++i) {
            const float a = ql[i] - ml[i], b = qr[i] - mr[i];
            sums[i] += a * a + b * b;
        }
    }
    double total = 0;
    for (float each : sums) total += each;
    return total;
}

// The search. Almost all pairs of a row hold no outlier under any scale that is tried: their error is a sum over single
// values, bounded from below and above by a histogram or by a short loop. Only the others take the whole rounding.
// Scales whose lower bound is above the least upper bound are out, and what is left of them is tried value by value, so
// that the scale found is the one of the exhaustive search. Bounds allow for the float32 arithmetic of that search.

constexpr int kCountAt = 40;               // of a bin: how many values, above the sum of their integers
constexpr size_t kFlush = size_t{1} << 17;  // values until that sum could overflow
constexpr int kUnits = 23;                 // bits of a magnitude as an integer
constexpr size_t kGroup = 4;               // scales that are bounded together
constexpr size_t kShort = 64;              // rows below take longer to bound than to try
constexpr double kReach = 1.6;             // the histogram ends at so many times the smallest limit of outliers
constexpr double kFloatSums = 2e-5;        // relative error of sums of squares in float32, twice

struct Bounds {
    double low, high;
};

struct Pair {
    float most, left, right;
};

// Pairs as left and right halves, filled up to whole vectors with zeros.
struct Halves {
    std::vector<float> left, right;

    void assign(const std::vector<Pair>& pairs) {
        left.assign(pairs.size() + kLanes, 0.0f);
        right.assign(pairs.size() + kLanes, 0.0f);
        for (size_t i = 0; i < pairs.size(); ++i) {
            left[i] = pairs[i].left;
            right[i] = pairs[i].right;
        }
    }

    void shorten(size_t pairs) {
        std::fill_n(left.begin() + static_cast<ptrdiff_t>(pairs), kLanes, 0.0f);
        std::fill_n(right.begin() + static_cast<ptrdiff_t>(pairs), kLanes, 0.0f);
    }
};

// Values that are never outliers: one by one (`values`), or integers in units of 1 / `per_unit` by bins of 2^`shift`.
struct Normals {
    std::vector<float> values;
    std::vector<uint64_t> bins, counts, sums;  // bins: both in one; the others once kFlush values are in
    std::vector<double> above, excess;         // of values at or above a bin's edge: how many, sum of what is above it
    float per_unit = 0;
    int shift = 0;
    size_t count = 0, since_flush = 0;
    double squares = 0;  // of integers, or of values
    bool wide = false;

    bool binned() const { return per_unit > 0; }

    void reset(float units, int bits) {
        per_unit = units;
        shift = kUnits - bits;
        count = since_flush = 0;
        squares = 0;
        wide = false;
        values.clear();
        if (!binned()) return;
        const size_t size = (size_t{1} << bits) + 2;
        bins.assign(size, 0);
        above.resize(size + 1);
        excess.resize(size + 1);
    }

    void add(const int32_t* integers, size_t size) {
        for (size_t i = 0; i < size; ++i)
            bins[static_cast<size_t>(integers[i] >> shift)] +=
                (uint64_t{1} << kCountAt) + static_cast<uint64_t>(integers[i]);
        count += size;
        since_flush += size;
        if (since_flush > kFlush - kChunk * 2) flush();
    }

    void flush() {
        if (!wide) {
            counts.assign(bins.size(), 0);
            sums.assign(bins.size(), 0);
            wide = true;
        }
        for (size_t b = 0; b < bins.size(); ++b) {
            counts[b] += bins[b] >> kCountAt;
            sums[b] += bins[b] & ((uint64_t{1} << kCountAt) - 1);
            bins[b] = 0;
        }
        since_flush = 0;
    }

    void add_up() {
        uint64_t number = 0, sum = 0;
        above[bins.size()] = excess[bins.size()] = 0;
        for (size_t b = bins.size(); b-- > 0;) {
            number += bins[b] >> kCountAt;
            sum += bins[b] & ((uint64_t{1} << kCountAt) - 1);
            if (wide) {
                number += counts[b];
                sum += sums[b];
            }
            above[b] = static_cast<double>(static_cast<int64_t>(number));
            excess[b] = static_cast<double>(static_cast<int64_t>(sum - number * (uint64_t{b} << shift)));
        }
    }
};

constexpr float kFlintEdges[] = {0.5f, 1.5f, 2.5f, 3.5f, 5.0f, 7.0f, 12.0f};
constexpr float kFlintSteps[] = {1, 1, 1, 1, 2, 2, 8};

// Squared error of the binned values, whose scale is `scale` units. With e(t) the sum of what values exceed t by, it is
// the sum of squares less 2 * scale * the sum over edges t between normal values of their difference times e(t); e is
// convex, and known at the edges of bins.
template <bool Flint>
Bounds binned_error(const Normals& n, double scale, int top) {
    const int edges = Flint ? 7 : top;
    const double width = static_cast<double>(int64_t{1} << n.shift), per_width = 1 / width;
    double most = 0, least = 0;
    for (int k = 0; k < edges; ++k) {
        const double t = (Flint ? static_cast<double>(kFlintEdges[k]) : k + 0.5) * scale;
        const double place = t * per_width;
        if (place >= static_cast<double>(n.bins.size())) break;
        const size_t b = static_cast<size_t>(static_cast<int64_t>(place));
        const double into = t - static_cast<double>(static_cast<int64_t>(b)) * width;
        const double weight = Flint ? static_cast<double>(kFlintSteps[k]) : 1.0;
        most += weight * (n.excess[b] + (n.excess[b + 1] - n.excess[b]) * into * per_width);
        least += weight * std::max(n.excess[b] - n.above[b] * into, n.excess[b + 1] + n.above[b + 1] * (width - into));
    }
    const double slack = 1.5 * std::sqrt(static_cast<double>(n.count)) + std::ldexp(std::sqrt(n.squares), -kUnits);
    const double low = std::sqrt(std::max(n.squares - 2 * scale * most, 0.0)) - slack;
    const double high = std::sqrt(std::max(n.squares - 2 * scale * least, 0.0)) + slack;
    return {std::max(low, 0.0) * std::max(low, 0.0), high * high};
}

// The same of values one by one, padded with zeros to whole vectors, for kGroup scales, of which it takes the inverse.
template <bool Flint>
BITWRIGHT_CLONES void single_errors(const float* values, size_t size, const float* inverse, float top, double* found) {
    for (size_t s = 0; s < kGroup; ++s) found[s] = 0;
    for (size_t start = 0; start < size; start += kChunk) {
        float sums[kGroup][kLanes] = {};
        const size_t end = std::min(start + kChunk, size);
        for (size_t at = start; at < end; at += kLanes)
            for (size_t s = 0; s < kGroup; ++s)
                for (size_t i = 0; i < kLanes; ++i) {
                    const float m = values[at + i] * inverse[s], a = m - normal_value(m, top, Flint);
                    sums[s][i] += a * a;
                }
        for (size_t s = 0; s < kGroup; ++s)
            for (float each : sums[s]) found[s] += each;
    }
}

template <bool Flint, bool Left>
BITWRIGHT_CLONES void halves_errors(const Halves& h, size_t pairs, const float* scales, const Grid& g, double* found) {
    for (size_t s = 0; s < kGroup; ++s) found[s] = 0;
    for (size_t start = 0; start < pairs; start += kChunk) {
        const size_t size = (std::min(kChunk, pairs - start) + kLanes - 1) / kLanes * kLanes;
        for (size_t s = 0; s < kGroup; ++s)
            found[s] += squared_error<Flint, Left>(h.left.data() + start, h.right.data() + start, size, scales[s], g);
    }
}

// Magnitudes as integers of at most `most`.
BITWRIGHT_CLONES void to_integers(const float* x, size_t size, float per_unit, float most, int32_t* integers) {
    for (size_t i = 0; i < size; ++i)
        integers[i] = static_cast<int32_t>(std::min(std::fabs(x[i]) * per_unit, most) + 0.5f);
}

BITWRIGHT_CLONES double sum_of_squares(const int32_t* integers, size_t size) {
    uint64_t total = 0;
    for (size_t i = 0; i < size; ++i) {
        const uint64_t wide = static_cast<uint32_t>(integers[i]);
        total += wide * wide;
    }
    return static_cast<double>(static_cast<int64_t>(total));
}

// Sorts the pairs of a row into normal values and pairs of which a value is beyond `limit`.
inline void separate(const float* x, size_t size, double limit, Normals& normals, std::vector<Pair>& others) {
    others.clear();
    if (!normals.binned()) {
        const float bound = static_cast<float>(limit * (1 - 1e-6));
        normals.values.resize(size + kLanes);
        float* to = normals.values.data();
        for (size_t i = 0; i < size; i += 2) {
            const float l = std::fabs(x[i]), r = std::fabs(x[i + 1]), most = std::max(l, r);
            to[0] = l;
            to[1] = r;
            if (most > bound)
                others.push_back({most, l, r});
            else
                to += 2;
        }
        normals.count = static_cast<size_t>(to - normals.values.data());
        std::fill_n(to, kLanes, 0.0f);
        return;
    }
    const int32_t bound = static_cast<int32_t>(limit * (1 - 1e-6) * normals.per_unit) - 1;
    int32_t integers[2 * kChunk];
    for (size_t start = 0; start < size; start += 2 * kChunk) {
        const size_t here = std::min(2 * kChunk, size - start);
        to_integers(x + start, here, normals.per_unit, static_cast<float>(1 << (kUnits + 1)), integers);
        size_t kept = 0;
        for (size_t i = 0; i < here; i += 2) {
            const int32_t l = integers[i], r = integers[i + 1];
            integers[kept] = l;
            integers[kept + 1] = r;
            if (std::max(l, r) > bound) {
                const float left = std::fabs(x[start + i]), right = std::fabs(x[start + i + 1]);
                others.push_back({std::max(left, right), left, right});
            } else {
                kept += 2;
            }
        }
        normals.squares += sum_of_squares(integers, kept);
        normals.add(integers, kept);
    }
}

// Pairs from `first` on become normal values.
inline void move(const std::vector<Pair>& others, size_t first, size_t last, Normals& normals) {
    if (!normals.binned()) {
        normals.values.resize(normals.count + 2 * (last - first) + kLanes);
        float* to = normals.values.data() + normals.count;
        for (size_t i = first; i < last; ++i) {
            *to++ = others[i].left;
            *to++ = others[i].right;
        }
        std::fill_n(to, kLanes, 0.0f);
        normals.count += 2 * (last - first);
        return;
    }
    for (size_t i = first; i < last; ++i) {
        const float both[2] = {others[i].left, others[i].right};
        int32_t integers[2];
        to_integers(both, 2, normals.per_unit, static_cast<float>(1 << (kUnits + 1)), integers);
        normals.squares += sum_of_squares(integers, 2);
        normals.add(integers, 2);
    }
}

// Squared errors, in units of the scale, of a row under each of `count` scales.
template <bool Flint, bool Left>
BITWRIGHT_CLONES void row_errors(const float* x, size_t size, const float* scales, size_t count, const Grid& g,
                                 double* errors) {
    float left[kChunk], right[kChunk];
    std::fill_n(errors, count, 0.0);
    for (size_t start = 0; start < size / 2; start += kChunk) {
        const size_t pairs = std::min(kChunk, size / 2 - start);
        const size_t filled = (pairs + kLanes - 1) / kLanes * kLanes;  // zeros round to zeros
        for (size_t i = 0; i < pairs; ++i) {
            left[i] = std::fabs(x[2 * (start + i)]);
            right[i] = std::fabs(x[2 * (start + i) + 1]);
        }
        std::fill(left + pairs, left + filled, 0.0f);
        std::fill(right + pairs, right + filled, 0.0f);
        for (size_t c = 0; c < count; ++c) errors[c] += squared_error<Flint, Left>(left, right, filled, scales[c], g);
    }
}

struct Workspace {
    Normals normals;
    std::vector<Pair> others;
    Halves halves;
    std::vector<size_t> order, rest;
    std::vector<float> scales;
    std::vector<double> errors;
    std::vector<Bounds> bounds;
};

// Candidates that may have the least error, in the order they were given: `w.rest`.
template <bool Flint, bool Left>
void likely_scales(const float* x, size_t size, const std::vector<float>& scales, const Grid& g, Workspace& w) {
    const size_t candidates = scales.size();
    w.order.resize(candidates);
    for (size_t c = 0; c < candidates; ++c) w.order[c] = c;
    std::sort(w.order.begin(), w.order.end(), [&](size_t a, size_t b) { return scales[a] < scales[b]; });
    const double smallest = scales[w.order.front()], largest = scales[w.order.back()];
    const double reach = std::min(kReach * g.edge * smallest, 1.01 * g.top * largest);
    const int edges = Flint ? 7 : static_cast<int>(g.top);
    const bool binned = size > (Flint ? 64 : 192) * static_cast<size_t>(edges) && reach > 1e-30 && reach < 1e30;
    const int bits = std::min(14, static_cast<int>(std::bit_width(size / 4)) + (edges > 15 ? 2 : 0));
    w.normals.reset(binned ? static_cast<float>((1 << kUnits) / reach) : 0.0f, bits);
    const double furthest = binned ? reach : std::numeric_limits<double>::infinity();
    separate(x, size, std::min(g.edge * smallest, furthest), w.normals, w.others);
    std::sort(w.others.begin(), w.others.end(), [](const Pair& a, const Pair& b) { return a.most > b.most; });
    w.halves.assign(w.others);
    if (binned) w.normals.add_up();
    size_t live = w.others.size(), next = live;
    w.bounds.resize(candidates);
    double least = std::numeric_limits<double>::infinity();
    for (size_t at = 0; at < candidates; at += kGroup) {
        const size_t group = std::min(kGroup, candidates - at);
        float scale[kGroup], inverse[kGroup];
        double rest[kGroup], sums[kGroup];
        for (size_t s = 0; s < kGroup; ++s) {
            scale[s] = scales[w.order[at + std::min(s, group - 1)]];
            inverse[s] = 1 / scale[s];
        }
        const double limit = std::min(g.edge * static_cast<double>(scale[0]), furthest) * (1 - 1e-6);
        while (next > 0 && w.others[next - 1].most < limit) --next;
        const size_t saved = (live - next) * (candidates - at);  // roundings, against bins to add up
        if (live > next && saved * 2 > (binned ? w.normals.bins.size() : 0)) {
            move(w.others, next, live, w.normals);
            if (binned) w.normals.add_up();
            w.halves.shorten(live = next);
        }
        halves_errors<Flint, Left>(w.halves, live, scale, g, rest);
        const size_t filled = (w.normals.count + kLanes - 1) / kLanes * kLanes;
        if (!binned) single_errors<Flint>(w.normals.values.data(), filled, inverse, g.top, sums);
        for (size_t s = 0; s < group; ++s) {
            const double square = static_cast<double>(scale[s]) * scale[s];
            Bounds found;
            if (binned) {
                const double unit = w.normals.per_unit;
                found = binned_error<Flint>(w.normals, scale[s] * unit, static_cast<int>(g.top));
                found = {found.low / (unit * unit), found.high / (unit * unit)};
            } else {
                const double root = std::sqrt(sums[s]);
                const double slack = std::ldexp(root + g.top * std::sqrt(static_cast<double>(filled)), -21);
                const double low = std::max(root - slack, 0.0), high = root + slack;
                found = {low * low * square, high * high * square};
            }
            const double others = rest[s] * square;
            found = {(found.low + others) * (1 - kFloatSums), (found.high + others) * (1 + kFloatSums)};
            w.bounds[w.order[at + s]] = found;
            least = std::min(least, found.high);
        }
    }
    w.rest.clear();
    for (size_t c = 0; c < candidates; ++c)
        if (!(w.bounds[c].low > least)) w.rest.push_back(c);
}

// `error` may be null; then a row for which one scale is left is not rounded again.
template <bool Flint, bool Left>
void search_rows(const float* x, size_t rows, size_t size, const double* base, const double* percents,
                 size_t candidates, const Grid& g, bool exhaustive, float* found, double* error) {
    std::vector<float> scales(candidates);
    Workspace w;
    for (size_t row = 0; row < rows; ++row, x += size) {
        for (size_t c = 0; c < candidates; ++c) {
            const double scale = base[row] * percents[c] / 100;
            scales[c] = static_cast<float>(std::max(scale, double{std::numeric_limits<float>::min()}));
        }
        if (exhaustive || size < kShort) {
            w.rest.resize(candidates);
            for (size_t c = 0; c < candidates; ++c) w.rest[c] = c;
        } else {
            likely_scales<Flint, Left>(x, size, scales, g, w);
        }
        found[row] = scales[w.rest.size() == 1 ? w.rest[0] : 0];
        if (w.rest.size() == 1 && error == nullptr) continue;
        w.scales.resize(w.rest.size());
        w.errors.resize(w.rest.size());
        for (size_t i = 0; i < w.rest.size(); ++i) w.scales[i] = scales[w.rest[i]];
        row_errors<Flint, Left>(x, size, w.scales.data(), w.scales.size(), g, w.errors.data());
        double best = std::numeric_limits<double>::infinity();
        for (size_t i = 0; i < w.rest.size(); ++i) {
            const double each = w.errors[i] * w.scales[i] * w.scales[i];
            if (each < best) {
                best = each;
                found[row] = w.scales[i];
            }
        }
        if (error != nullptr) error[row] = best;
    }
}

// Sum of differences from `mean`, or of their squares, in float64.
template <bool Squares>
BITWRIGHT_INLINE double sum_of(const float* x, size_t size, double mean) {
    constexpr size_t lanes = 4 * kLanes;
    double total = 0;
    for (size_t start = 0; start < size; start += kChunk) {
        double sums[lanes] = {};
        const size_t end = std::min(start + kChunk, size);
        size_t at = start;
        for (; at + lanes <= end; at += lanes)
            for (size_t i = 0; i < lanes; ++i) {
                const double d = x[at + i] - mean;
                sums[i] += Squares ? d * d : d;
            }
        for (; at < end; ++at) {
            const double d = x[at] - mean;
            sums[at % lanes] += Squares ? d * d : d;
        }
        for (double each : sums) total += each;
    }
    return total;
}

// |mean| + `deviations` standard deviations of every row, in float64.
BITWRIGHT_CLONES
void reach_of_rows(const float* x, size_t rows, size_t size, double deviations, double* reach) {
    for (size_t row = 0; row < rows; ++row, x += size) {
        const double mean = sum_of<false>(x, size, 0) / static_cast<double>(size);
        const double variance = sum_of<true>(x, size, mean) / static_cast<double>(size);
        reach[row] = std::fabs(mean) + deviations * std::sqrt(variance);
    }
}

// Codes of a rounded magnitude; `negative` is 0 or -1 (all bits).
template <bool Flint>
BITWRIGHT_INLINE int32_t normal_code(float magnitude, int32_t negative, int32_t mask) {
    const int32_t value = static_cast<int32_t>(magnitude);
    if constexpr (!Flint) return ((value ^ negative) - negative) & mask;
    // flint3: 0xx is 0 to 3; of 1xx the position of the next one is the exponent: 110 111 101 100 are 4 6 8 16, whose
    // exponents and first bits of a fraction count 0 1 2 4 from that of 4
    const int32_t place = (std::bit_cast<int32_t>(magnitude) >> 22) - 258;
    const int32_t code = value > 3 ? (0x40576 >> ((4 * place) & 31)) & 7 : value;
    return code | (value > 0 ? negative & 8 : 0);
}

BITWRIGHT_INLINE int32_t outlier_code(float magnitude, int32_t negative, const Grid& g) {
    const int32_t code = std::bit_cast<int32_t>(magnitude) >> (23 - g.mantissa);
    return (code - ((127 + g.mantissa + g.bias) << g.mantissa)) | (negative & (1 << (g.bits - 1)));
}

template <bool Flint, bool Left>
BITWRIGHT_CLONES void encode_rows(const float* x, const float* scale, size_t rows, size_t size, const Grid& g,
                                  int32_t identifier, uint8_t* codes) {
    const int32_t mask = (1 << g.bits) - 1;
    const float top = g.top;
    float xl[kLanes], xr[kLanes], l[kLanes], r[kLanes], ql[kLanes], qr[kLanes];
    uint16_t made[kLanes];
    for (size_t row = 0; row < rows; ++row, x += size, codes += size) {
        const float s = scale[row];
        for (size_t start = 0; start < size; start += 2 * kLanes) {
            const size_t pairs = std::min(kLanes, (size - start) / 2);
            const float* from = x + start;
            float tail[2 * kLanes] = {};
            if (pairs < kLanes) {
                std::copy(from, from + 2 * pairs, tail);
                from = tail;
            }
            for (size_t i = 0; i < kLanes; ++i) {
                xl[i] = from[2 * i];
                xr[i] = from[2 * i + 1];
            }
            for (size_t i = 0; i < kLanes; ++i) {
                l[i] = std::fabs(xl[i]) / s;
                r[i] = std::fabs(xr[i]) / s;
            }
            round_lanes<Flint, Left>(l, r, g, ql, qr);
            for (size_t i = 0; i < kLanes; ++i) {
                const int32_t nl = std::bit_cast<int32_t>(xl[i]) >> 31, nr = std::bit_cast<int32_t>(xr[i]) >> 31;
                const bool left = ql[i] > top, right = qr[i] > top;
                const int32_t cl = normal_code<Flint>(ql[i], nl, mask), cr = normal_code<Flint>(qr[i], nr, mask);
                const int32_t bl = outlier_code(ql[i], nl, g), br = outlier_code(qr[i], nr, g);
                const int32_t first = right ? identifier : left ? bl : cl, second = left ? identifier : right ? br : cr;
                made[i] = static_cast<uint16_t>((first & 0xff) | second << 8);
            }
            std::memcpy(codes + start, made, 2 * pairs);
        }
    }
}

Grid grid(int bits, int mantissa, int bias, float top, float last, bool flint, bool left) {
    const float first = std::ldexp(static_cast<float>((1 << mantissa) + 1), bias);
    return Grid{bits, mantissa, bias, top, first, last, (top + first) / 2, flint, left};
}

size_t row_size(size_t values, size_t rows) {
    if (rows == 0 || values % rows != 0 || values / rows % 2 != 0)
        throw std::invalid_argument("rows of an even number of values");
    return values / rows;
}

void search(Reals x, Doubles base, Doubles percents, int bits, int mantissa, int bias, float top, float last, bool flint,
            bool left, bool exhaustive, RealsOut found, DoublesOut error) {
    const size_t rows = base.shape(0), size = row_size(x.shape(0), rows);
    if (found.shape(0) != rows || (error.shape(0) != rows && error.shape(0) != 0) || percents.shape(0) == 0)
        throw std::invalid_argument("one scale per row, as many errors or none, and candidates");
    const Grid g = grid(bits, mantissa, bias, top, last, flint, left);
    nb::gil_scoped_release release;
    const auto run = flint ? (left ? &search_rows<true, true> : &search_rows<true, false>)
                           : (left ? &search_rows<false, true> : &search_rows<false, false>);
    run(x.data(), rows, size, base.data(), percents.data(), percents.shape(0), g, exhaustive, found.data(),
        error.shape(0) == rows ? error.data() : nullptr);
}

void reach(Reals x, double deviations, DoublesOut found) {
    const size_t rows = found.shape(0);
    if (rows == 0 || x.shape(0) % rows != 0) throw std::invalid_argument("whole rows");
    nb::gil_scoped_release release;
    reach_of_rows(x.data(), rows, x.shape(0) / rows, deviations, found.data());
}

void encode(Reals x, Reals scale, int bits, int mantissa, int bias, float top, float last, bool flint, bool left,
            int identifier, CodesOut codes) {
    const size_t rows = scale.shape(0), size = row_size(x.shape(0), rows);
    if (codes.shape(0) != x.shape(0)) throw std::invalid_argument("as many codes as values");
    const Grid g = grid(bits, mantissa, bias, top, last, flint, left);
    nb::gil_scoped_release release;
    const auto run = flint ? (left ? &encode_rows<true, true> : &encode_rows<true, false>)
                           : (left ? &encode_rows<false, true> : &encode_rows<false, false>);
    run(x.data(), scale.data(), rows, size, g, identifier, codes.data());
}

BITWRIGHT_CLONES
size_t decode_rows(const uint8_t* codes, const float* scale, size_t rows, size_t size, const float* normal,
                   const float* outlier, uint8_t identifier, float* x) {
    size_t illegal = 0;
    for (size_t row = 0; row < rows; ++row, x += size, codes += size) {
        const float s = scale[row];
        for (size_t i = 0; i < size; i += 2) {
            const uint8_t a = codes[i], b = codes[i + 1];
            const bool va = a == identifier, vb = b == identifier;
            illegal += va & vb;
            x[i] = (va ? 0.0f : vb ? outlier[a] : normal[a]) * s;
            x[i + 1] = (vb ? 0.0f : va ? outlier[b] : normal[b]) * s;
        }
    }
    return illegal;
}

// Values times scales; the number of pairs that hold two victims.
size_t decode(Codes codes, Reals scale, Reals normal, Reals outlier, int identifier, RealsOut x) {
    const size_t rows = scale.shape(0), size = row_size(codes.shape(0), rows);
    if (codes.shape(0) != x.shape(0) || normal.shape(0) != 256 || outlier.shape(0) != 256)
        throw std::invalid_argument("as many values as codes, and tables of 256 values");
    nb::gil_scoped_release release;
    return decode_rows(codes.data(), scale.data(), rows, size, normal.data(), outlier.data(),
                       static_cast<uint8_t>(identifier), x.data());
}

}  // namespace

void bind_outlier_victim(nb::module_& m) {
    m.def("outlier_victim_search", &search, nb::arg("x"), nb::arg("base"), nb::arg("percents"), nb::arg("bits"),
          nb::arg("mantissa"), nb::arg("bias"), nb::arg("top"), nb::arg("last"), nb::arg("flint"), nb::arg("left"),
          nb::arg("exhaustive"), nb::arg("found"), nb::arg("error"));
    m.def("outlier_victim_reach", &reach, nb::arg("x"), nb::arg("deviations"), nb::arg("found"));
    m.def("outlier_victim_encode", &encode, nb::arg("x"), nb::arg("scale"), nb::arg("bits"), nb::arg("mantissa"),
          nb::arg("bias"), nb::arg("top"), nb::arg("last"), nb::arg("flint"), nb::arg("left"), nb::arg("identifier"),
          nb::arg("codes"));
    m.def("outlier_victim_decode", &decode, nb::arg("codes"), nb::arg("scale"), nb::arg("normal"), nb::arg("outlier"),
          nb::arg("identifier"), nb::arg("x"));
}

}  // namespace bitwright

// The normalising tail for one instruction level; batch_norm.h describes the pieces of work.
#pragma once

#include "batch_norm.h"
#include "batch_norm_vectors.h"
#include "memory.h"
#include "vector.h"

namespace annnet::ANNNET_LEVEL {

namespace batch_norm {

// ---- how maps are walked ----

// Pixels that share constants; vectors that are added before their sum is widened.
constexpr int64_t kGroup = 4;

// Bytes ahead that channels are prefetched. Hardware does not foresee that the pixels of a group are read in turn, and
// without it summing took 2.6 times as long (512 channels). More than the rest of a pixel's channels goes on with the
// pixel kGroup further; that pixel's whole row ahead would evict itself where 8 KiB lie between pixels (2048 channels,
// gradient: 1.5 times as long).
constexpr int64_t kChannelBytesAhead = 1024;

ANNNET_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Calls body(line, first pixel of it, count) for the pieces of lines that a unit holds.
template <class Body>
ANNNET_INLINE void for_pieces(const BatchNormArgs& args, const BatchNormUnit& unit, Body body) {
  int64_t line = unit.first / args.length, start = unit.first % args.length;
  for (int64_t left = unit.last - unit.first; left > 0; ++line, start = 0) {
    const int64_t count = least(left, args.length - start);
    body(line, start, count);
    left -= count;
  }
}

// Tags of two versions of a loop body: for whole vectors of neighbours, and for all others.
struct Whole {};
struct Some {};

template <class T>
ANNNET_INLINE Vec<T> load_as(Whole, const T* source, int64_t, int64_t) {
  return load(source);
}
template <class T>
ANNNET_INLINE Vec<T> load_as(Some, const T* source, int64_t stride, int64_t count) {
  return load_lanes(source, stride, count);
}
template <class T>
ANNNET_INLINE void store_as(Whole, T* target, int64_t, Vec<T> value, int64_t) {
  store(target, value);
}
template <class T>
ANNNET_INLINE void store_as(Some, T* target, int64_t stride, Vec<T> value, int64_t count) {
  store_lanes(target, stride, value, count);
}

// Calls body(tag, offset) for the vectors that cover `count` lanes.
template <class T, class Body>
ANNNET_INLINE void for_lanes(bool together, int64_t count, Body body) {
  const int64_t whole = together ? count / kLanes<T> * kLanes<T> : 0;
  // One load instruction per map: unrolled, the gradient in NCHW took 1.2 times as long.
#pragma GCC unroll 1
  for (int64_t offset = 0; offset < whole; offset += kLanes<T>) body(Whole{}, offset);
  for (int64_t offset = whole; offset < count; offset += kLanes<T>) body(Some{}, offset);
}

// A map along a piece of a line.
template <class T>
struct Piece {
  ANNNET_INLINE Piece(const BatchNormMap& map, const BatchNormUnit& unit, int64_t line, int64_t pixel)
      : first(static_cast<T*>(map.data) + unit.image * map.batch + unit.channel * map.channel + line * map.line +
              pixel * map.step),
        step(map.step),
        channel(map.channel) {}
  ANNNET_INLINE T* at(int64_t pixel, int64_t c) const { return first + pixel * step + c * channel; }
  ANNNET_INLINE void prefetch_channels(int64_t pixel, int64_t c, int64_t count) const {
    constexpr int64_t kChannelsAhead = kChannelBytesAhead / sizeof(T);
    const int64_t next_pixel = kGroup * step - (c + count);
    __builtin_prefetch(at(pixel, c) + kChannelsAhead + (count > kChannelsAhead ? 0 : next_pixel));
  }
  T* first;
  int64_t step, channel;
};

// What an operation reads along a piece of a line.
template <class T, class Op>
struct Source {
  ANNNET_INLINE Source(const BatchNormArgs& args, const BatchNormUnit& unit, int64_t line, int64_t pixel)
      : y(args.y, unit, line, pixel), grad(Op::kReadsGrad ? args.grad : args.y, unit, line, pixel) {}
  template <class Tag>
  ANNNET_INLINE auto channels(Tag tag, const Op& op, int64_t pixel, int64_t c, int64_t count) const {
    y.prefetch_channels(pixel, c, count);
    if constexpr (Op::kReadsGrad) grad.prefetch_channels(pixel, c, count);
    return apply(tag, op, pixel, c, y.channel, grad.channel, count);
  }
  template <class Tag>
  ANNNET_INLINE auto pixels(Tag tag, const Op& op, int64_t pixel, int64_t count) const {
    prefetch(y.at(pixel, 0));
    if constexpr (Op::kReadsGrad) prefetch(grad.at(pixel, 0));
    return apply(tag, op, pixel, 0, y.step, grad.step, count);
  }
  template <class Tag>
  ANNNET_INLINE auto apply(Tag tag, const Op& op, int64_t pixel, int64_t c, int64_t y_stride, int64_t grad_stride,
                           int64_t count) const {
    Vec<T> g = {};
    if constexpr (Op::kReadsGrad) g = load_as(tag, grad.at(pixel, c), grad_stride, count);
    return op(load_as(tag, y.at(pixel, c), y_stride, count), g);
  }
  Piece<const T> y, grad;
};

template <class T, class Op>
void map_channels(const BatchNormArgs& args, BatchNormUnit unit) {
  for_pieces(args, unit, [&](int64_t line, int64_t start, int64_t pixels) {
    const Source<T, Op> source(args, unit, line, start);
    const Piece<T> out(args.out, unit, line, start);
    const bool together = source.y.channel == 1 && source.grad.channel == 1 && out.channel == 1;
    for (int64_t group = 0; group < pixels; group += kGroup) {
      const int64_t end = least(group + kGroup, pixels);
      for_lanes<T>(together, unit.channels, [&](auto tag, int64_t c) {
        const int64_t count = unit.channels - c;
        const Op op(Constants<T, kChannels>{args, unit.image, unit.channel + c, count});
        for (int64_t pixel = group; pixel < end; ++pixel)
          store_as(tag, out.at(pixel, c), out.channel, source.channels(tag, op, pixel, c, count), count);
      });
    }
  });
}

template <class T, class Op>
void map_pixels(const BatchNormArgs& args, BatchNormUnit unit) {
  const Op op(Constants<T, kPixels>{args, unit.image, unit.channel, 1});
  for_pieces(args, unit, [&](int64_t line, int64_t start, int64_t pixels) {
    const Source<T, Op> source(args, unit, line, start);
    const Piece<T> out(args.out, unit, line, start);
    const bool together = source.y.step == 1 && source.grad.step == 1 && out.step == 1;
    for_lanes<T>(together, pixels, [&](auto tag, int64_t pixel) {
      const int64_t count = pixels - pixel;
      prefetch_to_write(out.at(pixel, 0));
      store_as(tag, out.at(pixel, 0), out.step, source.pixels(tag, op, pixel, count), count);
    });
  });
}

// The first `count` lanes, zero beyond.
template <class T>
ANNNET_INLINE Vec<T> first_lanes(Vec<T> value, int64_t count) {
  if (count >= kLanes<T>) return value;
  Acc<T> elements[kLanes<T>];
  store(elements, value);
  return load_first(elements, count);
}

ANNNET_INLINE void widen(DoubleVector value, DoubleVector* parts) { parts[0] = value; }
ANNNET_INLINE void widen(FloatVector value, DoubleVector* parts) {
  using HalfVector = float __attribute__((vector_size(kVectorBytes / 2)));
  HalfVector halves[2];
  memcpy(halves, &value, sizeof value);
  parts[0] = __builtin_convertvector(halves[0], DoubleVector);
  parts[1] = __builtin_convertvector(halves[1], DoubleVector);
}

// Lane by lane two sums of groups of terms, in double precision whatever the dtype: in float32 the mean of 2 × 17 × 24
// random values, itself near zero, was off by 2.3e-7.
template <class T>
struct WideSums {
  static constexpr int kParts = sizeof(double) / sizeof(Acc<T>);
  ANNNET_INLINE void operator+=(const Pair<T>& term) {
    DoubleVector parts[2][kParts];
    widen(term.first, parts[0]);
    widen(term.second, parts[1]);
    for (int i = 0; i < kParts; ++i) {
      first[i] += parts[0][i];
      second[i] += parts[1][i];
    }
  }
  // Adds the first `count` lanes to sums in memory.
  ANNNET_INLINE void add_to(double* first_sums, double* second_sums, int64_t count) const {
    for (int i = 0; i < kParts && i * kLanes<double> < count; ++i) {
      const int64_t lane = i * kLanes<double>;
      add(first_sums + lane, first[i], count - lane);
      add(second_sums + lane, second[i], count - lane);
    }
  }
  ANNNET_INLINE static void add(double* sums, DoubleVector value, int64_t count) {
    store_lanes(sums, 1, load_lanes(sums, 1, count) + value, count);
  }
  DoubleVector first[kParts] = {}, second[kParts] = {};
};

template <class T, class Op>
void sum_channels(const BatchNormArgs& args, BatchNormUnit unit, double* sums) {
  double* first = sums + unit.channel;
  double* second = first + args.channels;
  memset(first, 0, static_cast<size_t>(unit.channels) * sizeof(double));
  memset(second, 0, static_cast<size_t>(unit.channels) * sizeof(double));
  for_pieces(args, unit, [&](int64_t line, int64_t start, int64_t pixels) {
    const Source<T, Op> source(args, unit, line, start);
    const bool together = source.y.channel == 1 && source.grad.channel == 1;
    for (int64_t group = 0; group < pixels; group += kGroup) {
      const int64_t end = least(group + kGroup, pixels);
      for_lanes<T>(together, unit.channels, [&](auto tag, int64_t c) {
        const int64_t count = unit.channels - c;
        const Op op(Constants<T, kChannels>{args, unit.image, unit.channel + c, count});
        Pair<T> sum = {};
        for (int64_t pixel = group; pixel < end; ++pixel) sum += source.channels(tag, op, pixel, c, count);
        WideSums<T> wide;
        wide += sum;
        wide.add_to(first + c, second + c, count);
      });
    }
  });
}

template <class T, class Op>
void sum_pixels(const BatchNormArgs& args, BatchNormUnit unit, double* sums) {
  const Op op(Constants<T, kPixels>{args, unit.image, unit.channel, 1});
  WideSums<T> total;
  for_pieces(args, unit, [&](int64_t line, int64_t start, int64_t pixels) {
    const Source<T, Op> source(args, unit, line, start);
    const bool together = source.y.step == 1 && source.grad.step == 1;
    for (int64_t group = 0; group < pixels; group += kGroup * kLanes<T>) {
      Pair<T> sum = {};
      for_lanes<T>(together, least(kGroup * kLanes<T>, pixels - group), [&](auto tag, int64_t offset) {
        const int64_t count = pixels - group - offset;
        const Pair<T> term = source.pixels(tag, op, group + offset, count);
        sum += {first_lanes<T>(term.first, count), first_lanes<T>(term.second, count)};
      });
      total += sum;
    }
  });
  double* target = sums + unit.channel;
  target[0] = target[args.channels] = 0;
  for (int i = 0; i < WideSums<T>::kParts; ++i) {
    target[0] += sum_lanes(total.first[i]);
    target[args.channels] += sum_lanes(total.second[i]);
  }
}

template <Lanes kLanesAre, class T, class Op>
void map(const BatchNormArgs& args, BatchNormUnit unit) {
  if constexpr (kLanesAre == kChannels)
    map_channels<T, Op>(args, unit);
  else
    map_pixels<T, Op>(args, unit);
}

template <Lanes kLanesAre, class T, class Op>
void sum(const BatchNormArgs& args, BatchNormUnit unit, double* sums) {
  if constexpr (kLanesAre == kChannels)
    sum_channels<T, Op>(args, unit, sums);
  else
    sum_pixels<T, Op>(args, unit, sums);
}

// A value near the mean of the k values behind the sums, 0 if that is not finite (an infinite shift would turn an
// infinite mean into NaN). Bits far below the values are cut off: y − K would lose them for each y of a binade alike,
// an error that does not average out (mean of 2 × 17 × 24 random values: off by 1.6e-7).
template <class A>
A shift_from(double sum, double squares, int64_t k) {
  constexpr double kRound = 0x1p41;  // leaves multiples of about 2^-11 of the root mean square
  const double mean = sum / static_cast<double>(k), root = sqrt(squares / static_cast<double>(k)) * kRound;
  const double shift = mean + root - root;
  return shift - shift == 0 ? static_cast<A>(shift) : 0;
}

// The shift K is about the mean of the first k of n values. Since n (mean − K)² ≤ n / k · Σ (y − mean)², subtracting
// it afterwards never loses more than log2(1 + n / k) bits, however far the values lie from zero.
template <Lanes kLanesAre, class T>
void moments(const BatchNormArgs& args, BatchNormUnit unit, void* shift, double* sums) {
  constexpr int64_t kPilot = kLanesAre == kChannels ? 16 : 256;
  BatchNormUnit pilot = unit;
  pilot.last = least(unit.last, unit.first + kPilot);
  sum<kLanesAre, T, Total<T>>(args, pilot, sums);
  for (int64_t c = unit.channel; c < unit.channel + unit.channels; ++c)
    static_cast<Acc<T>*>(shift)[c] = shift_from<Acc<T>>(sums[c], sums[args.channels + c], pilot.last - pilot.first);
  BatchNormArgs shifted = args;
  shifted.shift = shift;
  sum<kLanesAre, T, Moments<T>>(shifted, unit, sums);
}

template <class T, bool kRelu>
using CentredInput = Input<T, kRelu, true>;
template <class T, bool kRelu>
using FrozenInput = Input<T, kRelu, false>;

// [dtype], and [relu][lanes][dtype]
#define ANNNET_ROW(walk, op, lanes, relu)                                      \
  {walk<lanes, float, op<float, relu>>, walk<lanes, double, op<double, relu>>, \
   walk<lanes, BFloat16, op<BFloat16, relu>>, walk<lanes, Float16, op<Float16, relu>>}
#define ANNNET_PLANE(walk, op, relu) {ANNNET_ROW(walk, op, kPixels, relu), ANNNET_ROW(walk, op, kChannels, relu)}
#define ANNNET_TABLE(walk, op) {ANNNET_PLANE(walk, op, false), ANNNET_PLANE(walk, op, true)}
#define ANNNET_MOMENTS(lanes) \
  {moments<lanes, float>, moments<lanes, double>, moments<lanes, BFloat16>, moments<lanes, Float16>}

constexpr BatchNormKernels table = {
    .moments = {ANNNET_MOMENTS(kPixels), ANNNET_MOMENTS(kChannels)},
    .apply = ANNNET_TABLE(map, Apply),
    .sums = ANNNET_TABLE(sum, Sums),
    .input = {ANNNET_TABLE(map, FrozenInput), ANNNET_TABLE(map, CentredInput)},
};

}  // namespace batch_norm

}  // namespace annnet::ANNNET_LEVEL

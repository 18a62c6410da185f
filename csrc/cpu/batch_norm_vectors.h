// What batch norm does with a vector, for one instruction level: each is made once per vector of channels, from vectors
// of constants.
#pragma once

#include "batch_norm.h"
#include "memory.h"
#include "norm.h"
#include "vector.h"

namespace annnet::ANNNET_LEVEL {

namespace batch_norm {

// Reads constants for the lanes: of `count` channels from `channel` on, or of one channel.
template <class T, Lanes kLanesAre>
struct Constants {
  const BatchNormArgs& args;
  int64_t image, channel, count;

  ANNNET_INLINE Vec<T> operator()(const void* vector) const {
    const Acc<T>* source = static_cast<const Acc<T>*>(vector) + channel;
    return kLanesAre == kChannels ? load_lanes(source, 1, count) : broadcast<T>(*source);
  }
  // A row of a table whose rows have all channels.
  ANNNET_INLINE Vec<T> row(const void* table, int64_t index) const {
    return (*this)(static_cast<const Acc<T>*>(table) + index * args.channels);
  }
  ANNNET_INLINE Vec<T> factor() const {
    if (args.channel_scale == nullptr) return broadcast<T>(1);
    return (*this)(static_cast<const Acc<T>*>(args.channel_scale) + image * args.channels);
  }
};

template <class T>
struct Pair {
  ANNNET_INLINE void operator+=(const Pair& other) {
    first += other.first;
    second += other.second;
  }
  Vec<T> first, second;
};

template <class T>
struct Total {
  static constexpr bool kReadsGrad = false;
  template <class C>
  ANNNET_INLINE explicit Total(const C&) {}
  ANNNET_INLINE Pair<T> operator()(Vec<T> y, Vec<T>) const { return {y, y * y}; }
};

template <class T>
struct Moments {
  static constexpr bool kReadsGrad = false;
  template <class C>
  ANNNET_INLINE explicit Moments(const C& constants) : shift(constants(constants.args.shift)) {}
  ANNNET_INLINE Pair<T> operator()(Vec<T> y, Vec<T>) const {
    const Vec<T> shifted = y - shift;
    return {shifted, shifted * shifted};
  }
  Vec<T> shift;
};

template <class T, bool kRelu>
struct Apply {
  static constexpr bool kReadsGrad = false;
  template <class C>
  ANNNET_INLINE explicit Apply(const C& constants)
      : mean(constants.row(constants.args.norm, 0)),
        scale(constants.row(constants.args.norm, 1) * constants.row(constants.args.norm, 2)),
        bias(constants.row(constants.args.norm, 3)),
        factor(constants.factor()) {}
  ANNNET_INLINE Vec<T> operator()(Vec<T> y, Vec<T>) const {
    Vec<T> z = (y - mean) * scale + bias;
    if constexpr (kRelu) z = relu(z);
    return z * factor;
  }
  Vec<T> mean, scale, bias, factor;
};

// Σ g and Σ g·(y − mean), where g is the gradient with respect to z.
template <class T, bool kRelu>
struct Sums {
  static constexpr bool kReadsGrad = true;
  template <class C>
  ANNNET_INLINE explicit Sums(const C& constants) : forward(constants) {}
  ANNNET_INLINE Pair<T> operator()(Vec<T> y, Vec<T> grad) const {
    const Vec<T> centred = y - forward.mean;
    Vec<T> g = grad * forward.factor;
    if constexpr (kRelu) g = through_relu(centred * forward.scale + forward.bias, g);
    return {g, g * centred};
  }
  Apply<T, kRelu> forward;
};

template <class T, bool kRelu, bool kCentred>
struct Input {
  static constexpr bool kReadsGrad = true;
  template <class C>
  ANNNET_INLINE explicit Input(const C& constants) : sums(constants), offset{}, slope{} {
    if constexpr (kCentred) {
      offset = constants.row(constants.args.mean_sums, 0);
      slope = constants.row(constants.args.mean_sums, 1) * constants.row(constants.args.norm, 1);
    }
  }
  ANNNET_INLINE Vec<T> operator()(Vec<T> y, Vec<T> grad) const {
    Vec<T> g = sums(y, grad).first;
    if constexpr (kCentred) g = g - offset - (y - sums.forward.mean) * slope;
    return g * sums.forward.scale;
  }
  Sums<T, kRelu> sums;
  Vec<T> offset, slope;
};

}  // namespace batch_norm

}  // namespace annnet::ANNNET_LEVEL

// What is done to a vector of a map when it is loaded: nothing, or batch norm and ReLU from a norm's table.
#pragma once

#include "pyramid_pool.h"
#include "vector.h"

namespace annnet::ANNNET_LEVEL {

// NaN stays.
template <class V>
ANNNET_INLINE V relu(V z) {
  return z <= 0 ? V{} : z;
}

// The gradient of what lies ahead of a ReLU, from that of what lies behind it.
template <class V>
ANNNET_INLINE V through_relu(V z, V grad) {
  return z <= 0 ? V{} : grad;
}

template <class T>
struct Plain {
  ANNNET_INLINE static Plain of_channel(const NormTable&, int64_t) { return {}; }
  ANNNET_INLINE static Plain of_channels(const NormTable&, int64_t, int64_t) { return {}; }
  ANNNET_INLINE Vec<T> operator()(Vec<T> x) const { return x; }
};

// y − mean comes first: a single scale and shift would cancel where the mean is large.
template <class T>
struct BnRelu {
  Vec<T> mean, invstd, weight, bias;

  // One channel in all lanes.
  ANNNET_INLINE static BnRelu of_channel(const NormTable& norm, int64_t channel) {
    const Acc<T>* const first = static_cast<const Acc<T>*>(norm.data) + channel;
    const auto row = [&](int64_t index) { return broadcast<T>(first[index * norm.channels]); };
    return {row(0), row(1), row(2), row(3)};
  }

  // A channel per lane.
  ANNNET_INLINE static BnRelu of_channels(const NormTable& norm, int64_t channel, int64_t count) {
    const Acc<T>* const first = static_cast<const Acc<T>*>(norm.data) + channel;
    const auto row = [&](int64_t index) { return load_lanes(first + index * norm.channels, 1, count); };
    return {row(0), row(1), row(2), row(3)};
  }

  ANNNET_INLINE Vec<T> normal(Vec<T> y) const { return (y - mean) * invstd; }
  ANNNET_INLINE Vec<T> operator()(Vec<T> y) const { return relu(normal(y) * weight + bias); }
  ANNNET_INLINE Vec<T> gradient(Vec<T> y, Vec<T> grad) const { return through_relu(normal(y) * weight + bias, grad); }
};

}  // namespace annnet::ANNNET_LEVEL

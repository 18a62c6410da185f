// C[i][j] = Σ_k A[k][i] B[k][j]: the matrix product of every CPU attention step, from registers and the first cache.
//
// The rows of a tile are broadcast from A, its columns are vectors of B. B is k-major, A either: an A that lies by row
// (k adjacent) is as fast, since single elements are read. An operand of bfloat16 holds two consecutive k in each
// 32-bit element where the processor has the dot product of such pairs, and is widened to float32 elsewhere.
#pragma once

#include "ahead.h"
#include "vector.h"

namespace annnet::ANNNET_LEVEL {

// How elements of type T are held in an operand: one k per element, as the accumulator type.
template <class T>
struct Operand {
  using Element = Acc<T>;
  static constexpr int kStep = 1;
};

template <class T>
using Element = typename Operand<T>::Element;

// The arithmetic of elements E of operands. The tiles are compiled per E, so that all types whose operands are float
// share them.
template <class E>
struct Arithmetic {
  using Sum = E;
  static constexpr int kStep = 1;
  static ANNNET_INLINE Vec<E> multiply_add(E a, const E* b, Vec<E> sum) { return broadcast<E>(a) * load(b) + sum; }
};

#ifdef ANNNET_BF16_DOT
template <>
struct Operand<BFloat16> {
  using Element = uint32_t;  // k in the low half, k + 1 in the high half
  static constexpr int kStep = 2;
};

template <>
struct Arithmetic<uint32_t> {
  using Sum = float;
  static constexpr int kStep = 2;
  static ANNNET_INLINE FloatVector multiply_add(uint32_t a, const uint32_t* b, FloatVector sum) {
    const __m512i pairs = _mm512_set1_epi32(static_cast<int>(a));
    return _mm512_dpbf16_ps(sum, bit_cast<__m512bh>(pairs), bit_cast<__m512bh>(_mm512_loadu_si512(b)));
  }
};
#endif

template <class E>
using Sum = typename Arithmetic<E>::Sum;

// The tile fills the registers: 24 accumulators of 32 registers with AVX-512, 12 or 8 of 16 below. The last tile of a
// column may have fewer rows: 110 tokens are 13 tiles of 8 and one of 6.
constexpr int kTileRows = kVectorBytes == 64 ? 8 : 4;
constexpr int kLastRows = kTileRows - 2;
constexpr int kTileVectors = kVectorBytes >= 32 ? 3 : 2;

// Elements from one k to the next: an odd number of cache lines, so that a column of an operand spreads over the sets
// of the cache, and at least as many as whole tiles need.
template <class T>
constexpr int64_t leading_dimension(int64_t columns) {
  constexpr int64_t kLine = 64 / sizeof(Acc<T>);
  return ((columns + kLine - 1) / kLine | 1) * kLine;
}

// The vectors that `count` elements fill.
template <class T>
constexpr int64_t vectors_of(int64_t count) {
  return (count + kLanes<T> - 1) / kLanes<T>;
}

inline int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// The two layouts of A: the rows of one k are adjacent, or the k of one row.
template <class E>
struct ByDepth {
  const E* data;
  int64_t stride;
  ANNNET_INLINE ByDepth at_row(int64_t row) const { return {data + row, stride}; }
  ANNNET_INLINE E operator[](int i) const { return data[i]; }
  ANNNET_INLINE void next() { data += stride; }
};
template <class E>
struct ByRow {
  const E* data;
  int64_t stride;
  ANNNET_INLINE ByRow at_row(int64_t row) const { return {data + row * stride, stride}; }
  ANNNET_INLINE E operator[](int i) const { return data[i * stride]; }
  ANNNET_INLINE void next() { ++data; }
};

// A sum of more than kRun terms is made of runs of at most so many: one run of 1024 terms would have twice the error.
constexpr int64_t kRun = 128;

// One tile of C, at `row` and `column`; `a` and `b` begin there.
template <int kRows, int kVectors, class E, class A, class Sink>
ANNNET_INLINE void tile(int64_t depth, A a, const E* b, int64_t ldb, Sink& sink, int64_t row, int64_t column,
                        ReadAhead& ahead) {
  constexpr int kWidth = kLanes<Sum<E>>;
  Vec<Sum<E>> sum[kRows][kVectors] = {}, total[kRows][kVectors];
  ReadAhead next = ahead;
  for (int64_t begin = 0;;) {
    const int64_t end = minimum(begin + kRun, depth);
    for (int64_t k = begin; k < end; k += Arithmetic<E>::kStep, a.next(), b += ldb) {
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) sum[i][j] = Arithmetic<E>::multiply_add(a[i], b + j * kWidth, sum[i][j]);
      next.advance();
      sink.expect();
    }
    if (depth <= kRun) break;
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) {
        total[i][j] = begin == 0 ? sum[i][j] : total[i][j] + sum[i][j];
        sum[i][j] = end == depth ? total[i][j] : Vec<Sum<E>>{};
      }
    if (end == depth) break;
    begin = end;
  }
  ahead = next;
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) sink(row + i, column + j * kWidth, sum[i][j]);
}

// The tiles of kVectors vectors from `column` on.
template <int kVectors, class E, class A, class Sink>
ANNNET_INLINE void column_of_tiles(int64_t rows, int64_t depth, const A& a, const E* b, int64_t ldb, Sink& sink,
                                   int64_t column, ReadAhead& ahead) {
  sink.begin(column, kVectors * kLanes<Sum<E>>);
  b += column;
  int64_t row = 0;
  for (; rows - row > kLastRows; row += kTileRows)
    tile<kTileRows, kVectors>(depth, a.at_row(row), b, ldb, sink, row, column, ahead);
  if (row < rows) tile<kLastRows, kVectors>(depth, a.at_row(row), b, ldb, sink, row, column, ahead);
}

// Hands every vector of C to sink(row, column, vector). Rows come in tiles and columns in whole vectors, so the sink
// also gets what lies beyond `rows` and `columns`: values without meaning. At every step `ahead` asks for memory, and
// so may the sink in expect(), for the columns named in begin(): all their rows come before the next. The sink is
// copied: kept where the caller has it, its members would be read anew at every vector, which took 3 % of the
// attention's time.
template <class E, class A, class Sink>
inline void multiply(int64_t rows, int64_t columns, int64_t depth, const A& a, const E* b, int64_t ldb,
                     const Sink& into, ReadAhead& ahead) {
  Sink sink = into;
  int64_t vectors = vectors_of<Sum<E>>(columns), column = 0;
  while (vectors > 0) {
    // Four are two and two: a tile of one vector has too few sums to keep the multipliers busy.
    const int64_t wide = vectors == kTileVectors + 1 ? minimum(2, kTileVectors) : minimum(vectors, kTileVectors);
    if (wide == kTileVectors)
      column_of_tiles<kTileVectors>(rows, depth, a, b, ldb, sink, column, ahead);
    else if (wide == 2)
      column_of_tiles<2>(rows, depth, a, b, ldb, sink, column, ahead);
    else
      column_of_tiles<1>(rows, depth, a, b, ldb, sink, column, ahead);
    vectors -= wide;
    column += wide * kLanes<Sum<E>>;
  }
}

// Sink: a buffer of whole tiles, overwritten or added to.
template <class A>
struct ToBuffer {
  A* target;
  int64_t stride;
  bool add;
  ANNNET_INLINE void begin(int64_t, int64_t) const {}
  ANNNET_INLINE void expect() const {}
  ANNNET_INLINE void operator()(int64_t row, int64_t column, Vec<A> value) const {
    A* place = target + row * stride + column;
    store(place, add ? load(place) + value : value);
  }
};

}  // namespace annnet::ANNNET_LEVEL

// Arguments and table of the pooling kernels. Plain C types only: see levels.h.
//
// An axis is cut at every edge of every bin of every level, into about 30 segments for the usual pyramid. A pixel lies
// in one cell (row segment × column segment) and is added once; a bin is a run of segments, so no sum is ever made by
// subtraction. All pixels of a cell have the same gradient.
//
// In the kernels the lanes of a vector are channels: `block` channels of one image are a unit, and a row segment of a
// unit is the smallest piece of work. What a piece leaves behind does not depend on who computes it or when, so
// results are bitwise the same for any number of threads.
#pragma once

#include <stdint.h>

#include "dtypes.h"

namespace annnet {

struct PoolAxis {
  int64_t segments;
  const int64_t* segment_start;  // (segments + 1): segment s holds the pixels segment_start[s] … segment_start[s+1] - 1
  const int64_t* segment_of;     // (pixels + 15): segment that holds a pixel; the last one's is repeated
  int64_t bins;                  // of all levels, one level after another
  const int64_t* bin_first;      // (bins): bin k holds the segments bin_first[k] … bin_last[k] - 1
  const int64_t* bin_last;
  const int64_t* bin_length;    // (bins): in pixels
  const int64_t* holder_start;  // (segments + 1): holders[holder_start[s] … holder_start[s+1] - 1] hold segment s
  const int64_t* holders;
};

// Token `token + i · row_stride + j · column_stride` is bin (i, j) of the level.
struct PoolLevel {
  int64_t rows, first_row_bin;
  int64_t columns, first_column_bin;
  int64_t token, row_stride, column_stride;
};

// Strides are in elements.
struct PoolMap {
  void* data;
  int64_t batch, channel, row, column;
};

struct PoolTokens {
  void* data;
  int64_t batch, channel, token;
};

// Mean, invstd, weight and bias, a row of accumulators each: (y − mean) · invstd · weight + bias. Null: none.
struct NormTable {
  const void* data;
  int64_t channels;
};

struct PoolArgs {
  PoolAxis rows, columns;
  const PoolLevel* levels;
  const int64_t* row_bin_level;  // (rows.bins): the level of a row bin
  int64_t channels, block;       // block is a multiple of 16
  PoolMap map;
  PoolTokens tokens;
  NormTable norm;  // for the kernels that normalise and rectify on load
  bool adds;       // the gradient is added to what the map holds
};

// One unit: channels channel … channel + count - 1 of an image, count ≤ block.
struct PoolUnit {
  int64_t image, channel, count;
};

struct PyramidPoolKernels {
  // Sums the row segments first … last - 1 of a unit into `bins`, columns.bins × block accumulators per row segment.
  using Sum = void (*)(const PoolArgs&, PoolUnit, int64_t first, int64_t last, void* bins, void* scratch);
  // Makes the tokens of the row bins first … last - 1 of a unit from the bins of all its row segments.
  using Finish = void (*)(const PoolArgs&, PoolUnit, int64_t first, int64_t last, const void* bins);
  // Writes or adds the gradient of the row segments first … last - 1 of a unit.
  using Spread = void (*)(const PoolArgs&, PoolUnit, int64_t first, int64_t last, void* scratch);

  Sum sum_rows[kDtypes];      // any map; fast if map.column is 1
  Sum sum_channels[kDtypes];  // map.channel is 1
  Sum sum_rows_bn_relu[kDtypes];
  Sum sum_channels_bn_relu[kDtypes];
  Finish finish[kDtypes];
  Spread spread_rows[kDtypes];      // map.column is 1
  Spread spread_channels[kDtypes];  // map.channel is 1

  // Bytes of scratch that a thread must bring, beside (columns.bins + columns.segments) × block accumulators.
  int64_t scratch_bytes;
};

}  // namespace annnet

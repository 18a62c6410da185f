// Arguments and table of the attention kernels. Plain C types only: see levels.h.
//
// B images, N = H·W pixels, T tokens, Ck and Cv channels of keys and values.
#pragma once

#include <stdint.h>

#include "dtypes.h"
#include "pyramid_pool.h"

namespace annnet {

struct AttentionSizes {
  int64_t batch, pixels, width, tokens, key_channels, value_channels;
};

// How a call is cut into parallel pieces and what memory they need. A function of the sizes alone, so that a result
// does not depend on the number of threads.
struct AttentionPlan {
  int64_t blocks;        // blocks of pixels of an image, the pieces of the forward
  int64_t splits;        // runs of blocks, the pieces of the backward, each with sums of its own for dkey and dvalue
  int64_t token_blocks;  // pieces of an image's tokens when they are packed
  int64_t key_groups, value_groups;  // pieces of an image's dkey and dvalue when the splits' sums are added up
  int64_t packed_bytes;              // keys and values of one image, packed
  int64_t scratch_bytes;             // one thread's blocks
  int64_t sums_bytes;                // one split's sums
};

struct Attention {
  AttentionSizes sizes;
  AttentionPlan plan;
  double scale;
  PoolMap query;
  NormTable norm;  // if its data is not null, the query is relu of the map's normalised values
  PoolTokens key, value;
  bool channels_last;  // out and dquery, which are dense, and the order of the products
  char* packed;        // plan.packed_bytes per image

  // Forward
  void* out;             // (B, Cv, H, W)
  PoolMap skip;          // as out, in any strides; its data may be null
  const void* constant;  // (Cv) accumulators, or null
  void* logsumexp;       // (B, N), float32 or float64

  // Backward
  PoolMap grad_out;
  bool needs_query, needs_key, needs_value;
  void *dquery, *dkey, *dvalue;  // dkey and dvalue: dense (B, T, C)
  char* sums;                    // plan.sums_bytes per image and split
};

struct AsymmetricAttentionKernels {
  struct OfDtype {
    AttentionPlan (*plan)(const AttentionSizes&, bool backward);
    // Packs keys and values: the blocks of tokens from `begin` to `end` of all images'.
    void (*pack)(const Attention&, bool backward, int64_t begin, int64_t end);
    // The blocks of pixels from `begin` to `end` of all images'; `scratch` is this thread's.
    void (*forward)(const Attention&, char* scratch, int64_t begin, int64_t end);
    // The splits from `begin` to `end` of all images'.
    void (*backward)(const Attention&, char* scratch, int64_t begin, int64_t end);
    // dkey and dvalue from the splits' sums: the groups from `begin` to `end` of all images', of those that are
    // needed.
    void (*reduce)(const Attention&, int64_t begin, int64_t end);
  } of_dtype[kDtypes];
};

}  // namespace annnet

// annnet_native::asymmetric_attention and its backward on the CPU: checks and threads.
#include "asymmetric_attention.h"

#include <torch/library.h>

#include <array>
#include <optional>

#include "../checks.h"
#include "batch_norm_moments.h"
#include "levels.h"
#include "pool_problem.h"

namespace annnet {

namespace {

constexpr int64_t kReducedGroups = 4;  // groups of channels whose sums are worth a thread

void check_operands(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value) {
  ANNNET_CHECK_RANK(query, 4);
  ANNNET_CHECK_RANK(key, 3);
  ANNNET_CHECK_SHAPE(key, query.size(0), query.size(1), key.size(2));
  ANNNET_CHECK_RANK(value, 3);
  ANNNET_CHECK_SHAPE(value, query.size(0), value.size(1), key.size(2));
  ANNNET_CHECK_SAME_KIND(key, query);
  ANNNET_CHECK_SAME_KIND(value, query);
  TORCH_CHECK_VALUE(key.size(1) > 0 && key.size(2) > 0 && value.size(1) > 0,
                    "key, value: expected at least one channel and one token, got shapes ", key.sizes(), " and ",
                    value.sizes());
}

// Whether a map that is written is channels_last; it must be that, or NCHW, without gaps.
bool written_channels_last(const at::Tensor& x, const char* name) {
  if (x.is_contiguous()) return false;
  TORCH_CHECK_VALUE(x.is_contiguous(at::MemoryFormat::ChannelsLast), name,
                    ": expected a dense NCHW or channels_last map, got strides ", x.strides());
  return true;
}

// Whether dquery, dense as the query, would be channels_last and not contiguous as well: the sums of the other
// gradients do not depend on whether it is asked for.
bool is_channels_last(const at::Tensor& query) {
  return query.stride(1) == 1 && query.stride(2) > 1 && query.stride(3) > 1 && query.size(1) > 1 &&
         query.size(2) * query.size(3) > 1;
}

void check_written_tokens(const at::Tensor& x, const at::Tensor& like, const char* name) {
  TORCH_CHECK_VALUE(x.sizes() == like.sizes() && x.transpose(1, 2).is_contiguous(), name,
                    ": expected token-major memory of shape ", like.sizes(), ", got shape ", x.sizes(), " and strides ",
                    x.strides());
  ANNNET_CHECK_SAME_KIND(x, like);
}

// One call, forward or backward: its arguments for the kernels, and the memory that they point to.
struct Call {
  Call(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, double scale,
       const std::optional<at::Tensor>& norm, bool backward)
      : kernel(kernels().asymmetric_attention.of_dtype[dtype_of(query, "query")]) {
    args.sizes = {.batch = query.size(0),
                  .pixels = query.size(2) * query.size(3),
                  .width = query.size(3),
                  .tokens = key.size(2),
                  .key_channels = key.size(1),
                  .value_channels = value.size(1)};
    args.plan = kernel.plan(args.sizes, backward);
    args.scale = scale;
    args.query = map_of(query, Lines::rows);
    if (norm) args.norm = norm_of(*norm, query);
    args.key = tokens_of(key);
    args.value = tokens_of(value);
    packed = scratch_memory(args.sizes.batch * args.plan.packed_bytes);
    args.packed = address(packed);
    at::parallel_for(0, args.sizes.batch * args.plan.token_blocks, 1,
                     [&](int64_t begin, int64_t end) { kernel.pack(args, backward, begin, end); });
  }

  // Runs `pieces` pieces of work, each thread with scratch memory of its own.
  template <class Work>
  void run(int64_t pieces, const Work& work) const {
    const at::Tensor scratch = scratch_memory(at::get_num_threads() * args.plan.scratch_bytes);
    at::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
      work(args, address(scratch, at::get_thread_num() * args.plan.scratch_bytes), begin, end);
    });
  }

  const AsymmetricAttentionKernels::OfDtype& kernel;
  Attention args = {};
  at::Tensor packed;
};

void asymmetric_attention(const at::Tensor& query, const std::optional<at::Tensor>& norm, const at::Tensor& key,
                          const at::Tensor& value, const std::optional<at::Tensor>& skip,
                          const std::optional<at::Tensor>& constant, double scale, bool statistics,
                          const at::Tensor& out, const at::Tensor& logsumexp, at::Tensor& moments) {
  check_operands(query, key, value);
  ANNNET_CHECK_SHAPE(out, query.size(0), value.size(1), query.size(2), query.size(3));
  ANNNET_CHECK_SAME_KIND(out, query);
  if (skip) {
    ANNNET_CHECK_SHAPE(*skip, query.size(0), value.size(1), query.size(2), query.size(3));
    ANNNET_CHECK_SAME_KIND(*skip, query);
  }
  if (constant) {
    ANNNET_CHECK_SHAPE(*constant, value.size(1));
    ANNNET_CHECK_DTYPE(*constant, accumulator_of(query));
    TORCH_CHECK_VALUE(constant->is_contiguous(), "constant: expected contiguous, got strides ", constant->strides());
  }
  ANNNET_CHECK_SHAPE(logsumexp, query.size(0), query.size(2) * query.size(3));
  ANNNET_CHECK_DTYPE(logsumexp, accumulator_of(query));
  TORCH_CHECK_VALUE(logsumexp.is_contiguous(), "logsumexp: expected contiguous, got strides ", logsumexp.strides());
  const bool channels_last = written_channels_last(out, "out");
  if (query.numel() == 0) {
    if (statistics) batch_norm_moments(out, moments);
    return;
  }

  Call call(query, key, value, scale, norm, false);
  call.args.channels_last = channels_last;
  call.args.out = out.mutable_data_ptr();
  if (skip) call.args.skip = map_of(*skip, Lines::rows);
  if (constant) call.args.constant = constant->const_data_ptr();
  call.args.logsumexp = logsumexp.mutable_data_ptr();
  call.run(call.args.sizes.batch * call.args.plan.blocks, call.kernel.forward);
  if (statistics) batch_norm_moments(out, moments);
}

// The probabilities are made again from queries and keys.
void asymmetric_attention_bwd(const at::Tensor& grad_out, const at::Tensor& query,
                              const std::optional<at::Tensor>& norm, const at::Tensor& key, const at::Tensor& value,
                              const at::Tensor& /*logsumexp*/, double scale, std::array<bool, 3> needs,
                              const at::Tensor& dquery, const at::Tensor& dkey, const at::Tensor& dvalue) {
  check_operands(query, key, value);
  ANNNET_CHECK_SHAPE(grad_out, query.size(0), value.size(1), query.size(2), query.size(3));
  ANNNET_CHECK_SAME_KIND(grad_out, query);
  if (needs[0]) {
    ANNNET_CHECK_SHAPE(dquery, query.size(0), query.size(1), query.size(2), query.size(3));
    ANNNET_CHECK_SAME_KIND(dquery, query);
  }
  if (needs[1]) check_written_tokens(dkey, key, "dkey");
  if (needs[2]) check_written_tokens(dvalue, value, "dvalue");
  const bool channels_last = needs[0] ? written_channels_last(dquery, "dquery") : is_channels_last(query);
  if (query.numel() == 0) {
    if (needs[1]) dkey.zero_();
    if (needs[2]) dvalue.zero_();
    return;
  }
  if (!(needs[0] || needs[1] || needs[2])) return;

  Call call(query, key, value, scale, norm, true);
  Attention& args = call.args;
  args.channels_last = channels_last;
  args.grad_out = map_of(grad_out, Lines::rows);
  args.needs_query = needs[0];
  args.needs_key = needs[1];
  args.needs_value = needs[2];
  args.dquery = dquery.mutable_data_ptr();
  args.dkey = dkey.mutable_data_ptr();
  args.dvalue = dvalue.mutable_data_ptr();
  const int64_t splits = args.sizes.batch * args.plan.splits;
  const at::Tensor sums = scratch_memory(splits * args.plan.sums_bytes);
  args.sums = address(sums);
  call.run(splits, call.kernel.backward);
  const int64_t groups = needs[1] * args.plan.key_groups + needs[2] * args.plan.value_groups;
  at::parallel_for(0, args.sizes.batch * groups, kReducedGroups,
                   [&](int64_t begin, int64_t end) { call.kernel.reduce(args, begin, end); });
}

}  // namespace

TORCH_LIBRARY_IMPL(annnet_native, CPU, m) {
  m.impl("asymmetric_attention", asymmetric_attention);
  m.impl("asymmetric_attention_bwd", asymmetric_attention_bwd);
}

}  // namespace annnet

#include "asymmetric_attention.h"

#include <ATen/ops/empty.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "../checks.h"
#include "levels.h"
#include "tensors.h"

namespace annnet {

namespace {

Map map_of(const at::Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.stride(3)}; }

Tokens tokens_of(const at::Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

at::Tensor workspace(int64_t bytes) { return at::empty({bytes}, at::kByte); }

char* memory_of(const at::Tensor& bytes) { return reinterpret_cast<char*>(bytes.data_ptr<uint8_t>()); }

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

void check_written_tokens(const at::Tensor& x, const at::Tensor& like, const char* name) {
  TORCH_CHECK_VALUE(x.sizes() == like.sizes() && x.transpose(1, 2).is_contiguous(), name,
                    ": expected token-major memory of shape ", like.sizes(), ", got shape ", x.sizes(), " and strides ",
                    x.strides());
  ANNNET_CHECK_SAME_KIND(x, like);
}

// The fields that the forward and the backward share, with the tokens packed into `packed`.
Attention prepare(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, double scale, bool backward,
                  const AsymmetricAttentionKernels::OfDtype& op, at::Tensor& packed) {
  Attention args = {};
  args.sizes = {.batch = query.size(0),
                .pixels = query.size(2) * query.size(3),
                .width = query.size(3),
                .tokens = key.size(2),
                .key_channels = key.size(1),
                .value_channels = value.size(1)};
  args.plan = op.plan(args.sizes, backward);
  args.scale = scale;
  args.query = map_of(query);
  args.key = tokens_of(key);
  args.value = tokens_of(value);
  packed = workspace(args.sizes.batch * args.plan.packed_bytes);
  args.packed = memory_of(packed);
  at::parallel_for(0, args.sizes.batch * args.plan.token_blocks, 1,
                   [&](int64_t begin, int64_t end) { op.pack(args, backward, begin, end); });
  return args;
}

// Runs `pieces` pieces of work, each thread with scratch memory of its own.
template <class Work>
void run(const AttentionPlan& plan, int64_t pieces, const Work& work) {
  const at::Tensor scratch = workspace(at::get_num_threads() * plan.scratch_bytes);
  at::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    work(memory_of(scratch) + at::get_thread_num() * plan.scratch_bytes, begin, end);
  });
}

void asymmetric_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, double scale,
                          const at::Tensor& out, const at::Tensor& logsumexp) {
  check_operands(query, key, value);
  ANNNET_CHECK_SHAPE(out, query.size(0), value.size(1), query.size(2), query.size(3));
  ANNNET_CHECK_SAME_KIND(out, query);
  ANNNET_CHECK_SHAPE(logsumexp, query.size(0), query.size(2) * query.size(3));
  ANNNET_CHECK_DTYPE(logsumexp, query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  TORCH_CHECK_VALUE(logsumexp.is_contiguous(), "logsumexp: expected contiguous, got strides ", logsumexp.strides());
  const bool channels_last = written_channels_last(out, "out");
  if (query.numel() == 0) return;

  const auto& op = kernels().asymmetric_attention.of_dtype[dtype_of(query, "query")];
  at::Tensor packed;
  Attention args = prepare(query, key, value, scale, false, op, packed);
  args.channels_last = channels_last;
  args.out = out.data_ptr();
  args.logsumexp = logsumexp.data_ptr();
  run(args.plan, args.sizes.batch * args.plan.blocks,
      [&](char* scratch, int64_t begin, int64_t end) { op.forward(args, scratch, begin, end); });
}

void asymmetric_attention_bwd(const at::Tensor& grad_out, const at::Tensor& query, const at::Tensor& key,
                              const at::Tensor& value, const at::Tensor& /*logsumexp: recomputed, exactly*/,
                              double scale, std::array<bool, 3> needs, const at::Tensor& dquery, const at::Tensor& dkey,
                              const at::Tensor& dvalue) {
  check_operands(query, key, value);
  ANNNET_CHECK_SHAPE(grad_out, query.size(0), value.size(1), query.size(2), query.size(3));
  ANNNET_CHECK_SAME_KIND(grad_out, query);
  if (needs[0]) {
    ANNNET_CHECK_SHAPE(dquery, query.size(0), query.size(1), query.size(2), query.size(3));
    ANNNET_CHECK_SAME_KIND(dquery, query);
  }
  if (needs[1]) check_written_tokens(dkey, key, "dkey");
  if (needs[2]) check_written_tokens(dvalue, value, "dvalue");
  const bool channels_last = needs[0] && written_channels_last(dquery, "dquery");
  if (query.numel() == 0) {
    if (needs[1]) dkey.zero_();
    if (needs[2]) dvalue.zero_();
    return;
  }
  if (!(needs[0] || needs[1] || needs[2])) return;

  const auto& op = kernels().asymmetric_attention.of_dtype[dtype_of(query, "query")];
  at::Tensor packed;
  Attention args = prepare(query, key, value, scale, true, op, packed);
  args.channels_last = channels_last;
  args.grad_out = map_of(grad_out);
  args.needs_query = needs[0];
  args.needs_key = needs[1];
  args.needs_value = needs[2];
  args.dquery = dquery.data_ptr();
  args.dkey = dkey.data_ptr();
  args.dvalue = dvalue.data_ptr();
  const int64_t splits = args.sizes.batch * args.plan.splits;
  const at::Tensor sums = workspace(splits * args.plan.sums_bytes);
  args.sums = memory_of(sums);
  run(args.plan, splits, [&](char* scratch, int64_t begin, int64_t end) { op.backward(args, scratch, begin, end); });
  if (needs[1] || needs[2])
    at::parallel_for(0, args.sizes.batch * args.sizes.tokens, 16,
                     [&](int64_t begin, int64_t end) { op.reduce(args, begin, end); });
}

}  // namespace

TORCH_LIBRARY_IMPL(annnet_native, CPU, m) {
  m.impl("asymmetric_attention", asymmetric_attention);
  m.impl("asymmetric_attention_bwd", asymmetric_attention_bwd);
}

}  // namespace annnet

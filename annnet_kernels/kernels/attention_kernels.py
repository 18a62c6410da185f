"""Triton: attention of the pixels of a map over pooled tokens, forward and backward.

B batch, N pixels, T tokens, Ck and Cv channels of the key and of the value. Up to 128 tokens are one block: logits are
made once and stay in registers. More are walked in blocks, and their logits are made once more per pass.

Backward: one kernel owns a block of pixels and writes dQ and, in the dtype of the operands, A and dS, (B, N, T rounded
up to 16); another multiplies them with the maps, in a fixed-order split over the pixels. Making A and dS there again
would cost every 128 channels of a token gradient all of Q and G, and one kernel that keeps both token gradients
spills. No kernel uses atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .operands import load_map, load_tokens, pixel_pointers, store_map

_SIZES = ["pixel_groups", "width"]  # not in the key of a compiled variant


@triton.jit
def _pixel_block(pixel_groups, PIXEL_MULTIPLE: tl.constexpr, BLOCK_PIXELS: tl.constexpr):
    """This program's image and first pixel, which of its pixels exist, and N.

    N comes in groups of ``PIXEL_MULTIPLE`` pixels, which tells the compiler that it is divisible.
    """
    n_pixels = pixel_groups * PIXEL_MULTIPLE
    blocks = tl.cdiv(n_pixels, BLOCK_PIXELS)
    first = (tl.program_id(0) % blocks) * BLOCK_PIXELS
    inside = first + tl.arange(0, BLOCK_PIXELS) < n_pixels
    return (tl.program_id(0) // blocks).to(tl.int64), first, inside, n_pixels


@triton.jit
def _scores(map, norm, pixels, inside, tokens, batch, first_token, chunk, BLOCK_TOKENS, PRECISION):
    """Products of pixels with tokens over all channels, (pixels, BLOCK_TOKENS) float32."""
    scores = tl.zeros((inside.shape[0], BLOCK_TOKENS), tl.float32)
    for first in range(0, map.channels, chunk.size):
        rows = load_map(map, norm, pixels, inside, first, chunk)
        columns = load_tokens(tokens, batch, first_token, first, chunk, BLOCK_TOKENS)
        scores = tl.dot(rows, tl.trans(columns), scores, input_precision=PRECISION)
    return scores


@triton.jit
def _logits(query, norm, pixels, inside, key, batch, first_token, scale, chunk, BLOCK_TOKENS, PRECISION):
    """scale · QKᵀ, −∞ beyond the last token."""
    scores = _scores(query, norm, pixels, inside, key, batch, first_token, chunk, BLOCK_TOKENS, PRECISION)
    exists = first_token + tl.arange(0, BLOCK_TOKENS) < key.count
    return tl.where(exists[None, :], scores * scale, -float("inf"))


@triton.jit(do_not_specialize=_SIZES)
def asymmetric_attention_fwd_kernel(
    query,
    norm,
    key,
    value,
    skip,
    constant_ptr,
    out,
    logsumexp_ptr,
    pixel_groups,
    width,
    scale,
    key_chunk,
    value_chunk,
    PIXEL_MULTIPLE: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out = softmax(scale · QKᵀ) V + skip + constant, and the logsumexp of the logits.

    Grid: (B · ⌈N / BLOCK_PIXELS⌉,). A program owns BLOCK_PIXELS pixels of one image, with all their value channels.
    query (B, Ck, H, W), norm (4, Ck), key (B, Ck, T), value (B, Cv, T), skip and out (B, Cv, H, W), constant (Cv),
    logsumexp (B, N).
    """
    batch, first_pixel, inside, n_pixels = _pixel_block(pixel_groups, PIXEL_MULTIPLE, BLOCK_PIXELS)
    query_pixels = pixel_pointers(query, batch, first_pixel, width, BLOCK_PIXELS)
    out_pixels = pixel_pointers(out, batch, first_pixel, width, BLOCK_PIXELS)

    if ONE_BLOCK:
        logits = _logits(query, norm, query_pixels, inside, key, batch, 0, scale, key_chunk, BLOCK_TOKENS, PRECISION)
        maximum = tl.max(logits, 1)
        weights = tl.exp(logits - maximum[:, None])
        total = tl.sum(weights, 1)
        attention = (weights * (1.0 / total)[:, None]).to(value.pointer.dtype.element_ty)
    else:
        maximum = tl.full((BLOCK_PIXELS,), -float("inf"), tl.float32)
        total = tl.zeros((BLOCK_PIXELS,), tl.float32)
        for first_token in range(0, key.count, BLOCK_TOKENS):
            logits = _logits(
                query, norm, query_pixels, inside, key, batch, first_token, scale, key_chunk, BLOCK_TOKENS, PRECISION
            )
            larger = tl.maximum(maximum, tl.max(logits, 1))
            total = total * tl.exp(maximum - larger) + tl.sum(tl.exp(logits - larger[:, None]), 1)
            maximum = larger

    rows = first_pixel + tl.arange(0, BLOCK_PIXELS)
    tl.store(logsumexp_ptr + batch * n_pixels + rows, maximum + tl.log(total), mask=inside)

    # With stages of its own, this loop copies ahead what enters no product too: the skip map and the constant.
    # The skip map may be the output itself: a chunk that is copied ahead is none that was written.
    for first in tl.range(0, value.channels, value_chunk.size, num_stages=STAGES):
        if ONE_BLOCK:
            columns = load_tokens(value, batch, 0, first, value_chunk, BLOCK_TOKENS)
            context = tl.dot(attention, columns, input_precision=PRECISION)
        else:
            context = tl.zeros((BLOCK_PIXELS, value_chunk.size), tl.float32)
            for first_token in range(0, key.count, BLOCK_TOKENS):
                logits = _logits(
                    query,
                    norm,
                    query_pixels,
                    inside,
                    key,
                    batch,
                    first_token,
                    scale,
                    key_chunk,
                    BLOCK_TOKENS,
                    PRECISION,
                )
                weights = tl.exp(logits - maximum[:, None])
                columns = load_tokens(value, batch, first_token, first, value_chunk, BLOCK_TOKENS)
                context = tl.dot(weights.to(columns.dtype), columns, context, input_precision=PRECISION)
            context = context / total[:, None]
        if skip.pointer is not None:
            skip_pixels = pixel_pointers(skip, batch, first_pixel, width, BLOCK_PIXELS)
            context += load_map(skip, None, skip_pixels, inside, first, value_chunk)
        if constant_ptr is not None:
            channels = first + tl.arange(0, value_chunk.size)
            context += tl.load(constant_ptr + channels, mask=channels < value.channels, other=0.0)[None, :]
        store_map(out, context, out_pixels, inside, first, value_chunk)


@triton.jit
def _scratch_tile(
    pointer, batch, n_pixels, first_pixel, inside, first_token, scratch_tokens, BLOCK_TOKENS: tl.constexpr
):
    """Pointers and mask (pixels, BLOCK_TOKENS) of a (B, N, scratch_tokens) matrix."""
    corner = pointer + (batch * n_pixels + first_pixel) * scratch_tokens
    rows = tl.arange(0, inside.shape[0])
    tokens = first_token + tl.arange(0, BLOCK_TOKENS)
    offsets = (rows * scratch_tokens)[:, None] + tokens[None, :]
    return corner + offsets, inside[:, None] & (tokens < scratch_tokens)[None, :]


@triton.jit(do_not_specialize=_SIZES)
def asymmetric_attention_bwd_pixels_kernel(
    grad,
    query,
    norm,
    key,
    value,
    logsumexp_ptr,
    dquery,
    attention_ptr,
    dlogits_ptr,
    scratch_tokens,
    pixel_groups,
    width,
    scale,
    key_chunk,
    value_chunk,
    PIXEL_MULTIPLE: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A = softmax(scale · QKᵀ), dS = A ∘ (dA − rowsum(A ∘ dA)) with dA = G Vᵀ, dQ = scale · dS K.

    Grid: (B · ⌈N / BLOCK_PIXELS⌉,). A program owns BLOCK_PIXELS pixels of one image.
    grad (B, Cv, H, W), query and dquery (B, Ck, H, W), logsumexp (B, N), attention and dlogits
    (B, N, scratch_tokens). A result without a pointer is not made; dquery has none unless all tokens are one block.
    """
    batch, first_pixel, inside, n_pixels = _pixel_block(pixel_groups, PIXEL_MULTIPLE, BLOCK_PIXELS)
    query_pixels = pixel_pointers(query, batch, first_pixel, width, BLOCK_PIXELS)
    grad_pixels = pixel_pointers(grad, batch, first_pixel, width, BLOCK_PIXELS)

    if not ONE_BLOCK:
        # The logsumexp is a rounded number: what its rounding does to all weights of a row is divided out again.
        row = first_pixel + tl.arange(0, BLOCK_PIXELS)
        logsumexp = tl.load(logsumexp_ptr + batch * n_pixels + row, mask=inside, other=0.0)
        total = tl.zeros((BLOCK_PIXELS,), tl.float32)
        rowsum = tl.zeros((BLOCK_PIXELS,), tl.float32)
        for first_token in range(0, key.count, BLOCK_TOKENS):
            logits = _logits(
                query, norm, query_pixels, inside, key, batch, first_token, scale, key_chunk, BLOCK_TOKENS, PRECISION
            )
            weights = tl.exp(logits - logsumexp[:, None])
            total += tl.sum(weights, 1)
            if dlogits_ptr is not None:
                dattention = _scores(
                    grad, None, grad_pixels, inside, value, batch, first_token, value_chunk, BLOCK_TOKENS, PRECISION
                )
                rowsum += tl.sum(weights * dattention, 1)
        rowsum = rowsum / total

    for first_token in range(0, BLOCK_TOKENS if ONE_BLOCK else key.count, BLOCK_TOKENS):
        logits = _logits(
            query, norm, query_pixels, inside, key, batch, first_token, scale, key_chunk, BLOCK_TOKENS, PRECISION
        )
        if ONE_BLOCK:
            weights = tl.exp(logits - tl.max(logits, 1)[:, None])
            total = tl.sum(weights, 1)
        else:
            weights = tl.exp(logits - logsumexp[:, None])
        attention = weights * (1.0 / total)[:, None]
        if attention_ptr is not None:
            target, mask = _scratch_tile(
                attention_ptr, batch, n_pixels, first_pixel, inside, first_token, scratch_tokens, BLOCK_TOKENS
            )
            tl.store(target, attention.to(attention_ptr.dtype.element_ty), mask=mask)
        if dlogits_ptr is not None or dquery.pointer is not None:
            dattention = _scores(
                grad, None, grad_pixels, inside, value, batch, first_token, value_chunk, BLOCK_TOKENS, PRECISION
            )
            if ONE_BLOCK:
                rowsum = tl.sum(attention * dattention, 1)
            dlogits = (attention * (dattention - rowsum[:, None])).to(query.pointer.dtype.element_ty)
            if dlogits_ptr is not None:
                target, mask = _scratch_tile(
                    dlogits_ptr, batch, n_pixels, first_pixel, inside, first_token, scratch_tokens, BLOCK_TOKENS
                )
                tl.store(target, dlogits, mask=mask)
            if dquery.pointer is not None:
                dquery_pixels = pixel_pointers(dquery, batch, first_pixel, width, BLOCK_PIXELS)
                for first in range(0, key.channels, key_chunk.size):
                    columns = load_tokens(key, batch, 0, first, key_chunk, BLOCK_TOKENS)
                    product = tl.dot(dlogits, columns, input_precision=PRECISION)
                    store_map(dquery, product * scale, dquery_pixels, inside, first, key_chunk)


@triton.jit(do_not_specialize=_SIZES)
def asymmetric_attention_bwd_query_kernel(
    dlogits_ptr,
    key,
    dquery,
    scratch_tokens,
    pixel_groups,
    width,
    scale,
    chunk,
    PIXEL_MULTIPLE: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dQ = scale · dS K for several blocks of tokens.

    Grid: (B · ⌈N / BLOCK_PIXELS⌉, ⌈Ck / chunk⌉). A program owns BLOCK_PIXELS pixels and one chunk of channels.
    dlogits (B, N, scratch_tokens), key (B, Ck, T), dquery (B, Ck, H, W).
    """
    batch, first_pixel, inside, n_pixels = _pixel_block(pixel_groups, PIXEL_MULTIPLE, BLOCK_PIXELS)
    first = tl.program_id(1) * chunk.size
    total = tl.zeros((BLOCK_PIXELS, chunk.size), tl.float32)
    for first_token in range(0, key.count, BLOCK_TOKENS):
        source, mask = _scratch_tile(
            dlogits_ptr, batch, n_pixels, first_pixel, inside, first_token, scratch_tokens, BLOCK_TOKENS
        )
        dlogits = tl.load(source, mask=mask, other=0.0)
        columns = load_tokens(key, batch, first_token, first, chunk, BLOCK_TOKENS)
        total = tl.dot(dlogits, columns, total, input_precision=PRECISION)
    dquery_pixels = pixel_pointers(dquery, batch, first_pixel, width, BLOCK_PIXELS)
    store_map(dquery, total * scale, dquery_pixels, inside, first, chunk)


@triton.jit(do_not_specialize=[*_SIZES, "split_pixels"])
def asymmetric_attention_bwd_tokens_kernel(
    map,
    norm,
    scratch_ptr,
    out_ptr,
    n_tokens,
    scratch_tokens,
    split_pixels,
    pixel_groups,
    width,
    scale,
    chunk,
    PIXEL_MULTIPLE: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Partial sums over the pixels of scale · Sᵀ X, with S = A or dS and X = G or Q.

    Grid: (⌈C / chunk⌉ · ⌈T / BLOCK_TOKENS⌉, splits, B). A program owns a tile of one image's sums over one split.
    map (B, C, H, W), scratch (B, N, scratch_tokens), out (splits, B, T, C).
    """
    chunks = tl.cdiv(map.channels, chunk.size)
    first = (tl.program_id(0) % chunks) * chunk.size
    first_token = (tl.program_id(0) // chunks) * BLOCK_TOKENS
    batch = tl.program_id(2).to(tl.int64)
    n_pixels = pixel_groups * PIXEL_MULTIPLE
    first_pixel = tl.program_id(1) * split_pixels
    last_pixel = tl.minimum(first_pixel + split_pixels, n_pixels)

    total = tl.zeros((BLOCK_TOKENS, chunk.size), tl.float32)
    for pixel in range(first_pixel, last_pixel, BLOCK_PIXELS):
        inside = pixel + tl.arange(0, BLOCK_PIXELS) < n_pixels
        source, mask = _scratch_tile(
            scratch_ptr, batch, n_pixels, pixel, inside, first_token, scratch_tokens, BLOCK_TOKENS
        )
        weights = tl.load(source, mask=mask, other=0.0)
        values = load_map(map, norm, pixel_pointers(map, batch, pixel, width, BLOCK_PIXELS), inside, first, chunk)
        total = tl.dot(tl.trans(weights), values, total, input_precision=PRECISION)

    tokens = first_token + tl.arange(0, BLOCK_TOKENS)
    channels = first + tl.arange(0, chunk.size)
    image = (tl.program_id(1) * tl.num_programs(2) + batch) * n_tokens
    target = out_ptr + (image + tokens)[:, None] * map.channels + channels[None, :]
    mask = (tokens < n_tokens)[:, None] & (channels < map.channels)[None, :]
    tl.store(target, (total * scale).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["splits", "size"])
def asymmetric_attention_sum_splits_kernel(partials_ptr, out_ptr, splits, size, BLOCK: tl.constexpr):
    """out = Σ partials over the splits, in their order.

    Grid: (⌈size / BLOCK⌉,). partials (splits, size), out (size,).
    """
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = offsets < size
    source = partials_ptr + offsets
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(splits):
        total += tl.load(source, mask=exists, other=0.0)
        source += size
    tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask=exists)

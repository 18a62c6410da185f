"""The tile choices: pure, within their limits, and bounded in number."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st

from annnet_kernels.kernels.tiles import AttentionCase, attention_tile, channel_chunk, pixel_splits, token_gradient_tile

CAPABILITIES = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}
KINDS = ((torch.bfloat16, "ieee"), (torch.float16, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32"))
WIDTHS = st.integers(1, 4096)


@given(channels=WIDTHS, widest=st.sampled_from((16, 32, 64, 128)))
def test_a_chunk_is_a_power_of_two_with_little_padding(channels, widest):
    chunk = channel_chunk(channels, widest)
    assert chunk in (16, 32, 64, 128)
    assert chunk <= max(widest, 16)
    assert -channels % chunk < max(chunk // 2, 32)


@given(
    key=WIDTHS,
    value=WIDTHS,
    tokens=st.integers(1, 5000),
    kind=st.sampled_from(KINDS),
    backward=st.booleans(),
    normalised=st.booleans(),
    nchw=st.booleans(),
    strided=st.booleans(),
    token_major=st.booleans(),
    capability=st.sampled_from(list(CAPABILITIES)),
)
def test_operands_of_a_stage_fit_shared_memory(
    key, value, tokens, kind, backward, normalised, nchw, strided, token_major, capability
):
    dtype, precision = kind
    shared = CAPABILITIES[capability] * 1024
    flags = backward, normalised, nchw, strided, token_major
    tile = attention_tile(AttentionCase(key, value, tokens, dtype, precision, *flags, capability, shared))
    assert tile.tokens in (64, 128)
    assert tile.tokens >= min(tokens, 128)
    operands = (tile.pixels + tile.tokens) * max(tile.key_chunk, tile.value_chunk) * dtype.itemsize
    assert operands * tile.stages <= shared
    sums = token_gradient_tile(key, tokens, dtype, precision, normalised, shared)
    bytes_of_sums = sums.pixels * (sums.tokens + sums.chunk) * dtype.itemsize * sums.stages
    assert bytes_of_sums * sums.per_multiprocessor <= shared


@pytest.mark.parametrize("nchw", [False, True])
@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
@pytest.mark.parametrize(("dtype", "precision"), KINDS, ids=str)
def test_sizes_of_an_image_choose_nothing_and_tokens_little(dtype, precision, capability, nchw):
    shared = CAPABILITIES[capability] * 1024
    tiles = {
        attention_tile(
            AttentionCase(
                256, 512, tokens, dtype, precision, backward, normalised, nchw, False, True, capability, shared
            )
        )
        for tokens in range(1, 1025)
        for backward in (False, True)
        for normalised in (False, True)
    }
    assert len(tiles) <= 12  # three classes of tokens, forward or backward, normalised or not


@given(
    pixels=st.integers(1, 10**7),
    programs=st.integers(1, 10**4),
    at_once=st.integers(1, 400),
    block=st.sampled_from((16, 32, 64)),
)
def test_splits_make_at_most_one_wave_of_parts_worth_their_sums(pixels, programs, at_once, block):
    splits = pixel_splits(pixels, programs, at_once, block)
    assert splits >= 1
    if splits > 1:
        assert splits * programs <= at_once
        assert pixels // splits >= 4 * block

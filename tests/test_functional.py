"""The public door: token regions, the attention map, bad input."""

import pytest
import torch

import annnet_kernels as ak
from annnet_kernels import pyramid


def test_token_regions_are_what_the_tokens_average():
    x = torch.randn(1, 2, 7, 10, dtype=torch.float64)
    sizes = (1, (2, 3), 9)
    tokens = ak.pyramid_pool(x, sizes)
    regions = ak.token_regions(sizes, (7, 10))
    assert len(regions) == tokens.shape[2] == 1 + 6 + 81
    for token, r in enumerate(regions):
        mean = x[:, :, r.top : r.bottom, r.left : r.right].mean((2, 3))
        torch.testing.assert_close(tokens[:, :, token], mean)


def test_bins_follow_adaptive_average_pooling():
    assert pyramid.bin_edges(10, 3) == [(0, 4), (3, 7), (6, 10)]
    assert pyramid.bin_edges(2, 3) == [(0, 1), (0, 2), (1, 2)]
    assert pyramid.level_offsets((1, 3), (1, 2)) == [0, 1]


def test_the_attention_map_is_what_the_output_was_made_with():
    query = torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    key, value = torch.randn(2, 5, 7, dtype=torch.float64), torch.randn(2, 6, 7, dtype=torch.float64)
    out, attention = ak.asymmetric_attention(query, key, value, 0.7, return_attention=True)
    assert attention.shape == (2, 12, 7)
    assert not attention.requires_grad
    assert out.requires_grad
    torch.testing.assert_close(attention.sum(2), torch.ones(2, 12, dtype=torch.float64))
    torch.testing.assert_close(out.flatten(2), value @ attention.transpose(1, 2))


X, TOKENS = torch.zeros(2, 4, 3, 3), torch.zeros(2, 4, 5)
BAD = [
    (lambda: ak.pyramid_pool([1]), TypeError, r"x: expected a torch\.Tensor, got list"),
    (lambda: ak.pyramid_pool(torch.zeros(2, 3)), ValueError, r"x: expected a feature map .* got shape \(2, 3\)"),
    (lambda: ak.pyramid_pool(X.int()), TypeError, r"x: expected dtype float32, .* got torch\.int32"),
    (lambda: ak.pyramid_pool(X[:, :, :0]), ValueError, "x: expected at least one channel, row and column"),
    (lambda: ak.pyramid_pool(X, ()), ValueError, r"output_sizes: expected at least one pool size, got \(\)"),
    (lambda: ak.pyramid_pool(X, (1, 0)), ValueError, r"output_sizes\[1\]: expected a positive integer, got 0"),
    (lambda: ak.pyramid_pool(X, (1, -3)), ValueError, r"output_sizes\[1\]: expected a positive integer, got -3"),
    (lambda: ak.pyramid_pool(X, (1.5,)), TypeError, r"output_sizes\[0\]: expected a positive integer, got 1\.5"),
    (lambda: ak.pyramid_pool(X, (True,)), TypeError, r"output_sizes\[0\]: expected a positive integer, got True"),
    (lambda: ak.pyramid_pool(X, ((1, 2, 3),)), ValueError, r"output_sizes\[0\]: expected an integer or a pair"),
    (lambda: ak.pyramid_pool(X, 3), TypeError, "output_sizes: expected a sequence of pool sizes"),
    (lambda: ak.pyramid_pool(X, "13"), TypeError, "output_sizes: expected a sequence of pool sizes"),
    (lambda: ak.token_regions((1,), (0, 4)), ValueError, r"map_size\[0\]: expected a positive integer, got 0"),
    (lambda: ak.token_regions((1,), 4), TypeError, r"map_size: expected a pair \(H, W\), got 4"),
    (lambda: ak.token_regions((1,), (4,)), ValueError, r"map_size: expected a pair \(H, W\), got \(4,\)"),
    (lambda: ak.asymmetric_attention(X[0], TOKENS, TOKENS), ValueError, "query: expected a feature map"),
    (lambda: ak.asymmetric_attention(X, X, TOKENS), ValueError, "key: expected tokens of shape"),
    (lambda: ak.asymmetric_attention(X, TOKENS[:1], TOKENS), ValueError, "key: expected the batch of query, 2, got 1"),
    (lambda: ak.asymmetric_attention(X, TOKENS[:, :3], TOKENS), ValueError, "key: expected the channels of query, 4"),
    (lambda: ak.asymmetric_attention(X, TOKENS, TOKENS[..., :3]), ValueError, "value: expected the tokens of key, 5"),
    (lambda: ak.asymmetric_attention(X, TOKENS[..., :0], TOKENS), ValueError, "key: expected at least one channel and"),
    (lambda: ak.asymmetric_attention(X, TOKENS.double(), TOKENS), TypeError, "key: expected the dtype of query"),
    (lambda: ak.asymmetric_attention(X, TOKENS, TOKENS.to("meta")), ValueError, "value: expected the device of query"),
    (lambda: ak.asymmetric_attention(X.to("meta"), TOKENS, TOKENS), ValueError, "key: expected the device of query"),
    (lambda: ak.asymmetric_attention(X, TOKENS, TOKENS, "1"), TypeError, "scale: expected a real number or None, got"),
    (lambda: ak.asymmetric_attention(X, TOKENS, TOKENS, float("nan")), ValueError, "scale: expected a finite number"),
    (lambda: ak.asymmetric_attention(X, TOKENS, TOKENS, return_attention=1), TypeError, "return_attention: expected a"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[message[:44] for _, _, message in BAD])
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_every_public_name_has_a_docstring_with_shapes_errors_and_source():
    for name in ak.__all__:
        text = getattr(ak, name).__doc__
        assert text, name
        assert len(text) > 40, name
    for name in ("pyramid_pool", "asymmetric_attention", "AFNB", "APNB", "NonLocalBlock", "ANNNet"):
        text = getattr(ak, name).__doc__
        assert "Raises:" in text, name
        assert "Source:" in text, name
        assert "(B, " in text, name

"""The error rule can fail: a wrong result, a lost factor, a NaN and a wrong shape are each caught."""

import pytest
import torch
from helpers import assert_as_accurate_as_plain, relative_error


def run_with(change):
    def run(seed):
        truth = torch.randn(50, 40, dtype=torch.float64) @ torch.randn(40, 50, dtype=torch.float64)
        plain = truth.float() * (1 + 1e-6 * torch.randn(50, 50))
        return {"product": change(truth.float())}, {"product": plain}, {"product": truth}

    return run


def test_an_accurate_result_passes():
    assert_as_accurate_as_plain(run_with(lambda x: x), torch.float32)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x * 1.00001,
        lambda x: x + 1e-3,
        lambda x: x * (1 + 3e-6 * torch.randn_like(x)),
        lambda x: torch.where(x == x.max(), torch.nan, x),
        lambda x: x[:1],
        lambda x: torch.zeros_like(x),
    ],
)
def test_a_wrong_result_fails(change):
    with pytest.raises(AssertionError, match="product: median error"):
        assert_as_accurate_as_plain(run_with(change), torch.float32)


def test_one_outlier_in_five_seeds_is_forgiven():
    draws = iter([lambda x: x * 2] + [lambda x: x] * 4)
    assert_as_accurate_as_plain(lambda seed: run_with(next(draws))(seed), torch.float32)


def test_a_bad_median_is_judged_again_over_more_draws():
    draws = iter([lambda x: x * 2] * 5 + [lambda x: x] * 25)
    assert_as_accurate_as_plain(lambda seed: run_with(next(draws))(seed), torch.float32)


def test_a_comparison_with_what_is_not_finite_fails():
    def run(seed):
        ours, plain, truth = run_with(lambda x: x)(seed)
        return ours, {"product": plain["product"] * torch.inf}, truth

    with pytest.raises(AssertionError, match=r"product: median error .* plain inf"):
        assert_as_accurate_as_plain(run, torch.float32)


def test_relative_error_is_relative():
    truth = torch.full((3,), 1e-20, dtype=torch.float64)
    assert relative_error(truth * 1.5, truth) == pytest.approx(0.5)

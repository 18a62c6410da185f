"""The quick cases under pytest-benchmark: ``pytest benchmarks/ --benchmark-autosave``, then ``--benchmark-compare``."""

from __future__ import annotations

import pytest

from .cases import Case, select
from .features import Features
from .measure import rotating, synchronize
from .problem import Contestant, Problem
from .providers import Provider, providers
from .verify import check, checked_cases


def _ascii(name: str) -> str:
    """A test's name: pytest escapes other characters."""
    return name.replace("×", "x").replace("→", "-")


CONTESTS = [(case, provider) for case in select(["quick"]) for provider in providers(case, "quick")]


@pytest.mark.parametrize(("case", "provider"), CONTESTS, ids=[_ascii(f"{c.name}-{p.name}") for c, p in CONTESTS])
def test_speed(case: Case, provider: Provider, maps: Features, benchmark) -> None:  # type: ignore[no-untyped-def]
    problem = Problem(case, maps)
    contestant = Contestant(provider, problem)
    contestant.load(problem.state(0))
    call = rotating(lambda call: call(), contestant.calls())
    benchmark.group = case.name
    benchmark.extra_info["provider"] = provider.name

    def finished() -> None:
        call()
        synchronize(maps.device)

    benchmark.pedantic(finished, rounds=7, warmup_rounds=2)


def _rethrow(contestant: Contestant, error: Exception) -> None:
    raise error


@pytest.mark.parametrize("case", select(["quick"]), ids=lambda case: _ascii(case.name))
def test_ours_is_right(case: Case, maps: Features) -> None:
    problem = Problem(checked_cases(case, "asymmetric")[0], maps)
    members = [Contestant(p, problem) for p in providers(case, "quick") if p.name in ("ours", "plain eager")]
    verdict = check(members, problem, 5, _rethrow)["ours"]
    assert verdict.right, str(verdict)

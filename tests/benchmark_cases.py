"""What the tests of the benchmark run it on: tiny cases with random maps, providers that are spoilt, a record."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from benchmarks import cases, providers
from benchmarks.records import SCHEMA
from benchmarks.runner import NO_TIME, OK, CaseRun, Options

CPU = torch.device("cpu")
PLAIN, OURS = providers.PLAIN, providers.OURS

APNB = cases.Case("APNB", True, (9, 11), 24, batch=2, out_channels=24)
AFNB = cases.Case("AFNB", True, (9, 11), 24, batch=2, out_channels=32, low_channels=16)
POOL = cases.Case("pyramid_pool", True, (17, 19), 8)
ATTENTION = cases.Case("asymmetric_attention", True, (9, 11), 256)


class RandomFeatures:
    """Maps of any channels in the place of a backbone's."""

    device = CPU

    def maps(self, case):
        def draw(channels):
            return torch.randn(case.batch, channels, *case.size)

        if case.subject == "AFNB":
            return draw(case.low_channels), draw(case.channels)
        if case.subject == "asymmetric_attention":
            return draw(case.channels), draw(case.channels), draw(cases.VALUE_CHANNELS)
        return (draw(case.channels),)


class Changed(nn.Module):
    """Ours, spoilt in one respect."""

    def __init__(self, inner, change):
        super().__init__()
        self.inner, self.change = [inner], change
        for name, child in inner.named_children():
            self.add_module(name, child)

    def forward(self, *inputs):
        return self.change(self.inner[0](*inputs), self)


def run_case(case, chosen, **options):
    """The rows of a run over ``chosen`` providers, by name."""
    options = Options(seeds=2, seconds=0.05, choose=lambda case, effort: list(chosen), **options)
    record = CaseRun(case, RandomFeatures(), options, lambda doing, part: None).run()
    return {row["name"]: row for row in record["providers"]}


def named(case, *names):
    return [p for p in providers.providers(case, "full") if p.name in names]


def spoilt(case, change, name="spoilt"):
    (ours,) = named(case, OURS)
    return replace(ours, name=name, build=lambda case: Changed(ours.build(case), change))


def sample_record(slower=1.0):
    """A record of one case with two providers, ours ``slower`` times slower."""

    def row(name, milliseconds, peak):
        times = [milliseconds * 1e-3 * factor for factor in (0.99, 1.0, 1.01)]
        return {
            "name": name,
            "family": "asymmetric",
            "status": OK,
            "times_s": times,
            "quartiles_s": times,
            "peak_bytes": peak,
            "flop": 10**9,
            "traffic": 10**8,
            "check": {"error": 1e-7},
        }

    case = cases.Case("APNB", True, (97, 97), 512, out_channels=512)
    return {
        "schema": SCHEMA,
        "environment": {
            "date": "2026-01-01T00:00:00",
            "device": "cpu",
            "device_name": "a processor",
            "threads": 2,
            "versions": {"torch": "2.10.0"},
            "commit": "0123456789abcdef",
        },
        "limits": {"copy_bytes_per_s": 1e10, "flop_per_s_float32": 1e11},
        "input": {"pictures": ["grace_hopper.jpg"], "features": "random"},
        "cases": [
            {
                **case.record(),
                "minimal_bytes": 10**7,
                "left_out": ["plain max-autotune"],
                "providers": [row(OURS, 20 * slower, 10**7), row(PLAIN, 50, 4 * 10**7)],
            }
        ],
        "not_run": [{"name": "ANNNet", "reason": NO_TIME}],
    }

"""What the benchmark measures and counts, its cases, and the maps it runs them on."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from benchmark_cases import AFNB, APNB, CPU, OURS, PLAIN, POOL, RandomFeatures, named, run_case

import annnet_kernels as ak
from annnet_kernels.runtime import native
from benchmarks import cases, counting, heads, measure, providers, upsampled
from benchmarks.features import Features
from benchmarks.problem import Contestant, Problem
from benchmarks.runner import CaseRun, Options

pytestmark = pytest.mark.usefixtures("one_thread", "frozen_imports")


class TestMeasurement:
    def test_memory_counts_peak_and_rest(self):
        def call():
            first = torch.empty(3000, dtype=torch.uint8)
            second = torch.empty(5000, dtype=torch.uint8)
            del first
            return second, torch.empty(1000, dtype=torch.uint8)

        memory = measure.memory_of(call, CPU)
        assert (memory.peak, memory.live) == (8000, 6000)

    def test_kept_bytes_are_what_autograd_saves(self):
        x = torch.randn(1000, requires_grad=True)
        outputs = []
        memory = measure.memory_of(lambda: outputs.append(x.exp().sin()), CPU)
        assert memory.live == 2 * 4000  # exp's result serves both derivatives; and the output

    def test_repetitions_are_interleaved_and_slow_calls_sit_out(self):
        order = []

        def call(name, seconds):
            def run():
                order.append(name)
                time.sleep(seconds)

            return run

        fast, slow = measure.interleaved([call("fast", 0.002), call("slow", 0.02)], CPU, seconds=0.3)
        assert 5 <= len(slow) < len(fast) <= measure.MAX_REPETITIONS
        timed = order[4:]
        last_fast_before_end = len(timed) - timed[::-1].index("fast")
        assert "slow" in timed[: len(timed) // 3]
        assert "slow" in timed[last_fast_before_end // 2 :]
        assert min(slow) >= 0.02

    def test_short_calls_are_timed_several_at_a_time(self):
        calls = []
        (samples,) = measure.interleaved([lambda: calls.append(0)], CPU, seconds=0.01)
        assert len(calls) > 10 * len(samples)
        assert max(samples) < 1e-3

    def test_inputs_rotate(self):
        seen = []
        call = measure.rotating(seen.append, [1, 2, 3])
        for _ in range(4):
            call()
        assert seen == [1, 2, 3, 1]

    def test_rotation_exceeds_the_cache(self):
        problem = Problem(POOL, RandomFeatures(), cache_bytes=30_000)
        size = 4 * 8 * 17 * 19
        assert problem.rotation * size > 60_000
        (ours,) = named(POOL, OURS)
        assert len(Contestant(ours, problem).calls()) == problem.rotation
        pointers = {problem.inputs(True, i)[0].data_ptr() for i in range(problem.rotation)}
        assert len(pointers) == problem.rotation

    @pytest.mark.skipif(native.why_not("cpu") is not None, reason="the C++ extension is not built")
    def test_a_request_from_outside_does_not_change_who_is_timed(self):
        (ours,) = named(POOL, OURS)
        with ak.use_backend("reference"):
            Contestant(ours, Problem(POOL, RandomFeatures())).calls()[0]()
        assert ak.last_backend("pyramid_pool") == "native"

    def test_counting_runs_nothing(self):
        def build():
            a, b = torch.empty(2**20, 2**15), torch.empty(2**15, 2**20)
            return lambda: (a @ b).relu_()

        counts = counting.count(build)
        assert counts.flop == 2 * 2**55
        assert counts.peak == 4 * 2**40
        assert counts.traffic == 4 * (2 * 2**35 + 2**40) + 8 * 2**40

    def test_counted_peak_of_the_plain_block_is_near_the_measured(self):
        rows = run_case(replace(APNB, size=(33, 40)), named(APNB, PLAIN))
        row = rows[PLAIN]
        assert 0.6 < row["counted_peak"] / row["peak_bytes"] < 1.2

    def test_the_collapse_halves_the_counted_flop(self):
        case = cases.Case("AFNB", False, (33, 33), 2048, out_channels=2048, low_channels=1024)
        problem = Problem(case, RandomFeatures())
        flop = {}
        for provider in named(case, OURS, PLAIN):
            inputs = [torch.empty_like(x) for x in problem.inputs(True)]

            def build(provider=provider, inputs=inputs):
                contestant = Contestant(provider, problem)
                return lambda: contestant.forward(tuple(inputs))

            flop[provider.name] = counting.count(build).flop
        assert 1.4 < flop[PLAIN] / flop[OURS] < 2

    def test_minimal_bytes(self):
        case = replace(POOL, training=False)
        assert Problem(case, RandomFeatures()).minimal_bytes() == 4 * 8 * (17 * 19 + 110)
        assert Problem(POOL, RandomFeatures()).minimal_bytes() == 2 * 4 * 8 * (17 * 19 + 110)


class TestCases:
    def test_names_are_unique_within_a_set(self):
        for tag in {tag for case in cases.CASES for tag in case.tags}:
            names = [case.name for case in cases.select([tag])]
            assert len(names) == len(set(names)), tag

    def test_quick_has_every_subject_in_both_modes(self):
        quick = {(case.subject, case.training) for case in cases.select(["quick"])}
        subjects = (*cases.OPERATORS, *cases.BLOCKS, cases.MODEL, heads.SEGFORMER_B0)
        in_both = {(subject, training) for subject in subjects for training in (False, True)}
        assert quick == in_both | {(upsampled.LOSS, True), (upsampled.ARGMAX, False)}

    def test_what_is_folded_runs_in_evaluation_only(self):
        for case in cases.CASES:
            folded = [p.name for p in providers.providers(case, "full") if p.folded]
            foldable = case.subject in (*cases.BLOCKS, cases.PAIR, cases.MODEL)
            assert bool(folded) == (not case.training and foldable), case.name

    def test_quick_has_every_peer_that_must_be_there(self):
        for subject in cases.BLOCKS:
            for case in cases.select(["quick"], [subject]):
                present = {p.name for p in providers.providers(case, "quick")}
                assert {OURS, PLAIN, "SDPA on pooled keys", providers.NAIVE} <= present
                compiles = (subject, case.training) == ("APNB", False)  # it takes a large part of a quick run
                assert ("plain compiled" in present) == compiles


class TestFeatures:
    def test_the_time_that_maps_take_is_not_of_their_case(self):
        class SlowFeatures(RandomFeatures):
            def maps(self, case):
                time.sleep(0.3)
                return super().maps(case)

        options = Options(until=time.monotonic() + 100, share=0.002)
        run = CaseRun(POOL, SlowFeatures(), options, lambda *_: None)
        assert time.monotonic() < run.end < options.until

    def test_maps_are_made_once_and_large_ones_leave_with_the_next_size(self, monkeypatch):
        made = []

        def _stages(self, case):
            made.append(case.size)
            return torch.zeros(1, 1024), torch.zeros(1, 2048)

        monkeypatch.setattr(Features, "_stages", _stages)
        maps = Features([], CPU).maps
        small, large, larger = (replace(AFNB, size=size) for size in ((33, 33), (97, 97), (128, 128)))
        for case in (large, replace(large, training=False), small, large, larger, small, large):
            maps(case)
        assert made == [large.size, small.size, large.size, larger.size, large.size]

"""The benchmark's runs: what it calls wrong, and that it survives its peers."""

from __future__ import annotations

import gc
import time
import weakref
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from benchmark_cases import AFNB, APNB, ATTENTION, CPU, OURS, PLAIN, POOL, named, run_case, spoilt
from helpers import FACTOR, FLOOR
from rich.console import Console
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import annnet_kernels as ak
from benchmarks import accuracy, cases, machine, measure, plausible, providers, runner, verify
from benchmarks.cases import KEY_CHANNELS
from benchmarks.providers import COPY
from benchmarks.runner import FAILED, IMPOSSIBLE, NO_TIME, OK, OUT_OF_MEMORY, WRONG, Options, Pace

pytestmark = pytest.mark.usefixtures("one_thread", "frozen_imports")


class TestCorrectnessComesFirst:
    @pytest.mark.parametrize("case", [APNB, AFNB, POOL, ATTENTION], ids=lambda case: case.subject)
    @pytest.mark.parametrize("training", [False, True])
    def test_every_eager_provider_passes(self, case, training):
        case = replace(case, training=training)
        chosen = [p for p in providers.providers(case, "full") if p.compile is None]
        rows = run_case(case, chosen)
        assert {row["status"] for row in rows.values()} == {OK}, {n: r.get("reason") for n, r in rows.items()}
        assert all(len(row["times_s"]) >= 3 for row in rows.values())

    @pytest.mark.parametrize("case", cases.loss((9, 8), 7, batch=2), ids=lambda case: case.subject)
    def test_loss_and_argmax_pass_and_wrong_ones_do_not(self, case):
        chosen = [p for p in providers.providers(case, "full") if p.compile is None]
        assert {p.name for p in chosen} == {OURS, PLAIN, "striped plain"}
        rows = run_case(case, [*chosen, spoilt(case, lambda out, _: out * 1.5 + 1)])
        assert {row["name"] for row in rows.values() if row["status"] == OK} == {p.name for p in chosen}
        assert rows["spoilt"]["status"] == WRONG

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_sixteen_bits_run_under_autocast(self, dtype):
        case = replace(APNB, dtype=dtype, layout="channels_last")
        for _ in range(3):  # on a tiny map a few ReLU values that rounding switches can outweigh everything
            rows = run_case(case, named(case, PLAIN, "SDPA on pooled keys", providers.NAIVE))
            if {row["status"] for row in rows.values()} == {OK}:
                break
        assert {row["status"] for row in rows.values()} == {OK}, {n: r.get("reason") for n, r in rows.items()}
        assert rows[PLAIN]["check"]["error"] > 1e-5

    def test_dropout_that_draws_otherwise_is_matched(self):
        """As compiled dropout may, from the same seed."""
        (plain,) = named(APNB, PLAIN)

        class DrawsLater(nn.Dropout2d):
            def forward(self, x):
                torch.rand(7)
                return super().forward(x)

        def build(case):
            block = plain.build(case)
            block.conv_bn_dropout[-1] = DrawsLater(1 - verify.KEEP)
            return block

        rows = run_case(APNB, [*named(APNB, OURS, PLAIN), replace(plain, name="other", build=build)])
        assert rows["other"]["status"] == OK, rows["other"].get("reason")

    def test_a_compiled_provider_passes(self, monkeypatch):
        """By a backend that generates no code, which took 20 s."""
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
        rows = run_case(APNB, named(APNB, OURS, PLAIN, "plain compiled"))
        assert rows["plain compiled"]["status"] == OK, rows["plain compiled"].get("reason")
        assert rows["plain compiled"]["first_call_s"] > 3 * rows["plain compiled"]["quartiles_s"][2]

    def test_every_case_compiles_anew(self, monkeypatch):
        """What no longer compiles would be timed as it is, under the name of a compiled one."""
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
        for size in (5, 6, 7, 8):
            case = replace(POOL, size=(size, size))
            with torch._dynamo.config.patch(recompile_limit=3):
                rows = run_case(case, named(case, OURS, PLAIN, "plain compiled"))
            assert rows["plain compiled"]["status"] == OK, rows["plain compiled"].get("reason")

    def test_a_wrong_output_is_wrong(self):
        rows = run_case(APNB, [*named(APNB, OURS, PLAIN), spoilt(APNB, lambda out, module: out * 1.001)])
        assert rows["spoilt"]["status"] == WRONG
        assert rows["spoilt"]["check"]["error"] == pytest.approx(1e-3, rel=0.5)
        assert "times_s" not in rows["spoilt"]
        assert rows[OURS]["status"] == rows[PLAIN]["status"] == OK

    def test_a_wrong_gradient_alone_is_wrong(self):
        def lie(out, module):
            weight = module.stages[0].f_value.weight
            return (
                out + 0 * weight.sum() if out.requires_grad is False else out + (weight - weight.detach()).sum() * 1e-2
            )

        rows = run_case(APNB, [*named(APNB, OURS, PLAIN), spoilt(APNB, lie)])
        assert rows["spoilt"]["status"] == WRONG
        assert rows["spoilt"]["check"]["tensor"].startswith("gradient")

    def test_wrong_running_statistics_alone_are_wrong(self):
        def drift(out, module):
            module.stages[0].f_key[1][0].running_mean.mul_(1.01)
            return out

        rows = run_case(APNB, [*named(APNB, OURS, PLAIN), spoilt(APNB, drift)])
        assert rows["spoilt"]["status"] == WRONG
        assert rows["spoilt"]["check"]["tensor"].endswith("running_mean")

    def test_the_rule_is_the_projects(self):
        assert verify.FACTOR == FACTOR
        assert {getattr(torch, name): floor for name, floor in verify.FLOOR.items()} == FLOOR

    def test_ours_gets_no_more_room_than_the_rule(self):
        case = replace(POOL, training=False)
        baseline = {"output 0": 1e-6}
        assert not verify._judge(verify.FACTOR, {"output 0": 1.7e-6}, baseline, case, 5).right
        assert verify._judge(verify.FACTOR, {"output 0": 1.5e-6}, baseline, case, 5).right
        assert verify._judge(verify.PEER_FACTOR, {"output 0": 1.7e-6}, baseline, case, 5).right

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_values_that_switch_by_chance_are_no_error(self, dtype):
        """Medians of five runs, plain's and ours, that switch other values; and a gradient that is wrong."""
        case = replace(APNB, size=(97, 97), dtype=dtype, training=True)
        values = 97 * 97 * KEY_CHANNELS
        expected = torch.tensor(values * 4 * torch.finfo(getattr(torch, dtype)).eps)
        switched = torch.poisson(expected.expand(100, 2, 5)).median(dim=2).values
        for plain, ours in (2 * switched / values).sqrt().tolist():
            found, baseline = {"gradient of bias": ours}, {"gradient of bias": plain}
            assert verify._judge(verify.FACTOR, found, baseline, case, 5).right, (plain, ours)
            wrong = {"gradient of bias": 3 * plain + 3e-3}
            assert not verify._judge(verify.FACTOR, wrong, baseline, case, 5).right, plain

    def test_truth_shrinks_until_it_fits(self, monkeypatch):
        sizes = []

        def out_of_memory_unless_small(contestants, problem, *rest):
            sizes.append((problem.case.batch, problem.case.size))
            if problem.case.batch > 1:
                raise torch.OutOfMemoryError("no room")
            return original(contestants, problem, *rest)

        original = verify.check
        monkeypatch.setattr("benchmarks.runner.check", out_of_memory_unless_small)
        rows = run_case(APNB, named(APNB, OURS, PLAIN))
        assert sizes == [(2, (9, 11)), (1, (9, 11))]
        assert rows[OURS]["check"]["maps"] == "maps 1×9×11"


class TestPeersThatFail:
    def test_out_of_memory_does_not_stop_the_run(self):
        def exhaust(case):
            return providers.FunctionModule(
                lambda *maps: _raise(RuntimeError("[enforce fail] can't allocate memory: 1 TB"))
            )

        peer = providers.Provider("greedy", exhaust)
        rows = run_case(POOL, [*named(POOL, OURS, PLAIN), peer])
        assert rows["greedy"]["status"] == OUT_OF_MEMORY
        assert rows[OURS]["status"] == OK
        assert len(rows[OURS]["times_s"]) >= 3

    def test_what_cannot_fit_is_never_started(self):
        started = []

        def build(case):
            def enormous(x):
                if not isinstance(x, FakeTensor):
                    started.append(x)
                return x.new_empty(2**45)

            return providers.FunctionModule(enormous)

        case = replace(POOL, training=False)
        rows = run_case(case, [*named(case, OURS, PLAIN), providers.Provider("enormous", build)])
        assert rows["enormous"]["status"] == OUT_OF_MEMORY
        assert rows["enormous"]["counted_peak"] == 2**47
        assert started == []

    def test_an_error_is_recorded(self):
        def build(case):
            return providers.FunctionModule(lambda x: _raise(KeyError("no such thing")))

        rows = run_case(POOL, [*named(POOL, OURS, PLAIN), providers.Provider("broken", build)])
        assert rows["broken"]["status"] == FAILED
        assert "no such thing" in rows["broken"]["reason"]
        assert rows[OURS]["status"] == OK

    def test_an_error_after_the_check_is_recorded(self):
        calls = []

        def build(case):
            def tired(x):
                calls.append(x)
                return ak.pyramid_pool(x) if len(calls) < 8 else _raise(RuntimeError("tired"))

            return providers.FunctionModule(tired)

        rows = run_case(POOL, [*named(POOL, OURS, PLAIN), providers.Provider("tired", build)])
        assert rows["tired"]["status"] == FAILED
        assert rows[OURS]["status"] == OK

    def test_no_compilation_without_time(self):
        rows = run_case(POOL, named(POOL, OURS, PLAIN, "plain compiled"), until=time.monotonic() + 5)
        assert rows["plain compiled"]["status"] == NO_TIME
        assert rows[OURS]["status"] == OK

    def test_a_compilation_takes_the_time_of_later_cases(self, monkeypatch):
        """A case's share of the time is smaller than a compilation; its most important peer is timed all the same."""
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
        until = time.monotonic() + 200
        rows = run_case(POOL, named(POOL, OURS, PLAIN, "plain compiled"), until=until, share=1e-3)
        assert rows["plain compiled"]["status"] == OK, rows["plain compiled"].get("reason")
        assert rows["plain compiled"]["times_s"]

    def test_a_slow_compilation_is_remembered(self):
        options = Options(until=time.monotonic() + 100, pace=Pace(compilation=200.0))
        assert replace(options, share=0.5).pace is options.pace
        rows = run_case(POOL, named(POOL, OURS, PLAIN, "plain compiled"), until=options.until, pace=options.pace)
        assert rows["plain compiled"]["status"] == NO_TIME


def _raise(error):
    raise error


class TestNothingIsLeftBehind:
    def test_an_error_keeps_no_tensor_alive(self):
        """Neither in its own frames nor in those of what it came from."""

        def fail():
            large = torch.zeros(3)
            alive.append(weakref.ref(large))
            raise ValueError("inner")

        alive = []
        try:
            try:
                fail()
            except ValueError as inner:
                mine = torch.zeros(3)
                alive.append(weakref.ref(mine))
                del mine
                raise RuntimeError("outer") from inner
        except RuntimeError as error:
            kept = error
        assert alive[0]() is not None
        runner.drop_frames(kept)
        gc.collect()
        assert [reference() for reference in alive] == [None, None]

    def test_what_a_case_leaves_can_be_collected_after_the_next_began(self):
        class Cycle:
            def __init__(self):
                self.me = self

        leftover = Cycle()
        reference = weakref.ref(leftover)
        run_case(POOL, named(POOL, OURS, PLAIN))  # freezes what is alive
        del leftover
        run_case(POOL, named(POOL, OURS, PLAIN))
        assert reference() is None

    def test_a_failed_capture_gives_the_stream_back(self, monkeypatch):
        streams = ["the user's"]
        cuda = SimpleNamespace(set=streams.append)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[-1])
        monkeypatch.setattr(torch.cuda, "set_stream", cuda.set)

        def capture():
            with measure._stream_kept(CPU):
                streams.append("of the capture")
                raise RuntimeError("capture failed")

        with pytest.raises(RuntimeError, match="capture failed"):
            capture()
        assert streams[-1] == "the user's"

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_float32_means_float32_and_settings_come_back(self, dtype):
        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = True
        try:
            with machine.exact_float32(dtype):
                assert torch.backends.cudnn.allow_tf32 == (dtype != "float32")
            assert torch.backends.cudnn.allow_tf32
        finally:
            torch.backends.cudnn.allow_tf32 = before


class TestImpossibleTimes:
    LIMITS: ClassVar = {"copy_bytes_per_s": 1e12, "flop_per_s_bfloat16": 1e14}

    def judged(self, seconds, device="cuda", **provider):
        row = {"name": "x", "family": "asymmetric", "status": OK, "times_s": [seconds], "quartiles_s": [seconds] * 3}
        case = {"dtype": "bfloat16", "minimal_bytes": 10**9, "providers": [row | provider]}
        plausible.refuse(case, self.LIMITS, torch.device(device))
        return case["providers"][0]

    def test_faster_than_memory_is_a_measurement_error(self):
        assert self.judged(1e-3)["status"] == OK
        refused = self.judged(0.8e-3)
        assert refused["status"] == IMPOSSIBLE
        assert "0.8000 ms" in refused["reason"]
        assert not {"times_s", "quartiles_s"} & set(refused)

    def test_faster_than_arithmetic_is_one_too(self):
        assert self.judged(1.5e-3, flop=2 * 10**11)["status"] == IMPOSSIBLE
        assert self.judged(2e-3, flop=2 * 10**11)["status"] == OK

    def test_the_kernel_time_is_judged_as_well(self):
        assert self.judged(2e-3, graph_quartiles_s=[0.5e-3] * 3)["status"] == IMPOSSIBLE

    def test_a_cpu_with_its_caches_and_a_copy_are_left_alone(self):
        assert self.judged(0.5e-3, "cpu")["status"] == OK
        assert self.judged(0.5e-3, family=COPY)["status"] == OK


class TestAccuracy:
    def test_a_wrong_operator_is_beyond_the_rule(self, monkeypatch, capsys):
        right = accuracy.ROWS[-1]
        biased = right._replace(ours=lambda x: right.ours(x) * 1.001)
        for row, code in ((right, 0), (biased, 1)):
            monkeypatch.setattr(accuracy, "ROWS", (row,))
            assert accuracy.run(CPU, 5, Console()) == code
            assert ("BEYOND" in capsys.readouterr().out) == bool(code)

    def test_the_shapes_that_are_promised_are_there(self):
        attention = [row.shapes for row in accuracy.ROWS if len(row.shapes) == 3]
        channels = {shape[0][1] for shape in attention} | {shape[2][1] for shape in attention}
        assert {19, 48, 80, 96, 256, 512, 2048} <= channels
        assert {1, 110, 1024} <= {shape[1][2] for shape in attention}

"""The benchmark: what it calls wrong, how it measures, what it writes down, and that it survives its peers."""

from __future__ import annotations

import copy
import io
import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import FACTOR, FLOOR
from rich.console import Console
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import annnet_kernels as ak
from benchmarks import (
    __main__ as command,
    accuracy,
    cases,
    compare,
    counting,
    gpu,
    measure,
    providers,
    report,
    results,
    verify,
)
from benchmarks.features import Features, find_pictures
from benchmarks.problem import Contestant, Problem
from benchmarks.runner import FAILED, NO_TIME, OK, OUT_OF_MEMORY, WRONG, CaseRun, Options, Pace
from benchmarks.session import SCHEMA

ROOT = Path(__file__).resolve().parent.parent
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


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class TestCorrectnessComesFirst:
    @pytest.mark.parametrize("case", [APNB, AFNB, POOL, ATTENTION], ids=lambda case: case.subject)
    @pytest.mark.parametrize("training", [False, True])
    def test_every_eager_provider_passes(self, case, training):
        case = replace(case, training=training)
        chosen = [p for p in providers.providers(case, "full") if p.compile is None]
        rows = run_case(case, chosen)
        assert {row["status"] for row in rows.values()} == {OK}, {n: r.get("reason") for n, r in rows.items()}
        assert all(len(row["times_s"]) >= 3 for row in rows.values())

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_sixteen_bits_run_under_autocast(self, dtype):
        case = replace(APNB, dtype=dtype, layout="channels_last")
        for _ in range(3):  # on a tiny map a few ReLU values that rounding switches can outweigh everything
            rows = run_case(case, named(case, PLAIN, "SDPA on pooled keys", providers.NAIVE))
            if {row["status"] for row in rows.values()} == {OK}:
                break
        assert {row["status"] for row in rows.values()} == {OK}, {n: r.get("reason") for n, r in rows.items()}
        assert rows[PLAIN]["check"]["error"] > 1e-5

    def test_compiled_dropout_is_matched(self):
        rows = run_case(APNB, named(APNB, OURS, PLAIN, "plain compiled"))
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
            return providers._Function(lambda *maps: _raise(RuntimeError("[enforce fail] can't allocate memory: 1 TB")))

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

            return providers._Function(enormous)

        case = replace(POOL, training=False)
        rows = run_case(case, [*named(case, OURS, PLAIN), providers.Provider("enormous", build)])
        assert rows["enormous"]["status"] == OUT_OF_MEMORY
        assert rows["enormous"]["counted_peak"] == 2**47
        assert started == []

    def test_an_error_is_recorded(self):
        def build(case):
            return providers._Function(lambda x: _raise(KeyError("no such thing")))

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

            return providers._Function(tired)

        rows = run_case(POOL, [*named(POOL, OURS, PLAIN), providers.Provider("tired", build)])
        assert rows["tired"]["status"] == FAILED
        assert rows[OURS]["status"] == OK

    def test_no_compilation_without_time(self):
        rows = run_case(POOL, named(POOL, OURS, PLAIN, "plain compiled"), until=time.monotonic() + 5)
        assert rows["plain compiled"]["status"] == NO_TIME
        assert rows[OURS]["status"] == OK

    def test_a_slow_compilation_is_remembered(self):
        options = Options(until=time.monotonic() + 100, pace=Pace(compilation=200.0))
        assert replace(options, share=0.5).pace is options.pace
        rows = run_case(POOL, named(POOL, OURS, PLAIN, "plain compiled"), until=options.until, pace=options.pace)
        assert rows["plain compiled"]["status"] == NO_TIME

    def test_all_are_shown(self):
        record = sample_record()
        record["cases"][0]["providers"] += [
            {"name": "a", "family": "asymmetric", "status": WRONG, "reason": "output 0: error 2.0e-01"},
            {"name": "b", "family": "asymmetric", "status": OUT_OF_MEMORY, "reason": "needs 12.0 GiB"},
        ]
        text = printed(record)
        assert "WRONG: a in" in text
        assert "output 0: error 2.0e-01" in text
        assert "out of memory: b in" in text
        assert "needs 12.0 GiB" in text
        assert "| a | WRONG |" in report.markdown(record)


def _raise(error):
    raise error


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


def printed(record):
    console = Console(file=io.StringIO(), width=200)
    report.print_record(record, console)
    return console.file.getvalue()


class TestReport:
    def test_ratios_come_first(self):
        (line,) = (line for line in printed(sample_record()).splitlines() if line.split()[:2] == ["plain", "eager"])
        assert line.split()[2:5] == ["2.50×", "4.00×", "50.0"]

    def test_the_limit_and_what_is_left_out_are_named(self):
        text = printed(sample_record())
        assert "limit 10.0 ms, ours at 50% of it" in text
        assert "left out: plain max-autotune for APNB" in text
        assert "not run: ANNNet: no time left" in text

    def test_narrow_terminals_lose_nothing(self):
        console = Console(file=io.StringIO(), width=80)
        report.print_record(sample_record(), console)
        assert "…" not in console.file.getvalue()

    def test_plots_are_drawn(self, tmp_path):
        record = sample_record()
        for size in ((32, 64), (64, 128)):
            case = copy.deepcopy(record["cases"][0])
            case["size"] = list(size)
            record["cases"].append(case)
        written = command.write(record, tmp_path)
        assert {path.name for path in written} == {"benchmark.md", "speedup.png", "roofline.png", "sizes.png"}
        assert all(path.read_bytes()[:4] == b"\x89PNG" for path in written if path.suffix == ".png")

    def test_nothing_measured_still_prints(self, tmp_path):
        record = sample_record()
        for row in record["cases"][0]["providers"]:
            row["status"] = WRONG
            del row["quartiles_s"], row["peak_bytes"]
        assert "WRONG" in printed(record)
        command.write(record, tmp_path)
        assert report.ours_failed(record)


class TestCompare:
    def run(self, before, after):
        console = Console(file=io.StringIO(), width=200)
        return compare.run(before, after, console), console.file.getvalue()

    def test_a_slower_ours_is_a_regression(self):
        code, text = self.run(sample_record(), sample_record(slower=1.2))
        assert code == 1
        assert "WORSE: ours" in text
        assert "+20%" in text

    def test_a_faster_ours_is_none(self):
        code, text = self.run(sample_record(slower=1.2), sample_record())
        assert code == 0
        assert "better: ours" in text

    def test_four_percent_or_overlapping_quartiles_are_noise(self):
        assert self.run(sample_record(), sample_record(slower=1.04))[0] == 0
        after = sample_record(slower=1.2)
        after["cases"][0]["providers"][0]["quartiles_s"][0] = 20e-3
        assert self.run(sample_record(), after)[0] == 0

    def test_a_slower_peer_is_shown_and_no_regression(self):
        after = sample_record()
        row = after["cases"][0]["providers"][1]
        row["quartiles_s"] = [2 * t for t in row["quartiles_s"]]
        code, text = self.run(sample_record(), after)
        assert code == 0
        assert "WORSE: plain eager" in text

    def test_more_memory_or_a_wrong_result_is_a_regression(self):
        after = sample_record()
        after["cases"][0]["providers"][0]["peak_bytes"] *= 2
        assert self.run(sample_record(), after)[0] == 1
        after = sample_record()
        after["cases"][0]["providers"][0]["status"] = WRONG
        assert self.run(sample_record(), after)[0] == 1

    def test_a_slowed_kernel_is_flagged(self):
        def record(pause):
            def slow(out, module):
                time.sleep(pause)
                return out

            chosen = [spoilt(POOL, slow, name=OURS), *named(POOL, PLAIN)]
            options = Options(seeds=1, seconds=0.2, choose=lambda case, effort: chosen)
            return {**sample_record(), "cases": [CaseRun(POOL, RandomFeatures(), options, lambda *_: None).run()]}

        code, text = self.run(record(0.0), record(0.05))
        assert code == 1
        assert "WORSE: ours" in text

    def test_strangers_are_refused(self):
        other = sample_record()
        other["cases"][0]["name"] = "another"
        with pytest.raises(ValueError, match="no case in common"):
            self.run(sample_record(), other)


class TestReadme:
    def test_tables_are_generated_between_the_markers(self):
        readme = f"before\n{results.BEGIN}\nold\n{results.END}\nafter\n"
        new = results.generate(readme, [sample_record()])
        assert new.startswith("before\n")
        assert new.endswith("\nafter\n")
        assert "old" not in new
        assert "| 20.00 | 2.50 |" in new
        assert results.generate(new, [sample_record()]) == new

    def test_a_record_has_a_folder_of_its_device_and_day(self):
        folder = results.new_folder("NVIDIA H200 (SXM)")
        assert folder.parent == results.RESULTS
        assert re.fullmatch(r"nvidia-h200-sxm-\d{4}-\d\d-\d\d", folder.name)

    def test_missing_markers_are_an_error(self):
        with pytest.raises(ValueError, match="markers"):
            results.generate("nothing here", [])

    def test_the_readme_agrees_with_the_records(self):
        if not results.README.exists() or results.BEGIN not in results.README.read_text():
            pytest.skip("README.md has no generated tables")
        readme = results.README.read_text()
        assert results.generate(readme, results.recorded()) == readme


class TestCases:
    def test_names_are_unique_within_a_set(self):
        for tag in {tag for case in cases.CASES for tag in case.tags}:
            names = [case.name for case in cases.select([tag])]
            assert len(names) == len(set(names)), tag

    def test_quick_has_every_subject_in_both_modes(self):
        quick = {(case.subject, case.training) for case in cases.select(["quick"])}
        subjects = (*cases.OPERATORS, *cases.BLOCKS, cases.MODEL)
        assert quick == {(subject, training) for subject in subjects for training in (False, True)}

    def test_what_is_folded_runs_in_evaluation_only(self):
        for case in cases.CASES:
            folded = [p.name for p in providers.providers(case, "full") if p.folded]
            assert bool(folded) == (not case.training and case.subject not in cases.OPERATORS), case.name

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


def run_command(*arguments, module="benchmarks"):
    return subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


class TestCommand:
    def test_a_run_from_end_to_end(self, tmp_path):
        options = ("--seeds", "1", "--seconds", "0.05", "--threads", "1", "--out", str(tmp_path))
        done = run_command("--cases", "smoke", "--only", "pyramid", "--effort", "quick", *options)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "time" in done.stdout
        assert "÷ ours" in done.stdout
        assert {path.name for path in tmp_path.iterdir()} >= {"benchmark.json", "benchmark.md", "speedup.png"}
        record = json.loads((tmp_path / "benchmark.json").read_text())
        assert record["environment"]["threads"] == 1
        assert record["input"]["pictures"] == ["grace_hopper.jpg"]
        row = record["cases"][0]["providers"][0]
        assert row["name"] == OURS
        assert row["quartiles_s"][1] > 0
        assert row["peak_bytes"] > 0
        allocator = record["environment"]["allocator"]
        if "mallopt" in allocator["setting"]:
            assert allocator["page_faults_after"] <= allocator["page_faults_before"] // 10
        assert run_command("compare", str(tmp_path), str(tmp_path)).returncode == 0

    def test_a_missing_picture_is_one_clear_line(self, tmp_path):
        done = run_command("--images", str(tmp_path / "none"), "--out", str(tmp_path))
        assert done.returncode == 2
        assert "--images" in done.stderr
        assert "does not exist" in done.stderr
        assert "Traceback" not in done.stderr

    def test_a_folder_gives_its_pictures(self, tmp_path):
        from PIL import Image

        for name in ("b.png", "a.jpg"):
            Image.new("RGB", (40, 30)).save(tmp_path / name)
        (tmp_path / "notes.txt").write_text("no picture")
        assert [path.name for path in find_pictures(str(tmp_path))] == ["a.jpg", "b.png"]


class TestGpuStages:
    def test_without_a_gpu_it_says_so(self, monkeypatch, capsys):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(SystemExit) as stopped:
            gpu.main(["--out", "nowhere"])
        assert stopped.value.code != 0
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "no CUDA GPU" in line

    def test_stages_are_recorded_and_resumed(self, tmp_path):
        arguments = ("--dry-run", "--stages", "operators", "--out", str(tmp_path))
        done = run_command(*arguments, module="benchmarks.gpu")
        assert done.returncode == 0, done.stdout + done.stderr
        record = json.loads((tmp_path / "benchmark.json").read_text())
        assert {name: entry["status"] for name, entry in record["stages"].items()} == {"operators": gpu.DONE}
        assert record["cases"]
        assert len(list(tmp_path.iterdir())) <= 8
        again = run_command(*arguments, module="benchmarks.gpu")
        assert again.stdout.strip() == ""

    def campaign(self, tmp_path, monkeypatch, stages, budget=100.0):
        monkeypatch.setattr(gpu, "RESERVE", 0.0)
        campaign = gpu.Campaign(tmp_path, budget, dry=True)
        return campaign.run(stages), campaign.record["stages"]

    def test_a_crash_and_a_hang_do_not_stop_the_next(self, tmp_path, monkeypatch):
        stages = [
            gpu.Stage("crash", 20, ("",), dry_command=("-c", "import os; print('so far'); os.abort()")),
            gpu.Stage("hang", 2, ("",), dry_command=("-c", "import time; time.sleep(60)")),
            gpu.Stage("fine", 20, ("",)),
        ]
        start = time.monotonic()
        fine, entries = self.campaign(tmp_path, monkeypatch, stages)
        assert time.monotonic() - start < 30
        assert not fine
        assert [entries[stage.name]["status"] for stage in stages] == [gpu.FAILED, gpu.PARTIAL, gpu.DONE]
        assert "== crash" in (tmp_path / gpu.LOG).read_text()

    def test_no_stage_starts_without_time(self, tmp_path, monkeypatch):
        _, entries = self.campaign(tmp_path, monkeypatch, [gpu.Stage("late", 20, ("",))], budget=0.0)
        assert entries == {}

    def test_the_budget_of_the_first_call_holds_its_stages(self):
        assert sum(stage.seconds for stage in gpu.STAGES if not stage.full) < 800
        assert all(gpu.stage_cases(stage, dry=False) for stage in gpu.STAGES if stage.command is None)

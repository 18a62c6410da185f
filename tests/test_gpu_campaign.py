"""The GPU campaign without a GPU: its rehearsal, its record, and the steps that a CPU can run on tiny cases."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmark_cases import sample_record

from annnet_kernels.runtime.backends import interpreting

if interpreting():
    pytest.skip("the stand-in driver needs compiled kernels", allow_module_level=True)
if sys.platform != "linux":
    pytest.skip("a campaign's processes are Linux processes", allow_module_level=True)
pytest.importorskip("triton")

from benchmarks.records import load
from tools.gpu import __main__ as command, measuring, products, profiling, rehearsal, stages, summary, tree, warming
from tools.gpu.campaign import Campaign
from tools.gpu.lines import outcomes_in
from tools.gpu.stages import Stage
from tools.gpu.store import DONE, FAILED, PARTIAL, RESULT, UNFINISHED, Store

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


def python(*arguments: str | Path, timeout: float = 600, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    run = [sys.executable, *map(str, arguments)]
    return subprocess.run(run, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=timeout)


def test_the_rehearsal_finds_nothing_wrong():
    done = python("-m", "tools.gpu.rehearsal", "--short")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("right: ") == 4
    assert "A rehearsal cannot show:" in done.stdout


def test_the_first_call_fits_into_its_budget():
    alone = sum(stage.seconds for stage in stages.STAGES if not stage.full and stage.together is None)
    together = max(stage.seconds for stage in stages.STAGES if stage.together is not None)
    assert alone + together <= 540 - 15


def test_warm_up_that_takes_too_long_on_16_cores_is_wrong():
    shares = [stage.name for stage in stages.STAGES if stage.step == "warm-up"]
    for seconds, fits in ((20.0, True), (60.0, False)):
        record = {"stages": {name: {"cpu_seconds": seconds} for name in shares}}
        assert rehearsal.fits(record) == fits


def test_the_shares_of_the_warm_up_are_all_of_it(monkeypatch):
    compiled = []
    monkeypatch.setattr("triton.runtime.jit.JITFunction.warmup", lambda kernel, **_: compiled.append(kernel.__name__))
    wanted = [launch.kernel.__name__ for launch in warming.launches(CPU)]
    assert {"asymmetric_attention_fwd_kernel", "pyramid_pool_fwd_kernel", "batch_norm_map_kernel"} <= set(wanted)
    assert sum(warming.compile_share(n, 3, CPU) for n in (1, 2, 3)) == len(wanted)
    assert sorted(compiled) == sorted(wanted)


def test_names_of_stages_are_unique_and_their_cases_exist():
    names = [stage.name for stage in stages.STAGES]
    assert len(set(names)) == len(names)
    for stage in stages.STAGES:
        if stage.step == "measure":
            cases, _, providers = measuring.chosen_cases(stage.options)
            assert cases, stage.name
            named = [word for word in stage.options if word in {"ours", "plain eager", "plain compiled"}]
            assert set(named) <= set(providers)
            assert [case.training for case in cases] == sorted((c.training for c in cases), reverse=True)


def test_every_file_with_gpu_tests_is_in_a_stage():
    marked = {p.name for p in (ROOT / "tests").glob("test_*.py") if "pytest.mark." + "gpu" in p.read_text()}
    assert marked <= {*stages.BLOCK_TESTS, *stages.OPERATOR_TESTS}


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        command.main(["--out", "nowhere"])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "no GPU" in line


def test_the_hash_follows_content_and_names(tmp_path):
    (tmp_path / "csrc").mkdir()
    file = tmp_path / "csrc" / "a.cpp"
    file.write_text("one")
    first = tree.tree_hash(tmp_path)
    (tmp_path / "csrc" / "built.so").write_text("no source")
    assert tree.tree_hash(tmp_path) == first
    file.write_text("two")
    second = tree.tree_hash(tmp_path)
    file.rename(file.with_name("b.cpp"))
    assert len({first, second, tree.tree_hash(tmp_path)}) == 3


def test_a_record_that_cannot_be_read_is_put_aside(tmp_path):
    (tmp_path / "benchmark.json").write_text('{"schema"')
    store = Store(tmp_path, None, command.new_record())
    assert "begun anew" in store.notes[0]
    assert (tmp_path / "benchmark.unreadable").exists()


def test_outcomes_are_written_as_tests_end_and_passed_ones_are_left_out(tmp_path):
    (tmp_path / "conftest.py").write_text("")
    (tmp_path / "test_it.py").write_text(
        "def test_good(): pass\n\ndef test_bad():\n    assert 1 == 2, 'caf\\xe9'\n\n"
        "def test_killed():\n    import os; os.abort()\n"
    )
    file = tmp_path / "outcomes.jsonl"
    words = ["-m", "pytest", "-p", "tools.gpu.outcomes", f"--outcomes={file}", "-p", "no:cacheprovider", tmp_path]
    python(*words)
    found = {name.partition("::")[2]: entry for name, entry in outcomes_in(file).items()}
    assert {name: entry["outcome"] for name, entry in found.items()} == {"test_good": "passed", "test_bad": "failed"}
    assert "caf\xe9" in found["test_bad"]["error"]
    assert any("assert 1 == 2" in line for line in found["test_bad"]["traceback"])
    again = python(*words, "--collect-only", "-q")
    assert "test_bad" in again.stdout
    assert "test_good" not in again.stdout


@pytest.mark.usefixtures("one_thread", "frozen_imports")
class TestSteps:
    @pytest.fixture(autouse=True)
    def _small(self, monkeypatch):
        """Random maps and few channels in the place of a backbone's."""
        monkeypatch.setattr("benchmarks.features.Features", lambda pictures, device: measuring.RandomFeatures(device))
        chosen = measuring.chosen_cases

        def with_few_channels(options):
            cases, *others = chosen(options)
            few = [replace(c, channels=24, out_channels=24, low_channels=16 if c.low_channels else 0) for c in cases]
            return few, *others

        monkeypatch.setattr(measuring, "chosen_cases", with_few_channels)

    def test_measuring(self, tmp_path):
        assert measuring.measure(tmp_path, 300.0, ["gpu-blocks", "97x97", "ours", "plain eager"], CPU, tiny=True) == 0
        record = load(tmp_path)
        assert len(record["cases"]) == 2
        first, second = record["cases"]
        (tmp_path / "benchmark.json").write_text(json.dumps(record | {"cases": [first | {"kept": True}]}))
        out_of_time = measuring.measure(tmp_path, 0.0, ["gpu-blocks", "97x97", "ours", "plain eager"], CPU, tiny=True)
        assert out_of_time == UNFINISHED
        assert [case.get("kept") for case in load(tmp_path)["cases"]] == [True]
        assert [case["name"] for case in load(tmp_path)["not_run"]] == [second["name"]]
        assert all(p["times_s"] for case in record["cases"] for p in case["providers"])

    def test_accuracy(self, tmp_path, monkeypatch):
        small = measuring.block_case
        monkeypatch.setattr(measuring, "block_case", lambda *a, **k: replace(small(*a, **k), size=(9, 11)))
        assert measuring.accuracy(tmp_path, 200.0, CPU) in (0, 1)  # a tiny map can switch a ReLU
        found = json.loads((tmp_path / RESULT).read_text())["accuracy"]
        assert len(found) == 2
        assert all("right" in verdicts["ours"] for verdicts in found.values())

    def test_profiling_without_a_profiler(self, tmp_path):
        cases = [replace(measuring.block_case("APNB", training=True), size=(9, 11), batch=1, dtype="float32")]
        assert profiling.run(tmp_path, 200.0, CPU, cases) == 0
        (tables,) = json.loads((tmp_path / RESULT).read_text())["profile"].values()
        assert set(tables) == {"ours", "plain eager"}
        assert any("convolution" in row["kernel"] for row in tables["plain eager"]["kernels"])
        assert all(table["device_us"] > 0 < table["host_us"] for table in tables.values())

    def test_products_of_both_libraries_agree(self):
        made = products.calls(16, 24, CPU, torch.float32, 2, (5, 7))
        for name in ("forward", "dX", "dW"):
            by_convolution, by_product = made[f"{name}, convolution"](), made[f"{name}, product"]()
            maps = next(
                x for x in (by_convolution if isinstance(by_convolution, tuple) else (by_convolution,)) if x is not None
            )
            rows = maps.flatten(1) if name == "dW" else maps.permute(0, 2, 3, 1).flatten(0, 2)
            torch.testing.assert_close(rows, by_product)


def test_failures_are_the_first_lines(tmp_path):
    record = sample_record() | {"stages": {"build": {"status": FAILED, "tree": "t", "exit_code": 1}}}
    record["tests"] = {"tests/a.py::test_x": {"outcome": "failed", "error": "ValueError: no", "stage": "tests"}}
    record["accuracy"] = {"APNB": {"ours": {"right": False, "tensor": "out", "error": 1.0, "allowed": 0.1, "maps": ""}}}
    lines = summary.markdown(record, "t").splitlines()
    assert lines[0].startswith("**WRONG: ours in APNB: out")
    assert "test tests/a.py::test_x: ValueError: no" in lines[1]
    assert "stage build failed" in lines[2]


def test_measurements_of_other_sources_are_replaced_whatever_they_timed(tmp_path):
    """Or a case that was right once would hide that it is wrong now."""
    stage, case = Stage("blocks", "measure"), sample_record()["cases"][0]
    store = Store(tmp_path, None, command.new_record())
    untimed = copy.deepcopy(case)
    for row in untimed["providers"]:
        row.pop("times_s", None)
    timed = copy.deepcopy(case)
    timed["providers"] = [row | {"times_s": [1.0]} for row in timed["providers"]]
    rounds = [("one", timed, timed), ("one", untimed, timed), ("two", untimed, untimed)]
    for second, (sources, cases, kept) in enumerate(rounds):
        store.record["stages"][stage.name] = {"status": DONE, "tree": sources}
        (store.place(stage) / "benchmark.json").write_text(json.dumps(sample_record() | {"cases": [cases]}))
        os.utime(store.place(stage) / "benchmark.json", times=(second, second))
        assert store.collect()
        (found,) = store.record["cases"]
        assert found["providers"] == kept["providers"], sources


def test_a_step_whose_time_was_over_is_gone_on_with(tmp_path):
    store = Store(tmp_path, None, command.new_record())
    stage = Stage("one", "x")
    campaign = Campaign(store, 100.0, "t", lambda *_: [sys.executable, "-c", f"exit({UNFINISHED})"], reserve=0.0)
    assert campaign.run([stage])
    assert store.entry(stage)["status"] == PARTIAL
    assert campaign.is_due(stage)


def test_no_more_stages_run_at_once_than_asked_for(tmp_path):
    busy = str(tmp_path / "busy")  # a second process cannot make this folder while a first one has it
    code = f"import os, time; os.mkdir({busy!r}); time.sleep(0.5); os.rmdir({busy!r})"
    store = Store(tmp_path / "record", None, command.new_record())
    group = [Stage(name, "x", together="first") for name in ("one", "two", "three")]
    campaign = Campaign(store, 100.0, "t", lambda *_: [sys.executable, "-c", code], reserve=0.0, at_once=1)
    assert campaign.run(group)
    assert [store.entry(stage)["status"] for stage in group] == [DONE] * 3


def test_rich_is_not_needed():
    code = "import sys; sys.modules['rich'] = None; import tools.gpu.steps, tools.gpu.measuring, tools.gpu.profiling"
    done = python("-c", f"{code}, tools.gpu.products, tools.gpu.finish, tools.gpu.summary, benchmarks.plots")
    assert done.returncode == 0, done.stderr


def test_a_stage_that_cannot_start_costs_itself(tmp_path):
    store = Store(tmp_path, None, command.new_record())

    def command_of(stage, place, seconds):
        return ["/does/not/exist"] if stage.name == "one" else [sys.executable, "-c", "pass"]

    campaign = Campaign(store, 100.0, "t", command_of, reserve=0.0)
    assert not campaign.run([Stage("one", "x"), Stage("two", "x")])
    assert {n: e["status"] for n, e in store.record["stages"].items()} == {"one": FAILED, "two": DONE}

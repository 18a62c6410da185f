"""What the benchmark writes down, prints and compares, and its commands."""

from __future__ import annotations

import copy
import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from benchmark_cases import OURS, PLAIN, POOL, RandomFeatures, named, sample_record, spoilt
from rich.console import Console

from benchmarks import __main__ as command, cases, compare, report, results, terminal
from benchmarks.features import find_pictures
from benchmarks.runner import OUT_OF_MEMORY, WRONG, CaseRun, Options

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.usefixtures("one_thread", "frozen_imports")


def printed(record):
    console = Console(file=io.StringIO(), width=200)
    terminal.print_record(record, console)
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
        terminal.print_record(sample_record(), console)
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

    def test_every_subject_has_its_mark(self, tmp_path):
        record = sample_record()
        (case,) = record["cases"]
        subjects = (*cases.OPERATORS, *cases.BLOCKS, cases.PAIR, cases.MODEL)
        record["cases"] = [{**case, "subject": subject} for subject in subjects]
        assert tmp_path / "roofline.png" in command.write(record, tmp_path)

    def test_nothing_measured_still_prints(self, tmp_path):
        record = sample_record()
        for row in record["cases"][0]["providers"]:
            row["status"] = WRONG
            del row["quartiles_s"], row["peak_bytes"]
        assert "WRONG" in printed(record)
        command.write(record, tmp_path)
        assert report.ours_failed(record)

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
        markdown = report.markdown(record).splitlines()
        assert any(line.startswith("| a | WRONG |") for line in markdown)
        assert markdown[2].startswith("**WRONG: a in")


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


class TestCommand:
    def test_a_run_from_end_to_end(self, tmp_path):
        options = ("--seeds", "1", "--seconds", "0.05", "--threads", "1", "--out", str(tmp_path))
        chosen = ("--cases", "smoke", "--only", "pyramid", "--effort", "quick")
        words = [sys.executable, "-m", "benchmarks", *chosen, *options]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
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
        assert command.main(["compare", str(tmp_path), str(tmp_path)]) == 0

    def test_a_missing_picture_is_one_clear_line(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(command.machine, "keep_large_blocks", dict)  # not in this process
        with pytest.raises(SystemExit) as stopped:
            command.main(["--images", str(tmp_path / "none"), "--out", str(tmp_path)])
        assert stopped.value.code == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "--images" in line
        assert "does not exist" in line

    def test_a_folder_gives_its_pictures(self, tmp_path):
        from PIL import Image

        for name in ("b.png", "a.jpg"):
            Image.new("RGB", (40, 30)).save(tmp_path / name)
        (tmp_path / "notes.txt").write_text("no picture")
        assert [path.name for path in find_pictures(str(tmp_path))] == ["a.jpg", "b.png"]

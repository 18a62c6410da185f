"""The model of row shards: its model says what its formula says, and the command measures, prints and records."""

import io
import json

import pytest
from rich.console import Console

from benchmarks.counting import count
from tools import scaling

GIVEN = scaling.Assumptions(rate=1e12, latency=1e-5, bandwidth=1e10)


def test_the_model_is_its_formula():
    work = scaling.Work(flop_per_pixel=2e6, flop_everywhere=1e9, messages=6, bytes=1_000_000)
    assert work.seconds(8000, 1, GIVEN) == pytest.approx(0.016 + 0.001)
    assert work.seconds(8000, 4, GIVEN) == pytest.approx(0.004 + 0.001 + 6e-5 + 1.5e6 / 1e10)
    assert work.efficiency(8000, 4, GIVEN) == pytest.approx(0.017 / (4 * 0.00521))
    # At 8: 0.017 / (8 · 0.003235) = 0.66; at 16: 0.017 / (16 · 0.0022475) = 0.47.
    assert work.last_that_pays(8000, GIVEN) == 8


@pytest.mark.parametrize("kind", scaling.BLOCKS)
def test_counted_work_is_linear_in_the_pixels(kind):
    work = scaling.work_of(kind, batch=1)
    counted = count(lambda: scaling._step_of(kind, 1, 20, 30)).flop
    assert counted == pytest.approx(work.flop_per_pixel * 600 + work.flop_everywhere, rel=1e-3)
    assert 0 < work.flop_everywhere < 1000 * work.flop_per_pixel
    assert work.messages == 6


def test_the_command_measures_and_records(tmp_path):
    path = tmp_path / "folder" / "scaling.json"
    command = ["--blocks", "APNB", "--processes", "2", "--map", "5", "6", "--steps", "2"]
    console = Console(file=io.StringIO(), width=200)
    assert scaling.main([*command, "--latency", "1e-4", "--out", str(path)], console) == 0
    printed = console.file.getvalue()
    assert "APNB 1×5×6, training step, gloo on this machine" in printed
    assert "The model assumes 2e+14 FLOP/s, 0.0001 s and 5e+10 bytes/s." in printed
    record = json.loads(path.read_text())
    (measured,) = record["measured"]
    assert (measured["processes"], len(measured["seconds"])) == (2, 2)
    assert 0 < measured["error"] < scaling.TOLERANCE
    assert record["assumptions"]["latency"] == 1e-4
    (model,) = record["model"]
    assert model["times"][0]["map"] == [97, 97]
    assert model["bytes"] == measured["bytes"]


def test_more_processes_than_rows_are_refused(capsys):
    with pytest.raises(SystemExit):
        scaling.main(["--map", "3", "6"])
    assert "--processes: expected from 1 to the 3 rows of the map, got [1, 2, 4]" in capsys.readouterr().err

"""Checkpoints: whole or not there, damage noticed, other runs refused, and a run goes on as if never interrupted."""

import contextlib
from dataclasses import replace

import pytest
import torch
from segmentation import checkpoint
from segmentation.distributed import Processes
from segmentation.errors import CheckpointError, DamagedError, UserError
from segmentation.monitor import Monitor
from segmentation.signals import StopRequest
from segmentation.training import Training, train

ALONE = Processes(torch.device("cpu"))


def run(options, until=None):
    """Train to the end, or stop as a signal would after the step ``until``."""
    training = Training(options, ALONE)
    training.resume()
    stop = StopRequest()
    with Monitor(options, training.step, True) as monitor:
        advance = training.advance

        def counted(images, labels):
            stop.number = 15 if training.step + 1 == until else 0
            return advance(images, labels)

        training.advance = counted
        assert train(training, monitor, stop) == (15 if until else 0)
    return training


def assert_same(first, second, path=""):
    """Bit for bit."""
    assert type(first) is type(second), path
    if isinstance(first, dict):
        assert first.keys() == second.keys(), path
        for key in first:
            assert_same(first[key], second[key], f"{path}/{key}")
    elif isinstance(first, list):
        assert len(first) == len(second), path
        for i, pair in enumerate(zip(first, second, strict=True)):
            assert_same(*pair, f"{path}/{i}")
    elif isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype, path
        assert torch.equal(first, second), path
    else:
        assert first == second, path


@pytest.mark.parametrize("settings", [{}, {"precision": "fp16"}, {"ohem": True, "workers": 1, "precision": "bf16"}])
def test_a_run_continues_bit_for_bit(tiny, tmp_path, settings):
    """Stopped inside the second epoch: weights, momenta, losses, random state and scaler end the same."""
    whole = run(tiny(out=tmp_path / "whole", steps=7, dropout=0.3, **settings))
    interrupted = tiny(steps=7, resume="last", dropout=0.3, **settings)
    stopped = run(interrupted, until=5)
    assert stopped.step == 5
    torch.manual_seed(torch.seed() % 2**31)
    resumed = run(interrupted)
    contents = [checkpoint.read(checkpoint.path_of(training.folder, 7)) for training in (whole, resumed)]
    assert len(contents[0]["losses"]) == 7
    assert contents[0]["optimizer"]["state"]
    assert_same(*contents)


def test_dropout_matters_to_the_test_above(tiny, tmp_path):
    """Else a random state that is not restored would go unnoticed."""
    losses = [run(tiny(out=tmp_path / str(p), steps=2, dropout=p)).loss_history() for p in (0.0, 0.3)]
    assert not torch.equal(*losses)


def test_a_checkpoint_of_a_plain_run_continues_fused(tiny):
    run(tiny(steps=4, blocks="plain"), until=2)
    assert run(tiny(steps=4, blocks="fused", resume="last")).step == 4


def test_a_failed_write_leaves_the_last_good_file(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    checkpoint.write(path, {"value": 1})

    def failing(content, file):
        file.write(b"half of it")
        raise OSError("disk full")

    with monkeypatch.context() as patch, contextlib.suppress(OSError):
        patch.setattr(torch, "save", failing)
        checkpoint.write(path, {"value": 2})
    assert torch.load(path) == {"value": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


@pytest.fixture(scope="module")
def finished_bytes():
    """Filled by the first test that trains: tests of damage need a checkpoint, not a run each."""
    return {}


@pytest.fixture
def stopped(tiny, finished_bytes):
    """Options of a run with checkpoints of steps 2 and 3."""
    options = tiny(steps=4, save_every=2, resume="last")
    folder = options.out / "checkpoints"
    if not finished_bytes:
        run(options, until=3)
        finished_bytes |= {path.name: path.read_bytes() for path in folder.iterdir()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in finished_bytes.items():
        (folder / name).write_bytes(content)
    assert [path.name for path in checkpoint.newest_first(folder)] == ["step_00000003.pt", "step_00000002.pt"]
    return options


def flip_a_bit(content):
    """Within a tensor, where torch.load would notice nothing."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def cut(content):
    return content[:-100]


def empty(content):
    return b""


@pytest.mark.parametrize("damage", [flip_a_bit, cut, empty])
def test_a_damaged_checkpoint_is_refused_by_name_and_the_last_good_one_used(stopped, damage, capsys):
    newest, good = checkpoint.newest_first(stopped.out / "checkpoints")
    before = good.read_bytes()
    newest.write_bytes(damage(newest.read_bytes()))
    with pytest.raises(DamagedError, match=str(newest)):
        checkpoint.read(newest)
    training = Training(stopped, ALONE)
    training.resume()
    assert training.step == 2
    assert f"refused: {newest}: " in capsys.readouterr().out.replace("\n", "")
    assert good.read_bytes() == before


def test_a_damaged_checkpoint_is_not_counted_among_those_kept(tiny, stopped):
    newest, _ = checkpoint.newest_first(stopped.out / "checkpoints")
    newest.write_bytes(b"")
    training = Training(tiny(steps=4, keep=1), ALONE)
    training.step = 2
    saved = training.save()
    assert checkpoint.newest_first(saved.parent) == [newest, saved]
    assert checkpoint.read(saved)["step"] == 2


def test_a_checkpoint_of_another_run_is_refused_by_name(tiny, stopped):
    newest, _ = checkpoint.newest_first(stopped.out / "checkpoints")
    expected = rf"{newest}: of another run, with batch_size 2 \(here 1\), lr 0.01 \(here 0.5\)"
    for resume in ("last", str(newest)):
        training = Training(tiny(steps=4, batch_size=1, lr=0.5, resume=resume), ALONE)
        weights = {name: value.clone() for name, value in training.network.state_dict().items()}
        with pytest.raises(CheckpointError, match=expected):
            training.resume()
        assert_same(weights, dict(training.network.state_dict()))
    assert len(checkpoint.newest_first(newest.parent)) == 2


def test_a_checkpoint_of_another_network_is_refused_by_name(stopped):
    newest, _ = checkpoint.newest_first(stopped.out / "checkpoints")
    network = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=rf"{newest}: of another network, .* is missing"):
        checkpoint.check_shapes(newest, {"weight": torch.zeros(2, 2)}, network)
    with pytest.raises(CheckpointError, match=r"weight is \(2, 3\) \(here \(2, 2\)\)"):
        checkpoint.check_shapes(newest, {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}, network)


def test_a_restart_goes_on_from_the_newest_checkpoint(tiny, stopped):
    """Not from the one that the first start was given."""
    _, older = checkpoint.newest_first(stopped.out / "checkpoints")
    for restarted, step in ((True, 3), (False, 2)):
        training = Training(tiny(steps=4, resume=str(older)), replace(ALONE, restarted=restarted))
        training.resume()
        assert training.step == step


def test_what_to_resume_is_never_guessed(tiny, stopped, tmp_path, capsys):
    with pytest.raises(CheckpointError, match="a run has been here; --resume continues it"):
        Training(tiny(steps=4), ALONE).resume()
    with pytest.raises(CheckpointError, match=r"nowhere.pt: no such checkpoint"):
        Training(tiny(steps=4, resume="nowhere.pt"), ALONE).resume()
    Training(tiny(out=tmp_path / "new", resume="last"), ALONE).resume()
    assert "starting anew" in capsys.readouterr().out
    torch.save({"weights": 1}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="no checkpoint of this program, it lacks format, recipe"):
        checkpoint.read(tmp_path / "other.pt")


def test_a_loss_that_is_not_finite_ends_the_run_and_reaches_no_checkpoint(tiny):
    options = tiny(lr=1e30, steps=6, save_every=1, log_every=1)
    with pytest.raises(UserError, match=r"the loss of step \d is (nan|inf); try a smaller --lr"):
        run(options)
    for path in checkpoint.newest_first(options.out / "checkpoints"):
        assert checkpoint.read(path)["losses"].isfinite().all()

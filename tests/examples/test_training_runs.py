"""Whole runs: what they leave, killed and resumed, and on two processes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import train as command
from gloo_pool import Pool
from PIL import Image
from segmentation import checkpoint
from segmentation.distributed import Processes
from segmentation.monitor import Monitor
from segmentation.options import Options, parse
from segmentation.results import write_results
from segmentation.signals import StopRequest
from segmentation.training import Training, train

EXAMPLES = Path(command.__file__).parent
ALONE = Processes(torch.device("cpu"))

DYING = """
import os, signal, sys
sys.path.insert(0, {examples!r})
import train
from segmentation.training import Training

advance = Training.advance

def dying(self, images, labels):
    if self.step == 3 and self.processes.rank == 1 and not self.processes.restarted:
        os.kill(os.getpid(), signal.SIGKILL)
    return advance(self, images, labels)

Training.advance = dying
sys.exit(train.main())
"""


def arguments_of(options):
    """The command line that gives these options."""
    result = []
    for name, value in vars(options).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            result.append(flag if value else "--no-" + flag[2:])
        elif isinstance(value, tuple) and value:
            result += [flag, *map(str, value)]
        elif value is not None and value != ():
            result += [flag, str(value)]
    return result


def start(options, *launcher, script=EXAMPLES / "train.py"):
    """The example in a process of its own, one thread per process."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    words = [sys.executable, *launcher, str(script), *arguments_of(options)]
    pipe = subprocess.PIPE
    return subprocess.Popen(words, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def finish(process, status=0):
    out, errors = process.communicate(timeout=240)
    assert process.returncode == status, out + errors
    return out + errors


def final(options):
    return checkpoint.read(checkpoint.path_of(options.out / "checkpoints", options.steps))


def test_the_command_line_gives_the_options(tiny, data):
    options = tiny(eval_scales=(0.5, 1.0), attention_pixel=(3, 4), resume="a.pt", flip=True, compile=True)
    assert parse(arguments_of(options)) == options
    assert parse(["--data", str(data), "--resume"]).resume == "last"
    small = parse(["--data", str(data), "--width-small", "--crop", "99"])
    assert (small.batch_size, small.crop, small.workers) == (4, 99, 1)
    assert (Options().batch_size, Options().crop) == (8, 512)


def test_a_run_ends_with_scores_weights_and_pictures(tiny, capsys):
    from segmentation.network import SmallBackbone

    import annnet_kernels as ak

    options = tiny(
        tensorboard=True, log_every=2, attention_pixel=(40, 3), window=40, eval_scales=(0.75, 1.0), flip=True, steps=4,
        evaluate_every=2,
    )  # fmt: skip
    assert command.main(arguments_of(options)) == 0
    printed = capsys.readouterr().out
    assert "step 4/4  loss " in printed
    assert "images/s" in printed
    assert "step 2: mIoU" in printed
    results = json.loads((options.out / "results.json").read_text())
    assert 0 <= results["mIoU"] <= 1
    assert f"step 4: mIoU {results['mIoU']:.2%}" in printed
    assert len(results["IoU"]) == 3
    assert len(results["losses"]) == 4
    for name in ("loss.png", "prediction.png", "attention.png"):
        assert np.asarray(Image.open(options.out / name).convert("L")).std() > 5, name
    assert list((options.out / "tensorboard").iterdir())
    network = ak.ANNNet(3, SmallBackbone(), channels=128, key_channels=64, value_channels=64)
    network.load_state_dict(torch.load(options.out / "weights.pt"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": Path("nowhere")}, "train.py: nowhere: no such folder"),
        ({"weights": "nowhere.pt"}, "train.py: --weights: no such file: nowhere.pt"),
        ({"resume": "nowhere.pt"}, "train.py: nowhere.pt: no such checkpoint"),
        ({"batch_size": 100}, "train.py: --batch-size: 100 is more than the 7 training pictures"),
        ({"attention_pixel": (999, 3), "steps": 1}, "train.py: --attention-pixel: 999 3 lies outside"),
    ],
)
def test_what_a_user_can_put_right_is_one_line(tiny, change, message, capsys):
    assert command.main(arguments_of(tiny(**change))) == 2
    assert capsys.readouterr().err.startswith(message)


def test_an_error_in_a_worker_is_one_line(tiny, data, capsys):
    for path in (data / "train/labels").iterdir():
        Image.fromarray(np.full((44, 56), 77, dtype=np.uint8)).save(path)
    assert command.main(arguments_of(tiny(workers=1))) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"train.py: {data}/train/images/")
    assert "label 77 is no class" in error
    assert error.count("\n") == 1


def test_a_killed_run_resumes_to_the_same_weights(tiny, tmp_path, capsys):
    """Ended by SIGTERM, resumed, ended by Ctrl-C, and resumed again, in this process, which costs no start.

    Loaders' workers get the signals as well.
    """
    settings = {"steps": 30, "log_every": 1, "dropout": 0.3, "workers": 1, "keep": 1}
    whole, interrupted = tiny(out=tmp_path / "whole", **settings), tiny(resume="last", **settings)
    steps = []
    for number in (signal.SIGTERM, signal.SIGINT):
        process = start(interrupted)
        taken = (line for line in process.stdout if line.startswith("step "))
        for _ in range(4):
            next(taken)
        os.killpg(process.pid, number)
        printed = finish(process, status=128 + number)
        (saved,) = checkpoint.newest_first(interrupted.out / "checkpoints")
        assert f"saved {saved}; --resume continues there" in printed
        steps.append(checkpoint.read(saved)["step"])
    assert 4 <= steps[0] < steps[0] + 4 <= steps[1] < 30
    assert command.main(arguments_of(interrupted)) == 0
    assert f"continuing at step {steps[1]} of 30" in capsys.readouterr().out
    assert command.main(arguments_of(whole)) == 0
    first, second = final(whole), final(interrupted)
    for part in ("network", "losses"):
        torch.testing.assert_close(first[part], second[part], rtol=0, atol=0)


def losses_alone(options):
    """The loss curve of one process with the joined batch."""
    training = Training(options, ALONE)
    with Monitor(options, 0, False) as monitor:
        assert train(training, monitor, StopRequest()) == 0
    return training.loss_history()


EXACT = {"precision": "fp64", "freeze_backbone_norm": True, "dropout": 0.0, "steps": 6, "save_every": 2, "keep": 9}
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def test_two_processes_one_of_them_killed_equal_one(tiny, tmp_path):
    """DDP with synchronised norms: rank 1 dies at step 3, torchrun restarts both from the checkpoint of step 2."""
    script = tmp_path / "dying.py"
    script.write_text(DYING.format(examples=str(EXAMPLES)))
    options = tiny(out=tmp_path / "two", **EXACT)
    printed = finish(start(options, *TWO, "--max-restarts", "1", script=script))
    assert "continuing at step 2 of 6" in printed
    assert printed.count("mIoU") == 1  # one process tells
    assert "Warning" not in printed
    expected = losses_alone(tiny(out=tmp_path / "one", **EXACT))
    torch.testing.assert_close(final(options)["losses"], expected, rtol=1e-9, atol=0)
    assert not torch.equal(expected[:-1], expected[1:])


def share_of_run(group, options):
    """What the command does between start and end, in one of two processes; the step that it began with."""
    training = Training(options, Processes(torch.device("cpu"), dist.get_rank(group), 2))
    training.resume()
    first = training.step
    with Monitor(options, first, training.processes.leads) as monitor:
        assert train(training, monitor, StopRequest()) == 0
        write_results(training, training.evaluate(monitor), monitor)
    return first


@pytest.fixture
def two_processes(tmp_path):
    processes = Pool(tmp_path, count=2)
    yield processes
    processes.close()


def test_two_fsdp_processes_continue_the_run_of_one(tiny, tmp_path, two_processes):
    """Sharded parameters and momenta from whole ones and back; with void that differs by picture, and hard pixels."""
    expected = losses_alone(tiny(out=tmp_path / "one", ohem=True, **EXACT))
    start_at = checkpoint.path_of(tmp_path / "one/checkpoints", 2)
    options = tiny(out=tmp_path / "two", parallel="fsdp", resume=str(start_at), ohem=True, **EXACT)
    assert two_processes.run(2, share_of_run, options) == [2, 2]
    assert (options.out / "prediction.png").exists()
    torch.testing.assert_close(final(options)["losses"], expected, rtol=1e-9, atol=0)
    one, two = final(tiny(out=tmp_path / "one", **EXACT)), final(options)
    torch.testing.assert_close(two["network"], one["network"], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(two["optimizer"]["state"], one["optimizer"]["state"], rtol=1e-6, atol=1e-8)

"""Checkpoint files that hold no weights, broken ones, malicious ones, and what may lie beside the weights."""

import os
import pickle

import numpy as np
import pytest
import torch
from checkpoint_states import (
    CONTAINERS,
    PADDLE_FUSION,
    assert_same,
    changed,
    paddle_state,
    randomised,
    save,
    save_paddle,
    unchanged,
)
from torch import nn

import annnet_kernels as ak


def test_a_file_without_weights_is_refused(tmp_path):
    block = ak.APNB(6, 6, 5, 5)
    for content in ({"epoch": 3}, [torch.ones(2)], {"state_dict": {}}):
        with pytest.raises(ValueError, match="path: expected a state dict, alone or under a name such as 'model'"):
            ak.load_checkpoint(block, save(content, tmp_path / "nothing.pth"))
    with pytest.raises(ValueError, match="path: expected one block or a whole head, got no asymmetric"):
        ak.load_checkpoint(block, save(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pth"))
    with pytest.raises(FileNotFoundError, match=r"path: no such file: .*missing\.pth"):
        ak.load_checkpoint(block, tmp_path / "missing.pth")
    with pytest.raises(TypeError, match="path: expected a path or a mapping, got 3 of type int"):
        ak.load_checkpoint(block, 3)
    with pytest.raises(TypeError, match="block_or_model: expected an instance"):
        ak.load_checkpoint("net", tmp_path / "linear.pth")


@pytest.mark.parametrize("ending", [".pth", ".pdparams"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.95])
def test_a_truncated_file_is_refused(ending, share, tmp_path):
    block = randomised(ak.AFNB(8, 12, 12, 5, 5))
    file = tmp_path / f"block{ending}"
    if ending == ".pth":
        save(block.state_dict(), file)
    else:
        save_paddle(paddle_state(block.state_dict(), PADDLE_FUSION), file)
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    check = unchanged(block)
    with pytest.raises(ValueError, match=f"path: .*block{ending} cannot be read as weights"):
        ak.load_checkpoint(block, file)
    check()


class Malicious:
    """Unpickling it calls what it was made with."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def write_all(path, content):
    path.write_bytes(pickle.dumps(content, protocol=4))
    return path


ATTACKS = {
    "os.system": lambda mark: Malicious(os.system, f"touch {mark}"),
    "eval": lambda mark: Malicious(eval, f"open({str(mark)!r}, 'w')"),
    "open": lambda mark: Malicious(open, str(mark), "w"),
    "getattr": lambda mark: Malicious(getattr, Malicious(open, str(mark), "w"), "close"),
    "numpy": lambda mark: Malicious(np.save, str(mark), [1]),
    "in an array": lambda mark: np.array([Malicious(open, str(mark), "w")], dtype=object),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
@pytest.mark.parametrize("ending", [".pth", "legacy.pth", "plain.pth", ".pdparams"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_in_a_file_is_executed(attack, ending, tmp_path):
    mark = tmp_path / "executed"
    content = {"state_dict": {"stages.0.W.weight": ATTACKS[attack](mark)}, "meta": ATTACKS[attack](mark)}
    file = tmp_path / f"bad{ending}"
    if ending in (".pth", "legacy.pth"):
        torch.save(content, file, _use_new_zipfile_serialization=ending == ".pth")
    else:
        write_all(file, content)
    mark.unlink(missing_ok=True)  # NumPy writes while it pickles
    block = ak.APNB(6, 6, 5, 5)
    with pytest.raises(ValueError, match="cannot be read as weights"):
        ak.load_checkpoint(block, file)
    assert not list(tmp_path.glob("executed*"))


def test_arrays_of_anything_but_numbers_are_refused(tmp_path):
    for value in (np.array(["a"]), "text", 3, np.array([True])):
        with pytest.raises(ValueError, match="bad: expected an array of numbers"):
            ak.load_checkpoint(ak.APNB(6, 6, 5, 5), write_all(tmp_path / "net.pdparams", {"bad": value}))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_an_array_in_the_place_of_a_weight_is_named(container, zipped, tmp_path):
    block = ak.APNB(6, 6, 5, 5)
    state = CONTAINERS[container](changed(block.state_dict(), stages__0__W__weight=np.ones((6, 5, 1, 1), np.float32)))
    torch.save(state, tmp_path / "block.pth", _use_new_zipfile_serialization=zipped)
    check = unchanged(block)
    expected = r"stages\.0\.W\.weight: expected a tensor, got a NumPy array"
    with pytest.raises(ValueError, match=f"path: .*{expected}"):
        ak.load_checkpoint(block, tmp_path / "block.pth")
    check()
    with pytest.raises(ValueError, match=f"state_dict: .*{expected}"):
        ak.to_dialect(state, "mmseg")


def test_arrays_beside_weights_are_read_over(tmp_path):
    source, target = randomised(ak.APNB(6, 6, 5, 5)), ak.APNB(6, 6, 5, 5)
    state = source.state_dict()
    for content in (
        {**state, "classes": np.ones(2), "best": np.float64(0.7)},
        {"state_dict": state, "a.b": np.ones(2)},
    ):
        ak.load_checkpoint(target, save(content, tmp_path / "block.pth"))
        assert_same(target.state_dict(), state)


def test_what_mmengine_stores_beside_weights_is_read_over(tmp_path):
    logging = pytest.importorskip("mmengine.logging", reason="needs MMEngine's history buffers")
    source, target = randomised(ak.APNB(6, 6, 5, 5)), ak.APNB(6, 6, 5, 5)
    content = {
        "meta": {"iter": 3, "best": np.float64(0.7)},
        "message_hub": {"log_scalars": {"loss": logging.HistoryBuffer([1.0, 2.0], [1, 1])}},
        "state_dict": source.state_dict(),
    }
    ak.load_checkpoint(target, save(content, tmp_path / "iter_3.pth"))
    assert_same(target.state_dict(), source.state_dict())

"""Checkpoint files that hold no weights, broken ones, malicious ones, and what may lie beside the weights."""

import argparse
import collections
import os
import pathlib
import pickle
import re
import types

import numpy as np
import pytest
import torch
from checkpoint_states import (
    CONTAINERS,
    PADDLE_FUSION,
    assert_same,
    changed,
    net,
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


BESIDE = {
    "Namespace": argparse.Namespace(lr=0.1, out=pathlib.Path("runs"), device=torch.device("cpu"), sizes=[1, 3]),
    "paths": [pathlib.Path("a"), pathlib.PurePosixPath("b"), pathlib.PureWindowsPath("c")],
    "defaultdict": collections.defaultdict(list, {"loss": [0.5, 0.25]}),
    "nested defaultdict": collections.defaultdict(dict, {"a": collections.defaultdict(float, {"b": 1.5})}),
    "NumPy numbers": {"best": np.float64(0.7), "epoch": np.int64(3), "flag": np.bool_(True), "small": np.float32(1)},
    "NumPy arrays": np.arange(6, dtype=np.int32).reshape(2, 3),
    "SimpleNamespace": types.SimpleNamespace(lr=0.1),
    "Counter": collections.Counter("abc"),
}


@pytest.mark.tool(
    "checkpoints with argparse.Namespace, paths, NumPy numbers", "works", "read over, nothing is executed"
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("beside", BESIDE)
def test_what_people_store_beside_weights_is_read_over(beside, zipped, tmp_path):
    source, target = randomised(ak.APNB(6, 6, 5, 5)), ak.APNB(6, 6, 5, 5)
    content = {"model": source.state_dict(), "args": BESIDE[beside], "epoch": 3}
    torch.save(content, tmp_path / "block.pth", _use_new_zipfile_serialization=zipped)
    for path in (tmp_path / "block.pth", content):
        ak.load_checkpoint(randomised(target), path)
        assert_same(target.state_dict(), source.state_dict())


class Configuration:
    """As OmegaConf's: a class that no loader knows."""

    def __init__(self):
        self.lr = 0.1


@pytest.mark.tool("checkpoints with other objects, whole models", "refused", "the message names the types and the cure")
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("what", ["configuration", "model", "function"])
def test_any_other_type_is_named_with_the_cure(what, zipped, tmp_path):
    source, target = randomised(ak.APNB(6, 6, 5, 5)), randomised(ak.APNB(6, 6, 5, 5))
    content = {
        "configuration": {"model": source.state_dict(), "cfg": Configuration()},
        "model": {"model": source},
        "function": {"model": source.state_dict(), "loss": nn.functional.cross_entropy},
    }[what]
    name = {
        "configuration": f"{__name__}.Configuration",
        "model": "annnet_kernels.blocks.modules.APNB",
        "function": "cross_entropy",
    }
    torch.save(content, tmp_path / "block.pth", _use_new_zipfile_serialization=zipped)
    check = unchanged(target)
    with pytest.raises(ValueError, match="cannot be read as weights: it holds") as error:
        ak.load_checkpoint(target, tmp_path / "block.pth")
    check()
    said = str(error.value)
    assert name[what] in said
    assert "torch.save(model.state_dict(), ...)" in said
    assert "\x1b" not in said
    assert "two options" not in said
    trusted = torch.load(tmp_path / "block.pth", weights_only=False)  # the cure
    ak.load_checkpoint(target, trusted)
    assert_same(target.state_dict(), source.state_dict())


NESTED = {
    **{
        name: (lambda state, name=name: {"epoch": 1, name: state})
        for name in ("net", "model_state_dict", "weights", "generator")
    },
    "deep": lambda state: {"checkpoint": {"model": {"state": state}}},
    "in a list": lambda state: [{"epoch": 1}, state],
    "beside an optimizer": lambda state: {"net": state, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
    "beside another part": lambda state: {"net": state, "backbone": {"layer1.0.weight": torch.ones(2)}},
    "Lightning": lambda state: {
        "state_dict": {f"model.{key}": x for key, x in state.items()},
        "pytorch-lightning_version": "2",
    },
    "compiled inside": lambda state: {key.replace("stages.", "stages._orig_mod."): x for key, x in state.items()},
    "wrapped inside": lambda state: {f"net._orig_mod.module.{key}": x for key, x in state.items()},
    "sharded inside": lambda state: {
        key.replace("stages.0", "_fsdp_wrapped_module.stages.0._checkpoint_wrapped_module"): x
        for key, x in state.items()
    },
    "averaged": lambda state: {"n_averaged": torch.tensor(3), **{f"module.{key}": x for key, x in state.items()}},
    "defaultdict": lambda state: collections.defaultdict(list, state),
    "parameters": lambda state: {key: nn.Parameter(x) if x.is_floating_point() else x for key, x in state.items()},
}


@pytest.mark.tool(
    "state dicts in containers of any name", "works", "files and mappings; module. and _orig_mod. anywhere"
)
@pytest.mark.parametrize("container", NESTED)
def test_the_one_state_dict_is_found_whatever_holds_it(container, tmp_path):
    source, target = randomised(ak.APNB(6, 6, 5, 5)), ak.APNB(6, 6, 5, 5)
    content = NESTED[container](source.state_dict())
    file = save(content, tmp_path / "block.pth")
    for path in (file, content) if isinstance(content, dict) else (file,):
        ak.load_checkpoint(randomised(target), path)
        assert_same(target.state_dict(), source.state_dict())


def test_two_state_dicts_are_named_and_one_can_be_passed(tmp_path):
    one, other = (randomised(ak.APNB(6, 6, 5, 5)) for _ in range(2))
    content = {"model": one.state_dict(), "model_ema": other.state_dict()}
    target = randomised(ak.APNB(6, 6, 5, 5))
    check = unchanged(target)
    for path in (save(content, tmp_path / "block.pth"), content):
        message = r"path: there are 2 state dicts, ['model'] and ['model_ema']: pass the one that you mean"
        with pytest.raises(ValueError, match=re.escape(message)):
            ak.load_checkpoint(target, path)
    check()
    ak.load_checkpoint(target, torch.load(tmp_path / "block.pth")["model_ema"])
    assert_same(target.state_dict(), other.state_dict())


@pytest.mark.parametrize("whole", [True, False], ids=["network", "block"])
def test_two_models_in_one_state_dict_are_named(whole, tmp_path):
    models = [net() if whole else ak.APNB(6, 6, 5, 5) for _ in range(3)]
    state = {f"model.{key}": x for key, x in models[0].state_dict().items()}
    state |= {f"ema_model.{key}": x for key, x in models[1].state_dict().items()}
    check = unchanged(models[2])
    with pytest.raises(ValueError, match=r"path: .*'?ema_model\.?'? ?(and|,) '?model"):
        ak.load_checkpoint(models[2], save({"state_dict": state}, tmp_path / "net.pth"))
    check()
    kept = {key: x for key, x in state.items() if key.startswith("ema_model.")}
    ak.load_checkpoint(models[2], kept)
    assert_same(models[2].state_dict(), models[1].state_dict())


def test_from_checkpoint_takes_a_mapping():
    source = net()
    made = ak.ANNNet.from_checkpoint({"net": source.state_dict()}, backbone=source.backbone, strict=True)
    assert_same(made.state_dict(), source.state_dict())


@pytest.mark.tool("safetensors files", "works", "by that package", package="safetensors")
def test_a_safetensors_file(tmp_path):
    torch_files = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    source, target = randomised(ak.AFNB(8, 12, 12, 5, 5)), randomised(ak.AFNB(8, 12, 12, 5, 5))
    torch_files.save_file(source.state_dict(), tmp_path / "block.safetensors")
    ak.load_checkpoint(target, tmp_path / "block.safetensors", strict=True)
    assert_same(target.state_dict(), source.state_dict())


def test_no_error_prints_a_whole_dictionary():
    state = ak.APNB(6, 6, 5, 5).state_dict()
    block = ak.APNB(6, 6, 5, 5)
    calls = [
        lambda: ak.to_dialect(state, state),
        lambda: ak.load_checkpoint(state, "block.pth"),
        lambda: ak.load_checkpoint(block, [state]),
        lambda: ak.load_checkpoint(block, {"a": {"b": 1}, **{f"k{i}": "x" * 1000 for i in range(50)}}),
        lambda: ak.replace_blocks(block, verify=state),
        lambda: ak.APNB(6, 6, 5, 5, psp_size=state),
        lambda: ak.APNB(6, state, 5, 5),
    ]
    for call in calls:
        with pytest.raises((TypeError, ValueError)) as error:
            call()
        assert len(str(error.value)) < 400, str(error.value)

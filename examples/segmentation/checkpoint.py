"""Checkpoints: a file is complete or not there, damage is noticed, and one of another run is refused by name."""

from __future__ import annotations

import os
import pickle
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from .errors import CheckpointError, DamagedError

FORMAT = 1
_PARTS = ("format", "recipe", "step", "network", "optimizer", "scaler", "random", "losses")


def write(path: Path, content: Any) -> None:
    """Write a file whole or not at all: under another name first, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read(path: Path) -> dict[str, Any]:
    """The content of a checkpoint; DamagedError if it is not complete or none at all."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load reads tensors without looking at their checksums
            damaged = archive.testzip()
        if damaged is not None:
            raise DamagedError(f"{path}: damaged, the checksum of {damaged} does not match")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such checkpoint") from error
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise DamagedError(f"{path}: damaged or no checkpoint ({str(error).splitlines()[0]})") from error
    missing = [part for part in _PARTS if not isinstance(content, dict) or part not in content]
    if missing:
        raise DamagedError(f"{path}: no checkpoint of this program, it lacks {', '.join(missing)}")
    if content["format"] != FORMAT:
        raise CheckpointError(f"{path}: written in format {content['format']}, this program reads {FORMAT}")
    return content


def check_recipe(path: Path, saved: dict[str, Any], ours: dict[str, Any]) -> None:
    """CheckpointError unless the checkpoint is of a run with the same recipe; names every difference."""
    names = [name for name in (*ours, *saved) if name not in ours or name not in saved or saved[name] != ours[name]]
    if names:
        differences = ", ".join(f"{name} {saved.get(name)} (here {ours.get(name)})" for name in dict.fromkeys(names))
        raise CheckpointError(f"{path}: of another run, with {differences}")


def check_shapes(path: Path, saved: dict[str, Tensor], network: nn.Module) -> None:
    """CheckpointError unless the checkpoint holds exactly the tensors of the network."""
    ours = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in saved.items()}
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            saved_shape, our_shape = theirs.get(name, "missing"), ours.get(name, "missing")
            raise CheckpointError(f"{path}: of another network, {name} is {saved_shape} (here {our_shape})")


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}.pt"


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints of a run; names sort by step."""
    return sorted(folder.glob("step_*.pt"), reverse=True)


def remove_older(path: Path, keep: int) -> None:
    """Keep ``keep`` checkpoints up to this one; a damaged one of a later step is not counted among them."""
    for old in [other for other in newest_first(path.parent) if other <= path][keep:]:
        old.unlink()


def gathered(state: Any) -> Any:
    """A state dict with every FSDP2 shard made whole, on the CPU; all processes must call it."""
    if isinstance(state, DTensor):
        return state.full_tensor().cpu()
    if isinstance(state, Tensor):
        return state.detach().cpu()
    if isinstance(state, dict):
        return {name: gathered(value) for name, value in state.items()}
    if isinstance(state, list):
        return [gathered(value) for value in state]
    return state


def load_network(network: nn.Module, saved: dict[str, Tensor]) -> None:
    """Whole tensors into a network, sharded or not."""
    state = network.state_dict()
    network.load_state_dict({name: _sharded_like(value, state[name]) for name, value in saved.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Whole momenta into an optimizer of sharded or whole parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        index: {
            name: _sharded_like(value, parameters[index]) if isinstance(value, Tensor) else value
            for name, value in values.items()
        }
        for index, values in saved["state"].items()
    }
    optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})


def _sharded_like(value: Tensor, like: Tensor) -> Tensor:
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)

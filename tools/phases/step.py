"""One training step of a block on tensors without memory: the launches of this package, and PyTorch's calls.

Every operator of this package is asked for its outputs as ``torch.compile`` would ask, and then, on meta tensors of the
same shapes, for the launches that the chosen GPU would get. Nothing is computed and nothing is launched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

import annnet_kernels as ak
from annnet_kernels.kernels import launch as launching
from annnet_kernels.kernels.launch import Device, Launch
from benchmarks.counting import bytes_of, decomposed, moves_nothing

from ..standin import recording

BLOCKS: dict[str, tuple[Callable[[], torch.nn.Module], tuple[int, ...]]] = {
    "AFNB": (lambda: ak.AFNB(1024, 2048, 2048, 256, 256), (1024, 2048)),
    "APNB": (lambda: ak.APNB(512, 512, 256, 256), (512,)),
}
"""By name: the block, and the channels of its maps."""


@dataclass(frozen=True)
class Phase:
    """One launch of this package, or one call of PyTorch.

    Args:
        kind: of the products, as ``Gpu.products`` has it.
        launch: None for a call of PyTorch.
    """

    name: str
    size: int
    flop: int
    kind: str
    launch: Launch | None


def phases_of(block: str, device: Device, batch: int, height: int, width: int) -> list[Phase]:
    """The phases of one training step under bfloat16 autocast, channels_last, in their order.

    The process believes in a GPU from then on.
    """
    recording._pretend_cuda()
    recording._route()
    launching.INTERPRETER = device  # what a tensor that lies on no GPU counts as
    make, channels = BLOCKS[block]
    with FakeTensorMode(allow_non_fake_inputs=True):
        module = make()
        for parameter in module.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        shapes = [(batch, count, height, width) for count in channels]
        maps = [
            torch.empty(shape, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last).requires_grad_()
            for shape in shapes
        ]
        leaves = [*maps, *module.parameters()]
        ledger = Ledger()
        with ledger:
            with torch.autocast("cpu", torch.bfloat16):
                out = module(*maps)
            torch.autograd.grad(out, leaves, torch.empty_like(out), allow_unused=True)
    return ledger.phases


class Ledger(TorchDispatchMode):
    """Writes down what each operator would do."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phases: list[Phase] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = _formula(func)
        if formula is None and (result := decomposed(self, func, args, kwargs)) is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if not (inputs or outputs) or func.namespace == "prim":
            return result
        flop = int(formula(*args, **kwargs, out_val=result)) if formula is not None else 0
        if func.namespace == "annnet":
            self.phases += _launched(func, args, kwargs, flop)
        elif not func.is_view and not moves_nothing(func, inputs, outputs):
            size = bytes_of([] if _only_writes(func) else inputs) + bytes_of(outputs)
            if func is torch.ops.aten.convolution_backward.default and outputs[:2] and args[-1][0] and args[-1][1]:
                size += bytes_of([args[0]])  # two products read the gradient
            kind = str(outputs[0].dtype if outputs else inputs[0].dtype).removeprefix("torch.")
            self.phases.append(Phase(str(func), size, flop, _kind(kind, "ieee"), None))
        return result


def _formula(func: Any) -> Callable[..., int] | None:
    """PyTorch has FLOP formulas for most products, but not for those that add to their first operand in place."""
    packet = func._overloadpacket
    if packet.__name__.endswith("_") and func.namespace == "aten":
        packet = getattr(torch.ops.aten, packet.__name__.removesuffix("_"), packet)
    return flop_registry.get(packet)


def _only_writes(func: Any) -> bool:
    """Whether an operator takes no more than the shape of a tensor."""
    name: str = func.__name__
    return name.startswith(("new_", "zeros_like", "ones_like", "full_like", "bernoulli_", "zero_", "fill_"))


def _launched(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], flop: int) -> Iterator[Phase]:
    """The launches of one of this package's operators."""
    launches: list[Launch] = []
    without_memory: dict[int, Tensor] = {}

    def meta(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if id(x) not in without_memory:
            without_memory[id(x)] = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        return without_memory[id(x)]

    run = Launch.run
    Launch.run = lambda self: launches.append(self)  # type: ignore[method-assign]
    try:
        with _disable_current_modes():
            func._op_dk(DispatchKey.CompositeExplicitAutograd, *tree_map(meta, args), **tree_map(meta, kwargs))
    finally:
        Launch.run = run  # type: ignore[method-assign]
    sizes = [_operand_bytes(launch.arguments) for launch in launches]
    for launch, size in zip(launches, sizes, strict=True):
        name = launch.kernel.__name__
        if name in _FLOP:
            own = _FLOP[name](launch.arguments)
        else:
            own = flop if size == max(sizes) and not any(other.kernel.__name__ in _FLOP for other in launches) else 0
        tensors = list(_tensors(launch.arguments))
        dtype = "float32" if all(x.dtype == torch.float32 for x in tensors) else "bfloat16"
        yield Phase(name, size, own, _kind(dtype, launch.arguments.get("PRECISION", "ieee")), launch)


def _kind(dtype: str, precision: str) -> str:
    return dtype if dtype in ("bfloat16", "float16") else precision


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _operand_bytes(arguments: dict[str, Any]) -> int:
    """What a launch must read or write at least once; a tensor that it reads and overwrites is two arguments."""
    return bytes_of(_tensors(arguments))


def _pixels_and_tokens(arguments: dict[str, Any]) -> int:
    scratch = arguments.get("scratch_ptr")
    if scratch is not None:
        return int(prod(scratch.shape[:2]) * arguments["n_tokens"])
    return int(prod(arguments["logsumexp_ptr"].shape) * arguments["key"].count)


_FLOP: dict[str, Callable[[dict[str, Any]], int]] = {
    "asymmetric_attention_fwd_kernel": lambda a: 2 * _pixels_and_tokens(a) * (a["key"].channels + a["value"].channels),
    "asymmetric_attention_bwd_pixels_kernel": lambda a: (
        2 * _pixels_and_tokens(a) * (2 * a["key"].channels + a["value"].channels)
    ),
    "asymmetric_attention_bwd_tokens_kernel": lambda a: 2 * _pixels_and_tokens(a) * a["map"].channels,
    "asymmetric_attention_sum_splits_kernel": lambda _: 0,
}
"""FLOP of a launch where an operator has several with products; elsewhere the operator's formula is its largest
launch's."""

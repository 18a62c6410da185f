"""Takes CPU tensors to the Triton kernels as if they lay on a GPU, and writes down what Triton is asked for.

What this depends on in the package stands in ``_route``; in Triton, in ``_Driver`` and ``_watch_compiler``.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from . import library

CAPABILITY, MULTIPROCESSORS = (9, 0), 132
MODES = ("compile", "record")


@dataclass(frozen=True)
class Launched:
    """One launch: the kernel's name, its grid and launch options, and its arguments as text, by name."""

    kernel: str
    grid: tuple[int, ...]
    warps: int
    stages: int
    signature: dict[str, str]


@dataclass(frozen=True)
class Variant:
    """One piece of machine code: what Triton's key for it is, and the CPU seconds that compiling it took."""

    kernel: str
    key: str
    seconds: float


@dataclass
class Recorder:
    """What was launched and what was compiled since ``install``."""

    mode: str
    launches: list[Launched] = field(default_factory=list)
    variants: list[Variant] = field(default_factory=list)
    watch: Callable[[bool], None] = field(default=lambda _: None, repr=False)

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """Inside this context launches of known plans are not written down, so that nothing of it counts as theirs."""
        self.watch(False)
        try:
            yield
        finally:
            self.watch(True)

    def clear(self) -> None:
        """Forget the launches; the variants stay, since Triton compiles each only once."""
        self.launches.clear()


def install(mode: str = "compile") -> Recorder:
    """Make this process believe in a Hopper GPU; it cannot be undone.

    Args:
        mode: ``"compile"`` compiles every kernel for sm_90 and goes through Triton's launcher up to the driver;
            ``"record"`` compiles nothing and writes down what would be.

    Returns:
        The recorder that is filled from now on.

    Raises:
        ValueError: an unknown mode.
        RuntimeError: there is no C compiler, or Triton's interpreter is on.
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    from annnet_kernels.runtime.backends import interpreting

    if interpreting():
        raise RuntimeError("the stand-in driver needs compiled kernels; unset TRITON_INTERPRET")
    library.load()
    # PyTorch's CUDA runtime finds the stand-in too, cannot start on it, and says so; it is not needed.
    warnings.filterwarnings("ignore", message="CUDA initialization")
    recorder = Recorder(mode)
    _pretend_cuda()
    _activate_driver()
    _watch_compiler(recorder)
    _watch_launches(recorder)
    _route()
    return recorder


def _pretend_cuda() -> None:
    """What the package asks PyTorch about the GPU."""
    properties = SimpleNamespace(
        name="stand-in for a Hopper GPU",
        major=CAPABILITY[0],
        minor=CAPABILITY[1],
        multi_processor_count=MULTIPROCESSORS,
        L2_cache_size=60 * 2**20,
        total_memory=140 * 2**30,
    )
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.current_device = lambda: 0
    cuda.get_device_capability = lambda *_, **__: CAPABILITY
    cuda.get_device_properties = lambda *_, **__: properties
    cuda.device = _NoDeviceGuard


class _NoDeviceGuard:
    """``torch.cuda.device`` without a device to switch to."""

    def __init__(self, *_: Any) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def _activate_driver() -> None:
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    standin: Any = CudaDriver()
    standin.get_device_capability = lambda *_: CAPABILITY
    standin.get_current_stream = lambda _: 0
    standin.get_current_device = lambda: 0
    driver.set_active(standin)


class _NotCompiled:
    """What a launch gets in the place of a compiled kernel that is only recorded."""

    function = 0
    packed_metadata = (4, 1, 0)

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, x: int, y: int, z: int, *_: Any) -> None:
        """Refuse the grids that the driver refuses when a kernel is compiled."""
        if not (1 <= x < 2**31 and 1 <= y < 2**16 and 1 <= z < 2**16):
            raise RuntimeError(f"the stand-in refuses the grid {(x, y, z)}")

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.run


def _watch_compiler(recorder: Recorder) -> None:
    from triton.runtime.jit import JITFunction

    compile_kernel = JITFunction._do_compile

    def watched(self: Any, key: Any, signature: Any, device: int, *others: Any) -> Any:
        start = _cpu_seconds()
        if recorder.mode == "record":
            kernel: Any = _NotCompiled()
            self.device_caches[device][0][key] = kernel
        else:
            kernel = compile_kernel(self, key, signature, device, *others)
        recorder.variants.append(Variant(self.__name__, str(key), _cpu_seconds() - start))
        return kernel

    JITFunction._do_compile = watched


def _cpu_seconds() -> float:
    """Of this process and of the assemblers and C compilers that it has waited for."""
    return sum(os.times()[:4])


def _watch_launches(recorder: Recorder) -> None:
    """Those of calls that are planned, and those of calls whose plan is known; the latter unless ``unwatched``."""
    from annnet_kernels.kernels.launch import Launch
    from annnet_kernels.kernels.plans import Plan

    run, make, repeat = Launch.run, Plan.__init__, Plan.run

    def described(launch: Launch) -> Launched:
        signature = {name: _described(value) for name, value in launch.arguments.items()}
        return Launched(launch.kernel.__name__, tuple(launch.grid), launch.num_warps, launch.num_stages, signature)

    def watched(self: Launch) -> Any:
        recorder.launches.append(described(self))
        return run(self)

    def made(self: Plan, launches: Any, *others: Any) -> None:
        make(self, launches, *others)
        vars(self)["launched"] = list(map(described, launches))

    def repeated(self: Plan, arguments: Any) -> None:
        recorder.launches += vars(self)["launched"]
        repeat(self, arguments)

    def watch(watches: bool) -> None:
        Plan.run = repeated if watches else repeat  # type: ignore[method-assign]

    Launch.run = watched  # type: ignore[method-assign]
    Plan.__init__ = made  # type: ignore[method-assign, assignment]
    watch(True)
    recorder.watch = watch


def _described(value: Any) -> str:
    """An argument as text: a tensor's dtype, shape and strides, a tuple's fields, else the value."""
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"*{dtype} {tuple(value.shape)} strides {value.stride()}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_described, value))})"
    return str(getattr(value, "value", value))


def _route() -> None:
    """Operators on CPU tensors are served as on a GPU, by the launches that a Hopper GPU would get."""
    from annnet_kernels.kernels import launch
    from annnet_kernels.ops import registration

    cuda = torch.device("cuda", 0)
    namespace: Any = registration
    choose = namespace.choose_backend

    def choose_for_cuda(operator: str, device: torch.device, dtype: torch.dtype, *rest: Any, **options: Any) -> str:
        return str(choose(operator, cuda, dtype, *rest, **options))

    namespace.choose_backend = choose_for_cuda
    namespace.launches = lambda _: True
    launch.INTERPRETER = launch.Device(CAPABILITY, MULTIPROCESSORS)  # what a CPU tensor counts as

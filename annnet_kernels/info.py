"""``python -m annnet_kernels.info``: what is installed here, and which implementation would serve which call.

Nothing is compiled and no operator is run.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator
from pathlib import Path

import torch

from . import __version__
from .checks import FLOAT_DTYPES
from .ops.registration import NAMESPACE, TRITON_MODULES
from .runtime import backends, native

_PACKAGES = ("triton", "numpy", "torchvision", "mmsegmentation", "mmcv", "mmcv-lite")


def report() -> str:
    """Versions, devices, instruction level, and for every device who serves which operator and dtype, or why not."""
    lines = [*_versions(), "", *_devices()]
    for device in _here():
        lines += ["", *_served(device)]
    return "\n".join(lines)


def _versions() -> Iterator[str]:
    yield f"annnet_kernels {__version__} ({Path(__file__).parent})"
    found = {name: _version(name) for name in _PACKAGES}
    packages = [f"{name} {version}" for name, version in found.items() if version is not None]
    yield f"Python {platform.python_version()}, torch {torch.__version__}, " + ", ".join(packages)
    if found["triton"] is None:
        yield "Triton: not installed"
    yield f"C++ extension: {_extension()}"
    yield f"CUDA part of it: {', '.join(native.cuda_targets()) or 'none'}"
    requested = backends.requested_backend()
    yield f"requested backend: {requested or 'none, the device chooses'} (ANNNET_BACKEND)"


def _extension() -> str:
    failure = native.why_not("cpu")
    if failure is not None:
        return f"not used: {failure}"
    own, built = native.processor_level(), native.built_cpu_levels()
    lacking = "" if own in built else f"; this processor has {own}, for which a build made on it would add kernels"
    return f"loaded, CPU level {native.cpu_level()} (built: {', '.join(built)}){lacking}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> Iterator[str]:
    yield f"cpu: {_processor()}, {torch.get_num_threads()} threads of PyTorch"
    if not torch.cuda.is_available():
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        yield f"cuda: no device (torch is built {built})"
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        capability = f"compute capability {device.major}.{device.minor}"
        yield f"cuda:{index}: {device.name}, {capability}, {device.total_memory / 2**30:.0f} GiB"


def _processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _here() -> list[torch.device]:
    """The CPU, and one GPU of every kind."""
    kinds = {torch.cuda.get_device_capability(i): i for i in reversed(range(torch.cuda.device_count()))}
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in sorted(kinds.values()))]


def operators() -> list[str]:
    """Names of all operators, without their namespace; in-place forms run the implementations of the others."""
    names = (name.partition("::") for name in torch._C._dispatch_get_all_op_names())
    return sorted({name.partition(".")[0].removesuffix("_") for space, _, name in names if space == NAMESPACE})


def _served(device: torch.device) -> Iterator[str]:
    """A table of implementations, then every reason against one that was preferred to it."""
    dtypes = [str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES]
    width = max(map(len, operators()))
    yield f"{device!s:<{width}}  " + "".join(f"{dtype:<11}" for dtype in dtypes)
    reasons: dict[str, set[str]] = {}
    for operator in operators():
        row = []
        for dtype in FLOAT_DTYPES:
            backend, against = served_by(operator, device, dtype)
            row.append(backend or "refused")
            for other, reason in against.items():
                reasons.setdefault(f"not {other}: {reason}", set()).add(operator)
        yield f"{operator:<{width}}  " + "".join(f"{backend:<11}" for backend in row)
    for reason, concerned in reasons.items():
        few = f" ({', '.join(sorted(concerned))})" if len(concerned) < len(operators()) else ""
        yield reason + few


def served_by(operator: str, device: torch.device, dtype: torch.dtype) -> tuple[str | None, dict[str, str]]:
    """Which implementation would serve a call, and why not those that would come first; None if a request cannot run.

    Args:
        operator: a name out of :func:`operators`.
        device, dtype: of its tensors.
    """
    requested = backends.requested_backend()
    against: dict[str, str] = {}
    for backend in backends.BACKENDS if requested is None else (requested,):
        if requested is None and backend == "triton" and device.type != "cuda":
            reason: str | None = "Triton serves CUDA devices; elsewhere only its interpreter, on request"
        else:
            reason = backends.why_not(backend, operator, device, dtype, has_triton=operator in TRITON_MODULES)
        if reason is None:
            return backend, against
        against[backend] = reason
    return None, against


if __name__ == "__main__":
    print(report())

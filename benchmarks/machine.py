"""The machine: its record, its limits (copy bandwidth, matrix products), its free memory, and its allocator."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import annnet_kernels
from annnet_kernels.runtime import native

from .measure import seconds_of

ROOT = Path(__file__).resolve().parent.parent

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_INT_MAX = 2**31 - 1


@cache
def keep_large_blocks() -> dict[str, Any]:
    """Make malloc keep freed blocks instead of returning them to the system, and record whether it does.

    By default glibc maps every large tensor anew and the kernel fills its pages with zeros one fault at a time: the
    plain block took 68 or 122 ms by that alone. Same as MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ in the
    environment, without a second process.
    """
    record: dict[str, Any] = {"page_faults_before": _page_faults()}
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        accepted = mallopt(_M_MMAP_THRESHOLD, _INT_MAX) == 1 and mallopt(_M_TRIM_THRESHOLD, _INT_MAX) == 1
        record["setting"] = "mallopt(M_MMAP_THRESHOLD, M_TRIM_THRESHOLD) = 2 GiB" + ("" if accepted else ", refused")
    else:
        record["setting"] = "as the system has it"
    record["page_faults_after"] = _page_faults()
    return record


def _page_faults() -> int:
    """Pages that the system must supply for the last two of a dozen tensors of 64 MiB, once reuse has settled."""
    before = 0
    for repetition in range(12):
        if repetition == 10:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(64 * 2**20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def available_bytes(device: torch.device) -> int:
    """Memory that a call may still take on ``device``: what is free, and on a CPU what the container allows."""
    if device.type == "cuda":
        reserved_unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved_unused
    free = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = [int(fields["MemAvailable"].split()[0]) * 1024]
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        free.append(int(limit.read_text()) - int(used.read_text()))
    return min(free)


def l2_bytes(device: torch.device) -> int:
    """Size of the last cache before memory on a GPU; 0 on a CPU, where inputs are not rotated."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size) if device.type == "cuda" else 0


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _commit() -> str:
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return "unknown"
    return f"{commit}-modified" if _git("status", "--porcelain", "--untracked-files=no") else commit


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _extension() -> str:
    reason = native.why_not("cpu")
    if reason is not None:
        return reason
    cuda = "without a CUDA part" if native.why_not("cuda") else "with a CUDA part"
    return f"loaded, CPU level {native.cpu_level()}, {cuda}"


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()


def environment(device: torch.device) -> dict[str, Any]:
    """All that a reader needs to judge or repeat a measurement."""
    record: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": [_without_folders(argument) for argument in sys.argv],
        "commit": _commit(),
        "device": device.type,
        "device_name": device_name(device),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {
            name: _installed(name)
            for name in ("torch", "triton", "torchvision", "numpy", "mmsegmentation", "transformers")
        },
        "annnet_kernels": annnet_kernels.__version__,
        "extension": _extension(),
        "allocator": keep_large_blocks() if device.type == "cpu" else "PyTorch's caching allocator",
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("ANNNET_", "OMP_", "MKL_", "MALLOC_", "GLIBC_", "LD_PRELOAD", "PYTORCH_", "TORCH"))
        },
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record["gpu"] = {
            "capability": f"{properties.major}.{properties.minor}",
            "memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "l2": properties.L2_cache_size,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "tf32": [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32],
        }
    return record


def limits(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> dict[str, Any]:
    """Rates of this very machine: bytes/s of a copy (read and write), FLOP/s of the fastest large product per dtype."""
    large = device.type == "cuda"
    source = torch.empty(2**30 if large else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    measured: dict[str, Any] = {"copy_bytes_per_s": 2 * source.nbytes / _fastest(lambda: target.copy_(source), device)}
    side = 8192 if large else 1024
    for dtype in dtypes:
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        pixels = a.view(1, side, side // 32, 32)
        kernel = b.view(side, side, 1, 1)
        layouts = (torch.contiguous_format, torch.channels_last)
        maps = [(pixels.contiguous(memory_format=f), kernel.contiguous(memory_format=f)) for f in layouts]
        fastest = min(
            _fastest(lambda: torch.mm(a, b), device),  # noqa: B023 called at once
            *(_fastest(lambda: F.conv2d(x, w), device) for x, w in maps),  # noqa: B023
        )
        measured[f"flop_per_s_{str(dtype).removeprefix('torch.')}"] = 2 * side**3 / fastest
    return measured


def _fastest(call: Any, device: torch.device) -> float:
    """Seconds of the fastest of several warm calls: a limit is what the machine can do undisturbed."""
    return min([seconds_of(call, device) for _ in range(12)][2:])


@contextmanager
def exact_float32(dtype: str) -> Iterator[None]:
    """No TF32 while a float32 case runs, in cuDNN's convolutions either, which use it unasked; others run as ever.

    With it plain PyTorch has an error of 4e-4 and would be called wrong, and its time would be that of another
    computation than ours.
    """
    backends: Any = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends if dtype == "float32" else ():
            backend.allow_tf32 = False
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


def _without_folders(argument: str) -> str:
    """A path by its last part: where things lie on a machine is nobody's business."""
    return Path(argument).name if Path(argument).exists() else argument

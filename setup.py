"""Builds the native extension annnet_kernels._C from csrc/; metadata is in pyproject.toml.

    python setup.py build_ext --inplace           for running from the checkout
    pip install --no-build-isolation .            for installing

| environment          | effect                                                                                  |
| ANNNET_NATIVE=0      | no extension                                                                            |
| ANNNET_CUDA=0        | no CUDA part                                                                            |
| ANNNET_CPU_LEVELS    | instruction levels of the CPU kernels beside the baseline: `native` (default), the      |
|                      | highest that this processor has; `runnable`, all that it has; `all`, for a wheel that   |
|                      | other machines install; or names, as `avx2,avx512`                                      |
| ANNNET_CPU=0         | no CPU part: the CUDA part alone builds faster                                          |
| ANNNET_DEBUG=1       | -O0 -g instead of -O3                                                                   |
| CXX, MAX_JOBS        | compiler and parallel jobs, as everywhere in PyTorch                                    |
| CUDA_HOME            | toolkit, instead of that of the nvcc on the PATH                                        |
| TORCH_CUDA_ARCH_LIST | GPU architectures, instead of the visible GPUs' own or, without any, the usual ones     |

The extension needs the very torch that will load it, so torch is no build requirement: under pip's build isolation,
which would fetch another torch, the extension is left out. Whatever is left out costs speed only, and one line says so.
"""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zlib
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    torch = None

NAME = "annnet_kernels._C"
COMMAND = "pip install --no-build-isolation ."
CPU_LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16")
CUDA_ARCHITECTURES = (80, 86, 89, 90, 100, 120)


def leave_out(what: str, reason: str) -> None:
    """The one line about a part that is not built."""
    print(f"annnet_kernels: {what} left out: {reason}; for a build with it: {COMMAND}", file=sys.stderr)


def first_line(text: str, mark: str = "") -> str:
    """The first line of a tool's complaint, if any holds ``mark`` the first of those."""
    lines = text.strip().splitlines() or ["no message"]
    return next((line for line in lines if mark in line), lines[0]).strip()


def compiler_problem() -> str | None:
    """Why the C++ compiler cannot compile an extension module, None if it can."""
    compiler = cpp_extension.get_cxx_compiler()
    include = f"-I{sysconfig.get_path('include')}"
    command = [compiler, include, "-x", "c++", "-fsyntax-only", "-"]
    try:
        probe = subprocess.run(command, input="#include <Python.h>\n", capture_output=True, text=True)
    except OSError as error:
        return f"no C++ compiler ({error})"
    if probe.returncode == 0:
        return None
    return f"the C++ compiler {compiler} does not compile Python.h ({first_line(probe.stderr)})"


def processor_level() -> str:
    """The highest instruction level of this processor, asked by a program; the highest of all if that does not run."""
    code = "int main(int, char**) { return static_cast<int>(annnet::processor_level()); }\n"
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/level"
        command = [cpp_extension.get_cxx_compiler(), "-std=c++17", "-Icsrc", "-x", "c++", "-", "-o", program]
        try:
            subprocess.run(command, input=f'#include "cpu/processor.h"\n{code}', check=True, text=True)
            return CPU_LEVELS[subprocess.run([program]).returncode]
        except (OSError, subprocess.CalledProcessError, IndexError):
            return CPU_LEVELS[-1]


def cpu_levels() -> list[str]:
    """The instruction levels to build, lowest first; the baseline is always among them."""
    wanted = os.environ.get("ANNNET_CPU_LEVELS") or "native"
    if wanted == "all":
        return list(CPU_LEVELS)
    if wanted in ("native", "runnable"):
        own = CPU_LEVELS.index(processor_level())
        return [name for i, name in enumerate(CPU_LEVELS) if i in (0, own) or (wanted == "runnable" and i < own)]
    names = wanted.split(",")
    unknown = [name for name in names if name not in CPU_LEVELS]
    if unknown:
        expected = f"native, runnable, all or names out of {', '.join(CPU_LEVELS)}"
        raise SystemExit(f"environment variable ANNNET_CPU_LEVELS: expected {expected}, got {unknown[0]!r}")
    return [name for name in CPU_LEVELS if name in ("baseline", *names)]


class Missing(Exception):
    """Why the CUDA part cannot be built."""


class CudaPart(NamedTuple):
    """What the CUDA part adds to the extension: compiled kernels, headers for their host code, and the targets."""

    kernels: Path
    include: Path
    targets: list[str]


def ask(*command: str) -> str:
    """What a tool prints."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise Missing(str(error)) from error
    if done.returncode != 0:
        raise Missing(f"{command[0]} failed ({first_line(done.stderr + done.stdout, 'error')})")
    return done.stdout + done.stderr


def find_toolkit() -> tuple[str, Path]:
    """nvcc and the root of its toolkit. nvcc is asked for it: what is on the PATH may be a link or a script."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if nvcc is None:
        raise Missing(f"no nvcc in {home}/bin" if home else "no nvcc on the PATH")
    top = re.search(r"^#\$ TOP=(.+)$", ask(nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull), re.M)
    root = Path(top[1].strip() if top else Path(nvcc).resolve().parent.parent).resolve()
    release = re.search(r"release (\d+)\.", ask(nvcc, "--version"))
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        raise Missing(f"{nvcc} is of CUDA {release[1] if release else '?'}, torch was built for {torch.version.cuda}")
    if not (root / "include" / "cuda_runtime_api.h").exists():
        raise Missing(f"the toolkit {root} has no include/cuda_runtime_api.h")
    return nvcc, root


def cuda_targets(nvcc: str) -> list[str]:
    """nvcc's flags for the architectures: machine code of each, and PTX of the last for GPUs to come."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return cpp_extension._get_cuda_arch_flags()
    known = {int(number) for number in re.findall(r"compute_(\d+)\b", ask(nvcc, "--list-gpu-arch"))}
    visible = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    own = {10 * major + minor for major, minor in map(torch.cuda.get_device_capability, visible)}
    chosen = sorted(known & (own or {*CUDA_ARCHITECTURES}))
    if not chosen:
        raise Missing(f"{nvcc} knows none of the architectures {', '.join(f'sm_{n}' for n in sorted(own))}")
    return [f"-gencode=arch=compute_{n},code=sm_{n}" for n in chosen] + [
        f"-gencode=arch=compute_{chosen[-1]},code=compute_{chosen[-1]}"
    ]


def compile_cuda(folder: Path) -> CudaPart | None:
    """The CUDA part, compiled into ``folder`` unless it lies there; None if it is not wanted.

    nvcc is called here and not by PyTorch, which would give up the whole extension where it fails.
    """
    if os.environ.get("ANNNET_CUDA") == "0" or torch.version.cuda is None:
        return None
    nvcc, root = find_toolkit()
    targets = cuda_targets(nvcc)
    optimise = ["-O0", "-g"] if os.environ.get("ANNNET_DEBUG") == "1" else ["-O3"]
    host = ["-ccbin", os.environ["CXX"]] if os.environ.get("CXX") else []
    command = [nvcc, "-std=c++17", *optimise, *host, "-Xcompiler=-fPIC", "--threads=0", *targets]
    kernels = folder.resolve() / f"cuda_{zlib.crc32(' '.join(command).encode()):08x}.o"
    newest = max(source.stat().st_mtime for source in Path("csrc").rglob("*") if source.suffix in (".cu", ".h"))
    if not kernels.exists() or kernels.stat().st_mtime < newest:
        folder.mkdir(parents=True, exist_ok=True)
        ask(*command, "-c", "csrc/cuda/pyramid_pool.cu", "-o", str(kernels))
    return CudaPart(kernels, root / "include", re.findall(r",code=(\w+)", " ".join(targets)))


def with_cpu_part() -> bool:
    return os.environ.get("ANNNET_CPU") != "0"


def cpu_extension() -> Extension:
    """The CPU part. -fopenmp makes at::parallel_for parallel; at link time it would bring in a second OpenMP runtime
    beside torch's own, so there it is not given and the symbols come from the one that libtorch_cpu is linked to."""
    sources = ["csrc/host.cpp", "csrc/cpu/levels.cpp"] if with_cpu_part() else ["csrc/library.cpp"]
    optimise = ["-O0", "-g"] if os.environ.get("ANNNET_DEBUG") == "1" else ["-O2", "-g0"]
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    return cpp_extension.CppExtension(
        NAME,
        sources=sources,
        include_dirs=[str(Path("csrc").resolve())],
        # -Wno-…: GCC 12 warns of the undefined vectors in its own immintrin.h.
        define_macros=[] if with_cpu_part() else [("ANNNET_WITHOUT_CPU", None)],
        extra_compile_args={"cxx": [*optimise, *openmp, "-Wno-maybe-uninitialized"]},
        optional=True,
    )


def add_levels(extension: Extension, levels: list[str]) -> None:
    """The kernels of these levels; they come first, since each takes longer to compile than all else."""
    extension.sources = [f"csrc/cpu/levels/{name}.cpp" for name in reversed(levels)] + extension.sources
    extension.define_macros += [(f"ANNNET_BUILDS_{name.upper()}", None) for name in levels]


def add_cuda(extension: Extension, part: CudaPart) -> None:
    """The commands of the CPU part stay the same, hence CPATH: a second attempt without CUDA compiles nothing twice.
    libcudart is not named at link time: the one that libc10_cuda is linked to serves."""
    os.environ["CPATH"] = os.pathsep.join(filter(None, [str(part.include), os.environ.get("CPATH")]))
    extension.sources = [*extension.sources, *map(str, sorted(Path("csrc/cuda").glob("*.cpp")))]
    extension.extra_objects = [str(part.kernels)]
    extension.libraries = [*extension.libraries, "c10_cuda"]


class LeaveOut(build_ext):
    """Builds nothing and says so."""

    def run(self) -> None:
        leave_out("the C++ extension", "the build environment has no torch")


class AskForExtension(build):
    """Runs build_ext without any extension: the wheel is of any platform then, and LeaveOut still speaks."""

    sub_commands = tuple((name, None if name == "build_ext" else needed) for name, needed in build.sub_commands)


if torch is None:
    extensions, commands = [], {"build": AskForExtension, "build_ext": LeaveOut}
else:

    class Build(cpp_extension.BuildExtension.with_options(use_ninja=cpp_extension.is_ninja_available())):
        """Builds the extension, if it can, with a record of the torch and the GPUs that it was built for."""

        def run(self) -> None:
            if not self.extensions:
                return
            problem = compiler_problem()
            if problem is None:
                levels = cpu_levels() if with_cpu_part() else []
                print(f"annnet_kernels: building the C++ extension for {', '.join(levels) or 'CUDA'}", flush=True)
                add_levels(self.extensions[0], levels)
                problem = self.build_with(self.cuda_part())
            if problem is not None:
                leave_out("the C++ extension", problem)

        def cuda_part(self) -> CudaPart | None:
            try:
                return compile_cuda(Path(self.build_temp))
            except Missing as reason:
                leave_out("the CUDA part", str(reason))
                return None

        def build_with(self, cuda: CudaPart | None) -> str | None:
            """Build, and without the CUDA part if that is in the way; why it failed, None if it did not."""
            (extension,) = self.extensions
            before = dict(vars(self)), copy.deepcopy(vars(extension))
            extension.optional = False  # where failures are reported here, setuptools must not swallow them
            if cuda is not None:
                add_cuda(extension, cuda)
            try:
                super().run()
            except Exception as error:
                vars(self).update(before[0])
                vars(extension).update(before[1])
                problem = f"the build failed ({first_line(str(error))})"
                if cuda is None:
                    return problem
                leave_out("the CUDA part", problem)
                return self.build_with(None)
            record = {"torch": torch.__version__, "cuda": cuda.targets if cuda else []}
            Path(self.get_ext_fullpath(NAME)).with_suffix(".json").write_text(json.dumps(record) + "\n")
            return None

    extensions, commands = [cpu_extension()], {"build_ext": Build}

if os.environ.get("ANNNET_NATIVE") == "0":
    extensions, commands = [], {}

if __name__ == "__main__":
    setup(ext_modules=extensions, cmdclass=commands)

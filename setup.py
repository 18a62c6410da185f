"""Builds the native extension annnet_kernels._C from csrc/; metadata is in pyproject.toml.

    python setup.py build_ext --inplace           for running from the checkout
    pip install --no-build-isolation .            for installing

| environment        | effect                                              |
| ANNNET_NATIVE=0    | no extension                                        |
| ANNNET_DEBUG=1     | -O0 -g instead of -O3                               |
| CXX, MAX_JOBS      | compiler and parallel jobs, as everywhere in PyTorch |

The extension needs the very torch that will load it, so torch is no build requirement: under pip's build isolation,
which would fetch another torch, the extension is left out. Whatever is left out costs speed only, and one line says so.
"""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    torch = None

NAME = "annnet_kernels._C"
COMMAND = "pip install --no-build-isolation ."


def leave_out(what: str, reason: str) -> None:
    """The one line about a part that is not built."""
    print(f"annnet_kernels: {what} left out: {reason}; for a build with it: {COMMAND}", file=sys.stderr)


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
    complaint = (probe.stderr.strip().splitlines() or ["no message"])[0]
    return f"the C++ compiler {compiler} does not compile Python.h ({complaint})"


def cpu_extension() -> Extension:
    """The CPU part. -fopenmp makes at::parallel_for parallel; at link time it would bring in a second OpenMP runtime
    beside torch's own, so there it is not given and the symbols come from the one that libtorch_cpu is linked to."""
    sources = [Path("csrc/library.cpp"), *sorted(Path("csrc/cpu").rglob("*.cpp"))]
    optimise = ["-O0", "-g"] if os.environ.get("ANNNET_DEBUG") == "1" else ["-O3", "-g0"]
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    return cpp_extension.CppExtension(
        NAME,
        sources=[str(source) for source in sources],
        include_dirs=[str(Path("csrc").resolve())],
        # -Wno-…: GCC 12 warns of the undefined vectors in its own immintrin.h.
        extra_compile_args={"cxx": [*optimise, *openmp, "-Wno-maybe-uninitialized"]},
        optional=True,
    )


class LeaveOut(build_ext):
    """Builds nothing and says so."""

    def run(self) -> None:
        leave_out("the C++ extension", "the build environment has no torch")


if torch is None:
    extensions, command = [Extension(NAME, sources=[], optional=True)], LeaveOut
else:

    class Build(cpp_extension.BuildExtension.with_options(use_ninja=cpp_extension.is_ninja_available())):
        """Builds the extension, if it can, with the record of the torch it was built for."""

        def run(self) -> None:
            if not self.extensions:
                return
            problem = compiler_problem()
            if problem is None:
                try:
                    super().run()
                except Exception as error:
                    problem = f"the build failed ({str(error).strip().splitlines()[0]})"
            if problem is not None:
                leave_out("the C++ extension", problem)
                return
            library = Path(self.get_ext_fullpath(NAME))
            library.with_suffix(".json").write_text(json.dumps({"torch": torch.__version__}) + "\n")

    extensions, command = [cpu_extension()], Build

if os.environ.get("ANNNET_NATIVE") == "0":
    extensions = []

setup(ext_modules=extensions, cmdclass={"build_ext": command})

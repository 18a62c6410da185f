"""The C++ extension as a whole: level, build record, OpenMP, and what happens where it cannot be built or loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fresh
import pytest
from fresh import CHECKOUT

import annnet_kernels
from annnet_kernels.runtime import native

PACKAGE = Path(annnet_kernels.__file__).parent
USE = (
    "import torch, annnet_kernels as ak; from annnet_kernels.runtime import native;"
    "ak.pyramid_pool(torch.randn(1, 2, 9, 9)); print(ak.last_backend('pyramid_pool'), native.cpu_level())"
)

built = pytest.mark.skipif(native.why_not("cpu") is not None, reason=f"native: {native.why_not('cpu')}")
from_checkout = pytest.mark.skipif(not (CHECKOUT / "setup.py").exists(), reason="needs the checkout's setup.py")


def _build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True)


def _copy_package(target: Path, with_library: bool) -> Path:
    ignore = shutil.ignore_patterns("__pycache__", *(() if with_library else ("_C.*",)))
    shutil.copytree(PACKAGE, target / "annnet_kernels", ignore=ignore)
    return target


def _copy_checkout(target: Path) -> Path:
    _copy_package(target, with_library=False)
    shutil.copytree(CHECKOUT / "csrc", target / "csrc")
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        if (CHECKOUT / name).exists():
            shutil.copy(CHECKOUT / name, target)
    return target


def _lines_about_us(run: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in (run.stdout + run.stderr).splitlines() if line.startswith("annnet_kernels: ")]


@built
def test_the_environment_lowers_the_level() -> None:
    run = fresh.python(USE, ANNNET_CPU_LEVEL="baseline")
    assert run.stdout.split() == ["native", "baseline"], run.stderr


@built
def test_an_unknown_level_is_an_error_that_names_the_levels() -> None:
    run = fresh.python(USE, ANNNET_CPU_LEVEL="sse9")
    assert run.returncode != 0
    assert "ANNNET_CPU_LEVEL: expected baseline, avx2, avx512 or avx512_bf16, got 'sse9'" in run.stderr


@built
def test_a_level_that_the_processor_lacks_is_a_warning() -> None:
    from annnet_kernels import _C

    highest = "avx512_bf16"
    if native.processor_level() == highest:
        pytest.skip("this processor has every level")
    run = fresh.python(USE, ANNNET_CPU_LEVEL=highest)
    assert run.stdout.split() == ["native", _C.cpu_levels()[-1]]
    assert "RuntimeWarning: environment variable ANNNET_CPU_LEVEL: this processor has no" in run.stderr


@built
@pytest.mark.parametrize("record", ['{"torch": "1.0.0+another"}', "no json", "{}", None])
def test_a_library_of_another_torch_is_not_opened(tmp_path: Path, record: str | None) -> None:
    """The library is replaced by bytes that no loader accepts: opening it would be an error of its own."""
    folder = _copy_package(tmp_path, with_library=True)
    (library,) = (folder / "annnet_kernels").glob("_C.*.so")
    library.write_bytes(b"not a library")
    (folder / "annnet_kernels" / library.with_suffix(".json").name).unlink()
    if record is not None:
        library.with_suffix(".json").write_text(record)
    run = fresh.python(USE, folder=folder)
    assert run.stdout.split() == ["reference", "None"], run.stderr
    assert run.stderr.count("RuntimeWarning: annnet_kernels: the C++ extension ") == 1
    assert "failed to load" not in run.stderr
    assert "pip install --no-build-isolation ." in run.stderr


@built
def test_a_library_that_does_not_load_is_a_warning(tmp_path: Path) -> None:
    folder = _copy_package(tmp_path, with_library=True)
    (library,) = (folder / "annnet_kernels").glob("_C.*.so")
    library.write_bytes(b"not a library")
    run = fresh.python(USE, folder=folder)
    assert run.stdout.split() == ["reference", "None"], run.stderr
    assert "RuntimeWarning: annnet_kernels: the C++ extension failed to load" in run.stderr


@built
def test_the_record_names_this_torch_and_what_is_in_the_library() -> None:
    import torch

    from annnet_kernels import _C

    (file,) = PACKAGE.glob("_C.*.json")
    record = json.loads(file.read_text())
    assert record["torch"] == torch.__version__
    assert _C.parts() == (("cpu", "cuda") if record["cuda"] else ("cpu",))
    assert native.cuda_targets() == tuple(record["cuda"])


@built
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_threads_come_from_the_openmp_that_torch_uses() -> None:
    """A second OpenMP runtime would bring a second pool of spinning threads."""
    run = fresh.python(
        "import torch, annnet_kernels as ak; torch.set_num_threads(2); x = torch.randn(1, 64, 65, 65);"
        "x.exp(); before = len(__import__('os').listdir('/proc/self/task')); ak.pyramid_pool(x);"
        "print(len(__import__('os').listdir('/proc/self/task')) - before);"
        "print(*{line.split()[-1] for line in open('/proc/self/maps') if 'omp' in line.rsplit('/', 1)[-1]})",
    )
    new_threads, runtimes = run.stdout.splitlines()
    assert int(new_threads) == 0
    assert len(runtimes.split()) == 1, runtimes


@from_checkout
@pytest.mark.parametrize("compiler", ["/bin/false", "/nowhere/c++"])
def test_without_a_compiler_the_build_succeeds_with_one_line(tmp_path: Path, compiler: str) -> None:
    folder = _copy_checkout(tmp_path)
    run = _build(folder, CXX=compiler)
    assert run.returncode == 0, run.stderr
    (line,) = _lines_about_us(run)
    assert compiler in line
    assert "pip install --no-build-isolation ." in line
    assert fresh.python(USE, folder=folder).stdout.split() == ["reference", "None"]


@from_checkout
def test_without_torch_the_build_succeeds_with_one_line(tmp_path: Path) -> None:
    """As under pip's build isolation."""
    folder = _copy_checkout(tmp_path / "checkout")
    (tmp_path / "hidden" / "torch").mkdir(parents=True)
    (tmp_path / "hidden" / "torch" / "__init__.py").write_text("raise ImportError('isolated')\n")
    run = _build(folder, PYTHONPATH=str(tmp_path / "hidden"))
    assert run.returncode == 0, run.stderr
    (line,) = _lines_about_us(run)
    assert "no torch" in line
    assert "pip install --no-build-isolation ." in line


@from_checkout
def test_the_extension_can_be_switched_off(tmp_path: Path) -> None:
    folder = _copy_checkout(tmp_path)
    run = _build(folder, ANNNET_NATIVE="0")
    assert run.returncode == 0, run.stderr
    assert _lines_about_us(run) == []
    assert not list((folder / "annnet_kernels").glob("_C.*"))

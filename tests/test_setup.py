"""setup.py's CUDA part: what it finds, what it builds for, and that nothing that fails in it costs the CPU part."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

CHECKOUT = Path(__file__).parent.parent
if not (CHECKOUT / "setup.py").exists():
    pytest.skip("needs the checkout's setup.py", allow_module_level=True)
if sys.platform != "linux":
    pytest.skip("the pretended nvcc is a shell script", allow_module_level=True)
pytest.importorskip("setuptools")


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, in its folder, with a CUDA 13 torch and no GPU."""
    spec = importlib.util.spec_from_file_location("annnet_setup", CHECKOUT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(CHECKOUT)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("CUDA_HOME", "TORCH_CUDA_ARCH_LIST", "ANNNET_CUDA", "ANNNET_DEBUG", "CPATH", "CXX"):
        monkeypatch.delenv(name, raising=False)
    return module


@pytest.fixture
def nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pretended toolkit whose nvcc is on the PATH; what it is called with is kept in ``calls``."""
    root = tmp_path / "toolkit"
    (root / "bin").mkdir(parents=True)
    (root / "include").mkdir()
    (root / "include" / "cuda_runtime_api.h").touch()
    script = root / "bin" / "nvcc"
    script.write_text(f"""#!/bin/sh
echo "$@" >> {tmp_path}/calls
case "$*" in
*--dryrun*) echo '#$ _SPACE_= ' >&2; echo '#$ TOP={root}/bin/..' >&2 ;;
*--version*) echo 'Cuda compilation tools, release 13.0, V13.0.88' ;;
*--list-gpu-arch*) printf 'compute_80\\ncompute_90\\ncompute_100\\n' ;;
*) while [ "$1" != -o ]; do shift; done; touch "$2" ;;
esac
""")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{root / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return script


def break_compilation(nvcc: Path, message: str) -> None:
    compiles = 'while [ "$1" != -o ]; do shift; done; touch "$2"'
    nvcc.write_text(nvcc.read_text().replace(compiles, f"echo 'warning: old' >&2; echo '{message}' >&2; exit 1"))


def test_without_a_gpu_every_usual_architecture_that_nvcc_knows_and_ptx(
    build: ModuleType, nvcc: Path, tmp_path: Path
) -> None:
    part = build.compile_cuda(tmp_path / "objects")
    assert part.targets == ["sm_80", "sm_90", "sm_100", "compute_100"]
    assert part.include == nvcc.parent.parent / "include"
    assert part.kernels.exists()
    (compilation,) = (line for line in (tmp_path / "calls").read_text().splitlines() if "pyramid_pool.cu" in line)
    assert "-gencode=arch=compute_90,code=sm_90" in compilation


def test_what_is_compiled_already_is_not_compiled_again(build: ModuleType, nvcc: Path, tmp_path: Path) -> None:
    first, again = (build.compile_cuda(tmp_path / "objects") for _ in range(2))
    assert first == again
    assert (tmp_path / "calls").read_text().count("pyramid_pool.cu") == 1
    os.utime(first.kernels, (0, 0))  # older than its sources
    build.compile_cuda(tmp_path / "objects")
    assert (tmp_path / "calls").read_text().count("pyramid_pool.cu") == 2


def test_a_visible_gpu_is_all_it_is_built_for(
    build: ModuleType, nvcc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    assert build.compile_cuda(tmp_path).targets == ["sm_90", "compute_90"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (12, 0))
    with pytest.raises(build.Missing, match="knows none of the architectures sm_120"):
        build.compile_cuda(tmp_path)


def test_the_user_names_the_architectures(
    build: ModuleType, nvcc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a+PTX")
    assert set(build.compile_cuda(tmp_path).targets) == {"sm_80", "sm_90a", "compute_90a"}


@pytest.mark.parametrize("kind", ["link", "script", "CUDA_HOME"])
def test_the_toolkit_is_where_nvcc_says(
    build: ModuleType, nvcc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    (tmp_path / "elsewhere").mkdir()
    other = tmp_path / "elsewhere" / "nvcc"
    if kind == "link":
        other.symlink_to(nvcc)
    elif kind == "script":
        other.write_text(f'#!/bin/sh\nexec {nvcc} "$@"\n')
        other.chmod(0o755)
    else:
        monkeypatch.setenv("CUDA_HOME", str(nvcc.parent.parent))
    monkeypatch.setenv("PATH", f"{other.parent}:/usr/bin:/bin")
    assert build.find_toolkit()[1] == nvcc.parent.parent


def test_no_cuda_is_wanted(build: ModuleType, nvcc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANNNET_CUDA", "0")
    assert build.compile_cuda(tmp_path) is None
    monkeypatch.delenv("ANNNET_CUDA")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert build.compile_cuda(tmp_path) is None


def test_reasons_against_the_cuda_part(
    build: ModuleType, nvcc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reason() -> str:
        with pytest.raises(build.Missing) as raised:
            build.compile_cuda(tmp_path)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "is of CUDA 13, torch was built for 12.8" in reason()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    header = nvcc.parent.parent / "include" / "cuda_runtime_api.h"
    header.unlink()
    assert "has no include/cuda_runtime_api.h" in reason()
    header.touch()
    break_compilation(nvcc, "host_config.h: error: unsupported GNU version")
    assert "nvcc failed (host_config.h: error: unsupported GNU version)" in reason()
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    assert reason() == "no nvcc in /nowhere/bin"
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", "/nowhere")
    assert reason() == "no nvcc on the PATH"


class _Builds:
    """Stands for PyTorch's build: keeps what it was asked to build, and fails as told."""

    def __init__(self, build: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path, fails: list[str]) -> None:
        from setuptools import Distribution

        def run(command: Any) -> None:
            (extension,) = command.extensions
            self.asked.append((extension.sources, extension.extra_objects, extension.libraries))
            assert isinstance(command.compiler, str | None), "an earlier attempt has left its traces"
            assert command.inplace == 1
            command.compiler = object()
            command.inplace = 0  # until setuptools has built and copies the library
            extension.extra_compile_args["cxx"].append("-DADDED")
            self.flags.append(list(extension.extra_compile_args["cxx"]))
            if fails:
                raise RuntimeError(fails.pop(0))
            command.inplace = 1

        self.asked: list[tuple[list[str], list[str], list[str]]] = []
        self.flags: list[list[str]] = []
        monkeypatch.setattr(build.cpp_extension.BuildExtension, "run", run)
        monkeypatch.setattr(build, "compiler_problem", lambda: None)
        self.command = build.Build(Distribution({"name": "x", "ext_modules": build.extensions}))
        self.command.inplace = 1
        self.command.finalize_options()
        self.command.build_temp = str(folder / "temp")
        self.command.get_ext_fullpath = lambda name: str(folder / "_C.so")
        self.record = folder / "_C.json"


def lines_about_us(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("annnet_kernels: ")]


def test_a_build_with_the_cuda_part(
    build: ModuleType, nvcc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    builds = _Builds(build, monkeypatch, tmp_path, [])
    builds.command.run()
    ((sources, objects, libraries),) = builds.asked
    assert "csrc/cuda/pyramid_pool.cpp" in sources
    assert len(objects) == 1
    assert "c10_cuda" in libraries
    assert os.environ["CPATH"] == str(nvcc.parent.parent / "include")
    assert '"cuda": ["sm_80", "sm_90", "sm_100", "compute_100"]' in builds.record.read_text()
    assert lines_about_us(capsys) == []


def test_kernels_that_do_not_compile_cost_the_cuda_part_and_one_line(
    build: ModuleType, nvcc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    break_compilation(nvcc, "ptxas error: out of luck")
    builds = _Builds(build, monkeypatch, tmp_path, [])
    builds.command.run()
    ((sources, objects, libraries),) = builds.asked
    assert not any("cuda" in name for name in (*sources, *objects, *libraries))
    assert '"cuda": []' in builds.record.read_text()
    (line,) = lines_about_us(capsys)
    assert line.startswith("annnet_kernels: the CUDA part left out: ")
    assert "out of luck" in line


def test_a_build_that_the_cuda_part_breaks_is_done_again_without_it(
    build: ModuleType, nvcc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the same flags, so that nothing of the CPU part is compiled again."""
    builds = _Builds(build, monkeypatch, tmp_path, ["cannot find -lc10_cuda\nmore"])
    builds.command.run()
    assert [bool(objects) for _, objects, _ in builds.asked] == [True, False]
    assert builds.flags[0] == builds.flags[1]
    assert not any("cuda" in name for name in builds.asked[1][0])
    assert '"cuda": []' in builds.record.read_text()
    (line,) = lines_about_us(capsys)
    assert "the CUDA part left out: the build failed (cannot find -lc10_cuda)" in line


def test_a_build_that_fails_without_the_cuda_part_too(
    build: ModuleType, nvcc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    builds = _Builds(build, monkeypatch, tmp_path, ["first", "second"])
    builds.command.run()
    assert not builds.record.exists()
    assert builds.command.extensions[0].optional
    assert ["the CUDA part" in line for line in lines_about_us(capsys)] == [True, False]

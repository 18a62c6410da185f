"""setup.py: its instruction levels; its CUDA part, and that nothing that fails in that costs the CPU part."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from annnet_kernels.runtime import native

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
    for name in (
        "CUDA_HOME",
        "TORCH_CUDA_ARCH_LIST",
        "ANNNET_CPU",
        "ANNNET_CUDA",
        "ANNNET_CPU_LEVELS",
        "ANNNET_DEBUG",
        "CPATH",
        "CXX",
    ):
        monkeypatch.delenv(name, raising=False)
    return module


@pytest.mark.parametrize(
    ("wanted", "processor", "expected"),
    [
        (None, "avx2", ["baseline", "avx2"]),
        ("native", "baseline", ["baseline"]),
        ("native", "avx512_bf16", ["baseline", "avx512_bf16"]),
        ("runnable", "avx512", ["baseline", "avx2", "avx512"]),
        ("all", "baseline", ["baseline", "avx2", "avx512", "avx512_bf16"]),
        ("avx512,avx2", "baseline", ["baseline", "avx2", "avx512"]),
    ],
)
def test_instruction_levels_to_build(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, wanted: str | None, processor: str, expected: list[str]
) -> None:
    monkeypatch.setattr(build, "processor_level", lambda: processor)
    if wanted is not None:
        monkeypatch.setenv("ANNNET_CPU_LEVELS", wanted)
    assert build.cpu_levels() == expected


def test_an_unknown_instruction_level_is_an_error_that_names_them(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANNNET_CPU_LEVELS", "avx2,sse9")
    with pytest.raises(SystemExit, match=r"ANNNET_CPU_LEVELS: expected native, runnable, all or .*, got 'sse9'"):
        build.cpu_levels()


def test_the_level_of_this_processor_is_what_the_extension_says(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    if native.why_not("cpu") is not None:
        pytest.skip(f"native: {native.why_not('cpu')}")
    assert build.processor_level() == native.processor_level()
    monkeypatch.setenv("CXX", "/bin/false")
    assert build.processor_level() == "avx512_bf16", "where it cannot be asked, everything is built"


def test_a_library_without_a_level_uses_the_next_lower_one(build: ModuleType, tmp_path: Path) -> None:
    """csrc/cpu/levels.cpp with empty tables of kernels: its choice under every limit."""
    own = build.CPU_LEVELS.index(build.processor_level())
    for built in (["baseline"], ["baseline", "avx2"], ["baseline", "avx512"], list(build.CPU_LEVELS)):
        tables = "".join(f"namespace {name} {{ extern const Kernels kernels{{}}; }}" for name in built)
        source = tmp_path / "choice.cpp"
        source.write_text(f"""#include "cpu/levels.cpp"
            #include <cstdio>
            namespace annnet {{ {tables} }}
            int main() {{
              for (int i = 0; i < annnet::kLevels; ++i) {{
                annnet::choose_level(static_cast<annnet::Level>(i));
                std::puts(annnet::level_name(annnet::chosen_level()));
              }}
            }}""")
        defines = [f"-DANNNET_BUILDS_{name.upper()}" for name in built]
        compiler = build.cpp_extension.get_cxx_compiler()
        program = tmp_path / "choice"
        subprocess.run([compiler, "-std=c++20", "-Icsrc", *defines, source, "-o", program], check=True)
        chosen = subprocess.run([program], check=True, capture_output=True, text=True).stdout.split()
        for limit, name in enumerate(chosen):
            usable = [other for i, other in enumerate(build.CPU_LEVELS) if other in built and i <= min(limit, own)]
            assert name == usable[-1], (built, build.CPU_LEVELS[limit])


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


def test_the_cpu_part_can_be_left_out(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = build.cpu_extension()
    assert "csrc/host.cpp" in everything.sources
    assert ("ANNNET_WITHOUT_CPU", None) not in everything.define_macros
    monkeypatch.setenv("ANNNET_CPU", "0")
    alone = build.cpu_extension()
    assert alone.sources == ["csrc/library.cpp"]
    assert ("ANNNET_WITHOUT_CPU", None) in alone.define_macros

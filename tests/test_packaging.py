"""Wheel and sdist: what is in them, and that they install and work away from the checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

CHECKOUT = Path(__file__).parent.parent
if not (CHECKOUT / "setup.py").exists():
    pytest.skip("needs the checkout's setup.py", allow_module_level=True)
pytest.importorskip("build")

FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md")
FOLDERS = ("annnet_kernels", "csrc", "tests")


def run(*command: str | Path, folder: Path, **environment: str) -> str:
    """What a command prints, which must succeed; it sees no PYTHONPATH but one given here."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=inherited | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What makes a build see no torch, as under pip's and build's isolation, which would download their tools."""
    folder = tmp_path_factory.mktemp("hidden")
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text("raise ImportError('isolated')\n")
    return {"PYTHONPATH": str(folder)}


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory, without_torch: dict[str, str]) -> tuple[Path, str]:
    """The folder that ``python -m build`` fills, and what it prints."""
    source = tmp_path_factory.mktemp("source")
    for name in FOLDERS:  # with what a developer has built in place
        shutil.copytree(CHECKOUT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(CHECKOUT / name, source)
    (source / "annnet_kernels" / "_C.of-another-build.json").write_text("{}")
    target = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", target]
    return target, run(*build, folder=source, **without_torch)


def test_the_sdist_holds_the_sources_of_everything_that_is_installed(distributions: tuple[Path, str]) -> None:
    (file,) = distributions[0].glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {*FILES, "annnet_kernels/py.typed"}
    for folder, pattern in (("annnet_kernels", "*.py"), ("csrc", "*.*")):
        sources |= {str(path.relative_to(CHECKOUT)) for path in (CHECKOUT / folder).rglob(pattern)}
    sources = {name for name in sources if "__pycache__" not in name}
    assert len(sources) > 80
    assert sources <= names, sources - names
    assert not [name for name in names if name.startswith("tests") or "/_C." in name]


def test_the_wheel_is_pure_and_holds_the_package_alone(distributions: tuple[Path, str]) -> None:
    target, printed = distributions
    (file,) = target.glob("*.whl")
    assert file.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(file) as archive:
        names = set(archive.namelist())
    installed = {str(path.relative_to(CHECKOUT)) for path in (CHECKOUT / "annnet_kernels").rglob("*.py")}
    assert {name for name in names if ".dist-info/" not in name} == installed | {"annnet_kernels/py.typed"}
    (line,) = [line for line in printed.splitlines() if line.startswith("annnet_kernels: ")]
    assert "the C++ extension left out" in line
    assert "pip install --no-build-isolation ." in line


@pytest.mark.parametrize("kind", ["*.whl", "*.tar.gz"])
def test_it_installs_and_works_in_an_empty_environment(
    distributions: tuple[Path, str], without_torch: dict[str, str], kind: str, tmp_path: Path
) -> None:
    """Empty but for torch, which is that of the tests: its folder is added once pip is done."""
    (file,) = distributions[0].glob(kind)
    pip = [sys.executable, "-m", "pip", "--no-input"]
    if file.suffix == ".gz":
        wheel = [*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", tmp_path, file]
        run(*wheel, folder=tmp_path, **without_torch)
        (file,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "environment", with_pip=False)
    python = tmp_path / "environment" / "bin" / "python"
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", file, folder=tmp_path)
    (packages,) = (tmp_path / "environment").glob("lib/python*/site-packages")
    (packages / "torch_of_the_tests.pth").write_text(str(Path(torch.__file__).parent.parent))
    example = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", (CHECKOUT / "README.md").read_text(), re.DOTALL)
    assert example is not None
    code = "import annnet_kernels\nprint(annnet_kernels.__file__)\n" + example[1]
    location, *printed = run(python, "-W", "error::RuntimeWarning", "-c", code, folder=tmp_path).splitlines()
    assert Path(location).is_relative_to(packages)
    assert printed == example[2].splitlines()

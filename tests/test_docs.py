"""Documents: links lead to files, files that a table names exist, figures are what their scripts draw."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
IDS = [page.name for page in PAGES]
NAMING_FILES = ("architecture", "triton-kernels", "cpu-kernels", "adding-an-operator", "adding-a-dialect")
FOLDERS = ("", "annnet_kernels", "annnet_kernels/kernels", "csrc", "tests")


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("name", NAMING_FILES)
def test_files_that_are_named_exist(name):
    text = (ROOT / "docs" / f"{name}.md").read_text()
    files = re.findall(r"`([\w/.-]+\.(?:py|h|cpp|cu))`", text)
    assert files
    roots = [ROOT / folder for folder in (*FOLDERS, "csrc/cpu")]
    assert not [file for file in files if not any((root / file).exists() for root in roots)]


def test_the_figure_of_the_algebra_is_what_its_script_draws():
    script = ROOT / "docs" / "figures" / "algebra.py"
    spec = importlib.util.spec_from_file_location("algebra_figure", script)
    figure = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figure)
    for name, theme in figure.THEMES.items():
        assert script.with_name(f"algebra-{name}.svg").read_text() == figure.draw(theme)

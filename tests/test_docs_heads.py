"""The examples of docs/heads.md run and replace what they say."""

import re
from pathlib import Path

import pytest
from decode_heads import installed

from benchmarks.published import do_without_compiled_operators

PAGE = Path(__file__).parent.parent / "docs" / "heads.md"
if not PAGE.exists():
    pytest.skip("needs the checkout's docs", allow_module_level=True)
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
PACKAGES = ("transformers", "segmentation_models_pytorch", "mmseg")


def test_every_code_base_has_an_example():
    assert len(EXAMPLES) == len(PACKAGES)
    for package, example in zip(PACKAGES, EXAMPLES, strict=True):
        assert package in example


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("package", PACKAGES)
def test_the_example_replaces_a_head(package, capsys):
    if not installed(package):
        pytest.skip(f"{package} is not installed")
    if package == "mmseg":
        do_without_compiled_operators()
    exec(EXAMPLES[PACKAGES.index(package)], {})
    printed = capsys.readouterr().out
    assert "replaced" in printed
    assert "compared" in printed

"""A data set of coloured rectangles, made on the spot, and the options of a run that takes a second."""

import sys
from pathlib import Path

import numpy as np
import pytest
from rectangles import VOID, save_pair

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

for package in ("torchvision", "torchmetrics", "tensorboard", "rich", "matplotlib"):
    pytest.importorskip(package, reason=f"the training example needs {package}: pip install annnet_kernels[train]")


@pytest.fixture(autouse=True)
def _tiny_networks(one_thread):
    """Beside another busy process, runs of two threads took up to three times as long as of one."""


@pytest.fixture
def data(tmp_path):
    """Seven training and three validation pictures of 3 classes and void, 44 × 56."""
    generator = np.random.default_rng()
    for split, count in (("train", 7), ("val", 3)):
        for i in range(count):
            labels = np.zeros((44, 56), dtype=np.uint8)
            for value in (1, 2, VOID):
                top, left = generator.integers(0, 22), generator.integers(0, 28)
                labels[top : top + 20, left : left + 20] = value
            save_pair(tmp_path / "data" / split, f"{i}", labels)
    return tmp_path / "data"


@pytest.fixture
def tiny(data, tmp_path):
    """Makes options: three batches of two per epoch, on the CPU."""

    from segmentation.options import Options

    def options(**changes):
        settings = {
            "data": data,
            "dataset": "folder",
            "num_classes": 3,
            "void": VOID,
            "out": tmp_path / "run",
            "width_small": True,
            "steps": 5,
            "batch_size": 2,
            "crop": 40,
            "workers": 0,
            "device": "cpu",
            "tensorboard": False,
        }
        return Options(**settings | changes)

    return options

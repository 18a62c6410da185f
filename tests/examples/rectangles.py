"""Pictures whose colours tell their classes."""

import numpy as np
from PIL import Image

COLOURS = np.array([(200, 40, 40), (40, 200, 40), (40, 40, 200), (0, 0, 0)], dtype=np.uint8)
VOID = 3


def save_pair(folder, name, labels):
    """A picture whose colours tell its classes, and its labels."""
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng().integers(0, 30, (*labels.shape, 3), dtype=np.uint8)
    Image.fromarray(COLOURS[labels] + noise).save(folder / "images" / f"{name}.png")
    Image.fromarray(labels).save(folder / "labels" / f"{name}.png")

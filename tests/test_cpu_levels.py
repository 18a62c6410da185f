"""Every instruction level of the C++ operators below this processor's highest, which all other tests run at."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from annnet_kernels.runtime import native

if native.why_not("cpu") is not None:
    pytest.skip(f"native: {native.why_not('cpu')}", allow_module_level=True)

from annnet_kernels import _C

HERE = Path(__file__).parent
TESTS = {
    "asymmetric_attention_native": [
        "accuracy_of_shapes",
        "accuracy_of_map_layouts",
        "touches_nothing_beyond_its_tensors",
        "level_follows_the_environment",
    ],
    "bn_relu_attention_native": ["accuracy_of_shapes", "accuracy_of_map_layouts"],
    "pyramid_pool_native": [
        "any_shape_and_pyramid",
        "maps_longer_than_a_buffer",
        "every_16_bit_number",
        "memory_beyond_the_map_and_the_outputs",
        "memory_beyond_a_dense_gradient",
        "offsets_beyond_32_bits",
    ],
    "batch_norm": ["accuracy_of_layouts"],
    "upsampled_cross_entropy": ["accuracy_of_sizes", "accuracy_of_confident_logits"],
    "upsampled_argmax": ["the_largest_is_chosen_at_every_size"],
}
"""Shapes, layouts and edges of every operator: what depends on how wide a vector is."""


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
def test_lower_instruction_levels(level: str) -> None:
    """In one process per level: the level is chosen when the extension is loaded."""
    lower = _C.cpu_levels()[:-1]
    if level not in lower:
        pytest.skip(f"not below the highest level of this processor: {', '.join(_C.cpu_levels())}")
    selected = [f"{HERE}/test_{file}.py::test_{name}" for file, names in TESTS.items() for name in names]
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-k", "not reference", *selected]
    environment = {**os.environ, "ANNNET_CPU_LEVEL": level, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr

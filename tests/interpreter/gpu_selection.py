"""Which tests of the Triton kernels a GPU runs. The rest is left to the interpreter, which runs all of them.

Every kernel variant takes a second or two to compile, and all tests need about 600. What a GPU can show beyond the
interpreter is what the compiler makes of a layout and a dtype, so that a GPU takes bfloat16, the dtype of training, and
of the other dtypes what ``OTHER_DTYPES`` names. Image sizes, masks and splits are the same code on both.
``tests/test_gpu_variants.py`` counts the variants.
"""

from __future__ import annotations

import itertools

import pytest
import torch

OTHER_DTYPES = {
    # float32 without tensor cores and float16 have tiles of their own: one shape or layout each.
    "test_accuracy_of_shapes": {"shape": [(1, 64, 96, 9, 17, 110)], "dtype": [torch.float32]},
    "test_accuracy_of_views": {"layout": ["transposed"]},
    "test_accuracy_of_layouts": {"layout": ["channels_last"], "dtype": [torch.float32]},
    "test_accuracy_of_map_layouts": {"layout": ["channels_last"]},
    "test_accuracy_of_rectified_layouts": {"layout": ["channels_last"], "dtype": [torch.float32]},
    "test_norm_skip_and_constant": {"layout": ["channels_last"], "tokens": [43], "dtype": [torch.float32]},
}
"""Tests that a GPU runs in float32 and float16 too, with these parameters alone."""

LEFT_OUT = {
    "test_accuracy_of_shapes": {
        "shape": [
            # Attention: few tokens, one row, one pixel, one token, more tokens than a block, one channel, many pixels.
            (2, 19, 48, 5, 17, 7),
            (2, 48, 19, 1, 37, 64),
            (2, 40, 24, 1, 1, 128),
            (1, 16, 20, 12, 11, 1),
            (1, 16, 36, 5, 9, 129),
            (1, 1, 1, 2, 2, 2),
            (1, 16, 20, 19, 29, 7),
            # Pooling: small maps, one row or column; a large one stays.
            (2, 19, 13, 11),
            (1, 7, 5, 3),
            (1, 5, 1, 20),
            (1, 3, 20, 1),
            (1, 2, 1, 1),
            (1, 68, 9, 40),
            (3, 80, 65, 129),
            (4, 256, 128, 256),
        ]
    },
    "test_batch_norm_triton.py::test_accuracy_of_shapes": None,
    "test_matrix_products_triton.py::test_accuracy": {"size": [(1, 1, 1), (65, 33, 130), (64, 256, 64)]},
    "test_products_of_products": None,
    "test_accuracy_of_wide_channels": None,
    "test_accuracy_of_map_layouts": {"layout": ["nchw", "channels_last", "transposed", "expanded"]},
    "test_accuracy_of_token_layouts": None,
    "test_accuracy_of_layouts": {"layout": ["slice", "transposed", "expanded"]},
    "test_accuracy_of_rectified_layouts": {"layout": ["slice", "transposed", "expanded"]},
    "test_accuracy_of_views": {"layout": ["transposed", "expanded"]},
    "test_accuracy_of_gradient_layouts": None,
    "test_accuracy_of_maps_of_different_layouts": None,
    "test_accuracy_of_cut_rectified_maps": None,
    "test_accuracy_of_pyramids": {"height": [2], "sizes": [(1,), (11,), ((2, 5), 3), (1, 2, 3, 6)]},
    "test_accuracy_of_peaked_softmax": None,
    "test_accuracy_of_unusual_scales": {"scale": [0.0, -0.3]},
    "test_norm_skip_and_constant": {
        "layout": ["slice", "transposed", "expanded"],
        "tokens": [150],
        "with_skip": [False],
    },
    "test_gradients_that_are_not_needed": {
        "needs": [needs for needs in itertools.product((True, False), repeat=3) if needs != (True, False, False)],
        "tokens": [150],
    },
    "test_accuracy_of_what_may_be_absent": None,
    "test_accuracy_far_from_zero": None,
    "test_a_map_of_several_parts": {"layout": ["nchw", "channels_last"]},
    "test_the_relu_lets_nan_pass_and_holds_back_infinite_gradients": {"layout": ["nchw"]},
    "test_memory_around_a_map_is_not_read": None,
    "test_touches_nothing_beyond_its_tensors": {"layout": ["transposed"], "tokens": [150]},
    "test_non_finite_pixel_spoils_only_its_own_output": {"layout": ["channels_last"], "tokens": [150]},
    "test_accuracy_of_cut_maps": {"layout": ["nchw"]},
    "test_accuracy_of_sizes": None,
    "test_accuracy_of_options": None,
    "test_a_label_that_names_no_class_makes_its_pixel_nan": None,
    "test_bands_add_up_to_the_tokens": None,
    "test_a_sharded_block_equals_the_whole_one": None,
}
"""What a GPU leaves to the interpreter: a test with one of these parameters, or the whole test where none is named."""


def is_left_out(item: pytest.Item) -> bool:
    """Whether a GPU does not run this test with these parameters."""
    if not isinstance(item, pytest.Function):
        return False
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    name = item.originalname
    left_out = LEFT_OUT.get(f"{item.path.name}::{name}", LEFT_OUT.get(name, {}))
    if left_out is None:
        return True
    if parameters.get("dtype", torch.bfloat16) != torch.bfloat16:
        wanted = OTHER_DTYPES.get(name)
        return wanted is None or not all(parameters.get(key) in values for key, values in wanted.items())
    return any(key in parameters and parameters[key] in values for key, values in left_out.items())

"""What tools do to the modules inside of a block, and around it: the block runs whatever plain PyTorch runs.

Every test is of our own blocks and of replaced ones, against the plain block in float64, and says in a marker which
tool it is of and what holds: ``python tests/compatibility.py`` writes ``docs/compatibility.md`` from these.
"""

import copy
import warnings

import pytest
import torch
from block_rule import CLASSES, KEY, VALUE, build, draw_maps
from fused_pairs import assert_equal_calls, changed_alike
from torch import nn

from annnet_kernels.blocks import requirements

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.tool("attributes of the published stage", "runs plain", "key_channels and value_channels are not ignored")
def test_an_attribute_that_the_published_forward_reads(pair):
    def change(block):
        block.stages[0].key_channels = 3

    fused, plain, kind = changed_alike(pair, change)
    assert f"published forward, because of key_channels=3, where Conv2d puts out {KEY} channels" in repr(fused)
    assert_equal_calls(fused, plain, kind)
    fused.stages[0].key_channels = KEY
    assert "collapsed" in repr(fused)


def test_the_value_width_is_refused_as_plain_refuses_it():
    fused, plain = build("APNB")
    for block in (fused, plain):
        block.stages[0].value_channels = VALUE + 1
        with pytest.raises(RuntimeError, match="is invalid for input of size"):
            block(*draw_maps("APNB"))


@pytest.mark.tool("torch.nn.utils.skip_init", "works", "constructors take device and dtype")
@pytest.mark.parametrize("kind", CLASSES)
def test_skip_init_and_device(kind):
    cls, _, channels = CLASSES[kind]
    _, plain = build(kind)
    made = nn.utils.skip_init(cls, *channels, KEY, VALUE, dropout=0.0, dtype=torch.float64)
    made.load_state_dict(plain.state_dict())
    assert_equal_calls(made, plain, kind)
    empty = cls(*channels, KEY, VALUE, device="meta", dtype=torch.bfloat16)
    assert all(tensor.is_meta for tensor in (*empty.parameters(), *empty.buffers()))
    assert empty.stages[0].W.weight.dtype == empty.stages[0].f_key[1][0].running_mean.dtype == torch.bfloat16


@pytest.mark.tool("nn.Module.compile", "works", "copies of a compiled block included")
@pytest.mark.parametrize("pair", ["AFNB, own", "APNB, replaced"], indirect=True)
def test_a_block_compiled_in_place(pair):
    fused, plain, kind = pair
    torch._dynamo.reset()
    fused.compile(backend="eager", fullgraph=True)  # what follows tracing is test_compile's
    assert_equal_calls(fused, plain, kind)
    twin = copy.deepcopy(fused)
    assert_equal_calls(twin, plain, kind, modes=(False,))
    torch._dynamo.reset()


def test_a_reason_that_passes_is_said_once_for_each_block():
    fused, _ = build("APNB")
    maps = draw_maps("APNB")
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                fused(*maps)
    finally:
        handle.remove()
    assert [str(w.message) for w in caught] == [
        "annnet_kernels: APNB runs its published forward, because of global forward hooks"
    ]


def test_every_rule_has_a_reason_in_its_docstring():
    assert all(rule.__doc__ for rule in requirements.TO_COLLAPSE)
    assert requirements.sharded_weights not in requirements.ONCE_GATHERED

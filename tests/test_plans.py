"""Plans of launches that are kept: what a known plan launches is what a new one would, and which calls have none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from annnet_kernels.runtime.backends import interpreting

if interpreting():
    pytest.skip("plans are kept for compiled kernels", allow_module_level=True)
pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent
PRELUDE = """
import random, threading
import torch
from tools import standin
recorder = standin.install("record")
import annnet_kernels as ak
from annnet_kernels.ops import calls
torch.set_num_threads(1)
ops = torch.ops.annnet
sizes = [1, 3, 6, 8], [1, 3, 6, 8]

def launches(call):
    recorder.clear()
    call()
    return list(recorder.launches)

def addresses(call):
    seen = []
    run = standin.recording._NotCompiled.run
    standin.recording._NotCompiled.run = lambda self, *values: seen.append(values)
    try:
        call()
    finally:
        standin.recording._NotCompiled.run = run
    return seen
"""


def run(code):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_known_plan_launches_what_a_new_one_would():
    """1,000 random calls, in random order, each planned anew and from what is kept: grids and arguments are equal."""
    run("""
random.seed(0)
def draw():
    batch, channels = random.choice((1, 2)), random.choice((3, 16, 17, 32))
    height, width = random.choice((1, 7, 16, 20)), random.choice((1, 5, 16, 33))
    dtype = random.choice((torch.float32, torch.bfloat16))
    x = torch.empty(batch, channels, height, width, dtype=dtype)
    if random.random() < 0.5:
        x = x.contiguous(memory_format=torch.channels_last)
    elif random.random() < 0.3:
        x = torch.empty(batch, channels, height, 2 * width + 1, dtype=dtype)[..., 1::2]
    tokens = torch.empty(batch, 110, channels, dtype=dtype).transpose(1, 2)
    norm = torch.empty(4, channels)
    sums = torch.empty(2, channels)
    return random.choice((
        lambda: ops.pyramid_pool(x, random.choice((None,)), *sizes),
        lambda: ops.pyramid_pool(x, norm, *sizes),
        lambda: ops.pyramid_pool_bwd(tokens, None, [height, width], *sizes, False, None),
        lambda: ops.bn_relu_bwd_sums(x, norm, tokens, None, *sizes, None),
        lambda: ops.bn_relu_bwd_input(x, norm, tokens, x, sums, batch * height * width, *sizes, None),
        lambda: ops.asymmetric_attention(x, None, tokens, tokens, None, None, 0.5, False),
        lambda: ops.asymmetric_attention(x, norm, tokens, tokens, None, norm[0], 0.5, False),
        lambda: ops.batch_norm_apply(x, norm, None, True),
        lambda: ops.batch_norm_update(x, None, *norm[:2], None, *norm[2:], None, 1e-5, 0.1, 1),
        lambda: ops.matrix_products([tokens[0], norm], [0, 2], [~0, ~2], [0, -1]),
    ))
hits = 0
for _ in range(1000):
    call = draw()
    kept = dict(calls._kept)
    calls._kept.clear()
    expected = launches(call)
    calls._kept.clear()
    calls._kept.update(kept)
    before = len(calls._kept)
    assert launches(call) == expected
    hits += len(calls._kept) == before
assert hits > 150, hits
""")


def test_every_call_gets_its_own_tensors():
    """Pointers of a repeated call are those of its arguments, of an output written in place, and of new scratch."""
    run("""
for repeat in range(3):
    a, b = torch.empty(5, 4), torch.empty(4, 6)
    out = []
    (values,) = addresses(lambda: out.extend(ops.matrix_products([a, b], [0], [1], [-1])))
    values = values[9:]  # behind grid, stream, function, metadata and hooks
    assert values[0][0] is a and values[1][0] is b and values[2] is out[0]
x = [torch.empty(1, 8, 12, 12) for _ in range(3)]
keys = torch.empty(1, 8, 110)
for query, skip in ((x[0], x[1]), (x[1], x[2]), (x[2], x[2]), (x[0], x[0]), (x[1], x[0])):
    (values,) = addresses(lambda: ops.asymmetric_attention_(query, None, keys, keys, skip, None, 0.5, False))
    pointers = [value[0] for value in values if isinstance(value, tuple) and torch.is_tensor(value[0])]
    assert [id(x) for x in pointers] == [id(x) for x in (query, keys, keys, skip, skip)]
""")


def test_plans_are_bounded_and_threads_share_them():
    run("""
calls.MOST_CALLS = 20
def work():
    for n in range(1, 200):
        ops.matrix_products([torch.empty(n % 50 + 1, 4), torch.empty(4, 3)], [0], [1], [-1])
threads = [threading.Thread(target=work) for _ in range(4)]
[t.start() for t in threads]
[t.join() for t in threads]
assert len(calls._kept) <= 20 + 4, len(calls._kept)
""")


def test_a_call_that_copies_an_argument_is_planned_each_time():
    run("""
y, norm = torch.empty(1, 4, 6, 6), torch.empty(8, 4)[::2]
for _ in range(3):
    ops.batch_norm_apply(y, norm, None, True)
assert not calls._kept
""")


def test_a_block_that_repeats_its_step_launches_what_the_ordinary_forward_launches():
    run("""
from torch.utils._python_dispatch import TorchDispatchMode
from annnet_kernels.blocks import programs

class Listener(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))

for block, widths in ((ak.AFNB(16, 32, 32, 16, 16), (16, 32)), (ak.APNB(32, 32, 16, 16), (32,))):
    maps = [torch.randn(2, c, 33, 40).contiguous(memory_format=torch.channels_last) for c in widths]
    maps = [x.bfloat16().requires_grad_() for x in maps]

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            out = block(*maps)
        torch.autograd.grad(out, [*maps, *block.parameters()], torch.ones_like(out))

    for call in (step, torch.no_grad()(lambda: block(*[x.float() for x in maps]))):
        known = len(programs._programs)
        call()
        assert len(programs._programs) == known + 1 and None not in programs._programs.values()
        repeated = launches(call)
        with Listener():
            expected = launches(call)
        assert len(repeated) > 8 and repeated == expected
""")


def test_whoever_watches_launches_sees_those_of_known_calls():
    """The profile of a GPU campaign: floors by operands, and events around every launch."""
    run("""
from tools.gpu import profiling
block = ak.APNB(32, 32, 16, 16)
x = torch.randn(1, 32, 9, 8, requires_grad=True)

def step():
    torch.autograd.grad(block(x).sum(), [x, *block.parameters()])

for _ in range(3):
    step()
names = {launch.kernel for launch in launches(step)}
assert len(names) > 10
assert set(profiling.operand_bytes(step)) == names
assert names <= set(profiling._by_events(step, torch.device("cpu")))
assert {launch.kernel for launch in launches(step)} == names  # and the calls are known as before
""")

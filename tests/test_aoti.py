"""An AOTInductor package of the blocks and operators: made once, then loaded in a process of its own at other sizes."""

import os
import shutil
from pathlib import Path

import block_rule
import fresh
import pytest
import torch
from helpers import assert_as_accurate_as_plain
from torch import nn
from torch.export import Dim

import annnet_kernels as ak
from annnet_kernels.reference import operators as reference

COMPILER = os.environ.get("CXX", "g++")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"AOTInductor needs a C++ compiler: {COMPILER}"),
]

LEVELS = [1, 3, 6, 8], [1, 3, 6, 8]


class Everything(nn.Module):
    """Both blocks, both operators, and operators that write in place or take a list of free sizes and a string."""

    def __init__(self, afnb, apnb, pool, attend, spread, normalise):
        super().__init__()
        self.afnb, self.apnb = afnb, apnb
        self.pool, self.attend, self.spread, self.normalise = pool, attend, spread, normalise

    def forward(self, low, high):
        fused, refined = self.afnb(low, high), self.apnb(high)
        tokens = self.pool(high)
        context = self.attend(high, tokens)
        return fused, refined, tokens, context, self.spread(tokens, high), self.normalise(refined)


def spread(tokens, x):
    return torch.ops.annnet.pyramid_pool_bwd(tokens, None, list(x.shape[2:]), *LEVELS, False, "reference")


def plain_spread(tokens, x):
    dx = torch.empty_like(x)
    reference.pyramid_pool_bwd_out(tokens, None, list(x.shape[2:]), *LEVELS, False, dx)
    return dx


def normalise(x):
    written, norm = x * 2, x.new_full((4, x.shape[1]), 0.5)
    torch.ops.annnet.batch_norm_apply_(written, norm, None, True)
    return written


def plain_normalise(x):
    return ((x * 2 - 0.5) * 0.25 + 0.5).relu()


def draw(size=(3, 33, 40), dtype=torch.float64):
    batch, height, width = size
    low = torch.randn(batch, block_rule.LOW, height, width, dtype=dtype)
    return low, torch.randn(batch, block_rule.HIGH, height + 2, width + 1, dtype=dtype)


def free_sizes():
    batch = Dim("batch", max=64)
    return tuple({0: batch, 2: Dim(f"height{i}", max=256), 3: Dim(f"width{i}", max=256)} for i in range(2))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Path of the package, and the plain twin in float64."""
    blocks = [block_rule.build(kind) for kind in ("AFNB", "APNB")]
    (afnb, plain_afnb), (apnb, plain_apnb) = blocks
    module = Everything(
        afnb, apnb, ak.pyramid_pool, lambda x, t: ak.asymmetric_attention(x, t, t, 0.3), spread, normalise
    )
    twin = Everything(
        plain_afnb,
        plain_apnb,
        lambda x: reference.pyramid_pool(x, *LEVELS),
        lambda x, t: reference.asymmetric_attention(x, t, t, 0.3)[0],
        plain_spread,
        plain_normalise,
    )
    with torch.no_grad():
        maps = draw((2, 20, 18), torch.float32)
        program = torch.export.export(module.float().eval(), maps, dynamic_shapes=free_sizes())
    path = tmp_path_factory.mktemp("package") / "blocks.pt2"
    # Two thirds of the time are the C++ compiler's, most of it for what only calls the kernels.
    options = {"aot_inductor.compile_wrapper_opt_level": "O0", "aot_inductor.precompile_headers": False}
    made = torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)
    return Path(made), twin.eval()


def named(outputs):
    return {f"output {i}": out.detach() for i, out in enumerate(outputs)}


def test_right_at_other_sizes(compiled):
    path, twin = compiled
    package = torch._inductor.aoti_load_package(str(path))
    for size in ((3, 33, 40), (1, 5, 3), (2, 65, 17)):

        def results(seed, size=size):
            maps = draw(size)
            single = [x.float() for x in maps]
            with torch.no_grad():
                truth = named(twin.double()(*maps))
                return named(package(*single)), named(twin.float()(*single)), truth

        assert_as_accurate_as_plain(results, torch.float32)


LOAD = """
import sys, torch
if torch.__version__ < "2.11":
    import torch._inductor.codecache  # which 2.10 takes for imported
path, maps, results = sys.argv[1:]
try:
    torch._inductor.aoti_load_package(path)
except RuntimeError as error:
    print(error)
import annnet_kernels
package = torch._inductor.aoti_load_package(path)
torch.save(package(*torch.load(maps)), results)
"""


@pytest.fixture(scope="module")
def new_process(compiled, tmp_path_factory):
    """Maps, what a new process makes of them once it imports this package, and what it printed before."""
    folder = tmp_path_factory.mktemp("process")
    maps = draw(dtype=torch.float32)
    torch.save(list(maps), folder / "maps.pt")
    arguments = ["", str(compiled[0]), str(folder / "maps.pt"), str(folder / "results.pt")]
    process = fresh.python(f"import sys; sys.argv = {arguments!r}\n{LOAD}")
    assert process.returncode == 0, process.stderr
    return maps, torch.load(folder / "results.pt"), process.stdout


def test_a_new_process_that_imports_this_package_runs_it(compiled, new_process):
    maps, results, _ = new_process
    here = torch._inductor.aoti_load_package(str(compiled[0]))(*maps)
    torch.testing.assert_close(results, here)


def test_a_new_process_that_does_not_is_told_which_operator_is_missing(new_process):
    _, _, printed = new_process
    assert "Could not find schema for annnet::" in printed

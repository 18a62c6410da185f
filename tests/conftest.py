"""Every test starts from a random state of its own, printed when it fails."""

import gc

import pytest
import torch
from fused_pairs import pair  # noqa: F401
from row_shards_rule import alone, pool  # noqa: F401

from annnet_kernels.runtime import backends


@pytest.fixture(autouse=True)
def _fresh_seed(request):
    seed = torch.seed() % 2**31
    torch.manual_seed(seed)
    request.node.add_report_section("setup", "seed", f"torch.manual_seed({seed})")


@pytest.fixture(autouse=True)
def _choices_made_anew():
    """A test may change what the choice of a backend depends on."""
    yield
    backends._preferred.cache_clear()


@pytest.fixture(scope="module")
def one_thread():
    """Where maps are tiny: waking a second thread costs more than it computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def frozen_imports():
    """Where garbage is collected often: going over all that was imported takes 0.2 s each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()

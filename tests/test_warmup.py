"""ak.warmup: what it refuses; on a GPU, that a call afterwards compiles nothing."""

import pytest
import torch

import annnet_kernels as ak


def test_bad_input_is_named():
    with pytest.raises(TypeError, match=r"dtypes\[1\]: expected float32, bfloat16 or float16, got torch.float64"):
        ak.warmup((torch.float32, torch.float64))
    with pytest.raises(ValueError, match=r"operators\[0\]: expected one of pyramid_pool, .* got 'pool'"):
        ak.warmup(operators=("pool",))
    with pytest.raises(RuntimeError, match="Triton cannot serve cpu: it compiles for CUDA devices only"):
        ak.warmup(device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu_is_said():
    with pytest.raises(RuntimeError, match="PyTorch sees no CUDA device"):
        ak.warmup()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_call_afterwards_compiles_nothing():
    from annnet_kernels.kernels.pool_kernels import pyramid_pool_fwd_kernel

    assert ak.warmup((torch.bfloat16,), "cuda", ("pyramid_pool",)) > 0
    cache = pyramid_pool_fwd_kernel.device_caches[torch.cuda.current_device()][0]
    before = len(cache)
    for size in ((97, 97), (128, 256), (33, 40), (65, 129)):
        x = torch.randn(2, 64, *size, device="cuda", dtype=torch.bfloat16)
        with ak.use_backend("triton"):
            ak.pyramid_pool(x)
            ak.pyramid_pool(x.to(memory_format=torch.channels_last))
    assert len(cache) == before

"""python -m annnet_kernels.info: what it says is what runs."""

import subprocess
import sys

import pytest
import torch

import annnet_kernels as ak
from annnet_kernels import info
from annnet_kernels.runtime import backends, native

CPU = torch.device("cpu")


def test_it_prints_versions_devices_level_and_who_serves_what():
    printed = subprocess.run(
        [sys.executable, "-m", "annnet_kernels.info"], capture_output=True, text=True, check=True
    ).stdout
    for expected in (f"annnet_kernels {ak.__version__}", f"torch {torch.__version__}", "cpu: ", "requested backend:"):
        assert expected in printed
    if native.cpu_level() is not None:
        assert f"CPU level {native.cpu_level()} (built: {', '.join(native.built_cpu_levels())})" in printed
    table = [line.split() for line in printed.splitlines()]
    for operator in ("pyramid_pool", "asymmetric_attention", "asymmetric_attention_bwd"):
        assert any(row[:1] == [operator] and len(row) == 5 for row in table), operator


def test_a_build_without_the_level_of_this_processor_is_named(monkeypatch):
    monkeypatch.setattr(native, "why_not", lambda *_: None)
    monkeypatch.setattr(native, "cpu_level", lambda: "baseline")
    monkeypatch.setattr(native, "built_cpu_levels", lambda: ("baseline", "avx512"))
    for own, named in (("avx2", True), ("avx512", False)):
        monkeypatch.setattr(native, "processor_level", lambda own=own: own)
        assert (f"this processor has {own}, for which" in info.report()) == named


@pytest.mark.parametrize("request_", [None, "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_what_it_says_is_what_is_chosen(dtype, request_):
    with ak.use_backend(request_):
        for operator in info.operators():
            said, _ = info.served_by(operator, CPU, dtype)
            assert said == backends.choose_backend(operator, CPU, dtype, request_), operator


def test_every_registered_operator_is_listed():
    assert {"pyramid_pool", "pyramid_pool_bwd", "batch_norm_update"} <= set(info.operators())
    assert not [name for name in info.operators() if name.endswith("_")]


def test_a_missing_extension_is_named_with_its_reason(monkeypatch):
    monkeypatch.setattr(native, "_load_failure", "the C++ extension is not built (some command)")
    printed = info.report()
    assert "C++ extension: not used: the C++ extension is not built (some command)" in printed
    assert "not native: the C++ extension is not built (some command)" in printed
    assert info.served_by("pyramid_pool", CPU, torch.float32)[0] == "reference"


def test_a_gpu_that_is_too_old_is_named_with_its_capability(monkeypatch):
    monkeypatch.setattr(backends, "_has_triton", lambda: True)
    monkeypatch.setattr(backends, "triton_version", lambda: backends.MIN_TRITON_VERSION)
    monkeypatch.setattr(backends, "_capability", lambda _: (7, 5))
    backend, against = info.served_by("pyramid_pool", torch.device("cuda", 0), torch.float16)
    assert backend == "reference"
    assert "this GPU has 7.5" in against["triton"]


def test_a_missing_triton_is_named(monkeypatch):
    monkeypatch.setattr(backends, "_has_triton", lambda: False)
    monkeypatch.setattr(backends, "_capability", lambda _: (9, 0))
    _, against = info.served_by("pyramid_pool", torch.device("cuda", 0), torch.float16)
    assert "triton is not installed" in against["triton"]
    monkeypatch.setattr(info, "_version", lambda _: None)
    assert "Triton: not installed" in info.report()


def test_a_request_that_cannot_run_is_shown_as_refused():
    with ak.use_backend("triton"):
        printed = info.report()
    assert "requested backend: triton" in printed
    if not backends.interpreting():
        assert "refused" in printed
        assert "not triton: Triton runs on CUDA tensors" in printed

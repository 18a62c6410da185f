"""Count launches: draft."""

from __future__ import annotations
import sys, collections
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from tools import standin

recorder = standin.install("record")
import annnet_kernels as ak
from annnet_kernels.reference import PlainAFNB, PlainAPNB

VIEWS = (
    "view",
    "expand",
    "t.",
    "transpose",
    "permute",
    "slice.",
    "select.",
    "unbind",
    "split",
    "alias",
    "detach",
    "as_strided",
    "squeeze",
    "unsqueeze",
    "_unsafe_view",
    "_reshape_alias",
    "empty",
    "new_empty",
    "is_same",
    "set_.",
    "lift_fresh",
    "promote_types",
    "result_type",
)


class Log(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, f, t, a=(), k=None):
        n0 = len(recorder.launches)
        r = f(*a, **(k or {}))
        self.ops.append((str(f), [x.kernel for x in recorder.launches[n0:]]))
        return r


def is_view(n):
    return any(n.startswith(f"aten.{v}") for v in VIEWS)


def count(ops):
    real = []
    for n, new in ops:
        if n.startswith("annnet"):
            real += new
        elif not is_view(n):
            real.append(n.replace("aten.", "").replace(".default", ""))
            if "convolution_backward" in n:
                real.append("convolution_backward2")
    return real


def run(kind, ours, dtype=torch.bfloat16):
    if kind == "AFNB":
        block = (ak.AFNB if ours else PlainAFNB)(16, 32, 32, 16, 16)
        shapes = [(8, 16, 97, 97), (8, 32, 97, 97)]
    else:
        block = (ak.APNB if ours else PlainAPNB)(32, 32, 16, 16)
        shapes = [(8, 32, 97, 97)]
    xs = [torch.randn(s).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_() for s in shapes]
    leaves = [*xs, *block.parameters()]

    def fwd():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            return block(*xs)

    up = torch.randn_like(fwd())

    def step():
        torch.autograd.grad(fwd(), leaves, up, allow_unused=True)

    step()
    log = Log()
    with log:
        step()
    real = count(log.ops)
    c = collections.Counter(real)
    print(f"== {kind} {'ours' if ours else 'plain'} {dtype}: step {len(real)}")
    print("   ", ", ".join(f"{k}×{v}" for k, v in c.most_common()))
    if "-v" in sys.argv:
        print("\n".join(f"      {n} {new}" for n, new in log.ops if not is_view(n)))
    block.eval()

    def ev():
        with torch.no_grad():
            return fwd()

    ev()
    log = Log()
    with log:
        ev()
    real = count(log.ops)
    print(f"    evaluation {len(real)}:", ", ".join(f"{k}×{v}" for k, v in collections.Counter(real).most_common()))
    if ours:
        ak.fold_for_inference(block)
        ev()
        log = Log()
        with log:
            ev()
        real = count(log.ops)
        print(f"    folded {len(real)}:", ", ".join(f"{k}×{v}" for k, v in collections.Counter(real).most_common()))


for kind in ("AFNB", "APNB"):
    for ours in (True, False):
        run(kind, ours)
    run(kind, True, torch.float32)

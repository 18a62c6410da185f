"""Is a contestant right? Judged by a float64 truth before it is timed.

Ours by the project's rule: the median over the seeds of the relative error is at most 1.5 times that of plain PyTorch
in the same dtype, plus a floor for rounding noise. A peer may round more, up to 10 times plain's: wrong means wrong
mathematics. Plain PyTorch itself must stay below an absolute bound. Gradients get an allowance where so many values
lie ahead of a ReLU that some are within rounding of zero and switch on or off by chance.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf, prod, sqrt

import torch
from torch import Tensor

from annnet_kernels.pyramid import POOL_SIZES
from annnet_kernels.reference import truth

from . import upsampled
from .cases import BLOCKS, KEY_CHANNELS, MODEL, PAIR, Case
from .heads import HEADS, NETWORKS
from .problem import STATISTICS, Contestant, Problem
from .providers import NAIVE, NON_LOCAL, OURS, PLAIN, Provider, providers

FACTOR = 1.5
PEER_FACTOR = 10.0
FOLDED_FACTOR = 3.0  # products of weights round once more: at 49 × 49, float32, twice plain's error
FLOOR = {"float64": 1e-13, "float32": 1e-7, "float16": 1e-4, "bfloat16": 1e-3}
BOUND = {"float64": 1e-10, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
MODEL_BOUND = 0.1  # a network in training amplifies rounding; its truth is the plain network in float64
RARE = 0.1  # switching values expected in one run, below which a median of five does not meet one
NON_LOCAL_SIDE = 33
HEAD_IMAGE = 128  # pixels of a side, on which the truth of a network with a decode head is computed
KEEP = 0.95  # of the channels, by the blocks' Dropout2d

Failed = Callable[[Contestant, Exception], None]


@dataclass(frozen=True)
class Verdict:
    """The tensor that comes nearest to its bound, or crosses it."""

    right: bool
    tensor: str
    error: float
    allowed: float
    seeds: int
    maps: str

    def __str__(self) -> str:
        return (
            f"{self.tensor}: error {self.error:.1e}, allowed {self.allowed:.1e} (median of {self.seeds}, {self.maps})"
        )


def checked_cases(case: Case, family: str) -> list[Case]:
    """The cases to check a family on, the first whose truth fits in memory counts: the timed one if possible.

    Where every pixel is a token, few pixels do.
    """
    if case.subject in HEADS:
        side = HEAD_IMAGE if case.subject in NETWORKS else HEAD_IMAGE // 4
        return [replace(case, size=(min(case.size[0], side), min(case.size[1], side)))]
    side = 8 * NON_LOCAL_SIDE - 7 if case.subject == MODEL else NON_LOCAL_SIDE
    height, width = (min(n, side) for n in case.size)
    small = replace(case, size=(height, width), batch=1)
    return [small] if family == NON_LOCAL else [case, replace(case, batch=1), small]


def check(
    contestants: Sequence[Contestant],
    problem: Problem,
    seeds: int,
    failed: Failed,
    in_time: Callable[[], bool] = lambda: True,
) -> dict[str, Verdict]:
    """Verdicts by provider name; the contestants belong to ``problem`` and to one family.

    ``failed`` is told of a contestant that raises; it gets no verdict. Once ``in_time`` says no, the seeds that were
    run decide; the verdict says how many.
    """
    running = list(contestants)
    errors: dict[str, dict[str, list[float]]] = {c.provider.name: {} for c in contestants}

    def attempt(contestant: Contestant, function: Callable[[], object]) -> object:
        try:
            return function()
        except Exception as error:
            running.remove(contestant)
            del errors[contestant.provider.name]
            failed(contestant, error)
            return None

    seeds_run = 0
    for seed in range(1, seeds + 1):
        problem.reseed(seed)
        state = problem.state(seed)
        masks: dict[str, Tensor] = {}
        if problem.case.training and problem.case.subject in BLOCKS:
            for contestant in list(running):
                mask = attempt(contestant, lambda c=contestant: _kept_channels(c, state, seed))  # noqa: B023
                if isinstance(mask, Tensor):
                    masks[contestant.provider.name] = mask
        if not running:
            break
        seeds_run = seed
        truth_of_seed = _Truth(running[0], state, seed, list(masks.values()))
        for contestant in list(running):
            mask = masks.get(contestant.provider.name)
            found = attempt(contestant, lambda c=contestant, m=mask: truth_of_seed.errors(c, state, m))  # noqa: B023
            if isinstance(found, dict):
                for tensor, error in found.items():
                    errors[contestant.provider.name].setdefault(tensor, []).append(error)
        if not in_time():
            break
    medians = {
        name: {tensor: statistics.median(values) for tensor, values in by_tensor.items()}
        for name, by_tensor in errors.items()
    }
    baseline = medians.get(NAIVE if contestants[0].provider.family == NON_LOCAL else PLAIN)
    factors = {c.provider.name: _factor(c.provider) for c in contestants}
    return {name: _judge(factors[name], found, baseline, problem.case, seeds_run) for name, found in medians.items()}


def _kept_channels(contestant: Contestant, state: dict[str, Tensor], seed: int) -> Tensor:
    """Which channels (B, C, 1, 1) the contestant's dropout keeps from this seed: the others are all zero."""
    contestant.load(state)
    torch.manual_seed(seed)
    (out,) = contestant.forward(contestant.problem.inputs(contestant.pooled))
    return (out.detach() != 0).any(dim=3, keepdim=True).any(dim=2, keepdim=True)


class _Truth:
    """The float64 results for one seed, for upstream gradients that are zero wherever any contestant's dropout is.

    So one backward pass of the truth serves all contestants, though each drops other channels.
    """

    def __init__(self, like: Contestant, state: dict[str, Tensor], seed: int, masks: list[Tensor]) -> None:
        problem, case = like.problem, like.case
        self.seed = seed
        inputs = [x.detach().double().requires_grad_(x.requires_grad) for x in problem.inputs(like.pooled)]
        with torch.set_grad_enabled(case.training), torch.device(problem.device):
            outputs, parameters, self.expected = _evaluate(like, inputs, state)
        self.expected |= {f"output {i}": out.detach() for i, out in enumerate(outputs)}
        self.upstream: list[Tensor] | None = None
        if not case.training:
            return
        generator = torch.Generator(problem.device).manual_seed(seed)
        dtype = getattr(torch, case.dtype)
        drawn = [torch.randn(out.shape, generator=generator, device=out.device).to(dtype) for out in outputs]
        common = torch.stack(masks).all(dim=0) if masks else None
        self.upstream = drawn if common is None else [g * common for g in drawn]
        scale = 1.0 if common is None else 1 / KEEP
        leaves = {f"input {i}": x for i, x in enumerate(inputs) if x.requires_grad} | parameters
        gradients = torch.autograd.grad(
            outputs, list(leaves.values()), [g.double() * scale for g in self.upstream], allow_unused=True
        )
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
            self.expected[f"gradient of {name}"] = torch.zeros_like(leaf) if gradient is None else gradient

    def errors(self, contestant: Contestant, state: dict[str, Tensor], mask: Tensor | None) -> dict[str, float]:
        """Relative errors of everything that the contestant computes from this seed, by tensor."""
        contestant.load(state)
        torch.manual_seed(self.seed)
        found = contestant.results(contestant.problem.inputs(contestant.pooled), self.upstream)
        expected = dict(self.expected)
        if mask is not None:
            expected["output 0"] = expected["output 0"] * mask / KEEP
        return {name: _error(value, expected[name], self._scale(name)) for name, value in found.items()}

    def _scale(self, name: str) -> float:
        """The norm that an error is relative to: of the tensor, or of its layer's weight gradient where it is zero.

        A bias ahead of a normalisation with batch statistics has a gradient of exactly zero.
        """
        norm = float(self.expected[name].norm())
        if name.startswith("gradient of ") and name.endswith(".bias"):
            weight = float(self.expected[name.removesuffix("bias") + "weight"].norm())
            return weight if norm < 1e-9 * weight else norm
        return norm


def _evaluate(
    like: Contestant, inputs: list[Tensor], state: dict[str, Tensor]
) -> tuple[Sequence[Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Outputs, parameters by name, and running statistics, in float64."""
    case, family = like.case, like.provider.family
    if case.subject == "pyramid_pool":
        matrix = truth.pooling_matrix(POOL_SIZES, POOL_SIZES, *case.size)
        return [inputs[0].flatten(2) @ matrix], {}, {}
    if case.subject == "asymmetric_attention":
        rows = (x.flatten(2).transpose(1, 2) for x in inputs)
        context = truth.attention(*rows, inputs[0].shape[1] ** -0.5)
        return [context.transpose(1, 2).unflatten(2, case.size)], {}, {}
    if case.subject in upsampled.SUBJECTS:
        (logits,) = inputs
        out = upsampled.function(case.subject, False, (*logits.shape[:2], *logits.shape[2:]))(logits)
        return [out.double()], {}, {}
    if case.subject in (PAIR, MODEL, *HEADS):
        name = NAIVE if family == NON_LOCAL else PLAIN
        (plain,) = (p for p in providers(case, "full") if p.name == name)
        module = plain.build(case).double().train(case.training)
        module.load_state_dict(state)
        outputs = module(*inputs)
        running = {n: b for n, b in module.named_buffers() if n.rsplit(".", 1)[-1] in STATISTICS}
        return outputs if isinstance(outputs, tuple) else (outputs,), dict(module.named_parameters()), running
    floats = {name: x for name, x in state.items() if x.is_floating_point()}
    parameters = {
        name: x.double().requires_grad_(case.training and name.rsplit(".", 1)[-1] not in STATISTICS)
        for name, x in floats.items()
    }
    out, running = truth.block(
        parameters,
        inputs[0],
        inputs[-1],
        training=case.training,
        relu=case.subject == "APNB",
        pool=None if family == NON_LOCAL else (POOL_SIZES, POOL_SIZES),
    )
    return [out], {name: x for name, x in parameters.items() if x.requires_grad}, running


def _error(value: Tensor, expected: Tensor, scale: float) -> float:
    if value.shape != expected.shape:
        return inf
    error = float((value.double() - expected).norm()) / max(scale, 1e-300)
    return error if error == error else inf


def _factor(provider: Provider) -> float:
    if provider.folded:
        return FOLDED_FACTOR
    return FACTOR if provider.name == OURS else PEER_FACTOR


def _judge(
    factor: float, found: dict[str, float], baseline: dict[str, float] | None, case: Case, seeds: int
) -> Verdict:
    worst: tuple[float, str, float, float] = (-1.0, "", 0.0, 0.0)
    for tensor, error in found.items():
        if baseline is None or found is baseline:
            allowed = MODEL_BOUND if case.subject in (MODEL, *NETWORKS) else BOUND[case.dtype]
        else:
            allowed = factor * baseline[tensor] + FLOOR[case.dtype]
        if case.subject == upsampled.ARGMAX:
            allowed = upsampled.ARGMAX_BOUND
        if tensor.startswith("gradient"):
            allowed += _allowance(case)
        worst = max(worst, (error / allowed, tensor, error, allowed))
    ratio, tensor, error, allowed = worst
    maps = f"maps {case.batch}×{case.map_size[0]}×{case.map_size[1]}"
    return Verdict(ratio <= 1, tensor, error, allowed, seeds, maps)


def _allowance(case: Case) -> float:
    """What ReLU values that switch by chance change in a gradient, relative to its norm.

    Of n values, n · 4ε lie within rounding of zero. Half of all pass, so that k which switch change the gradient by
    √(2k / n): an APNB of 97 × 97 pixels had none to four in a run. Ours and plain switch other ones, here at most two
    standard deviations and one more, or fewer, than expected. The gradients of the smallest map change most.
    """
    if case.subject not in (*BLOCKS, PAIR, MODEL):
        return 0.0
    pixels = case.batch * prod(case.map_size)
    expected = 4 * torch.finfo(getattr(torch, case.dtype)).eps  # per value
    if pixels * (KEY_CHANNELS + (case.out_channels if case.subject == "APNB" else 0)) * expected <= RARE:
        return 0.0
    values = pixels * KEY_CHANNELS
    spread = 2 * sqrt(values * expected) + 1
    most, fewest = values * expected + spread, max(values * expected - spread, 0.0)
    return sqrt(2 * most / values) - sqrt(2 * fewest / values)

"""A case made concrete: its inputs and parameters, and the contestants that compute it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import annnet_kernels as ak
from annnet_kernels import reference
from annnet_kernels.pyramid import POOL_SIZES
from annnet_kernels.runtime.backends import requested_backend

from .cases import MODEL, Case
from .counting import bytes_of
from .features import Features, randomise
from .heads import NETWORKS
from .measure import Call
from .providers import COPY, NON_LOCAL, FunctionModule, Provider, template

Maps = tuple[Tensor, ...]
MAX_ROTATION = 8


class Problem:
    """Inputs of a case in its dtype and layout, several copies where one would stay in the cache.

    Args:
        case: what to compute.
        features: where the maps come from.
        cache_bytes: size of the cache that the copies of the inputs must exceed twice over; 0 makes one copy.
    """

    def __init__(self, case: Case, features: Features, cache_bytes: int = 0) -> None:
        self.case = case
        self.device = features.device
        self._maps = features.maps(case)
        self._sets: dict[tuple[bool, int], Maps] = {}
        size = bytes_of(self.inputs(pooled=True))
        self.rotation = min(MAX_ROTATION, -(-2 * cache_bytes // size)) if cache_bytes else 1

    def inputs(self, pooled: bool, index: int = 0) -> Maps:
        """Copy number ``index`` of the inputs; the non-local attention takes unpooled keys and values."""
        key = (pooled or self.case.subject != "asymmetric_attention", index)
        if key not in self._sets:
            self._sets[key] = tuple(self._leaf(x) for x in self._shifted(seed=index, pooled=key[0]))
        return self._sets[key]

    def reseed(self, seed: int) -> None:
        """Overwrite copy 0 of the inputs, shifted elsewhere, so that a seed changes inputs as well as parameters."""
        for (pooled, index), tensors in self._sets.items():
            if index == 0:
                with torch.no_grad():
                    for tensor, fresh in zip(tensors, self._shifted(seed, pooled), strict=True):
                        tensor.copy_(fresh)

    def minimal_bytes(self) -> int:
        """What any way of computing the case must move: inputs and parameters read once, outputs written once.

        In training also the gradients of the outputs read, those of inputs and parameters written.
        """
        module = template(self.case)
        given = bytes_of([*self.inputs(pooled=True), *(module.parameters() if module is not None else ())])
        made = self.case.output_values * getattr(torch, self.case.dtype).itemsize
        return (2 if self.case.training else 1) * (given + made)

    def _shifted(self, seed: int, pooled: bool) -> Iterator[Tensor]:
        """The maps rolled by a seeded number of pixels; tokens for the attention."""
        generator = torch.Generator().manual_seed(seed)
        rows, columns = (int(torch.randint(n, (), generator=generator)) for n in self._maps[0].shape[2:])
        for position, full in enumerate(self._maps):
            x = full.roll((rows, columns), dims=(2, 3)) if seed else full
            if self.case.subject == "asymmetric_attention" and position > 0:
                yield reference.pyramid_pool(x, POOL_SIZES, POOL_SIZES) if pooled else x.flatten(2)
            else:
                yield x

    def _leaf(self, x: Tensor) -> Tensor:
        x = x.to(getattr(torch, self.case.dtype))
        if x.dim() == 3:  # tokens are kept token-major, as pyramid_pool makes them
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        elif self.case.layout == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        x = x.detach().clone()
        return x.requires_grad_(self.case.training and self.case.subject not in (MODEL, *NETWORKS))

    def state(self, seed: int) -> dict[str, Tensor]:
        """Random float32 parameters, with the running statistics that they have on these inputs; {} for operators."""
        with self.device:
            module = template(self.case)
        if module is None:
            return {}
        randomise(module, seed).train()
        norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
        with torch.no_grad():
            module(*(x.float() for x in self.inputs(pooled=True)))
        return module.state_dict()


class Contestant:
    """A provider set up for a problem: callable for its time, its memory and its results."""

    def __init__(self, provider: Provider, problem: Problem) -> None:
        self.provider = provider
        self.problem = problem
        self.case = problem.case
        self.pooled = provider.family != NON_LOCAL
        self.differentiates = self.case.training and provider.family != COPY
        with problem.device:
            module = provider.build(self.case).train(self.case.training)
        if self.case.layout == "channels_last":
            for parameter in module.parameters():
                if parameter.dim() == 4:
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        self.module = module
        self._call: Any = module.function if isinstance(module, FunctionModule) else module
        if provider.compile is not None:
            self._call = torch.compile(self._call, mode=provider.compile, fullgraph=True, dynamic=False)
        for context in self._contexts():
            self._call = _within(context, self._call)
        self._upstream: list[Tensor] | None = None

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over these parameters and statistics, in place."""
        if state:
            self.module.load_state_dict(state)
        if self.provider.folded:
            ak.fold_for_inference(self.module)

    def _contexts(self) -> Iterator[AbstractContextManager[object]]:
        """Those that a call needs, and no others, for they are timed with it."""
        if self.provider.backend != requested_backend():
            yield ak.use_backend(self.provider.backend)
        if self.case.autocast:
            yield torch.autocast(self.problem.device.type, getattr(torch, self.case.dtype))
        if not self.differentiates:
            yield torch.no_grad()

    def forward(self, inputs: Maps) -> Maps:
        outputs = self._call(*inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def leaves(self, inputs: Maps) -> dict[str, Tensor]:
        """What a training step differentiates for: inputs (of blocks and operators) and parameters, by name."""
        maps = {f"input {i}": x for i, x in enumerate(inputs) if x.requires_grad}
        return {**maps, **dict(self.module.named_parameters())}

    def step(self, inputs: Maps) -> Call:
        """The timed call: forward, and in training the gradients of all leaves for a fixed upstream gradient."""
        if not self.differentiates:
            return partial(self.forward, inputs)
        leaves = list(self.leaves(inputs).values())

        def forward_and_backward() -> tuple[Tensor | None, ...]:
            outputs = self.forward(inputs)
            return torch.autograd.grad(outputs, leaves, self.upstream(outputs), allow_unused=True)

        return forward_and_backward

    def upstream(self, outputs: Maps) -> list[Tensor]:
        """The gradient of the outputs, drawn at the first call, in the strides of each contestant's own output."""
        if self._upstream is None:
            generator = torch.Generator(self.problem.device).manual_seed(0)
            self._upstream = [_randn_like(out, generator) for out in outputs]
        return self._upstream

    def results(self, inputs: Maps, upstream: list[Tensor] | None) -> dict[str, Tensor]:
        """Outputs, gradients and statistics of one step, by name; a gradient that is not made counts as zero."""
        outputs = self.forward(inputs)
        results = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
        if upstream is not None:
            leaves = self.leaves(inputs)
            seeds = [torch.empty_like(out).copy_(g) for out, g in zip(outputs, upstream, strict=True)]
            gradients = torch.autograd.grad(outputs, list(leaves.values()), seeds, allow_unused=True)
            for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
                results[f"gradient of {name}"] = torch.zeros_like(leaf) if gradient is None else gradient
            if self.provider.statistics:
                results |= {n: b for n, b in self.module.named_buffers() if n.rsplit(".", 1)[-1] in STATISTICS}
        return results

    def calls(self) -> list[Call]:
        """One :meth:`step` per copy of the inputs."""
        return [self.step(self.problem.inputs(self.pooled, i)) for i in range(self.problem.rotation)]


def _within(context: AbstractContextManager[object], call: Callable[..., Any]) -> Callable[..., Any]:
    def within(*arguments: Any) -> Any:
        with context:
            return call(*arguments)

    return within


STATISTICS = ("running_mean", "running_var")


def _randn_like(x: Tensor, generator: torch.Generator) -> Tensor:
    """Random values in the dtype and strides of ``x``."""
    return torch.empty_like(x).copy_(torch.randn(x.shape, generator=generator, device=x.device))

"""Runs cases: sets up the contestants, checks them, measures memory and time, and writes down what happened."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from math import inf
from typing import Any

import torch

from . import machine, measure
from .cases import Case
from .counting import Counts, bytes_of, count
from .features import Features
from .problem import Contestant, Problem
from .providers import COPY, NON_LOCAL, Provider, left_out, providers
from .verify import Verdict, check, checked_cases

OK, WRONG, OUT_OF_MEMORY, FAILED, NO_TIME = "ok", "WRONG", "out of memory", "failed", "no time left"
IMPOSSIBLE = "measurement error"
MARGIN = 1.5  # over the counted peak: convolutions keep reordered copies that counting does not see
WARM_UP = 1  # the check, the memory probe and the estimate of a call's time have run each contestant before
GRAPH_REPETITIONS = 20
COMPILATION = 8.0  # seconds that one is expected to take before the first was seen
CHECK_SHARE = 0.5  # of the time that a case may take; the seeds of the check stop there

Report = Callable[[str, float], None]


def first_line(error: Exception) -> str:
    """What an error is, in one line."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]


@dataclass
class Pace:
    """How slow this machine is at what a run cannot cut short."""

    compilation: float = COMPILATION


@dataclass
class Options:
    """How a run measures.

    Args:
        effort: which providers take part, see ``providers.Provider``.
        seeds: of the correctness check.
        seconds: of timing per case, shared by its providers.
        without: names of providers left out.
        pace: shared by the cases of a run.
        until: ``time.monotonic()`` at which the run should be over. A peer is compiled as long as that can end before:
            a slow compilation takes from later cases, which matter less, and not from its own case's peers.
        share: of the time left, what the next case may take; it then checks fewer seeds and repeats less.
    """

    effort: str = "standard"
    seeds: int = 5
    seconds: float = 10.0
    without: tuple[str, ...] = ()
    pace: Pace = field(default_factory=Pace)
    until: float = inf
    share: float = 1.0
    choose: Callable[[Case, str], list[Provider]] = field(default=providers, repr=False)


def drop_frames(error: BaseException | None) -> None:
    """Let go of the frames that an error, and what it came from, would keep alive, and the tensors in them."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        earlier = error.__cause__ or error.__context__
        error.__cause__ = error.__context__ = None
        error = earlier


def _forget_earlier_cases() -> None:
    """Drop what was compiled for them: they share functions, each of which is compiled a limited number of times.

    What is left is frozen, since going over all that was imported took 0.2 s per memory probe; it is thawed first, or
    what the compiler drops would stay for ever.
    """
    torch.compiler.reset()
    gc.unfreeze()
    gc.collect()
    gc.freeze()


class CaseRun:
    """One case from set-up to record; a provider that fails is written down and the rest goes on."""

    def __init__(self, case: Case, features: Features, options: Options, report: Report) -> None:
        self.case = case
        self.features = features
        self.options = options
        self.report = report
        self.device = features.device
        self.rows: dict[str, dict[str, Any]] = {}
        self.problem = Problem(case, features, machine.l2_bytes(self.device))
        self.end = time.monotonic() + (options.until - time.monotonic()) * options.share

    def run(self) -> dict[str, Any]:
        _forget_earlier_cases()
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True), machine.exact_float32(self.case.dtype):
            return self._run()

    def _run(self) -> dict[str, Any]:
        chosen = [p for p in self.options.choose(self.case, self.options.effort) if p.name not in self.options.without]
        counts = {p.name: self._count(p) for p in chosen}
        contestants = [c for p in chosen if (c := self._enter(p, counts[p.name])) is not None]
        contestants = self._check(contestants)
        self.report("memory", 0.5)
        contestants = [c for c in contestants if self._memory(c)]
        self._time(contestants)
        return {
            **self.case.record(),
            "rotation": self.problem.rotation,
            "minimal_bytes": self.problem.minimal_bytes(),
            "left_out": [*left_out(self.case, self.options.effort), *self.options.without],
            "providers": list(self.rows.values()),
        }

    def _fail(self, name: str, error: Exception) -> None:
        """Write down why a provider is out."""
        row = self.rows[name]
        row["status"] = OUT_OF_MEMORY if measure.is_out_of_memory(error) else FAILED
        row["reason"] = first_line(error)
        drop_frames(error)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _count(self, provider: Provider) -> Counts | None:
        """FLOP, traffic and peak memory, counted without running; None where counting fails."""

        originals = self.problem.inputs(pooled=provider.family != NON_LOCAL)

        def build() -> measure.Call:
            eager = Provider(provider.name, provider.build, provider.family, backend=provider.backend)
            contestant = Contestant(eager, self.problem)
            inputs = tuple(torch.empty_like(x, requires_grad=x.requires_grad) for x in originals)
            contestant.upstream(contestant.forward(inputs))
            return contestant.step(inputs)

        row = {"name": provider.name, "family": provider.family, "compile": provider.compile, "status": OK}
        self.rows[provider.name] = row
        try:
            counts = count(build)
        except Exception as error:
            row["uncounted"] = first_line(error)
            return None
        row.update(flop=counts.flop, traffic=counts.traffic, counted_peak=counts.peak)
        return counts

    def _enter(self, provider: Provider, counts: Counts | None) -> Contestant | None:
        """Set a provider up and warm it, unless it would not fit (Linux kills a process that takes too much)."""
        self.report(provider.name, 0.0)
        if provider.compile is not None and self.options.until - time.monotonic() < self.options.pace.compilation:
            self.rows[provider.name].update(status=NO_TIME, reason="its compilation might not end in time")
            return None
        try:
            available = machine.available_bytes(self.device)
            if self.device.type == "cpu" and counts is not None and MARGIN * counts.peak > available:
                raise MemoryError(f"needs {counts.peak / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are available")
            contestant = Contestant(provider, self.problem)
            contestant.load(self._initial_state())
            first_call = measure.seconds_of(contestant.calls()[0], self.device)
            self.rows[provider.name]["first_call_s"] = first_call
            if provider.compile is not None:
                self.options.pace.compilation = max(COMPILATION, first_call)
        except Exception as error:
            self._fail(provider.name, error)
            return None
        return contestant

    def _seconds_left(self) -> float:
        return self.end - time.monotonic()

    def _initial_state(self) -> dict[str, torch.Tensor]:
        if not hasattr(self, "_state"):
            self._state = self.problem.state(0)
        return self._state

    def _check(self, contestants: list[Contestant]) -> list[Contestant]:
        """Those that compute what they should. Several families are checked apart, each against its own truth."""
        right = [c for c in contestants if c.provider.family == COPY]
        stop = time.monotonic() + self._seconds_left() * CHECK_SHARE
        for family in sorted({c.provider.family for c in contestants} - {COPY}):
            members = [c for c in contestants if c.provider.family == family]
            self.report(f"correctness, {family}", 0.25)
            verdicts = self._verdicts(members, family, lambda: time.monotonic() < stop)
            for contestant in members:
                name = contestant.provider.name
                if name not in verdicts:
                    continue
                self.rows[name]["check"] = asdict(verdicts[name])
                if verdicts[name].right:
                    right.append(contestant)
                else:
                    self.rows[name].update(status=WRONG, reason=str(verdicts[name]))
        self.problem.reseed(0)
        for contestant in right:
            contestant.load(self._initial_state())
        return sorted(right, key=contestants.index)

    def _verdicts(self, members: list[Contestant], family: str, in_time: Callable[[], bool]) -> dict[str, Verdict]:
        """On the timed tensors, or on smaller ones where their float64 truth does not fit in memory."""
        for smaller in checked_cases(self.case, family):
            problem, examined = self.problem, members
            if smaller != self.case:
                problem = Problem(smaller, self.features)
                examined = [Contestant(c.provider, problem) for c in members]
            try:
                return check(
                    examined,
                    problem,
                    self.options.seeds,
                    lambda contestant, error: self._fail(contestant.provider.name, error),
                    in_time,
                )
            except Exception as error:
                if not measure.is_out_of_memory(error):
                    raise
                drop_frames(error)
                failure = error
        raise failure

    def _memory(self, contestant: Contestant) -> bool:
        """Peak of the step above inputs and parameters; in training also what the forward keeps for the backward."""
        name, inputs = contestant.provider.name, self.problem.inputs(contestant.pooled)
        try:
            self.rows[name]["peak_bytes"] = measure.memory_of(contestant.step(inputs), self.device).peak
            if contestant.differentiates:
                outputs: list[torch.Tensor] = []
                memory = measure.memory_of(lambda: outputs.extend(contestant.forward(inputs)), self.device)
                self.rows[name]["kept_bytes"] = memory.live - bytes_of(outputs)
        except Exception as error:
            self._fail(name, error)
            return False
        return True

    def _time(self, contestants: list[Contestant]) -> None:
        """All together, in rounds; on a GPU once more from a CUDA graph, for the time without the host."""
        ready = []
        for contestant in contestants:
            try:
                calls = contestant.calls()
                for _ in range(WARM_UP):
                    for call in calls:
                        call()
                measure.synchronize(self.device)
            except Exception as error:
                self._fail(contestant.provider.name, error)
            else:
                ready.append((contestant, measure.rotating(lambda call: call(), calls)))
        samples = measure.interleaved(
            [call for _, call in ready],
            self.device,
            min(self.options.seconds, max(self._seconds_left(), 0.0)),
            lambda fraction: self.report("timing", 0.5 + 0.5 * fraction),
        )
        for (contestant, call), times in zip(ready, samples, strict=True):
            row = self.rows[contestant.provider.name]
            row["times_s"] = times
            row["quartiles_s"] = measure.quartiles(times)
            if self.device.type == "cuda":
                self._replay(row, call)

    def _replay(self, row: dict[str, Any], call: measure.Call) -> None:
        try:
            times = measure.replayed(call, self.device, GRAPH_REPETITIONS, self.problem.rotation)
        except Exception as error:
            row["graph_reason"] = first_line(error)
            return
        row["graph_times_s"] = times
        row["graph_quartiles_s"] = measure.quartiles(times)

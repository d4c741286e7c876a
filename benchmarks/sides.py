"""One subject run in several ways, all alive in one process.

Every side has a copy of the module and a code object of its own, so Dynamo keeps one
cache entry for each and no side can be served by what another one compiled.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
import torch._inductor.metrics as inductor_metrics
from records import Numbers, Ratio
from subjects import Subject
from torch import Tensor, nn

import memcompile

#: Gradients smaller than this share of the largest one are listed, not judged.
SMALL = 1e-4

#: Errors below this share of a gradient are as good as none: float32's resolution.
RESOLUTION = 1e-7


class Side:
    """One way of running a subject's step."""

    def __init__(self, label: str, subject: Subject, call: Callable[..., Any]) -> None:
        self.label, self.module, self.inputs, self.call = (
            label,
            subject.module,
            subject.inputs,
            call,
        )
        self.device, self.training = self.inputs[0].device, subject.training

    def step(self) -> Tensor | tuple[Tensor, ...]:
        """Forward and backward. Gradients must be None: :meth:`clear` first.

        Returns the loss; where the subject takes no gradient, what its module returns.
        """
        if not self.training:
            with torch.no_grad():
                return self.call(*self.inputs)
        loss = self.call(*self.inputs)
        loss.backward()
        return loss.detach()

    def clear(self) -> None:
        self.module.zero_grad(set_to_none=True)

    def seconds(self) -> float:
        """The time of one step."""
        self.clear()
        synchronize(self.device)
        start = time.perf_counter()
        self.step()
        synchronize(self.device)
        taken = time.perf_counter() - start
        self.clear()
        return taken

    def peak(self) -> memcompile.Peak:
        """The step peak, measured after a warm-up."""
        self.clear()
        self.step()
        self.clear()
        with settled():
            peak = memcompile.measure_peak(self.step, warmup=0, device=self.device)
        self.clear()
        return peak

    def numbers(self, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
        """Loss and gradients, random ops drawn from ``seed``.

        Where no gradient is taken: the sum of the outputs' means, and the outputs.
        """
        self.clear()
        torch.manual_seed(seed)
        loss = self.step()
        if isinstance(loss, tuple):
            return torch.stack([output.mean() for output in loss]).sum(), list(loss)
        gradients = [
            torch.zeros_like(p) if p.grad is None else p.grad for p in self.module.parameters()
        ]
        self.clear()
        return loss, gradients

    def names(self) -> list[str]:
        """What the tensors of :meth:`numbers` are called, the loss first."""
        if self.training:
            return ["loss", *(name for name, _ in self.module.named_parameters())]
        return ["outputs' means", *(f"output {i}" for i in range(len(self.numbers()[1])))]


def eager(subject: Subject, label: str) -> Side:
    """Nothing compiled."""
    return Side(label, subject, subject.module)


def compiled(
    subject: Subject,
    label: str,
    backend: str = "inductor",
    options: dict[str, Any] | None = None,
    activation_memory_budget: float | None = None,
) -> Side:
    """A copy of the subject, compiled as one graph; forward and backward have run once.

    Raises:
        memcompile.BudgetError: ``options["budget"]`` cannot be met.
    """
    own = dataclasses.replace(subject, module=copy.deepcopy(subject.module), blocks=[])
    call = torch.compile(
        own_code(own.module), backend=backend, options=options, fullgraph=True, dynamic=False
    )
    side = Side(label, own, call)
    patches = {}
    if activation_memory_budget is not None:
        patches["activation_memory_budget"] = activation_memory_budget
    with functorch_config.patch(patches):
        side.step()
    side.clear()
    return side


class DoesNotApply(Exception):
    """A way of compiling that changes nothing of the subject."""


def auto_chunked(subject: Subject, label: str, amplify: int = 8) -> Side:
    """Inductor's own chunking, which starts from a matrix product that is large.

    ``amplify`` is how many times as large as what it reads; 8 is Inductor's default.

    Raises:
        DoesNotApply: no such product, or what hangs on it cannot be chunked.
    """
    before = inductor_metrics.num_auto_chunking
    options = {"auto_chunker.enable": True, "auto_chunker.amplify_ratio_threshold": amplify}
    side = compiled(subject, label, options=options)
    if inductor_metrics.num_auto_chunking == before:
        raise DoesNotApply("auto_chunker found nothing it can chunk")
    return side


def own_code(module: nn.Module) -> Callable[..., Any]:
    """``module`` as a function that shares its code object with no other."""

    def step(*inputs: Tensor) -> Any:
        return module(*inputs)

    step.__code__ = step.__code__.replace()
    return step


@contextmanager
def settled() -> Iterator[None]:
    """Compiling anew is an error: what is measured is what was compiled."""
    with torch.compiler.set_stance("fail_on_recompile"):
        yield


@contextmanager
def planned_anew() -> Iterator[None]:
    """Torch's caches of graphs off: plans and their times are of this run. Kernels stay cached."""
    with ExitStack() as stack:
        stack.enter_context(inductor_config.patch(fx_graph_cache=False))
        stack.enter_context(functorch_config.patch(enable_autograd_cache=False))
        yield


def synchronize(device: torch.device) -> None:
    """Wait for what was launched on ``device``."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_pairs(
    pairs: Sequence[tuple[Side, Side]], count: int, after_round: Callable[[], None]
) -> list[Ratio]:
    """Step times of each pair's first side over its second's, from ``count`` rounds.

    A round times every pair once, so slow changes of the machine meet all pairs alike. Who
    of a pair goes first changes from round to round.
    """
    taken: list[tuple[list[float], list[float]]] = [([], []) for _ in pairs]
    with settled():
        for first, second in pairs:
            first.seconds()
            second.seconds()
        for turn in range(count):
            for sides, times in zip(pairs, taken, strict=True):
                for place in (0, 1) if turn % 2 == 0 else (1, 0):
                    times[place].append(sides[place].seconds())
            after_round()
    return [Ratio.of(ours, theirs) for ours, theirs in taken]


def is_random(side: Side) -> bool:
    """Whether the loss depends on the seed."""
    first, second = side.numbers(seed=0)[0], side.numbers(seed=1)[0]
    return not torch.equal(first, second)


def float64(subject: Subject) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of the eager step with everything in float64."""
    inputs = tuple(x.double() if x.is_floating_point() else x for x in subject.inputs)
    module = copy.deepcopy(subject.module).double()
    with mock.patch.object(Tensor, "float", Tensor.double):  # subjects take the loss in float
        exact = dataclasses.replace(subject, module=module, inputs=inputs, blocks=[])
        loss, gradients = eager(exact, "float64").numbers()
    assert loss.dtype == torch.float64
    return loss, gradients


def compare(
    side: Side, inductor: Side, truth: tuple[Tensor, list[Tensor]] | None = None
) -> Numbers:
    """A side's loss and gradients beside Inductor's, and both beside the ``truth``."""
    loss, ours = side.numbers()
    their_loss, theirs = inductor.numbers()
    size = norm(theirs)
    difference = norm([a - b for a, b in zip(ours, theirs, strict=True)])
    far = abs(float(loss) / float(their_loss) - 1)
    found = Numbers(torch.equal(loss, their_loss), far, difference / (size or 1.0))
    if truth is None:
        return found
    names = side.names()
    exact = [truth[0], *truth[1]]
    our_error = errors([loss, *ours], exact)
    their_error = errors([their_loss, *theirs], exact)
    sizes = [float(t.norm()) for t in exact]
    largest = max(sizes[1:])
    judged = [i for i, s in enumerate(sizes) if i == 0 or s >= SMALL * largest]
    ratios = {
        i: max(our_error[i], floor) / max(their_error[i], floor)
        for i in judged
        if (floor := RESOLUTION * sizes[i])
    }
    worst = max(ratios, key=ratios.__getitem__)
    least = RESOLUTION * _root(sizes[1:]) or 1.0
    found.error = max(least, _root(our_error[1:])) / max(least, _root(their_error[1:]))
    found.relative = _root(our_error[1:]) / (_root(sizes[1:]) or 1.0)
    found.worst, found.worst_name = ratios[worst], names[worst]
    found.unjudged = tuple(names[i] for i in range(len(names)) if i not in ratios)
    return found


def errors(found: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """The norm of each tensor's distance from the exact one."""
    return [float((a.double() - b).norm()) for a, b in zip(found, exact, strict=True)]


def norm(tensors: Sequence[Tensor]) -> float:
    """The norm of all entries together."""
    return _root([float(t.double().norm()) for t in tensors])


def _root(norms: Sequence[float]) -> float:
    return sum(x * x for x in norms) ** 0.5

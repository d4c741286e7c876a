"""Steps on a device that is not there: planned on fake CUDA tensors, run on the CPU.

A step is captured on the CPU and its graph written over for a device: every tensor's fake is one of
CUDA. What the planner makes of it is interpreted on the CPU, with copies that are over no sooner
than they are waited for: until then what is copied holds poison.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

import torch
from helpers import short_planning
from torch import fx

from memcompile import Options, _torch, scratch
from memcompile._torch import transfers
from memcompile.compiler import Compiler, Outcome
from memcompile.contract import Context
from memcompile.lowering import Lowering
from memcompile.pipeline import Pipeline
from memcompile.plan import Drafted, Plan
from memcompile.registry import resolve
from memcompile.split import Split
from memcompile.step import Step
from memcompile.testing import Captured, capture

CUDA = torch.device("cuda:0")


def on_cuda(graph: Captured) -> Captured:
    """The same graph with everything on a device."""
    module = _torch.copy_graph(graph.module)
    mode = next(
        found
        for node in module.graph.nodes
        if (found := _torch.detect_fake_mode([node.meta.get("val")])) is not None
    )

    def moved(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(moved(each) for each in value)
        if not isinstance(value, torch.Tensor):
            return value
        with mode:
            return torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device=CUDA
            ).requires_grad_(value.requires_grad)

    for node in module.graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = moved(node.meta["val"])
        node.args = fx.node.map_aggregate(node.args, _device(CUDA))
        node.kwargs = fx.node.map_aggregate(node.kwargs, _device(CUDA))
    return Captured(module, graph.num_outputs, graph.static, graph.inputs)


def _device(device: torch.device) -> Callable[[Any], Any]:
    return lambda arg: device if isinstance(arg, torch.device) else arg


@dataclasses.dataclass
class Planned:
    """A step on a device, planned."""

    graph: Captured
    compiler: Compiler
    outcome: Outcome
    drafted: Drafted


def plan(graph: Captured, budget: Any, passes: Any, drafts: int = 100, **options: Any) -> Planned:
    """Plan a graph that is on a device, by drafts alone."""
    parsed = Options(budget=budget, passes=passes, lower="eager", **options)
    pipeline = Pipeline(resolve(parsed.pipeline), Context(parsed.strict, None, "cuda"))
    compiler = Compiler(parsed, pipeline, Lowering(1, 1, scratch.of), 0)
    found: list[Drafted] = []
    settle = compiler._settle

    def noted(step: Step, chosen: Any, limit: int | None) -> None:
        found.append(chosen.drafted)
        settle(step, chosen, limit)

    compiler._settle = noted  # type: ignore[method-assign]
    compiler._guard = lambda *_: None  # type: ignore[method-assign]  # nothing is compiled
    module = _torch.copy_graph(graph.module)
    with short_planning(drafts):
        outcome = compiler.step(module, graph.num_outputs, graph.static)
    return Planned(graph, compiler, outcome, found[0])


# -- run without the device ----------------------------------------------------------------


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """What no right result is made of."""
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.fill_(float("nan"))
    if tensor.dtype is torch.bool:
        return tensor.fill_(True)
    return tensor.fill_(torch.iinfo(tensor.dtype).min or torch.iinfo(tensor.dtype).max)


class Link:
    """Copies that are over no sooner than they are waited for."""

    def __init__(self) -> None:
        self.under_way: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.count = 0
        self.sources: list[Any] = []  #: weak, of what was copied to the host

    def begin(self, source: torch.Tensor) -> torch.Tensor:
        """A copy that holds poison so far."""
        target = torch.empty_strided(source.shape, source.stride(), dtype=source.dtype)
        self.under_way[target.data_ptr()] = (poison(target), source)
        self.count += 1
        return target

    def wait(self, moved: torch.Tensor, source: torch.Tensor | None = None) -> torch.Tensor:
        """The copy is made from what the source holds by now."""
        target, read = self.under_way.pop(moved.data_ptr())  # every wait has its copy
        if source is not None:
            assert read.data_ptr() == source.data_ptr(), "another source is kept alive"
            self.sources.append(weakref.ref(source))
        target.copy_(read)
        return moved


class Simulated(fx.Interpreter):
    """Runs a side on the CPU."""

    def __init__(self, module: fx.GraphModule, link: Link, **more: Any) -> None:
        super().__init__(module, **more)
        self.link = link

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Copies by the link, all else by the op, on the CPU."""
        if target is transfers.offload:
            return self.link.begin(args[0])
        if target is transfers.reload:
            assert args[1] == CUDA
            return self.link.begin(args[0])
        if target is transfers.wait:
            return self.link.wait(*args)
        args, kwargs = fx.node.map_aggregate((args, kwargs), _device(torch.device("cpu")))
        return super().call_function(target, args, kwargs)


def run(graph: Captured, cut: Split, link: Link, backwards: int = 1) -> list[list[Any]]:
    """Outputs, and gradients of each of several backwards, always from one seed."""
    args = graph.arguments()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        returned = Simulated(cut.forward, link).run(*args)
    assert not link.under_way, "the forward leaves copies behind"
    (output,) = cut.forward.graph.find_nodes(op="output")
    known = dict(zip((getattr(n, "name", None) for n in output.args[0]), returned, strict=True))
    known |= graph.tangents
    results = [list(returned[: graph.num_outputs])]
    for _ in range(backwards):
        inputs = [known[n.name] for n in cut.backward.graph.find_nodes(op="placeholder")]
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            results.append(list(Simulated(cut.backward, link).run(*inputs)))
        assert not link.under_way, "the backward leaves copies behind"
    return results


def joint(graph: Captured) -> list[list[Any]]:
    """The same of the step without a plan."""
    step, given = graph.step, iter(graph.arguments())
    args = [
        graph.tangents[node.name] if node in step.tangents else next(given)
        for node in step.placeholders
    ]
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        flat = _torch.tree_leaves(Simulated(step.module, Link()).run(*args))
    return [flat[: graph.num_outputs], flat[graph.num_outputs :]]


def captured(function: Callable[..., Any], *inputs: Any, dynamic: bool | None = None) -> Captured:
    """The one graph of a function, with everything on a device."""
    (graph,) = capture(function, *inputs, dynamic=dynamic)
    tangents = graph.tangents  # random numbers, made while the step is on the CPU
    moved = on_cuda(graph)
    moved.__dict__["tangents"] = tangents
    return moved


__all__ = ["CUDA", "Link", "Plan", "Planned", "captured", "joint", "plan", "poison", "run"]

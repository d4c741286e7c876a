"""Capture the graphs of a function and run them op by op, always from one seed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from memcompile import _torch
from memcompile.analysis.ops import is_random
from memcompile.errors import PassError
from memcompile.joint import prepare
from memcompile.split import Split, inductor_split
from memcompile.step import Step, hint
from memcompile.testing.numbers import Result, own, wide


@dataclasses.dataclass
class Captured:
    """One graph of a function, before any pass, and what it was called with."""

    module: fx.GraphModule
    num_outputs: int
    static: tuple[int, ...] = ()
    inputs: list[Any] | None = None

    @functools.cached_property
    def step(self) -> Step:
        """The graph as a proposer gets it."""
        module = _torch.copy_graph(self.module)
        prepare(module)
        return Step(module, self.num_outputs, self.static)

    def arguments(self) -> list[Any]:
        """Fresh copies of what the graph was called with."""
        return [own(value) for value in self.inputs or []]

    @functools.cached_property
    def tangents(self) -> dict[str, torch.Tensor]:
        """Random gradients of the outputs, by placeholder; the same every time."""
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return {node.name: _random_like(node.meta["val"]) for node in self.step.tangents}


def capture(
    function: Callable[..., Any], *inputs: Any, dynamic: bool | None = None
) -> list[Captured]:
    """The graphs ``torch.compile`` captures of ``function(*inputs)``, which runs once.

    Forgets what this process has compiled (``torch.compiler.reset``).
    """
    found: list[Captured] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        forwards: list[Captured] = []

        def side(module: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
            return _recording(module, forwards.pop() if forwards else None)

        def infer(module: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
            (output,) = module.graph.find_nodes(op="output")
            found.append(Captured(_torch.copy_graph(module), len(output.args[0])))
            return _recording(module, found[-1])

        def partition(
            module: fx.GraphModule,
            _: Sequence[Any],
            *,
            num_fwd_outputs: int,
            static_lifetime_input_indices: Sequence[int] | None = None,
            **__: Any,
        ) -> tuple[fx.GraphModule, fx.GraphModule]:
            static = tuple(static_lifetime_input_indices or ())
            found.append(Captured(_torch.copy_graph(module), num_fwd_outputs, static))
            forwards.append(found[-1])
            cut, _saved = inductor_split(found[-1].step)
            return cut.forward, cut.backward

        return _torch.aot_eager(gm, example_inputs, side, infer, partition)

    torch.compiler.reset()
    with torch.random.fork_rng():
        torch.compile(function, backend=backend, dynamic=dynamic)(*inputs)
    torch.compiler.reset()
    graphs = [graph for graph in found if graph.inputs is not None]
    if not graphs:
        raise ValueError("torch.compile captured no graph: the function computes no tensor")
    return graphs


def interpret(
    module: fx.GraphModule, args: list[Any], cls: type[fx.Interpreter] = fx.Interpreter
) -> tuple[Any, dict[fx.Node, Any]]:
    """What a graph returns, and the value of every node; always from the same seed."""
    run = cls(module, garbage_collect_values=False)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        return run.run(*args), dict(run.env)


def run_joint(
    graph: Captured, module: fx.GraphModule, cls: type[fx.Interpreter] = fx.Interpreter
) -> tuple[list[Result], dict[str, Any]]:
    """Results of a joint graph, and every value by its node's name."""
    step = Step(module, graph.num_outputs, graph.static)
    primals = iter(graph.arguments())
    args = [
        graph.tangents[node.name] if node in step.tangents else next(primals)
        for node in step.placeholders
    ]
    _, env = interpret(module, args, cls)
    outputs = [env[node] if node else None for node in step.outputs]
    gradients = [env[node] if node else None for node in step.gradients]
    after = [env[node] for node in step.primals]
    return _results(step, outputs, gradients, after), {n.name: v for n, v in env.items()}


def run_split(graph: Captured, cut: Split) -> list[Result]:
    """Results of a forward and its backward."""
    step, args = graph.step, graph.arguments()
    returned, _ = interpret(cut.forward, args)
    assert cut.backward is not None
    (output,) = cut.forward.graph.find_nodes(op="output")
    pairs = zip(output.args[0], returned, strict=True)
    known = {node.name: value for node, value in pairs if isinstance(node, fx.Node)}
    known |= graph.tangents
    placeholders = cut.backward.graph.find_nodes(op="placeholder")
    gradients, _ = interpret(cut.backward, [known[node.name] for node in placeholders])
    return _results(step, returned[: step.num_outputs], gradients, args)


def _results(
    step: Step, outputs: Sequence[Any], gradients: Sequence[Any], after: Sequence[Any]
) -> list[Result]:
    names = [node.name for node in step.primals]
    return [
        *(Result("output", f"output {place}", value) for place, value in enumerate(outputs)),
        *(
            Result("gradient", f"gradient {place} (of {name})", value)
            for place, (name, value) in enumerate(zip(names, gradients, strict=False))
        ),
        *(
            Result("input", f"input {name} after the step", value)
            for name, value in zip(names, after, strict=True)
        ),
    ]


def _recording(module: fx.GraphModule, graph: Captured | None) -> Callable[..., Any]:
    """A side that runs op by op and notes what the graph is first called with."""
    run = _torch.boxed(module)

    def record(args: list[Any]) -> Any:
        if graph is not None and graph.inputs is None:
            graph.inputs = [own(value) for value in args]
        return run(args)

    record._boxed_call = True  # type: ignore[attr-defined]
    return record


def _random_like(traced: torch.Tensor) -> torch.Tensor:
    size = [hint(each) for each in traced.shape]
    return torch.randn(size, dtype=traced.dtype, device=traced.device)


class Float64(fx.Interpreter):
    """Runs a graph in double precision; random draws are those of its own precision."""

    def run_node(self, n: fx.Node) -> Any:
        """The node's value, tensors widened."""
        try:
            if n.op == "call_function" and (is_random(n) or "view.dtype" in str(n.target)):
                args, kwargs = fx.node.map_arg((n.args, n.kwargs), self._as_traced)
                value = n.target(*args, **kwargs)
            else:
                value = super().run_node(n)
        except Exception as error:
            raise PassError(
                f"node {n.name} ({n.target}) does not run in float64, the reference for "
                f'"rounding": {error}; check the pass on a function without it'
            ) from error
        return fx.node.map_aggregate(value, wide)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The op on what it is given, dtypes among its arguments widened."""
        args, kwargs = fx.node.map_aggregate((args, kwargs), wide)
        return super().call_function(target, args, kwargs)

    def _as_traced(self, node: fx.Node) -> Any:
        value, traced = self.env[node], node.meta.get("val")
        known = isinstance(value, torch.Tensor) and isinstance(traced, torch.Tensor)
        return value.to(traced.dtype) if known else value

"""See the graphs that are compiled, and say which of their nodes stay exact.

While a :class:`Watch` is in force, every captured graph is noted: its joint form before any
pass, the graphs that it became, and what they are first called with. This is how fidelity is
measured; nothing here is used otherwise.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from memcompile import _torch
from memcompile.contract import Pass
from memcompile.decided import Decision
from memcompile.registry import spell
from memcompile.report import MoveRow
from memcompile.step import tensors

#: Where a node of a rewritten graph keeps its name, for the graphs that are made of it.
TAG = "memcompile_name"


@dataclasses.dataclass
class Seen:
    """One graph on its way: before the passes, after the rewrites, and as it is run."""

    key: str  #: of its decisions
    code: str  #: of what Dynamo captured: the same for every set of passes
    joint: fx.GraphModule
    rewritten: fx.GraphModule
    exact: frozenset[str]  #: names of nodes that no pass may change
    by: dict[str, str] = dataclasses.field(default_factory=dict)  #: the rewrite of each node
    num_outputs: int = 0
    forward: fx.GraphModule | None = None
    backward: fx.GraphModule | None = None
    moves: tuple[MoveRow, ...] = ()  #: of inexact passes
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)  #: by placeholder

    def changed(self, by: Pass, module: fx.GraphModule) -> None:
        """Note what a rewrite has made of the graph: which nodes it runs otherwise."""
        was, now = _signatures(self.rewritten), _signatures(module)
        for name, signature in was.items():
            if now.get(name) != signature:
                self.by.setdefault(name, spell(by))
        self.rewritten = _torch.copy_graph(module)

    def done(self, module: fx.GraphModule) -> None:
        """Note the graph that the rewrites are done with, and name its nodes."""
        for node in module.graph.nodes:
            node.meta[TAG] = node.name
        self.rewritten = _torch.copy_graph(module)


def signature(node: fx.Node) -> str:
    """What a node computes, but for where its arguments come from."""
    args = fx.node.map_arg((node.args, node.kwargs), lambda arg: str(dtypes(arg)))
    return f"{node.target} {dtypes(node)} {args}"


def dtypes(node: fx.Node) -> tuple[torch.dtype, ...]:
    """The dtypes of the tensors a node gives."""
    return tuple(tensor.dtype for tensor in tensors(node))


def _signatures(module: fx.GraphModule) -> dict[str, str]:
    return {n.name: signature(n) for n in module.graph.nodes if n.op == "call_function"}


class Watch:
    """What is seen while it is in force.

    Args:
        exact: the nodes that are to stay exact, by the key of their graph; ``None``: what
            was decided on disk.
        decompositions: the table that graphs are traced with; ``None``: Inductor's choice.
    """

    def __init__(
        self,
        exact: Mapping[str, frozenset[str]] | None = None,
        decompositions: dict[Any, Any] | None = None,
    ) -> None:
        self.exact, self.decompositions = exact, decompositions
        self.graphs: list[Seen] = []

    def decision(self, key: str) -> Decision | None:
        """What this trial decides in place of what is on disk."""
        assert self.exact is not None
        found = self.exact.get(key)
        return None if found is None else Decision(found)

    def starts(self, key: str, code: str, joint: fx.GraphModule, exact: frozenset[str]) -> Seen:
        """Note a graph before any pass."""
        copied = _torch.copy_graph(joint)
        self.graphs.append(Seen(key, code, copied, copied, exact))
        return self.graphs[-1]

    def planned(
        self,
        forward: fx.GraphModule,
        backward: fx.GraphModule | None,
        num_outputs: int,
        moves: Sequence[MoveRow],
    ) -> None:
        """Note what the graph has become."""
        if self.graphs:
            seen = self.graphs[-1]
            seen.forward = _torch.copy_graph(forward)
            seen.backward = None if backward is None else _torch.copy_graph(backward)
            seen.num_outputs, seen.moves = num_outputs, tuple(moves)

    def recorded(self, gm: fx.GraphModule, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """``compiled``, noting copies of what it is first called with."""
        if not self.graphs:
            return compiled
        seen = self.graphs[-1]
        names = [str(node.target) for node in gm.graph.find_nodes(op="placeholder")]

        def run(args: list[Any]) -> Any:
            for name, value in zip(names, args, strict=True):
                if name not in seen.arguments:
                    tensor = isinstance(value, torch.Tensor)
                    seen.arguments[name] = value.detach().clone() if tensor else value
            return compiled(args)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run


_watches: list[Watch] = []


def current() -> Watch | None:
    """The watch in force, or ``None``."""
    return _watches[-1] if _watches else None


@contextlib.contextmanager
def watching(watch: Watch) -> Iterator[Watch]:
    """Within the block, ``watch`` is in force, in all threads: a backward may have its own."""
    _watches.append(watch)
    try:
        yield watch
    finally:
        _watches.remove(watch)

"""Sums of gradients with the terms first that do not wait for a loop.

Autograd adds a value's gradients in the order they come in. Where a loop makes some of them,
and others wait for what it gives, those that it makes are added inside if they stand first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import torch
from torch import fx

from memcompile import _torch
from memcompile.step import Step


@dataclasses.dataclass(frozen=True)
class _Sum:
    """A chain of additions, and what is added, in order."""

    adds: list[fx.Node]
    terms: list[fx.Node]


class Regrouped:
    """Writes the joint graph with the terms of late sums in another order.

    Args:
        step: the step.
        inside: late nodes of a region.
        waiting: late nodes that wait for the region.
    """

    def __init__(
        self, step: Step, inside: Collection[fx.Node], waiting: Collection[fx.Node]
    ) -> None:
        self.step, self.inside, self.waiting = step, frozenset(inside), frozenset(waiting)
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.args: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}

    def write(self) -> fx.GraphModule | None:
        """The new joint graph, every node by its old name; ``None`` where no sum changes."""
        for chain in self._sums():
            first = [t for t in chain.terms if t not in self.waiting]
            terms = first + [t for t in chain.terms if t in self.waiting]
            if len(first) < 2 or terms == chain.terms:
                continue
            total = terms[0]
            for add, term in zip(chain.adds, terms[1:], strict=True):
                self.args[add] = total, term
                total = add
        if not self.args:
            return None
        for node in self.step.nodes:
            self._emit(node)
        module = _torch.LazyGraphModule(self.step.module, self.graph)
        module.meta.update(self.step.module.meta)
        return module

    def _sums(self) -> list[_Sum]:
        """The longest chains of additions of which a term is inside and one waits."""
        found: list[_Sum] = []
        taken: set[fx.Node] = set()
        for node in reversed(self.step.nodes):
            if node in taken or not self._is_add(node):
                continue
            adds, terms = [node], list(node.args[:2])
            while self._is_add(terms[0]) and len(terms[0].users) == 1:
                adds.insert(0, terms[0])
                terms[:1] = terms[0].args[:2]
            taken.update(adds)
            if any(t in self.inside for t in terms) and len(set(terms)) == len(terms):
                found.append(_Sum(adds, terms))
        return found

    def _is_add(self, node: fx.Node) -> bool:
        """A late addition of two tensors that lie in memory as their sum does."""
        if node.target is not torch.ops.aten.add.Tensor or node not in self.step.sides.late:
            return False
        if node.kwargs or not all(isinstance(a, fx.Node) for a in node.args):
            return False
        value, *terms = (self.step.numbered(n).meta["val"] for n in (node, *node.all_input_nodes))
        if value is None or any(t is None for t in terms):
            return False
        like = (value.shape, value.stride(), value.dtype)
        return all((t.shape, t.stride(), t.dtype) == like for t in terms)

    def _emit(self, node: fx.Node) -> fx.Node:
        if node not in self.env:
            args = self.args.get(node)
            for argument in args or node.all_input_nodes:
                self._emit(argument)
            new = self.env[node] = self.graph.node_copy(node, self.env.__getitem__)
            if args is not None:
                new.args = tuple(self.env[a] for a in args)
        return self.env[node]

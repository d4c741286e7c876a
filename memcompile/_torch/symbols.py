"""Private torch that symbolic sizes need: what is asked of them, and their expressions as nodes.

Checked by running on torch 2.13.0 and 2.11.0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import sympy
import torch
from torch import fx
from torch.fx import graph as fx_graph
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.proxy import GraphAppendingTracer
from torch.utils import _pytree as pytree
from torch.utils._sympy.functions import FloorDiv
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis
from torch.utils._sympy.symbol import SymT, symbol_is_type

__all__ = [
    "FloorDiv",
    "GraphAppendingTracer",
    "PythonReferenceAnalysis",
    "ShapeEnv",
    "SymT",
    "is_known",
    "like",
    "simplified",
    "size_node",
    "size_of",
    "sizes_from_inputs",
    "symbol_is_type",
    "sympy_interp",
    "uncached",
    "unchecked_nodes",
    "unguarded",
    "whole_quotient",
]


def size_node(graph: fx.Graph, known: dict[sympy.Expr, fx.Node], size: Any) -> fx.Node:
    """A node of ``graph``, where nodes are inserted, that computes a symbolic size.

    Args:
        graph: what the node is added to.
        known: the nodes of symbols.
        size: a ``SymInt``.
    """
    expression = size.node.expr
    tracer = GraphAppendingTracer(graph)
    symbols = {s: fx.Proxy(known[s], tracer) for s in expression.free_symbols}
    found: fx.Node = sympy_interp(PythonReferenceAnalysis, symbols, expression).node
    _value(found)
    return found


def _value(node: fx.Node) -> Any:
    """The size a node computes; noted on it and on those that it is computed from."""
    if "val" not in node.meta:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), _value)
        node.meta["val"] = node.target(*args, **kwargs)
    return node.meta["val"]


def whole_quotient(whole: sympy.Expr, part: sympy.Expr) -> sympy.Expr | None:
    """``whole / part`` where it leaves nothing at any length, else ``None``."""
    quotient = sympy.cancel(whole / part)
    even = quotient.is_polynomial(*quotient.free_symbols) and sympy.denom(quotient) == 1
    return quotient if even else None


def simplified(expression: sympy.Expr) -> sympy.Expr:
    """With plain quotients where a division leaves nothing: ``s * s // s`` is ``s``."""

    def divided(whole: sympy.Expr, part: sympy.Expr) -> sympy.Expr:
        quotient = whole_quotient(whole, part)
        return FloorDiv(whole, part) if quotient is None else quotient

    return expression.replace(FloorDiv, divided)


def sizes_from_inputs(graph: fx.Graph) -> None:
    """Have sizes computed from those of the inputs, not read off tensors, where they can be."""
    known = {
        node.meta["val"].node.expr: node
        for node in graph.find_nodes(op="placeholder")
        if isinstance(node.meta.get("val"), torch.SymInt)
    }
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int):
        size = node.meta["val"]
        if isinstance(size, torch.SymInt) and size.node.expr.free_symbols <= known.keys():
            with graph.inserting_before(node):
                node.replace_all_uses_with(size_node(graph, known, size))
            graph.erase_node(node)


def is_known(symbol: sympy.Symbol) -> bool:
    """Whether a symbol has a value in this trace: it does not depend on data."""
    return not symbol_is_type(symbol, _UNKNOWN)


def like(size: torch.SymInt, expression: sympy.Expr) -> torch.SymInt:
    """A symbolic size of the trace that ``size`` is of."""
    env = size.node.shape_env
    hints = {s: env.create_symintnode(s, hint=None).node.hint for s in expression.free_symbols}
    return env.create_symintnode(expression, hint=int(expression.subs(hints)))


def size_of(given: Sequence[Any], size: Any) -> Any:
    """A size made of the symbols among ``given``, as a trace that was given them can follow it.

    Args:
        given: what a traced function was called with.
        size: an ``int`` or a ``SymInt``.
    """
    if not isinstance(size, torch.SymInt):
        return size
    symbols = {s.node.expr: s for s in given if isinstance(s, torch.SymInt)}
    return sympy_interp(PythonReferenceAnalysis, symbols, size.node.expr)


class _NoLeaves:
    """What makes nodes looks for no symbolic numbers among their arguments."""

    tree_iter = staticmethod(lambda tree: iter(()))

    def __getattr__(self, name: str) -> Any:
        return getattr(pytree, name)


@contextlib.contextmanager
def unchecked_nodes() -> Iterator[None]:
    """Within the block, nodes are copied in half the time.

    Since 2.13 every new node's arguments are searched for raw symbolic numbers, to warn of them;
    ours are copies of nodes that were searched.
    """
    with mock.patch.object(fx_graph, "pytree", _NoLeaves()):
        yield


@contextlib.contextmanager
def uncached(mode: Any) -> Iterator[None]:
    """Within the block a fake mode works each op out: for symbolic sizes its cache costs more."""
    with mock.patch.object(mode, "cache_enabled", False) if mode else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def unguarded(env: ShapeEnv | None) -> Iterator[dict[sympy.Basic, None]]:
    """Within the block, what is asked of symbolic sizes is answered and no guard of the step.

    What is given is filled with what was asked, to be asked again of what is kept.
    """
    asked: dict[sympy.Basic, None] = {}
    if env is None:
        yield asked
        return
    original = ShapeEnv.evaluate_expr

    def evaluate_expr(self: ShapeEnv, expression: sympy.Basic, *args: Any, **kwargs: Any) -> Any:
        symbols = expression.free_symbols
        if symbols and all(map(is_known, symbols)):
            asked.setdefault(expression)
        return original(self, expression, *args, **kwargs)

    with mock.patch.object(ShapeEnv, "evaluate_expr", evaluate_expr), env.suppress_guards():
        yield asked


#: Symbols of no hint: what depends on data.
_UNKNOWN = (SymT.UNBACKED_INT, SymT.UNBACKED_FLOAT)

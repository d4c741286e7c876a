"""Symbolic lengths: the numbers that rules are asked with, and how one length divides another.

A rule is asked at one length and holds at every one, if the number that stands for a symbol
is equal to no other size of the step by chance. So each symbol gets a prime of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from memcompile import _torch
from memcompile._torch.symbols import is_known, like, simplified, whole_quotient

#: Small, since rules cut a length into as many parts; no size of the step is a multiple of one.
FROM = 11


def with_numbers(nodes: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    """For each node one like it in whose arguments and values primes stand for symbols.

    What has no number of its own (a size that depends on data) has no value there: no rule
    is found for it.
    """
    primes = _primes_for(nodes)
    numbers: dict[fx.Node, Any] = {}
    twins: dict[fx.Node, fx.Node] = {}
    graph = fx.Graph()
    for node in nodes:
        if node.op == "output":
            continue
        value = node.meta.get("val")
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            numbers[node] = _number(value, primes)
        new = graph.node_copy(node, lambda n: twins[n] if numbers.get(n) is None else numbers[n])
        new.meta = {**node.meta, "val": _valued(value, primes)}
        twins[node] = new
    return twins


def ratio(size: Any, length: Any) -> Any:
    """``size / length`` where that is a whole number at every length, else ``None``.

    Args:
        size: of a dimension; an ``int`` or a ``SymInt``.
        length: likewise.
    """
    if isinstance(size, int) and isinstance(length, int):
        return size // length if size % length == 0 else None
    quotient = _quotient(size_expr(size), size_expr(length))
    if quotient is None or quotient.is_Integer:
        return quotient if quotient is None else int(quotient)
    return like(size, quotient)


@functools.lru_cache(maxsize=4096)
def _quotient(size: sympy.Expr, length: sympy.Expr) -> sympy.Expr | None:
    return whole_quotient(simplified(size), simplified(length))


def size_expr(size: Any) -> sympy.Expr:
    """A size as a sympy expression (an ``Integer`` when it is not symbolic)."""
    return sympy.Integer(size) if isinstance(size, int) else _torch.size_expr(size)


def _primes_for(nodes: Iterable[fx.Node]) -> dict[sympy.Symbol, int]:
    """A prime for every symbol of the step's sizes, none of which divides a size there."""
    symbols: dict[sympy.Symbol, None] = {}
    taken: set[int] = set()
    for node in nodes:
        for size in _sizes(node.meta.get("val")):
            if isinstance(size, int):
                taken.add(size or 1)
            else:
                found = filter(is_known, size_expr(size).free_symbols)
                symbols.update(dict.fromkeys(sorted(found, key=str)))
    primes: dict[sympy.Symbol, int] = {}
    prime = FROM
    for symbol in symbols:
        while any(size % prime == 0 for size in taken):
            prime = sympy.nextprime(prime)
        primes[symbol] = prime
        prime = sympy.nextprime(prime)
    return primes


def _sizes(value: Any) -> list[Any]:
    if isinstance(value, torch.SymInt):
        return [value]
    if isinstance(value, torch.Tensor):
        return list(value.shape)
    if isinstance(value, (list, tuple)):
        return [size for each in value for size in _sizes(each)]
    return []


def _number(value: Any, primes: dict[sympy.Symbol, int]) -> Any:
    if isinstance(value, int):
        return value
    found = value.node.expr.subs(primes)
    if found.free_symbols:
        return None
    if isinstance(value, torch.SymInt):
        return int(found) if found.is_Integer else None
    return bool(found) if isinstance(value, torch.SymBool) else float(found)


def _valued(value: Any, primes: dict[sympy.Symbol, int]) -> Any:
    """The value with numbers for symbols, as tensors of no memory."""
    if isinstance(value, (list, tuple)):
        return [_valued(each, primes) for each in value]
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return None
    shape = [_number(size, primes) for size in value.shape]
    stride = [_number(size, primes) for size in value.stride()]
    if None in shape or None in stride:
        return None
    return torch.empty_strided(shape, stride, dtype=value.dtype, device="meta")

"""The peak as a function of symbolic sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import sympy
from torch import fx

from memcompile.analysis.timeline import Kind, Timeline
from memcompile.plan import Drafted
from memcompile.step import Step


def peak_expressions(step: Step, drafted: Drafted) -> list[tuple[sympy.Expr, int]]:
    """Expressions whose maximum is the peak, at any size, with their values at the hints.

    Every moment of both sides is a sum of monomials with positive coefficients; those that
    another moment beats in every coefficient are left out.
    """
    tops: list[Counter[sympy.Expr]] = []
    start = _monomials(input_expression(step))
    for line in (drafted.forward, drafted.backward):
        total = Counter(start)
        if line is drafted.backward:
            total.update(_monomials(_returned(step, drafted)))
        for moment in _moments(step, line, total):
            if any(_beats(top, moment) for top in tops):
                continue
            tops = [top for top in tops if not _beats(moment, top)]
            tops.append(Counter(moment))
    hints = step.symbols()
    found = [sympy.Add(*(m * c for m, c in top.items())) for top in tops]
    return [(expression, int(expression.subs(hints))) for expression in found]


def _moments(
    step: Step,
    line: Timeline,
    total: Counter[sympy.Expr],
    size_of: Callable[[fx.Node], sympy.Expr] | None = None,
) -> Iterator[Counter[sympy.Expr]]:
    """The running sum at each op that allocates; the same object each time."""
    n = len(line.ops)
    dies: list[list[int]] = [[] for _ in range(n)]
    early: dict[int, list[int]] = {}  # what is taken ahead of the op that it belongs to
    sizes: dict[int, Counter[sympy.Expr]] = {}
    size_of = step.bytes_expr if size_of is None else size_of
    for j, op in enumerate(line.ops):
        if not line.real.real[j] or not op.bytes or not isinstance(op.node, fx.Node):
            continue
        sizes[j] = _monomials(size_of(op.node))
        if op.kind == Kind.SOURCE:
            total.update(sizes[j])
        elif j in line.since:
            early.setdefault(line.since[j], []).append(j)
        if line.last[j] < n:
            dies[max(line.last[j], 0)].append(j)
    for j, op in enumerate(line.ops):
        for taken in early.get(j, ()):
            total.update(sizes[taken])
            yield total
        if op.kind != Kind.SOURCE and j in sizes and j not in line.since:
            total.update(sizes[j])
            yield total
        loop = op.node.meta.get("loop") if isinstance(op.node, fx.Node) else None
        if loop is not None:
            inside = _monomials(loop.expression)
            total.update(inside)
            yield total
            total.subtract(inside)
        for dead in dies[j]:
            total.subtract(sizes[dead])


def bound(step: Step, line: Timeline, size_of: Callable[[fx.Node], sympy.Expr]) -> sympy.Expr:
    """What no moment of a timeline exceeds at any size, where the parts have sizes of their own."""
    most: Counter[sympy.Expr] = Counter()
    for moment in _moments(step, line, Counter(), size_of):
        most |= moment
    return sympy.Add(*(m * c for m, c in most.items()))


def _monomials(expression: sympy.Expr) -> Counter[sympy.Expr]:
    return Counter(sympy.expand(expression).as_coefficients_dict())


def _beats(one: Counter[sympy.Expr], other: Counter[sympy.Expr]) -> bool:
    return all(one[monomial] >= count for monomial, count in other.items())


def peak_expression(step: Step, drafted: Drafted) -> sympy.Expr:
    """The peak of the step: the larger side's expression at the hinted sizes."""
    pairs = peak_expressions(step, drafted)
    return max(pairs, key=lambda pair: pair[1])[0] if pairs else sympy.Integer(0)


def input_expression(step: Step) -> sympy.Expr:
    """Bytes of the primals, each storage once."""
    terms = []
    seen: set[fx.Node] = set()
    for node in step.primals:
        if step.roots[node] not in seen:
            seen.add(step.roots[node])
            terms.append(step.bytes_expr(node))
    return sympy.Add(*terms)


def _returned(step: Step, drafted: Drafted) -> sympy.Expr:
    """User outputs that live through the backward and are not saved values."""
    saved = set(drafted.saved)
    roots = {step.roots[node] for node in step.node_outputs()}
    return sympy.Add(
        *(step.bytes_expr(r) for r in roots if r.op == "call_function" and r not in saved)
    )

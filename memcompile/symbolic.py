"""The peak as a function of symbolic sizes."""

from __future__ import annotations

import sympy
from torch import fx

from memcompile.analysis.timeline import Timeline
from memcompile.draft import Drafted
from memcompile.step import Step


def peak_expressions(step: Step, drafted: Drafted) -> list[tuple[sympy.Expr, int]]:
    """For each side, its peak as an expression, with its value at the hinted sizes."""
    before = input_expression(step)
    found: dict[sympy.Expr, int] = {}
    for line in (drafted.forward, drafted.backward):
        if line.ops:
            expression = before + alive_expression(step, line, line.at)
            if line is drafted.backward:
                expression += _returned(step, drafted)
            found[sympy.expand(expression)] = line.peak
    return list(found.items())


def peak_expression(step: Step, drafted: Drafted) -> sympy.Expr:
    """The peak of the step: the larger side's expression at the hinted sizes."""
    pairs = peak_expressions(step, drafted)
    return max(pairs, key=lambda pair: pair[1])[0] if pairs else sympy.Integer(0)


def alive_expression(step: Step, line: Timeline, at: int) -> sympy.Expr:
    """Bytes alive while op ``at`` runs, what lives before the step left out."""
    terms = []
    for place in line.alive(at):
        op = line.ops[place]
        if op.bytes and isinstance(op.node, fx.Node):
            terms.append(step.bytes_expr(op.node))
    return sympy.Add(*terms)


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

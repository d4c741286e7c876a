"""What is the largest size that fits?

Answered from the symbolic peak of a report: for the plan at hand, or planning anew at
each size that is tried.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import sympy

from memcompile.draft import Draft
from memcompile.options import Budget
from memcompile.planner import Planner
from memcompile.report import Report

_planners: dict[int, tuple[weakref.ref[Report], Planner]] = {}

#: No size above this is tried.
LARGEST = 1 << 40


def remember(report: Report, planner: Planner) -> None:
    """Keep the planner of a dynamic step, so that it can be planned at other sizes."""
    _planners[id(report)] = (weakref.ref(report), planner)


def max_size(
    report: Report, budget: int | str, symbol: str | None = None, replan: bool = False
) -> int:
    """The largest value of a symbolic size whose step fits ``budget``.

    Args:
        report: of a step compiled with dynamic shapes.
        budget: total bytes, as in the options ("8GiB").
        symbol: which size, as ``report.peak_expression`` spells it; the only one by default.
        replan: plan anew at each size tried (the least predicted peak counts), instead of
            asking what the plan at hand allows.

    Returns:
        The size; 0 when not even 1 fits. The other symbols keep the values they were traced
        at. What lowering showed over the prediction (a ratio) is applied at every size.

    Raises:
        ValueError: the step is static, the symbol unknown, or the budget no number of bytes;
            with ``replan``, the report was not planned in this process.
    """
    limit = Budget.parse(budget)
    if limit.kind != "bytes":
        raise ValueError(f"budget={budget!r}: max_size needs a number of bytes")
    if not report.symbols:
        raise ValueError(
            "the step was compiled with static shapes; use torch.compile(dynamic=True)"
        )
    name = symbol or (next(iter(report.symbols)) if len(report.symbols) == 1 else None)
    if name not in report.symbols:
        known = ", ".join(report.symbols)
        raise ValueError(f"symbol={symbol!r}: the step's symbolic sizes are {known}; name one")
    error = max(1.0, (report.lowered or report.predicted) / max(1, report.predicted))
    peak = _replanned(report, name) if replan else _at_hand(report, name)
    return _largest(lambda size: peak(size) * error <= limit.value)


def _at_hand(report: Report, name: str) -> Callable[[int], float]:
    expression = sympy.sympify(report.peak_expression, locals=_symbols(report))
    others = {sympy.Symbol(k, **_ASSUMED): v for k, v in report.symbols.items() if k != name}
    fixed = expression.subs(others)
    variable = sympy.Symbol(name, **_ASSUMED)
    return lambda size: float(fixed.subs(variable, size))


#: Sizes are positive integers.
_ASSUMED: dict[str, Any] = {"integer": True, "positive": True}


def _symbols(report: Report) -> dict[str, sympy.Symbol]:
    return {name: sympy.Symbol(name, **_ASSUMED) for name in report.symbols}


def _replanned(report: Report, name: str) -> Callable[[int], float]:
    known = _planners.get(id(report))
    if known is None or known[0]() is not report:
        raise ValueError("replan=True needs a report of a step planned in this process")
    planner = known[1]
    step = planner.draft.step
    symbol = next(s for s in step.symbols() if str(s) == name)

    def peak(size: int) -> float:
        draft = Draft(
            step.at({symbol: size}), planner.draft.rates, planner.draft.again, planner.draft.fused
        )
        anew = Planner(draft, planner.ground, planner.proposals, planner.bound)
        return float(anew.build().floor.peak)

    return peak


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest size that fits, for a peak that rises with the size."""
    if not fits(1):
        return 0
    high = 2
    while high < LARGEST and fits(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low

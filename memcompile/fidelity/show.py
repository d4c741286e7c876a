"""How fidelity looks as text."""

from __future__ import annotations

from collections.abc import Sequence

from memcompile.fidelity.data import Calibration, Compared, Fidelity, NodeError
from memcompile.show import page
from memcompile.tables import Table, change, size

#: So many tensors are shown one by one.
SHOWN = 12


def fidelity(found: Fidelity) -> str:
    """What a check found."""
    heading = f"fidelity  (lowered by {found.lower}; loss: {found.loss})"
    lines = [
        f"Largest error against float64: memopt {found.error:.2g}, eager {found.eager:.2g}, "
        f"{_inductor(found.lower)} {found.inductor:.2g}.",
        f"May change numbers: {', '.join(found.passes) or 'no pass'}.",
    ]
    if found.exact:
        lines.append(f"Kept exact by calibration: {', '.join(found.exact)}.")
    if found.worst is not None:
        at = f" at {found.worst.source}" if found.worst.source else ""
        lines.append(f"Worst node: {found.worst.node}{at}.")
    judged = [each for each in found.tensors if not each.below]
    tables = [
        _tensors("Errors against float64, largest first", judged),
        _nodes("Nodes that bring most error", found.nodes),
        _tensors("Under the floor", [each for each in found.tensors if each.below]),
    ]
    return page(heading, lines, [t for t in tables if t.rows], _notes(found.notes))


def calibration(found: Calibration) -> str:
    """What a calibration decided."""
    heading = f"calibration  (lowered by {found.lower}; loss: {found.loss})"
    bounds = {"error": found.max_error, "gradient error": found.max_grad_error}
    asked = [f"{name} <= {bound:g}" for name, bound in bounds.items() if bound is not None]
    lines = [
        f"Asked: {', '.join(asked) or 'no bound'}. Passes: {', '.join(found.passes) or 'none'}.",
        f"Error {found.error:.2g}, gradient error {found.grad_error:.2g}; "
        f"before: {found.before[0]:.2g} and {found.before[1]:.2g}.",
        f"{len(found.exact)} kept exact in {found.graphs} graphs; {found.steps} steps were run.",
    ]
    tables = [_nodes("Kept exact", found.exact)] if found.exact else []
    return page(heading, lines, tables, _notes(found.notes))


def _inductor(lower: str) -> str:
    return "Inductor" if lower == "inductor" else "Inductor's graphs op by op"


def _notes(notes: Sequence[str]) -> list[tuple[str, Sequence[str]]]:
    return [("Notes", notes)] if notes else []


def _tensors(title: str, tensors: Sequence[Compared]) -> Table:
    shown = sorted(tensors, key=lambda each: -each.memopt)[:SHOWN]
    rows = tuple(
        (t.group, t.name, *(f"{e:.2g}" for e in (t.norm, t.eager, t.inductor, t.memopt)))
        for t in shown
    )
    columns = ("group", "tensor", "norm", "eager", "inductor", "memopt")
    more = f" ({len(shown)} of {len(tensors)})" if len(shown) < len(tensors) else ""
    return Table(f"{title}{more}", columns, rows, columns[2:])


def _nodes(title: str, nodes: Sequence[NodeError]) -> Table:
    rows = tuple(
        (
            _named(each),
            *(f"{e:.2g}" for e in (each.local, each.total, each.error, each.grad_error)),
            f"{size(each.bytes)}, {change(-each.seconds)}",
            "; ".join(filter(None, [each.source, _pass(each), _led(each)])),
        )
        for each in nodes
    )
    columns = ("node", "adds", "has", "brings", "to gradients", "buys", "where")
    return Table(title, columns, rows, columns[1:5])


def _named(node: NodeError) -> str:
    """The node, and what it stands for where that has another name."""
    stands = f" for {', '.join(node.names[:3])}" if node.node not in node.names else ""
    return f"{node.node} ({node.dtype}){stands}"


def _pass(node: NodeError) -> str:
    return node.by.split("{", 1)[0]


def _led(node: NodeError) -> str:
    """What it reads that is narrow, and where its error grows."""
    fed = f"fed by {node.fed_by}" if node.fed_by else ""
    grown = f"amplified {node.amplified}" if node.amplified else ""
    return "; ".join(filter(None, [fed, grown]))

"""What a refused user is told: the floor, what sets it, and what would lower it."""

from __future__ import annotations

from memcompile.errors import BudgetError
from memcompile.options import Options, format_bytes
from memcompile.plan import Drafted
from memcompile.step import Step, source_line


def refuse(
    options: Options, step: Step, least: Drafted, *, budget: int, floor: int, held: int
) -> BudgetError:
    """The error for a ``budget`` below the ``floor``, the least lowered peak found.

    Args:
        least: the draft whose lowered peak is the floor.
        budget: total bytes, the reserve taken off.
        held: bytes of the floor that earlier graphs of the step hold.
    """
    line = max((least.forward, least.backward), key=lambda t: t.peak)
    node = line.ops[line.at].node if line.ops else step.output
    where = source_line(node)
    label = f" ({options.name})" if options.name else ""
    reserve = options.reserve_bytes
    lines = [
        f"the step{label} cannot fit budget={options.budget!r}: "
        f"{format_bytes(budget)} ({budget} bytes)"
        + (f" after reserve={format_bytes(reserve)}" if reserve else ""),
        f"the least lowered peak found is {format_bytes(floor)} ({floor} bytes), "
        f"at node {node.name}" + (f" from {where}" if where else ""),
    ]
    if held:
        lines.append(f"of it, {format_bytes(held)} are held by graphs compiled before this one")
    lines += _suggestions(step, least)
    lines.append(f"budget={floor + reserve} (bytes) is the least known to be met")
    return BudgetError("\n".join(lines), budget=budget, floor=floor, node=node.name, source=where)


def _suggestions(step: Step, least: Drafted) -> list[str]:
    line = max((least.forward, least.backward), key=lambda t: t.peak)
    alive = sorted(line.alive(line.at), key=lambda j: -line.ops[j].bytes)[:3]
    held = [
        f"{line.ops[j].node.name} {format_bytes(line.ops[j].bytes)}"
        + (f" ({source_line(line.ops[j].node)})" if source_line(line.ops[j].node) else "")
        for j in alive
        if line.ops[j].bytes
    ]
    lines = []
    if held:
        lines.append("largest values alive there: " + "; ".join(held))
    lines.append(
        f"parameters, buffers and inputs are {format_bytes(step.input_bytes())} of it; "
        "a smaller batch or shorter sequence, or fewer values kept by the user's own "
        "checkpoint tags, would lower the rest"
    )
    return lines

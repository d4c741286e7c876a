"""Regions between two values that are saved anyway, where everything is of one size.

Along a residual stream all values are as large as each other, and no region starts and ends
where little crosses. But the stream itself is saved, so one layer can run as loops from one
of its values to the next. What a layer needs whole (one factor of a triangle multiplication,
AlphaFold 2, algorithm 11) is made outside and read whole; what is a sum over the chunks (that
factor's gradient) is given, large as it is. What waits for such a sum is left outside, where
it can be a region of its own. A sum of gradients of which some wait and some do not is
written with those first that do not, so that they are added inside.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from memcompile.analysis.flow import rules_for
from memcompile.analysis.ops import classify
from memcompile.analysis.rules import tensor_args
from memcompile.analysis.timeline import Kind
from memcompile.border import widened
from memcompile.layer import LARGE, Layer
from memcompile.region import Region
from memcompile.regroup import Regrouped
from memcompile.step import Step, is_loop, is_view, tensors

#: How many large values there may be between what is small and a value made of it.
NEAR = 8


def find(
    step: Step, seed: fx.Node, dim: int, kept: Collection[fx.Node]
) -> tuple[Step, Region] | None:
    """The layer around ``seed``, sliced along ``dim``; ``None`` where there is none.

    Args:
        step: the step.
        seed: a value inside the layer; what it is made of decides what is read whole.
        dim: the dimension to slice it along.
        kept: roots that are saved for the backward: no region goes past one.

    Returns:
        The region, and the step it is one of: the given one, or a copy in which the terms
        of sums stand in another order.
    """
    start = _start(step, seed, dim, kept)
    if start is None:
        return None
    seed, dim = start
    grown = _grown(step, seed, dim, kept)
    if grown is None:
        return None
    module = Regrouped(step, grown.late(), grown.waiting).write()
    if module is not None:
        step = step.anew(module)
        names = {node.name for node in kept}
        by_name = {node.name: node for node in step.nodes}
        seed, kept = by_name[seed.name], [n for n in step.nodes if n.name in names]
        grown = _grown(step, seed, dim, kept)
        if grown is None:
            return None
    found = grown.region()
    if found is None or seed in found.again or (found.late is None and step.sides.late):
        return None
    if _reads_itself(step, found):
        return None
    wide = widened(step, found, kept)
    return step, found if wide is None or _reads_itself(step, wide) else wide


def _reads_itself(step: Step, found: Region) -> bool:
    """Whether an input of a part is made of what that part gives."""
    for part in (found.early, found.late):
        if part is None:
            continue
        moved = {n for n in part.nodes if n not in found.again}
        if part is found.late:
            moved &= step.sides.late
        stack, seen = list(part.inputs), set(part.inputs)
        while stack:
            node = stack.pop()
            if node in moved:
                return True
            new = [a for a in node.all_input_nodes if a not in seen]
            seen.update(new)
            stack.extend(new)
    return False


def _start(
    step: Step, seed: fx.Node, dim: int, kept: Collection[fx.Node]
) -> tuple[fx.Node, int] | None:
    """An early value to grow from: the seed, or what a late seed reads a slice of."""
    early = seed in step.sides.early
    if not _is_turn(step, seed) and (step.sides.late or not _is_widened(step, seed, kept)):
        return None  # with a backward, outer products are regions by themselves
    if early:
        return None if step.roots[seed] in kept else (seed, dim)
    twin = step.numbered(seed)
    length = tensors(twin)[0].shape[dim] if tensors(twin) else None
    flow = rules_for(length).giving(twin, 0, dim) if isinstance(length, int) else None
    for argument, place in zip(tensor_args(seed), flow.inputs if flow else (), strict=False):
        inner = step.roots[argument].op == "call_function" and step.roots[argument] not in kept
        if isinstance(place, int) and inner and argument in step.sides.early:
            return argument, place
    return None


def _is_turn(step: Step, node: fx.Node) -> bool:
    """Whether one of the node's readers or itself needs something large of it whole.

    That is a product of two values of its order, or what a loop reads.
    """
    if any(is_loop(user) for value in _views(node) for user in value.users):
        return True
    size = LARGE * step.bytes(node)
    large = {step.roots[a] for a in node.all_input_nodes if step.bytes(step.roots[a]) >= size}
    inner = [root for root in large if root.op == "call_function"]
    return classify(node) == Kind.EXTERN and len(inner) > 1


def _is_widened(step: Step, node: fx.Node, kept: Collection[fx.Node]) -> bool:
    """Whether an early value is made of what is small alone: an outer product, and what follows."""
    size, stack, seen = LARGE * step.bytes(node), [node], {node}
    while stack:
        large = {step.roots[a] for a in stack.pop().all_input_nodes} - seen
        large = {root for root in large if step.bytes(root) >= size}
        if any(r.op != "call_function" or r in kept for r in large) or len(seen) > NEAR:
            return False
        seen |= large
        stack.extend(large)
    return True


def _views(node: fx.Node) -> list[fx.Node]:
    """A value and its views."""
    found = [node]
    for each in found:
        found += [user for user in each.users if is_view(user)]
    return found


def _grown(step: Step, seed: fx.Node, dim: int, kept: Collection[fx.Node]) -> Layer | None:
    values = tensors(step.numbered(seed))
    length = values[0].shape[dim] if values else None
    if not isinstance(length, int) or length < 2:
        return None
    growth = Layer(step, seed, rules_for(length), frozenset(kept))
    return growth if growth.grow(dim) else None

"""How much of the step's error each node brings, and what it buys.

A *candidate* is what can be moved back together: a value that an inexact move changes, a node
that an inexact rewrite runs otherwise, or neighbours that it replaced. What a candidate brings is
measured: the error that it adds, found by the walk, is put into the double-precision step at
that one place, and what hangs on it is computed again. So nothing else is in the figure, neither
other casts nor rounding, and each takes a part of one step and no compilation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from memcompile.analysis.cost import calibrate, node_seconds
from memcompile.fidelity.align import Pairs, through_rewrites
from memcompile.fidelity.values import Env, apart, error, in_double, is_drawn, is_float, under
from memcompile.fidelity.walk import Added, Walk, early_and_late
from memcompile.step import Step
from memcompile.testing.numbers import Result, epsilon, norms
from memcompile.watch import signature

#: So many candidates, or groups of them, are measured one by one.
PROBES = 64
#: An error is amplified where it grows by this factor from what a node reads to what it gives.
JUMP = 8.0
#: A value so much smaller than what it is made of is zero but for rounding, and says nothing.
NOISE = 1e-9


@dataclasses.dataclass
class Candidate:
    """Nodes of the graph before the passes that are moved back together."""

    names: tuple[str, ...]
    culprit: Added  #: the node, as it is run, that adds most
    gaps: dict[tuple[fx.Node, bool], Any]  #: the error at each, by node and whether late only
    bytes: int = 0  #: gained by leaving it inexact, predicted
    seconds: float = 0.0
    errors: dict[tuple[str, str], float] = dataclasses.field(default_factory=dict)  #: it brings
    amplified: fx.Node | None = None  #: where it grows beyond what its own value has
    factor: float = 1.0

    @property
    def error(self) -> float:
        """The largest relative error that it brings to an output or a gradient."""
        return max(self.errors.values(), default=0.0)

    @property
    def grad_error(self) -> float:
        """The largest that it brings to a gradient."""
        return max((e for (group, _), e in self.errors.items() if group == "gradient"), default=0.0)

    @property
    def broken(self) -> bool:
        """Whether the culprit adds more than roundings of its dtype: a cancellation, a codec."""
        value = self.culprit.node.meta.get("val")
        return self.culprit.local > JUMP * epsilon(value)


def candidates(walked: Walk, inexact: bool) -> list[Candidate]:
    """What can be moved back, or, where not only ``inexact`` is asked for, all that adds error."""
    seen = walked.seen
    groups = _groups(seen_pairs := through_rewrites(seen), seen.rewritten, seen.joint)
    moved = {move.value for move in seen.moves}
    owner = _owners(walked, groups, moved, inexact)
    parts: dict[tuple[str, ...], list[Added]] = {}
    for added in walked.added:
        names = owner.get(added.node)
        if names is not None:
            parts.setdefault(names, []).append(added)
    now: dict[str, fx.Node] = {old.name: new for new, old in reversed(list(seen_pairs.items()))}
    found, step = [], early_and_late(seen)
    for names, group in parts.items():
        gaps: dict[tuple[fx.Node, bool], Any] = {}
        for added in group:
            if added.gap is not None and added.stands_for is not None:
                gaps.setdefault((added.stands_for, added.late), added.gap)
        culprit = max(group, key=lambda added: added.local)
        one = Candidate(names, culprit, gaps)
        one.bytes, one.seconds = _gain(walked, step, names, now, group)
        found.append(one)
    return found


def _owners(
    walked: Walk,
    groups: Mapping[str, tuple[str, ...]],
    moved: set[str],
    inexact: bool,
) -> dict[fx.Node, tuple[str, ...]]:
    """Which candidate each node that is run belongs to: its own, or that of its readers."""
    owner: dict[fx.Node, tuple[str, ...]] = {}
    for added in reversed(walked.added):
        node, old = added.node, added.stands_for
        if old is not None and added.late and old.name in moved:
            owner[node] = (old.name,)
        elif old is not None and old.name in groups:
            owner[node] = groups[old.name]
        elif old is not None:
            if not inexact:
                owner[node] = (old.name,)
        else:
            readers = [owner[user] for user in node.users if user in owner]
            if readers:
                owner[node] = readers[0]
    return owner


def _groups(
    pairs: Pairs, rewritten: fx.GraphModule, joint: fx.GraphModule
) -> dict[str, tuple[str, ...]]:
    """Each node that a rewrite runs otherwise or has replaced, with those replaced with it."""
    alive = _alive(rewritten.graph)
    now: dict[fx.Node, list[fx.Node]] = {}
    for new, old in pairs.items():
        if new in alive:
            now.setdefault(old, []).append(new)
    was = _alive(joint.graph)
    groups: dict[str, tuple[str, ...]] = {}
    gone: set[fx.Node] = set()
    for old in joint.graph.nodes:
        if old.op != "call_function" or old not in was:
            continue
        same = [new for new in now.get(old, []) if new.target == old.target]
        if not same:
            gone.add(old)
        elif all(signature(new) != signature(old) for new in same):
            groups[old.name] = (old.name,)
    for group in _connected(gone):
        groups |= dict.fromkeys(group, group)
    return groups


def _alive(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that an output hangs on."""
    todo = list(graph.find_nodes(op="output"))
    found = set(todo)
    while todo:
        for arg in todo.pop().all_input_nodes:
            if arg not in found:
                found.add(arg)
                todo.append(arg)
    return found


def _connected(nodes: set[fx.Node]) -> list[tuple[str, ...]]:
    """Names of nodes that hang together, group by group."""
    left, found = dict.fromkeys(sorted(nodes)), []
    while left:
        todo, group = [next(iter(left))], []
        left.pop(todo[0])
        while todo:
            node = todo.pop()
            group.append(node.name)
            for other in (*node.all_input_nodes, *node.users):
                if other in left:
                    left.pop(other)
                    todo.append(other)
        found.append(tuple(sorted(group)))
    return found


def _gain(
    walked: Walk,
    step: Step,
    names: Sequence[str],
    now: Mapping[str, fx.Node],
    group: Sequence[Added],
) -> tuple[int, float]:
    """Bytes and predicted seconds that the candidate's nodes take less than they did.

    Where a rewrite put nodes in their place, ``group``, its seconds are those of all of them.
    """
    rates = calibrate(step.device)
    size, seconds = 0, 0.0
    moves = {move.value: move for move in walked.seen.moves}
    was = {node.name: node for node in step.nodes}
    for node in (was[name] for name in names if name in was):
        if node.name in moves:
            size += moves[node.name].bytes
            seconds -= moves[node.name].seconds
            continue
        seconds += node_seconds(node, rates)
        if node.name in now:
            size += step.bytes(node) - step.bytes(now[node.name])
    if not any(name in moves for name in names):
        seconds -= sum(node_seconds(a.node, rates) for a in group if not a.late)
    return size, seconds


# -- what each brings -------------------------------------------------------------------------


def measure(walked: Walk, found: Sequence[Candidate], probes: int = PROBES) -> list[Candidate]:
    """Fill in what each candidate brings; those beyond ``probes`` are measured in groups.

    A group becomes one candidate, so the list that is returned may be shorter.
    """
    step = early_and_late(walked.seen)
    order = sorted(found, key=lambda one: -one.culprit.local)
    single, rest = order[: probes // 2], order[probes // 2 :]
    share = -(-len(rest) // max(1, probes - len(single))) or 1
    joined = [_joined(rest[at : at + share]) for at in range(0, len(rest), share)]
    again = walked.again & step.sides.early
    with torch.random.fork_rng(), torch.no_grad():
        for one in (*single, *joined):
            _probe(step, walked, again, one)
    return [*single, *joined]


def _joined(several: Sequence[Candidate]) -> Candidate:
    if len(several) == 1:
        return several[0]
    gaps: dict[tuple[fx.Node, bool], Any] = {}
    for one in several:
        gaps |= one.gaps
    return Candidate(
        tuple(name for one in several for name in one.names),
        several[0].culprit,
        gaps,
        sum(one.bytes for one in several),
        sum(one.seconds for one in several),
    )


def trace(walked: Walk, one: Candidate) -> None:
    """Find where a candidate's error grows most on its way."""
    step = early_and_late(walked.seen)
    with torch.random.fork_rng(), torch.no_grad():
        _probe(step, walked, walked.again & step.sides.early, one, noting=True)


def _probe(
    step: Step, walked: Walk, again: set[fx.Node], one: Candidate, noting: bool = False
) -> None:
    """Put the candidate's error into the exact step, and compare what comes out.

    What only the backward reads otherwise is read so by late nodes, and by the early ones that
    the backward runs ``again``.
    """
    exact = walked.exact
    late: Env = {node: exact[node] + gap for (node, only), gap in one.gaps.items() if only}
    env: Env = {node: exact[node] + gap for (node, only), gap in one.gaps.items() if not only}
    for node in step.nodes:
        if node.op != "call_function" or is_drawn(node):
            continue
        if not any(arg in env or arg in late for arg in node.all_input_nodes):
            continue
        early = node in step.sides.early
        for changed, levels in ((env, (env, exact)), (late, (late, env, exact))):
            if node in changed or (changed is late and (not early or node not in again)):
                continue
            given = _Given(*(levels if early else (late, env, exact)))
            read = [arg for arg in node.all_input_nodes if given.changed(arg)]
            if changed is late and not any(arg in late for arg in read):
                continue
            if read:
                changed[node] = in_double(node, given, step.module)
                if noting:
                    _note(one, node, changed[node], given, read)
    one.errors = _errors(step, {**late, **env}, exact)


def _note(one: Candidate, node: fx.Node, value: Any, given: _Given, read: list[fx.Node]) -> None:
    """Keep where the error grows most."""
    exact = given.levels[-1]
    before = max(error(given[arg], exact[arg]) for arg in read)
    after = error(value, exact[node])
    if min((_mean_size(exact[arg]) for arg in read), default=0.0) * NOISE > _mean_size(exact[node]):
        return
    if before > 0 and math.isfinite(after) and after / before > max(JUMP, one.factor):
        one.amplified, one.factor = node, after / before


def _mean_size(value: Any) -> float:
    """The root mean square of a tensor of floats."""
    return float(value.abs().square().mean().sqrt()) if is_float(value) and value.numel() else 0.0


class _Given(Mapping[fx.Node, Any]):
    """What a node reads: what has changed, else what is exact."""

    def __init__(self, *levels: Mapping[fx.Node, Any]) -> None:
        self.levels = levels

    def __getitem__(self, node: fx.Node) -> Any:
        return next(level[node] for level in self.levels if node in level)

    def changed(self, node: fx.Node) -> bool:
        """Whether it reads something else there than what is exact."""
        return any(node in level for level in self.levels[:-1])

    def __iter__(self) -> Any:
        return iter(self.levels[-1])

    def __len__(self) -> int:
        return len(self.levels[-1])


def _errors(step: Step, env: Env, exact: Env) -> dict[tuple[str, str], float]:
    """The relative error of each output and gradient that counts, by group and name."""
    results = [Result("output", n.name, exact[n]) for n in step.node_outputs()]
    results += [Result("gradient", n.name, exact[n]) for n in step.gradient_nodes()]
    nodes = [*step.node_outputs(), *step.gradient_nodes()]
    largest = norms(result for result in results if is_float(result.value))
    found: dict[tuple[str, str], float] = {}
    for node, result in zip(nodes, results, strict=True):
        scale = largest.get("gradient", 0.0) if result.group == "gradient" else 0.0
        if node in env and is_float(result.value) and not under(result, scale):
            found[result.group, result.label] = apart(env[node], result.value, scale)
    return found


def together(several: Iterable[Candidate], gradients: bool) -> float:
    """The largest error that candidates bring together, if theirs add up as noise does."""
    squares: dict[tuple[str, str], float] = {}
    for one in several:
        for (group, name), brought in one.errors.items():
            if group == "gradient" or not gradients:
                squares[group, name] = squares.get((group, name), 0.0) + brought**2
    return math.sqrt(max(squares.values(), default=0.0))


# -- which to keep ----------------------------------------------------------------------------


def worst_first(found: Iterable[Candidate], gradients: bool) -> list[Candidate]:
    """In the order in which they are to be moved back: most error for what it buys first.

    What a candidate buys is its share of all bytes plus its share of all seconds.

    Args:
        found: measured candidates.
        gradients: whether the error of gradients alone counts.
    """
    found = list(found)
    size = sum(max(0, one.bytes) for one in found) or 1
    seconds = sum(max(0.0, one.seconds) for one in found) or 1.0

    def price(one: Candidate) -> float:
        gain = max(0, one.bytes) / size + max(0.0, one.seconds) / seconds
        return brings(one, gradients) / max(gain, 1e-9)

    return sorted(found, key=lambda one: (-price(one), one.names))


def brings(one: Candidate, gradients: bool) -> float:
    """The error that a candidate brings, of gradients alone or of all."""
    return one.grad_error if gradients else one.error

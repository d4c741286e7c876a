"""Walk over a step beside its double-precision self, and tell where error comes in.

The joint graph before the passes runs in float64 on what the step was called with: what each
value should be. Then each node of the graphs that are run is given these, rounded to the
dtypes it reads, and what it makes of them is compared: the error that it adds itself. What
it has in the step as a whole, less that, it inherits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from memcompile.analysis.ops import op_name
from memcompile.fidelity.align import Pairs, composed, is_cast, through_rewrites, through_split
from memcompile.fidelity.values import (
    Env,
    as_traced,
    error,
    in_double,
    is_drawn,
    is_float,
    rounded,
    runs_graphs,
    widest,
)
from memcompile.step import Step, hint
from memcompile.watch import TAG, Seen


@dataclasses.dataclass
class Added:
    """What one node of the step as it is run adds to the error."""

    node: fx.Node
    stands_for: fx.Node | None  #: a node of the joint graph before the passes
    late: bool  #: whether only the backward reads it
    local: float  #: relative error of its value, given what it should be given
    total: float  #: relative error of its value in the step as it is run
    gap: Any = None  #: its value less what it stands for, in float64


@dataclasses.dataclass
class Walk:
    """One graph, walked over."""

    seen: Seen
    pairs: Pairs  #: from the nodes that are run to those of the joint graph before the passes
    exact: Env  #: of the joint graph: each value in float64
    added: list[Added]

    @property
    def again(self) -> set[fx.Node]:
        """Nodes of the joint graph that run again in the backward, on what it is given."""
        if self.seen.backward is None:
            return set()
        nodes = [n for n in self.seen.backward.graph.nodes if n.op == "call_function"]
        return {self.pairs[node] for node in nodes if node in self.pairs}


def walk(seen: Seen, arguments: dict[str, Any]) -> Walk:
    """Walk over one graph.

    Args:
        seen: the graph, before the passes and as it is run.
        arguments: of the joint graph by placeholder: inputs, and tangents.
    """
    rewritten = through_rewrites(seen)
    pairs = composed(through_split(seen), rewritten)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        run = _run(sides(seen), arguments, pairs, {})
        draws = {old: run[new] for new, old in pairs.items() if is_drawn(old) and new in run}
        exact = _exact(seen.joint, arguments, draws)
        added = _compare(sides(seen), pairs, run, exact)
        if any(runs_graphs(node) for node in run):
            kept = {old: value for old, value in exact.items() if is_drawn(old)}
            run = _run([seen.rewritten], arguments, rewritten, kept)
            added += _hidden(added, _compare([seen.rewritten], rewritten, run, exact))
        return Walk(seen, pairs, exact, added)


def _hidden(seen: list[Added], all_nodes: list[Added]) -> list[Added]:
    """Of the nodes before loops were made, those that are inside of one."""
    stands = {added.stands_for for added in seen}
    names = {added.node.meta.get(TAG) for added in seen}
    return [
        added
        for added in all_nodes
        if added.node.name not in names
        and (added.stands_for is None or added.stands_for not in stands)
    ]


def arguments_of(seen: Seen, recorded: dict[str, Any]) -> dict[str, Any]:
    """What the joint graph is called with; ones where its backward never was."""
    found = {}
    for node in seen.joint.graph.find_nodes(op="placeholder"):
        value, traced = recorded.get(str(node.target)), node.meta.get("val")
        if value is None and isinstance(traced, torch.Tensor):
            size = [hint(each) for each in traced.shape]
            value = torch.ones(size, dtype=traced.dtype, device=traced.device)
        found[str(node.target)] = value
    return found


def sides(seen: Seen) -> list[fx.GraphModule]:
    """The graphs that are run."""
    return [module for module in (seen.forward, seen.backward) if module is not None]


def _run(
    modules: Sequence[fx.GraphModule], arguments: dict[str, Any], pairs: Pairs, drawn: Env
) -> Env:
    """Every value of the graphs as they are run, one after the other; one draw a draw."""
    env: Env = {}
    drawn = dict(drawn)
    made: dict[str, Any] = dict(arguments)
    for module in modules:
        for node in module.graph.nodes:
            if node.op == "placeholder":
                env[node] = made[node.name] if node.name in made else made[str(node.target)]
            elif is_drawn(node) and pairs.get(node) in drawn:
                env[node] = rounded(drawn[pairs[node]], node)
            elif node.op != "output":
                env[node] = as_traced(node, env, module)
                if is_drawn(node) and node in pairs:
                    drawn[pairs[node]] = env[node]
        made |= {node.name: value for node, value in env.items() if node.op != "placeholder"}
    return env


def _exact(joint: fx.GraphModule, arguments: dict[str, Any], draws: Env) -> Env:
    env: Env = {}
    for node in joint.graph.nodes:
        if node.op == "placeholder":
            env[node] = widest(arguments[str(node.target)])
        elif node in draws:
            env[node] = widest(draws[node])
        elif node.op != "output":
            env[node] = in_double(node, env, joint)
    return env


def _compare(modules: Sequence[fx.GraphModule], pairs: Pairs, run: Env, exact: Env) -> list[Added]:
    """Each node given what it should be given, in order."""
    found: list[Added] = []
    right: Env = {}  #: what each node should give
    rough: Env = {}  #: what it gives, if what comes before it has something it stands for
    made: dict[str, fx.Node] = {}
    for module in modules:
        before = {pairs[node] for node in made.values() if node in pairs}
        for node in module.graph.nodes:
            old = pairs.get(node)
            if node.op == "output":
                continue
            if node.op == "placeholder":
                source = made.get(node.name)
                given = run[node] if source is None else right[source]
                right[node] = exact[old] if old is not None else widest(given)
                rough[node] = right[node] if old is not None or source is None else rough[source]
                continue
            made[node.name] = node
            inside = any(rough[arg] is not right[arg] for arg in node.all_input_nodes)
            if is_drawn(node) or _draws_inside(node, module):
                right[node] = rough[node] = exact[old] if old is not None else widest(run[node])
                continue
            own = as_traced(node, right, module)
            through = as_traced(node, rough, module) if inside else own
            right[node] = exact[old] if old is not None else in_double(node, right, module)
            rough[node] = right[node] if old is not None else through
            local, total = error(own, right[node]), error(run[node], right[node])
            if local or total or inside:
                late = old is not None and old in before
                gap = _gap(through, exact[old]) if old is not None else None
                found.append(Added(node, old, late, local, total, gap))
    return found


def _gap(value: Any, exact: Any) -> Any:
    if not (is_float(value) and is_float(exact)) or value.shape != exact.shape:
        return None
    gap = widest(value) - exact
    return gap if bool(gap.isfinite().all()) else torch.where(gap.isfinite(), gap, exact)


def fed_by(node: fx.Node) -> fx.Node | None:
    """The nearest cast to fewer bits that a node's own few bits come from, if there is one."""
    todo, seen = [node], {node}
    for each in todo:
        for arg in each.all_input_nodes:
            if arg in seen or not _bits(arg):
                continue
            if is_cast(arg) and _bits(arg) < _bits(arg.all_input_nodes[0]):
                return arg
            if _bits(arg) == _bits(each) < 4:
                seen.add(arg)
                todo.append(arg)
    return None


def _draws_inside(node: fx.Node, module: fx.GraphModule) -> bool:
    """Whether it is a loop whose body draws: op by op it draws other numbers than the whole."""
    if not runs_graphs(node):
        return False
    names = [str(arg.target) for arg in node.all_input_nodes if arg.op == "get_attr"]
    bodies = [getattr(module, name) for name in names]
    graphs = [body.graph for body in bodies if isinstance(body, fx.GraphModule)]
    return any(op_name(n).endswith("_part") for graph in graphs for n in graph.nodes)


def _bits(node: fx.Node) -> int:
    """Bytes of one element of a node's value, if it is a tensor of floats."""
    value = node.meta.get("val")
    return value.element_size() if isinstance(value, torch.Tensor) and is_float(value) else 0


def early_and_late(seen: Seen) -> Step:
    """The joint graph before the passes, with its sides."""
    (output,) = seen.joint.graph.find_nodes(op="output")
    return Step(seen.joint, seen.num_outputs or len(output.args[0]))

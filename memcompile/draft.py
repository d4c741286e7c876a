"""A light copy of the step that moves edit; its timeline decides.

Nothing is deleted by hand: what nobody needs is never built, so undoing a move is
drafting without it.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable

from torch import fx

from memcompile._torch.transfers import reload
from memcompile.analysis.cost import Rates
from memcompile.analysis.timeline import Kind, Op, simulate
from memcompile.contract import Proposal, Rebuild
from memcompile.info import Info, read_fragment, read_step
from memcompile.order import late_order
from memcompile.plan import Drafted, Late, Plan
from memcompile.step import Step, is_view, tensors
from memcompile.ways import Ways, copy_node


class Draft:
    """The step, ready to be drafted under any plan.

    Args:
        step: the step.
        rates: what the device can do.
        again: early values that may run twice; any other one a late reader needs is kept.
        fused: whether the lowering fuses (Inductor does, eager does not).
        like: the draft of a step that this one was copied from, at the same rates.
    """

    def __init__(
        self,
        step: Step,
        rates: Rates,
        again: frozenset[fx.Node] | None = None,
        fused: bool = True,
        like: Draft | None = None,
    ) -> None:
        self.step = step
        self.rates = rates
        self.fused = fused
        self.grouped = fused and step.device.type == "cpu"
        self.again = step.sides.early if again is None else again
        self.before = step.input_bytes()
        roots = step.roots
        self.info: dict[fx.Node, Info] = read_step(
            step, rates, fused, like.info if like is not None else None
        )
        self.outputs = [roots[node] for node in step.node_outputs()]
        self.gradients = [roots[node] for node in step.gradient_nodes()]
        self._late_order = late_order(step, self.info, self.gradients)
        self.forward_always = self._closure(self.outputs + self._pinned_effects())
        self._returned = sum(
            self.info[r].bytes
            for r in set(self.outputs)
            if r in step.sides.early and r.op == "call_function"
        )
        self._tangents = sum(self.info[t].bytes for t in step.tangents)
        self.evaluations = 0

    # -- reading the step -----------------------------------------------------------

    def _pinned_effects(self) -> list[fx.Node]:
        """Early nodes that run for their effect, whoever reads them."""
        return [
            node
            for node in self.step.nodes
            if node in self.step.sides.early and node.op == "call_function" and node.is_impure()
        ]

    def _closure(self, roots: Iterable[fx.Node]) -> frozenset[fx.Node]:
        needed: set[fx.Node] = set()
        stack = list(roots)
        while stack:
            node = stack.pop()
            if node in needed:
                continue
            needed.add(node)
            stack.extend(self.info[node].inputs)
        return frozenset(needed)

    @functools.cached_property
    def forward_order(self) -> list[fx.Node]:
        """Early nodes as the forward runs them.

        What only the backward needs stands late in the joint graph; in the forward it
        runs as soon as its inputs are there, so that they are not held for it.
        """
        step = self.step
        place: dict[fx.Node, tuple[int, int]] = {}
        for node in step.nodes:
            if node.op != "placeholder" and node not in step.sides.early:
                continue
            own = step.order[node]
            if node in self.forward_always or node.op != "call_function":
                place[node] = (own, own)
            else:
                inputs = [place[a][0] for a in node.all_input_nodes if a in place]
                place[node] = (max(inputs, default=own), own)
        return sorted((n for n in place if n in step.sides.early), key=place.__getitem__)

    @functools.cached_property
    def early_calls(self) -> frozenset[fx.Node]:
        """Early nodes that compute something."""
        return frozenset(n for n in self.step.sides.early if n.op == "call_function")

    @functools.cached_property
    def unable(self) -> frozenset[fx.Node]:
        """Early nodes that may not run twice."""
        return self.early_calls - self.again

    @functools.cached_property
    def late_items(self) -> list[tuple[fx.Node, Info, Late]]:
        """Late nodes as the backward runs them, with what is known of each."""
        return [(node, self.info[node], Late(node, False)) for node in self._late_order]

    @functools.cached_property
    def needed_late(self) -> frozenset[fx.Node]:
        """Early roots that some late node or gradient reads directly."""
        early = self.step.sides.early
        read = {i for node in self._late_order for i in self.info[node].inputs}
        return frozenset(n for n in (*read, *self.gradients) if n in early)

    # -- drafting -------------------------------------------------------------------

    def under(self, plan: Plan) -> Drafted:
        """Draft the step under a plan and walk both sides' timelines."""
        self.evaluations += 1
        build = self._draft_backward(plan)
        saved, stored = build.saved, build.stored
        ways = (
            Ways(self.step, self.rates, build.ops, build.coming, build.starts)
            if build.coming
            else None
        )
        forward = self._draft_forward(plan, saved, stored, ways)
        before = ways.out(forward) if ways else {}
        after = ways.back() if ways else {}
        out = simulate(forward, self.before, self.grouped, **before)
        returned = self._returned - sum(self.info[s].bytes for s in set(saved) & set(self.outputs))
        back = simulate(build.ops, self.before + returned, self.grouped, **after)
        rate, launch = self.rates.memory, self.rates.launch
        seconds = out.seconds(rate, launch) + back.seconds(rate, launch)
        order = self.forward_order
        if ways is None:
            return Drafted(plan, out, back, saved, stored, order, build.order, seconds)
        seconds += ways.link.stalled
        return Drafted(
            plan, out, back, saved, stored, order, build.order, seconds, ways.stays(), ways.link
        )

    def _draft_forward(
        self, plan: Plan, saved: list[fx.Node], stored: list[fx.Node], ways: Ways | None
    ) -> list[Op]:
        info = self.info
        encoded = [v for v, p in plan.rebuilt.items() if p.rebuild and p.rebuild.encode]
        extra = [n for n in (*saved, *encoded) if n not in self.forward_always]
        needed = self.forward_always | self._closure(extra) if extra else self.forward_always
        keep = {*saved, *self.outputs}
        stored_set = set(stored)
        place: dict[fx.Node, int] = {}
        ops: list[Op] = []
        for node in self.forward_order:
            if node not in needed:
                continue
            what = info[node]
            place[node] = len(ops)
            if what.kind == Kind.SOURCE:
                ops.append(Op(node, Kind.SOURCE, (), 0, owned=False, traffic=what.bytes))
                continue
            inputs = tuple([place[i] for i in what.inputs])
            ops.append(what.op(node, inputs, node in keep))
            move = plan.rebuilt.get(node)
            if move is not None and move.rebuild is not None and move.rebuild.encode is not None:
                made = self._add_fragment(ops, move.rebuild.encode, [place[node]], stored_set)
                if ways is not None and move.rebuild.host is not None:
                    ways.leave(ops, move, made)
            if ways is not None:
                ways.pass_by(ops, node)
        return ops

    def _draft_backward(self, plan: Plan) -> _Backward:
        build = _Backward(self, plan)
        build.run()
        for gradient in self.gradients:
            build.need(gradient)
        for gradient in self.gradients:
            place = build.place.get(gradient)
            if place is not None:
                build.ops[place].keep = True
        return build

    def _add_fragment(
        self,
        ops: list[Op],
        fragment: fx.GraphModule,
        inputs: list[int],
        keep: set[fx.Node],
    ) -> list[int]:
        """Append a rebuild graph's ops; returns the places of its outputs."""
        place: dict[fx.Node, int] = {}
        given = iter(inputs)
        for node in fragment.graph.nodes:
            if node.op == "placeholder":
                place[node] = next(given)
            elif node.op == "output":
                return [place[out] for out in node.args[0]]
            elif tensors(node):  # no symbolic size
                what = self._fragment_info(node)
                args = tuple(dict.fromkeys(place[a] for a in node.all_input_nodes if a in place))
                if what is None:
                    place[node] = args[0]
                    continue
                place[node] = len(ops)
                ops.append(what.op(node, args, node in keep))
        raise AssertionError("a graph ends in an output")

    @functools.cached_property
    def _fragments(self) -> dict[fx.Node, Info | None]:
        return {}

    def _fragment_info(self, node: fx.Node) -> Info | None:
        """What is known of a node of a rebuild graph; ``None`` for a view."""
        if node not in self._fragments:
            known = (
                None if is_view(node) else read_fragment(self.step, node, self.rates, self.fused)
            )
            self._fragments[node] = known
        return self._fragments[node]


class _Backward:
    """Lays out one backward: late nodes in order, copies of early ones just in time."""

    def __init__(self, draft: Draft, plan: Plan) -> None:
        self.draft, self.plan, self.early = draft, plan, draft.step.sides.early
        #: chosen to be kept, or neither able to run twice nor rebuilt in another way
        self.kept = (draft.unable - plan.rebuilt.keys()) | (plan.kept & draft.early_calls)
        self.ops: list[Op] = []
        self.order: list[Late | Proposal] = []
        self.saved: list[fx.Node] = []
        self.stored: list[fx.Node] = []
        self.place: dict[fx.Node, int] = {}
        self.starts: list[int] = []  #: where the ops of each item of the order start
        self.coming: list[tuple[Proposal, list[int]]] = []  #: from the host, and where

    def run(self) -> None:
        """Lay out the late nodes, in their order, with whatever each needs before it."""
        place, starts, ops, order = self.place, self.starts, self.ops, self.order
        for node, what, own in self.draft.late_items:
            if node in place:
                continue
            try:  # most find all they read there: no call for these
                inputs = tuple([place[i] for i in what.inputs])
            except KeyError:
                self.need(node)
                continue
            place[node] = len(ops)
            starts.append(len(ops))
            ops.append(what.op(node, inputs))
            order.append(own)

    def need(self, node: fx.Node) -> None:
        """Lay out ``node`` and whatever it needs that is not there yet, in step order."""
        if node in self.place:
            return
        missing = self._missing(node)
        if len(missing) > 1:
            missing = sorted(missing, key=self.draft.step.order.__getitem__)
        for each in missing:
            self._lay(each)

    def _missing(self, node: fx.Node) -> Collection[fx.Node]:
        place, info, rebuilt, kept = self.place, self.draft.info, self.plan.rebuilt, self.kept
        found = {node}
        stack = [node]
        while stack:
            at = stack.pop()
            if at in kept:
                continue
            inputs = info[at].inputs
            if (move := rebuilt.get(at)) is not None and move.rebuild is not None:
                inputs = tuple(self.draft.step.roots[r] for r in move.rebuild.reads)
            for read in inputs:
                if read not in place and read not in found:
                    found.add(read)
                    stack.append(read)
        return found

    def _lay(self, node: fx.Node) -> None:
        draft, plan = self.draft, self.plan
        info = draft.info[node]
        if info.kind == Kind.SOURCE:
            size = 0 if node in self.early else info.bytes
            self._source(node, size, owned=False, traffic=info.bytes)
            return
        if node in self.kept:
            self.saved.append(node)
            self._source(node, info.bytes, owned=node not in draft.outputs)
            return
        early = node in self.early
        if early and (move := plan.rebuilt.get(node)) is not None and move.rebuild is not None:
            self._rebuild(node, move, move.rebuild)
            return
        inputs = tuple([self.place[i] for i in info.inputs])
        self.place[node] = len(self.ops)
        self.starts.append(len(self.ops))
        self.ops.append(info.op(node, inputs))
        self.order.append(Late(node, early))

    def _source(self, node: fx.Node, size: int, *, owned: bool, traffic: int = 0) -> int:
        self.place[node] = len(self.ops)
        self.ops.append(Op(node, Kind.SOURCE, (), size, owned=owned, traffic=traffic))
        return self.place[node]

    def _rebuild(self, node: fx.Node, move: Proposal, how: Rebuild) -> None:
        self.starts.append(len(self.ops))
        inputs = []
        for stored in how.stored:
            size = self.draft.step.bytes(stored)
            if how.host is None:
                self.stored.append(stored)
                inputs.append(self._source(stored, size, owned=True))
            else:
                inputs.append(len(self.ops))
                back = copy_node(move, stored, reload)
                self.ops.append(Op(back, Kind.EXTERN, (), size, moves=size))
        if how.host is not None and inputs:
            self.coming.append((move, list(inputs)))
        inputs += [self.place[self.draft.step.roots[r]] for r in how.reads]
        (self.place[node],) = self.draft._add_fragment(self.ops, how.decode, inputs, set())
        self.order.append(move)

"""The finished plan, cut into forward and backward graphs.

Nothing is decided here. The draft's order is written out as one joint graph in
which every recomputation and rebuild is explicit; torch's own extraction then cuts
it at the values that late readers take from the forward.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch
from torch import fx

from memcompile import _torch
from memcompile._torch import transfers
from memcompile.contiguous import make_contiguous
from memcompile.contract import Proposal
from memcompile.inplace import write_over
from memcompile.layout import lay_out
from memcompile.plan import Drafted, Late
from memcompile.shared import share_functions
from memcompile.step import Step, loops_in

#: Where a rebuilt value keeps the name of the value that it stands for.
STANDS_FOR = "memcompile_stands_for"


@dataclasses.dataclass(frozen=True)
class Split:
    """The modules a step compiles to."""

    forward: fx.GraphModule
    backward: fx.GraphModule | None  #: ``None`` for a step that is not split

    def keeps_order(self, drafted: Drafted) -> bool:
        """Whether Inductor is to look for no other order: by copies to the host, or by loops."""
        sides = [side for side in (self.forward, self.backward) if side is not None]
        return bool(drafted.stays) or any(loops_in(side.graph) for side in sides)


def inductor_split(step: Step) -> tuple[Split, list[str]]:
    """Inductor's own split of the step, and the names of the values it saves."""
    module = _torch.copy_graph(step.module)
    forward, backward = _torch.min_cut_rematerialization_partition(
        module,
        [node.meta["val"] for node in step.placeholders],
        compiler="inductor",
        num_fwd_outputs=step.num_outputs,
        static_lifetime_input_indices=[
            place for place, node in enumerate(step.primals) if node in step.static
        ],
    )
    (output,) = forward.graph.find_nodes(op="output")
    saved = [n.name for n in output.args[0][step.num_outputs :] if isinstance(n, fx.Node)]
    return Split(forward, backward), saved


def split(step: Step, drafted: Drafted) -> Split:
    """Cut the step as ``drafted`` says."""
    writer = _Writer(step, drafted)
    joint, saved, symbols = writer.write()
    forward, backward = _torch.extract_modules(
        joint,
        saved,
        saved_sym_nodes=symbols,
        num_fwd_outputs=step.num_outputs,
        static_lifetime_input_nodes=None,
    )
    forward = _torch.thread_graphsafe_rng_from_hops(
        _torch.raise_getitems(forward), is_backward=False
    )
    backward = _torch.thread_graphsafe_rng_from_hops(
        _torch.raise_getitems(backward), is_backward=True
    )
    part_distant_sums(backward.graph)
    backward.recompile()
    for side in (forward, backward):
        write_over(side)
        lay_out(side)
        make_contiguous(side)
        share_functions(side)
    return Split(forward, backward)


#: Nodes between a product and the other term of its sum that make the two "distant".
DISTANT = 16


def part_distant_sums(graph: fx.Graph) -> None:
    """Keep Inductor from moving a product down to a sum far below it.

    Inductor turns ``mm + x`` into one ``addmm`` where ``x`` is ready. With a tied weight,
    ``x`` is the embedding's gradient, at the end of the backward, and the product's inputs
    (the gradient of all logits) would live until then. ``x - (-mm)`` is the same sum, to
    the bit, and not that pattern.
    """
    place = {node: number for number, node in enumerate(graph.nodes)}
    aten = torch.ops.aten
    for node in list(graph.nodes):
        if node.target is not aten.add.Tensor or node.kwargs or len(node.args) != 2:
            continue
        for product, other in (node.args, node.args[::-1]):
            if not (isinstance(product, fx.Node) and isinstance(other, fx.Node)):
                continue
            if product.target is not aten.mm.default or len(product.users) != 1:
                continue
            if place[other] - place[product] < DISTANT:
                continue
            with graph.inserting_after(product):
                negative = graph.call_function(aten.neg.default, (product,))
            negative.meta = {**product.meta}
            node.target, node.args = aten.sub.Tensor, (other, negative)
            break


def rewrite_whole(step: Step, drafted: Drafted) -> fx.GraphModule:
    """The step as one graph, for steps that are not split: copies are made just in time."""
    module = _Writer(step, drafted).write_whole()
    write_over(module)
    lay_out(module)
    make_contiguous(module)
    share_functions(module)
    return module


class _Writer:
    """Writes the joint graph of a draft."""

    def __init__(self, step: Step, drafted: Drafted) -> None:
        self.step, self.drafted = step, drafted
        self.graph = fx.Graph()
        self.early: dict[fx.Node, fx.Node] = {}
        self.late: dict[fx.Node, fx.Node] = {}
        self.encoded: dict[fx.Node, fx.Node] = {}
        self.coming: dict[fx.Node, fx.Node] = {}  #: copies back that have begun
        self.saved: dict[fx.Node, None] = {}
        self.symbols: dict[fx.Node, None] = {}
        self.kept = frozenset(drafted.saved)
        self.constants: list[str] = []

    def write_whole(self) -> fx.GraphModule:
        """The whole graph with its outputs in their own order."""
        self._write_sides()
        (results,) = self.step.output.args
        flat = [self._output(r) if isinstance(r, fx.Node) else r for r in results]
        return self._module(tuple(flat))

    def write(self) -> tuple[fx.GraphModule, list[fx.Node], list[fx.Node]]:
        """The joint module, the values stored for the backward, the symbols stored."""
        self._write_sides()
        outputs = [self._output(node) for node in self.step.outputs]
        gradients = [None if g is None else self.read_late(g) for g in self.step.gradients]
        joint = self._module((*outputs, *gradients))
        return joint, list(self.saved), list(self.symbols)

    def _write_sides(self) -> None:
        self._write_early()
        begins: dict[int, list[Proposal]] = {}
        for stay in self.drafted.stays:
            begins.setdefault(stay.begins, []).append(stay.move)
        for place, item in enumerate(self.drafted.late):
            for move in begins.get(place, ()):
                self._reload(move)
            if isinstance(item, Late):
                self._copy_late(item.node)
            else:
                assert item.rebuild is not None
                decoded = self.late[item.value] = self._decode(item)
                decoded.meta[STANDS_FOR] = item.value.name

    def _module(self, results: tuple[object, ...]) -> fx.GraphModule:
        output = self.graph.output(results)
        output.meta.update(self.step.output.meta)
        module = fx.GraphModule(self.step.module, self.graph)
        module.meta.update(self.step.module.meta)
        return module

    def _write_early(self) -> None:
        rebuilt = self.drafted.plan.rebuilt
        landing: dict[fx.Node, list[Proposal]] = {}
        stays = self.drafted.stays
        for stay in sorted(stays, key=lambda stay: self.step.order[stay.move.value]):
            landing.setdefault(stay.landed, []).append(stay.move)
        leaving = {stay.move.value for stay in stays}
        for node in self.step.placeholders:
            self.early[node] = self.graph.node_copy(node)
        for node in self.drafted.early:
            if node.op != "placeholder":
                self.early[node] = self.graph.node_copy(node, self.early.__getitem__)
            move = rebuilt.get(node)
            if move is not None and move.rebuild is not None and move.rebuild.encode is not None:
                self._inline(move.rebuild.encode, [self.early[node]], self.encoded)
                if node in leaving:
                    self._offload(move)
            for landed in landing.get(node, ()):
                self._land(landed)

    # -- to the host and back ---------------------------------------------------------------

    def _offload(self, move: Proposal) -> None:
        """Begin to copy what is stored to the host."""
        for stored in _stored(move):
            self.coming[stored] = self._copy(
                transfers.offload, (self.encoded[stored],), f"offload_{move.value.name}"
            )

    def _land(self, move: Proposal) -> None:
        """Wait for those copies: what was copied is read until here."""
        for stored in _stored(move):
            source, name = self.encoded[stored], f"{transfers.LANDED}{move.value.name}"
            self.encoded[stored] = self._copy(
                transfers.wait, (self.coming.pop(stored), source), name
            )

    def _reload(self, move: Proposal) -> None:
        """Begin to copy what is stored back to where it was."""
        for stored in _stored(move):
            host = self.encoded[stored]
            self.saved[host] = None
            device = stored.meta["val"].device
            self.coming[stored] = self._copy(
                transfers.reload, (host, device), f"reload_{move.value.name}"
            )

    def _copy(self, target: Any, args: tuple[Any, ...], name: str) -> fx.Node:
        node = self.graph.create_node("call_function", target, args, name=name)
        given = fx.node.map_arg(args, lambda arg: arg.meta["val"])
        with _torch.detect_fake_mode([args[0].meta["val"]]) or contextlib.nullcontext():
            node.meta["val"] = target(*given)
        node.meta["stack_trace"] = args[0].meta.get("stack_trace")
        return node

    def _inline(
        self, module: fx.GraphModule, inputs: list[fx.Node], env: dict[fx.Node, fx.Node]
    ) -> list[fx.Node]:
        given = iter(inputs)
        for node in module.graph.nodes:
            if node.op == "placeholder":
                env[node] = next(given)
            elif node.op == "output":
                return [env[out] for out in node.args[0]]
            elif node.op == "get_attr":
                name = f"_rebuild_constant_{len(self.constants)}"
                self.constants.append(name)
                setattr(self.step.module, name, getattr(module, node.target))
                env[node] = self.graph.get_attr(name)
                env[node].meta.update(node.meta)
            else:
                env[node] = self.graph.node_copy(node, env.__getitem__)
        raise AssertionError("a graph ends in an output")

    def _decode(self, move: Proposal) -> fx.Node:
        how = move.rebuild
        assert how is not None
        if how.host is None:
            inputs = [self.encoded[stored] for stored in how.stored]
            self.saved.update(dict.fromkeys(inputs))
        else:
            name = f"back_{move.value.name}"
            inputs = [
                self._copy(transfers.wait, (self.coming.pop(stored),), name)
                for stored in how.stored
            ]
        inputs += [self.read_late(read) for read in how.reads]
        (result,) = self._inline(how.decode, inputs, {})
        return result

    def _copy_late(self, node: fx.Node) -> fx.Node:
        if node in self.late:
            return self.late[node]
        new = self.graph.node_copy(node, self.read_late)
        if node in self.step.sides.early:
            new.meta = {**new.meta, "partitioner_tag": "is_backward"}
            new.meta.pop("recompute", None)
        self.late[node] = new
        return new

    def read_late(self, node: fx.Node) -> fx.Node:
        """What a late reader of ``node`` reads, written on demand."""
        if node in self.late:
            return self.late[node]
        if node.op == "get_attr":
            return self.early[node]
        if node.op == "placeholder":
            if node not in self.step.tangents:
                stored = self.symbols if _is_symbol(node) else self.saved
                stored[self.early[node]] = None
            return self.early[node]
        if node in self.step.sides.early:
            if isinstance(node.meta.get("val"), torch.SymInt):
                self.symbols[self.early[node]] = None
                return self.early[node]
            if node in self.kept:
                self.saved[self.early[node]] = None
                return self.early[node]
        return self._copy_late(node)

    def _output(self, node: fx.Node | None) -> fx.Node | None:
        if node is None:
            return None
        return self.early[node] if node in self.early else self.read_late(node)


def _stored(move: Proposal) -> tuple[fx.Node, ...]:
    return move.rebuild.stored if move.rebuild is not None else ()


def _is_symbol(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt)

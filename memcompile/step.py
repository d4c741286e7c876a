"""The step: a joint forward-and-backward graph, its sides and its values.

A :class:`Step` reads a graph and never rewrites it. *Early* nodes can run before
the backward starts; *late* nodes depend on a tangent (or are pinned to the
backward). A *root* is the node whose storage a value lives in: views share their
base's root, so bytes are counted once.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import re
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import sympy
import torch
from torch import fx

from memcompile import _torch
from memcompile.lengths import size_expr, with_numbers


def tensors(node: fx.Node) -> list[torch.Tensor]:
    """The (fake) tensors a node produces: one, several, or none."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [leaf for leaf in value if isinstance(leaf, torch.Tensor)]
    return []


def hint(size: Any) -> int:
    """The integer a size has in this trace: itself, or a symbolic size's hint."""
    return int(size) if isinstance(size, int) else _torch.size_hint(size)


def tensor_size(tensor: torch.Tensor) -> Any:
    """Bytes of a tensor laid out densely: an ``int`` or a ``SymInt``.

    Sparse tensors count their indices and values.
    """
    if tensor.layout != torch.strided:
        parts = _torch.sparse_parts(tensor)
        return sum((part.numel() * part.element_size() for part in parts), 0)
    return tensor.numel() * tensor.element_size()


def source_line(node: fx.Node) -> str:
    """``"model.py:41 in forward"``: the user's innermost line, or ``""``."""
    trace = node.meta.get("stack_trace") or ""
    frames = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    if not frames:
        return ""
    own = [frame for frame in frames if "/torch/" not in frame.replace("\\", "/")] or frames
    try:
        path, line, where = own[-1].removeprefix("File ").split(", ", 2)
    except ValueError:
        return own[-1]
    name = path.strip('"').replace("\\", "/").rsplit("/", 1)[-1]
    return f"{name}:{line.removeprefix('line ')} {where}"


def module_names(node: fx.Node) -> tuple[str, ...]:
    """The modules the node comes from, forward or backward, outermost first.

    Paths as ``named_modules()`` has them from the compiled module or function on
    (``"encoder"``, ``"encoder.0"``), and the names of the modules' classes.
    """
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    names: dict[str, None] = {}
    for path, kind in stack.values():
        parts = re.sub(r"^[A-Z]\[[^]]*\]\.?", "", path).split(".")
        names.update(dict.fromkeys(".".join(parts[:end]) for end in range(1, len(parts) + 1)))
        names[getattr(kind, "__name__", str(kind).rsplit(".", 1)[-1])] = None
    names.pop("", None)
    return tuple(names)


def in_module(node: fx.Node, name: str) -> bool:
    """Whether a name is that of one of the node's modules, or the last parts of its path.

    ``*`` is anything.
    """
    return any(fnmatchcase(m, name) or fnmatchcase(m, f"*.{name}") for m in module_names(node))


def is_view(node: fx.Node) -> bool:
    """Whether the node's tensor shares its first argument's storage."""
    target = node.target
    if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
        return False
    if target is operator.getitem:
        base = node.args[0]
        return isinstance(base, fx.Node) and _splits_views(base)
    if not isinstance(target, _torch.OpOverload):
        return False
    if target in _torch.UNANNOTATED_VIEWS:
        return True
    returns = target._schema.returns
    alias = returns[0].alias_info if len(returns) == 1 else None
    return alias is not None and not alias.is_write and bool(node.args)


#: Noted on a loop: by number of an output the input that it may be written over.
OVER = "over"
#: Noted on a loop: a name that those share which fill the same buffers.
GROUP = "group"


def is_loop(node: fx.Node) -> bool:
    """A loop over chunks; its last outputs own the buffers it writes into."""
    return node.target is torch.ops.higher_order.while_loop


def loops_in(graph: fx.Graph) -> list[fx.Node]:
    """The loops over chunks of a graph, in its order."""
    return graph.find_nodes(op="call_function", target=torch.ops.higher_order.while_loop)


def _splits_views(node: fx.Node) -> bool:
    """``split`` and friends: a list of views of one tensor."""
    target = node.target
    if not isinstance(target, _torch.OpOverload) or target._schema.is_mutable:
        return False
    returns = target._schema.returns
    return (
        len(returns) == 1
        and str(returns[0].type) == "List[Tensor]"
        and returns[0].alias_info is not None
    )


def view_base(node: fx.Node) -> fx.Node:
    """What a view is a view of."""
    base = node.args[0]
    assert isinstance(base, fx.Node)
    if node.target is operator.getitem:
        inner = base.args[0]
        assert isinstance(inner, fx.Node)
        return inner
    return base


def is_reshaped(node: fx.Node) -> bool:
    """Whether the node is a view of a value in which its elements are counted otherwise."""
    while is_view(node):
        if node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
            return True
        node = view_base(node)
    return False


def must_save(node: fx.Node) -> bool:
    """Whether the user, or torch on their behalf, bound the value to be saved."""
    return node.meta.get("recompute") is _torch.CheckpointPolicy.MUST_SAVE


def must_recompute(node: fx.Node) -> bool:
    """Whether a selective checkpoint policy bound the value to be recomputed."""
    return node.meta.get("recompute") is _torch.CheckpointPolicy.MUST_RECOMPUTE


@dataclasses.dataclass(frozen=True)
class Sides:
    """Which nodes may run when."""

    early: frozenset[fx.Node]
    late: frozenset[fx.Node]


class Step:
    """One captured training step: a joint graph with ``num_outputs`` forward outputs.

    Args:
        module: the joint graph; placeholders are primals then tangents.
        num_outputs: how many of its outputs the forward returns; the rest are gradients.
        static_inputs: indices of primals that are parameters or buffers.
        late_from: for a graph that is not split (inference, a backward inside the graph,
            an optimizer): the first node that counts as late.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        num_outputs: int,
        static_inputs: Sequence[int] = (),
        late_from: fx.Node | None = None,
    ) -> None:
        self.late_from = late_from
        self.sizes: dict[sympy.Symbol, int] = {}  #: other values for symbols, to plan for
        self.module = module
        self.graph = module.graph
        self.num_outputs = num_outputs
        self.nodes: list[fx.Node] = list(self.graph.nodes)
        self.order = {node: place for place, node in enumerate(self.nodes)}
        (self.output,) = self.graph.find_nodes(op="output")
        outputs = _torch.tree_leaves(self.output.args)
        self.outputs: list[fx.Node | None] = [_node_or_none(o) for o in outputs[:num_outputs]]
        self.gradients: list[fx.Node | None] = [_node_or_none(o) for o in outputs[num_outputs:]]
        self.placeholders = [n for n in self.nodes if n.op == "placeholder"]
        self.tangents = [n for n in self.placeholders if _torch.is_tangent(n)]
        self.primals = [n for n in self.placeholders if not _torch.is_tangent(n)]
        self.static = frozenset(self.primals[i] for i in static_inputs if i < len(self.primals))
        self.sides = self._find_sides()
        if late_from is not None:
            late = self.sides.late
            self.gradients = [o for o in self.outputs if o in late]
            self.outputs = [o for o in self.outputs if o not in late]

    def _find_sides(self) -> Sides:
        late: set[fx.Node] = set()
        if self.late_from is not None:
            place = self.order[self.late_from]
            late.update(n for n in self.nodes[place:] if n.op == "call_function")
        for node in self.nodes:
            if node.op == "output" or node in late:
                continue
            if (
                node in self.tangents
                or _torch.must_be_in_backward(node)
                or any(arg in late for arg in node.all_input_nodes)
            ):
                late.add(node)
        # What the forward returns runs early, whatever it depends on.
        early = set(self.nodes) - late - {self.output}
        return Sides(frozenset(early), frozenset(late))

    @functools.cached_property
    def roots(self) -> dict[fx.Node, fx.Node]:
        """Every tensor-valued node's storage root."""
        roots: dict[fx.Node, fx.Node] = {}
        for node in self.nodes:
            roots[node] = roots[view_base(node)] if is_view(node) else node
        return roots

    def numbered(self, node: fx.Node) -> fx.Node:
        """The node with a prime for every symbolic size: what rules are asked about."""
        return self._numbered[node] if self.dynamic else node

    @functools.cached_property
    def _numbered(self) -> dict[fx.Node, fx.Node]:
        return with_numbers(self.nodes)

    @functools.cached_property
    def overwritten(self) -> frozenset[fx.Node]:
        """Primals the step writes to: late readers would find the new value in them."""
        written = {
            self.roots[node.args[0]]
            for node in self.nodes
            if node.target is torch.ops.aten.copy_.default and isinstance(node.args[0], fx.Node)
        }
        return frozenset(n for n in written if n.op == "placeholder")

    @functools.cached_property
    def above(self) -> dict[fx.Node, int]:
        """For each node a bit for itself and every node it is made of."""
        found: dict[fx.Node, int] = {}
        for place, node in enumerate(self.nodes):
            bits = 1 << place
            for argument in node.all_input_nodes:
                bits |= found[argument]
            found[node] = bits
        return found

    def bits(self, nodes: Iterable[fx.Node]) -> int:
        """A bit for each node, where :attr:`above` has it."""
        found = 0
        for node in nodes:
            found |= 1 << self.order[node]
        return found

    def bits_above(self, nodes: Iterable[fx.Node]) -> int:
        """A bit for each node and all that it is made of."""
        found = 0
        for node in nodes:
            found |= self.above[node]
        return found

    def reads_overwritten(self, node: fx.Node) -> bool:
        """Whether the node would see another value if it ran again late."""
        return any(self.roots[a] in self.overwritten for a in node.all_input_nodes)

    def early_values(self) -> list[fx.Node]:
        """Early nodes that own memory (or are tuples of such), in order."""
        return [
            node
            for node in self.nodes
            if node in self.sides.early
            and node.op == "call_function"
            and self.roots[node] is node
            and tensors(node)
        ]

    def bytes(self, node: fx.Node) -> int:
        """Bytes of the tensors a node produces, at hinted sizes. Views count as whole."""
        return self._bytes(node)

    @functools.cached_property
    def _bytes(self) -> Any:
        def count(node: fx.Node) -> int:
            if node.meta.get("buffer"):
                return 0  # counted where the loop that fills it returns it
            if self.sizes:
                return int(self.bytes_expr(node).subs(self.sizes))
            return sum(hint(tensor_size(t)) for t in tensors(node))

        return functools.cache(count)

    def anew(self, module: fx.GraphModule, late_from: fx.Node | None = None) -> Step:
        """The step of another graph of the same inputs and outputs."""
        static = [place for place, node in enumerate(self.primals) if node in self.static]
        return Step(module, self.num_outputs, static, late_from)

    def at(self, sizes: dict[sympy.Symbol, int]) -> Step:
        """The same step with other values for its symbolic sizes."""
        other = self.anew(self.module, self.late_from)
        other.sizes = self.symbols() | sizes
        return other

    def symbols(self) -> dict[sympy.Symbol, int]:
        """Symbolic sizes of the inputs, with the values they were traced at."""
        found: dict[sympy.Symbol, int] = {}
        for node in self.placeholders:
            for tensor in tensors(node):
                for size in tensor.shape:
                    expression = size_expr(size)
                    if isinstance(expression, sympy.Symbol):
                        found[expression] = hint(size)
        return found

    def bytes_expr(self, node: fx.Node) -> sympy.Expr:
        """Bytes of the tensors a node produces, symbolic sizes kept."""
        return sympy.Add(*(size_expr(tensor_size(t)) for t in tensors(node)))

    @functools.cached_property
    def dynamic(self) -> bool:
        """Whether any size in the step is symbolic."""
        return any(_torch.is_symbolic(node.meta.get("val")) for node in self.placeholders)

    @functools.cached_property
    def device(self) -> torch.device:
        """Where the step runs: the first accelerator among its inputs, else the CPU."""
        found = (t.device for node in self.placeholders for t in tensors(node))
        return next((d for d in found if d.type != "cpu"), torch.device("cpu"))

    def input_bytes(self) -> int:
        """Bytes of primals, each storage once: what lives before the step."""
        return self._unique_bytes(self.primals)

    def static_bytes(self) -> int:
        """The part of :meth:`input_bytes` that is parameters and buffers."""
        return self._unique_bytes([p for p in self.primals if p in self.static])

    def _unique_bytes(self, nodes: Iterable[fx.Node]) -> int:
        """Bytes of the nodes' tensors; tied or aliased inputs share a fake storage."""
        seen: dict[Any, int] = {}
        for node in nodes:
            for tensor in tensors(node):
                key = _torch.storage_key(tensor)
                seen[key] = max(seen.get(key, 0), self.bytes(node))
        return sum(seen.values())

    def node_outputs(self) -> Iterator[fx.Node]:
        """The forward's outputs that are nodes."""
        return (o for o in self.outputs if o is not None)

    def gradient_nodes(self) -> Iterator[fx.Node]:
        """The backward's outputs that are nodes."""
        return (g for g in self.gradients if g is not None)


def _node_or_none(value: Any) -> fx.Node | None:
    return value if isinstance(value, fx.Node) else None

"""Contractions in low precision: casts are made once, sink through views, and fold.

A contraction keeps its node and its name; its inputs become casts, its output a 16-bit tensor
that an upcast turns back into what the other readers had. Those compute in fp32, inside the
kernel that reads: Inductor computes in fp32 whatever it loads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from memcompile_passes.cast.islands import is_clear, tensor
from memcompile_passes.cast.rules import SPLITS, STATISTICS
from torch import fx

from memcompile.analysis.ops import op_name
from memcompile.step import hint

prims = torch.ops.prims
#: What a node of ours takes over from the node it stands beside.
INHERITED = (
    "ac_graph_id",
    "autograd_backward",
    "custom",
    "fwd_nn_module_stack",
    "nn_module_stack",
    "partitioner_tag",
    "recompute",
    "seq_nr",
    "stack_trace",
)


class Casting:
    """The casts of one graph, and the values they are of."""

    def __init__(self, graph: fx.Graph, dtype: torch.dtype) -> None:
        self.graph, self.dtype = graph, dtype
        self.low: dict[fx.Node, fx.Node] = {}  #: fp32 nodes, and the 16-bit ones of their values
        self.natural: dict[fx.Node, fx.Node] = {}  #: upcasts, and what they are casts of
        self.of_inputs: list[fx.Node] = []  #: casts of the graph's inputs and of views of them
        self.suffix = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]

    def lower(self, node: fx.Node) -> None:
        """Run a contraction in low precision."""
        names = [argument.name for argument in node.target._schema.arguments]
        args = [self._given(v, names[place], node) for place, v in enumerate(node.args)]
        node.kwargs = {key: self._given(v, key, node) for key, v in node.kwargs.items()}
        node.args = tuple(args)
        value = computed(node.target, node.args, node.kwargs)
        node.meta = {k: v for k, v in node.meta.items() if k != "tensor_meta"} | {"val": value}
        if isinstance(value, torch.Tensor):
            self.raise_(node)
            return
        for item in list(node.users):
            if op_name(item) == "getitem":
                item.meta.pop("tensor_meta", None)
                item.meta["val"] = value[item.args[1]]
                if item.meta["val"] is not None and item.meta["val"].dtype == self.dtype:
                    self.raise_(item)

    def widen(self, node: fx.Node) -> None:
        """Run a contraction in fp32 on what others read in 16 bits."""
        wide: dict[fx.Node, fx.Node] = {}
        for read in node.all_input_nodes:
            if is_float32(read) and source_of(read).op == "call_function":
                wide[read] = self.up(self.down(read, node), before=node)
        node.args, node.kwargs = fx.node.map_arg(
            (node.args, node.kwargs), lambda read: wide.get(read, read)
        )

    def _given(self, value: Any, name: str, reader: fx.Node) -> Any:
        cast = is_float32(value) and name not in STATISTICS
        return self.down(value, reader) if cast else value

    def raise_(self, node: fx.Node) -> fx.Node:
        """Give the readers of a 16-bit node an upcast."""
        up = self.up(node, after=node)
        node.replace_all_uses_with(up, delete_user_cb=lambda user: user is not up)
        self.low[up] = self.natural[up] = node
        return up

    def up(
        self, node: fx.Node, after: fx.Node | None = None, before: fx.Node | None = None
    ) -> fx.Node:
        """An upcast of a 16-bit node, which is not shared."""
        args = (node, torch.float32)
        return self.call(prims.convert_element_type.default, args, {}, node, "fp32", after, before)

    def down(self, node: fx.Node, reader: fx.Node) -> fx.Node:
        """The 16-bit node of an fp32 node's value; made where there is none."""
        if node not in self.low:
            self.low[node] = self._moved(node, reader) or self._cast(node, reader)
        return self.low[node]

    def _cast(self, node: fx.Node, reader: fx.Node) -> fx.Node:
        args = (node, self.dtype)
        source = node.op in ("placeholder", "get_attr")
        place = {"before": self._first()} if source else {"after": node}
        like = reader if source else node
        cast = self.call(prims.convert_element_type.default, args, {}, node, self.suffix, **place)
        cast.meta.update(inherited(like))
        if node.op == "placeholder":
            self.of_inputs.append(cast)
        return cast

    def _first(self) -> fx.Node:
        """Where casts of inputs stand until they are put where they are read."""
        return next(n for n in self.graph.nodes if n.op not in ("placeholder", "get_attr"))

    def _moved(self, node: fx.Node, reader: fx.Node) -> fx.Node | None:
        """A clear op done on the cast of what it reads, where that is no more to cast."""
        if not is_clear(node):
            return None
        split = op_name(node) == "getitem"
        inner = node.args[0] if split else node
        assert isinstance(inner, fx.Node)
        read = [argument for argument in inner.all_input_nodes if is_float32(argument)]
        if not read or not all(self.is_low(argument) for argument in read):
            sizes = [hint(argument.meta["val"].numel()) for argument in read]
            if not read or sum(sizes) > hint(node.meta["val"].numel()):
                return None
        swap: Callable[[fx.Node], fx.Node] = lambda n: (  # noqa: E731
            self.down(n, reader) if is_float32(n) else n
        )
        args, kwargs = fx.node.map_arg((inner.args, inner.kwargs), swap)
        try:
            value = computed(inner.target, args, kwargs)
        except RuntimeError:  # a view that the cast's strides do not allow
            return None
        if split:
            assert op_name(inner) in SPLITS
            parts = self.call(inner.target, args, kwargs, inner, self.suffix, after=inner)
            parts.meta["val"] = value
            item = self.call(node.target, (parts, node.args[1]), {}, node, self.suffix, after=node)
            item.meta["val"] = value[node.args[1]]
            return item
        moved = self.call(inner.target, args, kwargs, node, self.suffix, after=node)
        if any(argument in self.of_inputs for argument in moved.all_input_nodes):
            self.of_inputs.append(moved)
        return moved

    def is_low(self, node: fx.Node) -> bool:
        """Whether the node's value is there in 16 bits, or moved about from such."""
        if node in self.low:
            return True
        if not is_clear(node):
            return False
        inner = node.args[0] if op_name(node) == "getitem" else node
        read = [argument for argument in inner.all_input_nodes if is_float32(argument)]
        return bool(read) and all(self.is_low(argument) for argument in read)

    def call(
        self,
        target: Any,
        args: Any,
        kwargs: Any,
        like: fx.Node,
        suffix: str,
        after: fx.Node | None = None,
        before: fx.Node | None = None,
    ) -> fx.Node:
        """A new node, with what ``like`` is known by."""
        place = after if after is not None else before
        assert place is not None
        at = self.graph.inserting_after if after is not None else self.graph.inserting_before
        with at(place):
            new = self.graph.create_node(
                "call_function", target, args, kwargs, name=f"{like.name}_{suffix}"
            )
        new.meta = inherited(like)
        if op_name(like) != "getitem" or target is not like.target:
            new.meta["val"] = computed(target, args, kwargs)
        return new

    def settle(self) -> None:
        """Put every cast of an input right before its first reader."""
        for node in reversed(self.of_inputs):
            if node.users:
                min(node.users).prepend(node)


def is_float32(value: object) -> bool:
    """Whether it is a node whose value is an fp32 tensor."""
    found = tensor(value)
    return found is not None and found.dtype == torch.float32


def source_of(node: fx.Node) -> fx.Node:
    """What a value is of, before it was moved about."""
    while is_clear(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def inherited(node: fx.Node) -> dict[str, Any]:
    """What a new node takes over from one beside it."""
    return {key: node.meta[key] for key in INHERITED if key in node.meta}


def computed(target: Any, args: Any, kwargs: Any) -> Any:
    """The fake value of an op on fake values."""
    given_args, given_kwargs = fx.node.map_arg((args, kwargs), lambda node: node.meta["val"])
    return target(*given_args, **given_kwargs)

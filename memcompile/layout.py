"""What products in loops read, laid out as they want it.

A batched product takes its matrices as they lie where one of their two dimensions is the
innermost; any other operand a library copies, matrix by matrix, in every trip of a loop anew.
The factor of a triangle multiplication is such a one: its channels are the batch, and lie
innermost. Where such products alone read what a loop fills, the loop fills it in their order; what
they alone read of what is made elementwise, before a loop or in a trip, is made in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import operator

import torch
from torch import fx

from memcompile import _torch
from memcompile.analysis.ops import classify
from memcompile.analysis.timeline import Kind
from memcompile.step import is_loop, is_view, loops_in, view_base

aten = torch.ops.aten

#: Products of a batch, and which of their arguments are the matrices.
PRODUCTS = {
    aten.bmm.default: (0, 1),
    aten.baddbmm.default: (1, 2),
    aten.baddbmm_.default: (1, 2),
}
#: What a loop writes a slice with.
WRITES = aten.copy_.default


def lay_out(module: fx.GraphModule) -> None:
    """Lay out what the products in a finished graph's loops read.

    Args:
        module: the graph, changed in place; bodies that change are copied.
    """
    changed = False
    for made in module.graph.find_nodes(op="call_function", target=aten.full.default):
        buffer = _buffer(made)
        if buffer is not None:
            changed |= _LayingOut(module, made, buffer).write()
    for loop in loops_in(module.graph):
        for value in dict.fromkeys(map(_base, loop.args[3])):
            if _is_elementwise(value):
                changed |= _LayingOut(module, value, value).write()
        body = _copied(getattr(module, loop.args[1].target))
        values = [node for node in body.graph.nodes if _is_elementwise(node)]
        if any([_LayingOut(body, value, value).write() for value in values]):
            put_body(module, loop, body)
            changed = True
    if changed:
        module.graph.eliminate_dead_code()
        module.recompile()


def _base(node: fx.Node) -> fx.Node:
    """What a chain of views shows."""
    while is_view(node) and node.target is not operator.getitem:
        node = view_base(node)
    return node


def _is_elementwise(node: fx.Node) -> bool:
    """Whether the node makes a tensor that can be made in another order as well."""
    if node.op != "call_function" or node.meta.get("buffer") or is_loop(node) or is_view(node):
        return False
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or any(type(size) is not int for size in value.shape):
        return False
    return classify(node) == Kind.POINTWISE and node.target is not WRITES


def _buffer(made: fx.Node) -> fx.Node | None:
    """What loops carry of a tensor that was made for them: itself, or its one permutation."""
    if not made.meta.get("buffer") or any(not isinstance(size, int) for size in made.args[0]):
        return None
    users = list(made.users)
    if len(users) == 1 and users[0].target is aten.permute.default:
        return users[0]
    return made


@dataclasses.dataclass
class _LayingOut:
    """One buffer."""

    module: fx.GraphModule
    made: fx.Node
    buffer: fx.Node

    def __post_init__(self) -> None:
        self.operands: list[torch.Tensor] = []  #: views of it that products read
        self.views: list[fx.Node] = []  #: in the graph, in the order in which they are made
        #: The loops that hold it, and as which inputs of their bodies.
        self.loops: dict[fx.Node, list[int]] = {}
        self.was: torch.Tensor = self.buffer.meta["val"]

    def write(self) -> bool:
        """Whether the buffer lies in another order now."""
        if not self._follow(self.module, self.buffer, self.views):
            return False
        order = self._wanted()
        if order is None or not self._is_better(order):
            return False
        try:
            self._revalue(order)
        except RuntimeError:  # a view that such an order does not have
            return False
        self._reorder(order)
        return True

    # -- who reads it ---------------------------------------------------------------------

    def _follow(self, module: fx.GraphModule, node: fx.Node, views: list[fx.Node]) -> bool:
        """Note what is a view of ``node`` and what products read; whether nothing else does."""
        for user in node.users:
            if is_loop(user) and module is self.module:
                if not self._follow_into(user, node, views):
                    return False
            elif user.target in PRODUCTS:
                at = [number for number, each in enumerate(user.args) if each is node]
                if not set(at) <= set(PRODUCTS[user.target]):
                    return False
                self.operands.append(node.meta["val"])
            elif user.target is WRITES and user.args[0] is node and user.args[1] is not node:
                continue
            elif user.op == "output" and module is not self.module and node.op == "placeholder":
                continue  # a body returns what it carries
            elif not is_view(user) or user.target is operator.getitem:
                return False
            else:
                views.append(user)
                if not self._follow(module, user, views):
                    return False
        return True

    def _follow_into(self, loop: fx.Node, node: fx.Node, views: list[fx.Node]) -> bool:
        """The same inside a loop, and of what it gives in the place of what it carries."""
        carried, given = loop.args[2], loop.args[3]
        taken = [n for n, each in enumerate((*carried, *given)) if each is node]
        known = self.loops.setdefault(loop, [])
        known += taken
        if len(known) > 1 and min(known) < len(carried):
            return False
        body = getattr(self.module, loop.args[1].target)
        inputs = body.graph.find_nodes(op="placeholder")
        if not all(self._follow(body, inputs[at], []) for at in taken):
            return False
        at = taken[0]
        outputs = [user for user in loop.users if user.args[1] == at] if at < len(carried) else []
        for output in outputs:
            views.append(output)
            if not self._follow(self.module, output, views):
                return False
        return True

    # -- how they want it ------------------------------------------------------------------

    def _wanted(self) -> list[int] | None:
        """The order of dimensions, outermost first, that the largest ill-laid operand wants."""
        ill = [each for each in self.operands if not is_taken_as_it_lies(each)]
        for operand in sorted(ill, key=lambda each: -each.numel()):
            place = self._places(operand)
            if place is not None:
                matrix = {each[0] for each in place[-2:] if each is not None}
                now = self._order()
                return [d for d in now if d not in matrix] + [d for d in now if d in matrix]
        return None

    def _order(self) -> list[int]:
        """The dimensions as they lie now, outermost first."""
        stride = self.buffer.meta["val"].stride()
        return sorted(range(len(stride)), key=lambda d: -stride[d])

    def _places(self, operand: torch.Tensor) -> list[tuple[int, int] | None] | None:
        """Of each dimension of a view the one of the buffer that it runs along, and its step.

        Told by their strides; ``None`` for one of a single element, and for all where one runs
        along several.
        """
        value = self.buffer.meta["val"]
        found: list[tuple[int, int] | None] = []
        for size, stride in zip(operand.shape, operand.stride(), strict=True):
            along = [
                (dim, stride // value.stride(dim))
                for dim, length in enumerate(value.shape)
                if length > 1
                and stride % value.stride(dim) == 0
                and value.stride(dim) <= stride
                and stride * (size - 1) < value.stride(dim) * length
            ]
            if size > 1 and not along:
                return None
            found.append(max(along, key=lambda each: value.stride(each[0])) if size > 1 else None)
        return found

    def _strides(self, order: list[int]) -> list[int]:
        """Of the buffer, in that order."""
        shape = self.buffer.meta["val"].shape
        found, stride = [0] * len(shape), 1
        for dim in reversed(order):
            found[dim] = stride
            stride *= max(1, shape[dim])
        return found

    def _is_better(self, order: list[int]) -> bool:
        """Whether all products take their operands as they would lie."""
        strides = self._strides(order)
        for operand in self.operands:
            place = self._places(operand)
            if place is None:
                return False
            new = [1 if each is None else strides[each[0]] * each[1] for each in place]
            if not is_taken_as_it_lies(torch.empty_strided(operand.shape, new, device="meta")):
                return False
        return True

    # -- writing it -----------------------------------------------------------------------

    def _revalue(self, order: list[int]) -> None:
        """What views of the buffer are then, in the graph and in the bodies of its loops."""
        value = self.buffer.meta["val"]
        mode = _torch.detect_fake_mode([value]) or contextlib.nullcontext()
        with mode:
            new = value.new_empty_strided(value.shape, self._strides(order))
        values = {self.buffer: new}
        for view in self.views:
            source = view.args[0]
            if is_loop(source):  # what it carries
                values[view] = values[source.args[2][view.args[1]]]
            else:
                with mode:
                    values[view] = computed(view, values)
        bodies = {}
        for loop, taken in self.loops.items():
            given = (*loop.args[2], *loop.args[3])
            body = getattr(self.module, loop.args[1].target)
            bodies[loop] = given_anew(body, {at: values[given[at]] for at in taken})
        for node, each in values.items():
            node.meta["val"] = each
        for loop, body in bodies.items():
            put_body(self.module, loop, body)
            at = self.loops[loop][0]
            if at < len(loop.args[2]):
                vals = list(loop.meta["val"])
                vals[at] = values[loop.args[2][at]]
                loop.meta["val"] = tuple(vals)

    def _reorder(self, order: list[int]) -> None:
        """The buffer made in its new order."""
        value = self.buffer.meta["val"]
        graph = self.module.graph
        if self.made.target is not aten.full.default:
            self._copy(order, value)
            return
        with graph.inserting_before(self.made):
            shape = [value.shape[d] for d in order]
            full = graph.call_function(aten.full.default, (shape, *self.made.args[1:]))
            full.kwargs = self.made.kwargs
            full.meta = {**self.made.meta, "val": value.permute(order)}
            back = [order.index(d) for d in range(value.dim())]
            new = graph.call_function(aten.permute.default, (full, back))
        new.meta = {**self.buffer.meta}
        self.buffer.replace_all_uses_with(new)

    def _copy(self, order: list[int], value: torch.Tensor) -> None:
        """A copy in the new order, as ``value`` lies, which is fused with what makes the tensor."""
        self.made.meta["val"] = self.was
        turned, _, new = copy_before(self.made.next, self.made, order, value)
        self.made.replace_all_uses_with(new, delete_user_cb=lambda user: user is not turned)


def copy_before(
    place: fx.Node, source: fx.Node, order: list[int], value: torch.Tensor
) -> tuple[fx.Node, fx.Node, fx.Node]:
    """A copy of ``source`` whose dimensions lie in that order, as ``value`` does.

    The nodes that turn it, copy it and turn it back, in front of ``place``.
    """
    graph = place.graph
    back = [order.index(dim) for dim in range(value.dim())]
    contiguous = {"memory_format": torch.contiguous_format}
    with graph.inserting_before(place):
        turned = graph.call_function(aten.permute.default, (source, order))
        laid = graph.call_function(aten.clone.default, (turned,), contiguous)
        new = graph.call_function(aten.permute.default, (laid, back))
    vals = (source.meta["val"].permute(order), value.permute(order), value)
    for node, val in zip((turned, laid, new), vals, strict=True):
        node.meta = {**source.meta, "val": val}
    return turned, laid, new


def given_anew(body: fx.GraphModule, given: dict[int, torch.Tensor]) -> fx.GraphModule:
    """A copy of a loop's body that is given what is laid out anew, by the input's number.

    What it notes of views and writes is changed, of nothing else.

    Raises:
        RuntimeError: a view that such an order does not have.
    """
    body = _copied(body)
    inputs = body.graph.find_nodes(op="placeholder")
    for at, value in given.items():
        inputs[at].meta["val"] = value
    changed = {inputs[at] for at in given}
    with _torch.detect_fake_mode(list(given.values())) or contextlib.nullcontext():
        for node in body.graph.nodes:
            if not (is_view(node) or node.target is WRITES) or node.args[0] not in changed:
                continue
            node.meta["val"] = _in_trip(node)
            changed.add(node)
    return body


def _copied(body: fx.GraphModule) -> fx.GraphModule:
    """A copy of a loop's body."""
    graph = fx.Graph()
    results, output = graph.graph_copy(body.graph, {}, return_output_node=True)
    graph.output(results).meta.update(output.meta)
    return fx.GraphModule(body, graph)


def put_body(module: fx.GraphModule, loop: fx.Node, body: fx.GraphModule) -> None:
    """Give a loop another body."""
    body.recompile()
    name = f"{loop.args[1].target}_laid"
    setattr(module, name, body)
    with module.graph.inserting_before(loop):
        loop.args = (loop.args[0], module.graph.get_attr(name), *loop.args[2:])


def is_taken_as_it_lies(operand: torch.Tensor) -> bool:
    """Whether a batched product reads its matrices in place: rows or columns one after another."""
    (rows, columns), (down, right) = operand.shape[-2:], operand.stride()[-2:]
    by_row = (right == 1 or columns == 1) and (rows == 1 or down >= columns)
    by_column = (down == 1 or rows == 1) and (columns == 1 or right >= rows)
    return bool(by_row or by_column)


def _in_trip(node: fx.Node) -> torch.Tensor:
    """What a node of a body gives; where a trip's slice begins is known by the symbol it has."""
    if node.target is not aten.select.int or isinstance(node.args[2], int):
        return computed(node, {})
    (source, dim, _), old = node.args, node.meta["val"]
    assert isinstance(source, fx.Node)
    first = aten.select.int(source.meta["val"], dim, 0)
    return first.as_strided(first.shape, first.stride(), old.storage_offset())


def computed(node: fx.Node, instead: dict[fx.Node, torch.Tensor]) -> torch.Tensor:
    """What a node gives, of what its arguments are noted to be."""

    def value(argument: fx.Node) -> object:
        return instead.get(argument, argument.meta["val"])

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
    found: torch.Tensor = node.target(*args, **kwargs)
    return found

"""How a dimension flows through ops: sliced, whole, or carried by a loop.

A chunk is a shard in time: DTensor's rules say which inputs of an op must be sliced for
its output to be, and when the parts must be added up (Partial). What DTensor has no rule
for, and Inductor's joint graphs hold, is added in ``rules.py`` by name. An op without a rule
stops the flow.

A dimension may be sliced behind others that it is merged with (``merged.py``): what a view
does to it is computed from the shapes; of every other op the rule for the whole dimension
holds, since none that is asked goes by where in its dimension an element stands.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from memcompile import _torch
from memcompile._torch.loops import propagate
from memcompile.analysis.merged import VIEWS, lifted, relocated
from memcompile.analysis.ops import is_random, op_name
from memcompile.analysis.rules import (
    DRAWS,
    FACTORIES,
    OWN,
    Flow,
    Merged,
    Place,
    dim_of,
    tensor_args,
)
from memcompile.step import tensors

BOOLEAN = frozenset({"any", "all"})


class Rules:
    """Answers for one length of the sliced dimension; every question is asked once.

    Args:
        length: of the dimension; its chunks need not divide it.
    """

    def __init__(self, length: int) -> None:
        self.parts = _smallest_factor(length)
        self._answers: dict[Any, Flow | None] = {}
        self._givers: dict[Any, Flow | None] = {}

    def given(self, node: fx.Node, places: Iterable[Place]) -> Flow | None:
        """The flow through ``node`` when its tensor arguments are placed so, if there is one.

        What is given as sliced stays so; what is whole may be asked to be sliced.
        """
        if node.meta.get("no_loop"):  # a pass has said so
            return None
        places = tuple(places)
        key = (_signature(node), places)
        if key not in self._answers:
            self._answers[key] = self._ask(node, places)
        return self._answers[key]

    def giving(self, node: fx.Node, output: int, place: Place) -> Flow | None:
        """A flow through ``node`` that leaves its output number ``output`` sliced as ``place``."""
        if node.meta.get("no_loop"):
            return None
        key = (_signature(node), output, place)
        if key not in self._givers:
            self._givers[key] = self._ask_giving(node, output, place)
        return self._givers[key]

    def _ask_giving(self, node: fx.Node, output: int, place: Place) -> Flow | None:
        if isinstance(place, int):
            flow = self._giving(node, output, place)
            if flow is not None:
                return flow
        if op_name(node) in VIEWS:
            return self._viewing(node, place)
        if not isinstance(place, Merged) or output >= len(tensors(node)):
            return None
        flow = self._giving(node, output, place.dim)
        return self._lifted(node, flow, place, tensors(node)[output])

    def _viewing(self, node: fx.Node, place: Place) -> Flow | None:
        """The flow through a view that leaves it sliced as ``place``."""
        if not _static(node) or not tensors(node):
            return None
        (argument,), (value,) = tensor_args(node), tensors(node)
        source = relocated(value.shape, place, tensors(argument)[0].shape, self.parts)
        flow = self.given(node, [source]) if source is not None else None
        return flow if flow is not None and flow.outputs == (place,) else None

    def _giving(self, node: fx.Node, output: int, dim: int) -> Flow | None:
        arguments = tensor_args(node)
        nothing: list[Place] = [None] * len(arguments)
        if op_name(node) in FACTORIES:
            flow = self.given(node, nothing)
            return Flow(flow.inputs, (dim,)) if flow is not None else None
        for at, argument in enumerate(arguments):
            for along in range(tensors(argument)[0].dim()):
                flow = self.given(node, [*nothing[:at], along, *nothing[at + 1 :]])
                if flow is not None and flow.outputs[output : output + 1] == (dim,):
                    return flow
        return None

    def _ask(self, node: fx.Node, places: tuple[Place, ...]) -> Flow | None:
        if node.op != "call_function" or any(isinstance(p, str) for p in places):
            return None
        if node.meta.get("val") is None or not _static(node):
            return None
        if node.target is operator.getitem:
            return None
        if is_random(node) or not isinstance(node.target, _torch.OpOverload):
            return None
        name = op_name(node)
        if name in VIEWS:
            return self._viewed(node, places)
        if any(isinstance(p, Merged) for p in places):
            return self._merged(node, places)
        if name in OWN:
            return OWN[name](node, places)
        return self._propagated(node, places)

    def _viewed(self, node: fx.Node, places: tuple[Place, ...]) -> Flow | None:
        """Through a view: as DTensor says or, behind what is merged with it, by the shapes."""
        flow = None if isinstance(places[0], Merged) else self._propagated(node, places)
        if flow is not None or places == (None,):
            return flow
        (argument,), (value,) = tensor_args(node), tensors(node)
        before = tensors(argument)[0].shape
        found = relocated(before, places[0], value.shape, self.parts)
        if found is None or not (isinstance(places[0], Merged) or isinstance(found, Merged)):
            return None
        return Flow(places, (found,))

    def _merged(self, node: fx.Node, places: tuple[Place, ...]) -> Flow | None:
        """As the rule for whole dimensions says: it holds for any part of their elements."""
        if any(isinstance(p, int) for p in places):
            return None
        place, value = next(
            (place, tensors(argument)[0])
            for place, argument in zip(places, tensor_args(node), strict=True)
            if isinstance(place, Merged)
        )
        whole = self.given(node, [dim_of(p) for p in places])
        flow = self._lifted(node, whole, place, value)
        if flow is None:
            return None
        agree = all(p in (None, q) for p, q in zip(places, flow.inputs, strict=True))
        return flow if agree else None

    def _lifted(
        self, node: fx.Node, flow: Flow | None, place: Merged, value: torch.Tensor
    ) -> Flow | None:
        """The flow of whole dimensions for the part that ``place`` is of a dimension."""
        if flow is None or op_name(node) in DRAWS:
            return None
        return lifted(node, flow, place.outer, value.shape[place.dim])

    def _propagated(self, node: fx.Node, places: tuple[Place, ...]) -> Flow | None:
        """The flow that DTensor's rules say."""
        name = op_name(node)
        if name not in AUDITED or any(tensors(n) for n in _nodes(node.kwargs)):
            return None
        args = fx.node.map_arg(node.args, lambda n: n.meta["val"])
        found = propagate(node.target, args, node.kwargs, [*map(dim_of, places)], self.parts)
        if found is None:
            return None
        inputs, outputs = found
        if any(p is not None and q != p for p, q in zip(places, inputs, strict=True)):
            return None
        if name in BOOLEAN and "sum" in outputs:  # parts of a truth value do not add up
            return None
        return Flow(inputs, outputs)


def _smallest_factor(length: int) -> int:
    for factor in range(2, int(length**0.5) + 1):
        if length % factor == 0:
            return factor
    return max(2, length)


def _static(node: fx.Node) -> bool:
    if any(not tensors(n) for n in node.all_input_nodes):
        return False  # a symbolic size among the arguments
    values = [t for n in (node, *node.all_input_nodes) for t in tensors(n)]
    return all(isinstance(size, int) for t in values for size in t.shape)


def _nodes(values: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(values, found.append)
    return found


def _signature(node: fx.Node) -> Any:
    """Equal for nodes of which every question has the same answer."""
    return str(node.target), _plain(node.args), _plain(node.kwargs)


def _plain(value: Any) -> Any:
    """An argument as something that hashes: of a tensor what rules go by."""
    if isinstance(value, fx.Node):
        found = value.meta.get("val")
        if not isinstance(found, torch.Tensor):
            return "o", value.name
        return "t", _numbers(found.shape), _numbers(found.stride()), found.dtype
    if isinstance(value, (list, tuple)):
        return type(value).__name__, *map(_plain, value)
    if isinstance(value, dict):
        return "d", *((key, _plain(each)) for key, each in value.items())
    return type(value).__name__, repr(value)


def _numbers(sizes: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(size if type(size) is int else str(size) for size in sizes)


#: Ops whose rules are asked of DTensor. Each is audited by running it whole and in parts: not
#: all of DTensor's are right (``any``, ``cat``), and what nobody has checked stops the flow.
AUDITED = frozenset(
    """
    _softmax _unsafe_view abs acos acosh add addmm alias amax amin any asin asinh atan atan2 atanh
    baddbmm bitwise_and bitwise_not bitwise_or bitwise_xor bmm ceil clamp clamp_max clamp_min
    clone cos cosh div embedding eq erf erfc exp exp2 expand expm1 floor fmod gather ge gt hypot
    index index_select isnan le log log10 log1p log2 logical_and logical_not logical_or
    logical_xor lt maximum mean minimum mm mul native_layer_norm neg permute pow prod reciprocal
    relu remainder repeat reshape round rsqrt select sgn sigmoid sign sin sinh slice slice_scatter
    sort split sqrt sub sum tan tanh tril trunc unsqueeze upsample_bilinear2d upsample_nearest2d
    view view_as_complex view_as_real where
    """.split()  # noqa: SIM905
)

#: The rules for a length, with all that was asked of them before.
rules_for = functools.lru_cache(maxsize=64)(Rules)

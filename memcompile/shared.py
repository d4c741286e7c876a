"""Graphs that compute the same thing: loops that do share their functions.

Blocks that repeat have loops that repeat. Inductor lowers a function of the graph once, however
many loops run it: with one for all of a kind, code size and compile time go by the kinds of loops
there are, not by the blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from memcompile.step import loops_in


def fingerprint(graph: fx.Graph) -> list[tuple[object, ...]]:
    """Equal for graphs that compute the same thing in the same order."""
    number = {node: place for place, node in enumerate(graph.nodes)}

    def shown(arg: object) -> str:
        return repr(fx.node.map_arg(arg, lambda node: f"%{number[node]}"))

    return [(n.op, str(n.target), shown(n.args), shown(n.kwargs)) for n in graph.nodes]


def share_functions(module: fx.GraphModule) -> None:
    """Have the loops of a finished graph that do the same on alike inputs share their functions.

    Args:
        module: the graph, changed in place.
    """
    known: dict[object, str] = {}
    replaced: set[str] = set()
    for loop in loops_in(module.graph):
        given = [node.meta["val"] for node in (*loop.args[2], *loop.args[3])]
        for place, function in enumerate(loop.args[:2]):
            key = _key(getattr(module, function.target), given)
            name = known.setdefault(key, function.target) if key is not None else function.target
            if name != function.target:
                with module.graph.inserting_before(loop):
                    loop.update_arg(place, module.graph.get_attr(name))
                replaced.add(function.target)
    if not replaced:
        return
    module.graph.eliminate_dead_code()
    for name in replaced - {node.target for node in module.graph.find_nodes(op="get_attr")}:
        delattr(module, name)
    module.recompile()


def _key(function: fx.GraphModule, given: Sequence[object]) -> object:
    """Equal for functions that do the same of what they are given.

    ``None`` where one holds what others may not have.
    """
    if function.graph.find_nodes(op="get_attr"):
        return None
    inputs = len(function.graph.find_nodes(op="placeholder"))
    made = [node.meta.get("val") for node in function.graph.nodes if node.op == "call_function"]
    starts = [v.storage_offset() if isinstance(v, torch.Tensor) else v for v in given]
    return str((fingerprint(function.graph)[inputs:], *map(_lies, (*given, *made)), starts))


def _lies(value: object) -> object:
    """What a tensor is compiled for, but for where it starts, which may be a trip's own."""
    if not isinstance(value, torch.Tensor):
        return None
    return tuple(map(str, (value.dtype, value.device, value.shape, value.stride())))

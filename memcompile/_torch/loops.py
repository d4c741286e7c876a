"""Private torch that loops need: DTensor's sharding rules, Inductor's wrapper.

Checked by running on torch 2.13.0. The rules are asked without a process group: a mesh of
``n`` imaginary devices is enough, nothing is sent, no tensor exists.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch._inductor.config as inductor_config
from torch import fx
from torch._higher_order_ops import utils as hop_utils
from torch._higher_order_ops.utils import check_input_alias_and_mutation
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.lowering import lowerings, make_fallback
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.tensor import DeviceMesh, DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._op_schema import OpSchema
from torch.utils._pytree import tree_map

__all__ = [
    "DTensorSpec",
    "OpSchema",
    "PythonWrapperCodegen",
    "TensorMeta",
    "cached_loops",
    "check_input_alias_and_mutation",
    "hop_utils",
    "lower_added_products",
    "lowerings",
    "make_fallback",
    "propagate",
    "released_loops",
]

#: A dimension (sliced), ``None`` (whole), or how parts are put together.
Place = int | str | None


@functools.cache
def _mesh(size: int) -> DeviceMesh:
    return DeviceMesh("cpu", torch.arange(size), _init_backend=False, _rank=0)


def _placement(place: Place) -> Placement:
    return Shard(place) if isinstance(place, int) else Replicate()


def _place(spec: Any) -> Place | bool:
    """What a spec says; ``False`` for what a loop cannot do."""
    if not isinstance(spec, DTensorSpec):
        return None
    (placement,) = spec.placements
    if type(placement) is Shard:
        return placement.dim
    if type(placement) is Partial and placement.reduce_op in ("sum", "max", "min"):
        return placement.reduce_op
    return None if isinstance(placement, Replicate) else False


def propagate(
    op: Any, args: Any, kwargs: Any, places: Sequence[Place], parts: int
) -> tuple[tuple[Place, ...], tuple[Place, ...]] | None:
    """Where the inputs of an op must be, and where its outputs then are.

    Args:
        op: an aten overload.
        args: its arguments, tensors included (fake or meta).
        kwargs: its keyword arguments, without tensors.
        places: of the tensors among ``args``, in order, as known.
        parts: into how many parts a sliced dimension falls; it must divide it.

    Returns:
        Places of inputs and outputs; ``None`` where there is no rule, or none that fits.
    """
    with unset_fake_temporarily():
        return _propagate(op, args, kwargs, places, _mesh(parts))


def _propagate(op: Any, args: Any, kwargs: Any, places: Sequence[Place], mesh: DeviceMesh) -> Any:
    given = iter(places)

    def spec(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        meta = TensorMeta(value.shape, value.stride(), value.dtype)
        return DTensorSpec(mesh, (_placement(next(given)),), meta)

    schema = OpSchema(op, tree_map(spec, tuple(args)), kwargs)
    try:
        found = DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding_non_cached(schema)
    except Exception:  # no rule, or one that does not stand these arguments
        return None
    wanted = found.redistribute_schema if found.redistribute_schema is not None else schema
    inputs = [_place(s) for s in _specs(wanted.args_schema)]
    results = found.output_spec
    several = isinstance(results, (list, tuple))
    outputs = [_place(s) for s in (results if several else (results,))]
    if len(inputs) != len(places) or any(p is False or isinstance(p, str) for p in inputs):
        return None
    if any(p is False for p in outputs):
        return None
    return tuple(inputs), tuple(outputs)


def _specs(values: Any) -> list[DTensorSpec]:
    if isinstance(values, DTensorSpec):
        return [values]
    if isinstance(values, (list, tuple)):
        return [spec for value in values for spec in _specs(value)]
    return []


def lower_added_products() -> None:
    """Have Inductor lower ``addmm_`` and ``baddbmm_``, which its own graphs never hold.

    Left to itself it would first make every transposed operand contiguous, in a backward.
    """
    for op in (torch.ops.aten.addmm_.default, torch.ops.aten.baddbmm_.default):
        if op not in lowerings:
            make_fallback(op, warn=False, override_decomp=True)


@contextlib.contextmanager
def released_loops() -> Iterator[None]:
    """Within the block, a lowered loop lets go of the buffers it carried when it is over.

    Inductor's wrapper keeps them in a list to the end of the call, whatever is freed. Ours
    are written in place: what reads them reads the buffers, never the list. It also takes the
    order in which a body writes to its buffers for the order in which they are carried.
    """
    original = PythonWrapperCodegen.codegen_while_loop

    def codegen_while_loop(self: Any, while_loop: Any, stack_output: bool) -> None:
        original(self, while_loop, stack_output)
        if not stack_output:
            self.writeline(f"del {while_loop.get_name()}")

    def carried_in_order(module: Any, values: Any) -> Any:
        *others, written = check_input_alias_and_mutation(module, values)
        return *others, sorted(set(written))

    with (
        mock.patch.object(PythonWrapperCodegen, "codegen_while_loop", codegen_while_loop),
        mock.patch.object(hop_utils, "check_input_alias_and_mutation", carried_in_order),
    ):
        yield


#: How Inductor's list of ops that may be cached spells a loop.
_LOOP = "torch.ops.higher_order.while_loop"


@contextlib.contextmanager
def cached_loops(gm: fx.GraphModule) -> Iterator[None]:
    """Within the block, Inductor's cache takes ``gm`` if all loops in it are ours.

    It takes no loop by itself. Ours are safe: a body is a module of ``gm`` made of aten ops
    alone, and the cache's key holds the code and the constants of every module. What is
    kept is the wrapper's source, so what :func:`released_loops` writes is kept too.
    """
    loop = torch.ops.higher_order.while_loop
    graphs = [module.graph for module in gm.modules() if isinstance(module, fx.GraphModule)]
    found = [node for g in graphs for node in g.find_nodes(op="call_function", target=loop)]
    if not found or not all("loop" in node.meta for node in found):
        yield
        return
    marked = {**inductor_config.unsafe_marked_cacheable_functions, _LOOP: "memcompile"}
    with inductor_config.patch(unsafe_marked_cacheable_functions=marked):
        yield

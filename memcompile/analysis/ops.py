"""What kind of op a node is: data about aten, in one place."""

from __future__ import annotations

import operator

import torch
from torch import fx

from memcompile import _torch
from memcompile.analysis.timeline import Kind
from memcompile.step import in_module, is_loop

aten = torch.ops.aten

#: Fusible ops that carry no ``pointwise`` tag, by name of their overload packet.
POINTWISE = frozenset(
    [
        "_to_copy",
        "arange",
        "clone",
        "constant_pad_nd",
        "convert_element_type",
        "copy",
        "embedding",
        "empty",
        "empty_like",
        "expand",
        "fill",
        "full",
        "full_like",
        "gather",
        "index",
        "iota",
        "lift_fresh_copy",
        "masked_fill",
        "new_empty",
        "new_full",
        "new_ones",
        "new_zeros",
        "ones",
        "ones_like",
        "rand_like",
        "scalar_tensor",
        "slice_scatter",
        "select_scatter",
        "diagonal_scatter",
        "as_strided_scatter",
        "tril",
        "triu",
        "where",
        "zeros",
        "zeros_like",
        "inductor_lookup_seed",
        "inductor_random",
        "inductor_randint",
        "_unsafe_index",
        "_unsafe_masked_index",
        "flip",
        "roll",
        "repeat",
        "empty_strided",
        "fma",
        "broadcast_in_dim",
        "rev",
    ]
)

#: Ops that Inductor lets write into a copy of their first input, or into it where it ends there.
SCATTER = frozenset(
    [
        "index_put",
        "scatter",
        "scatter_add",
        "scatter_reduce",
        "_unsafe_index_put",
        "_unsafe_masked_index_put_accumulate",
    ]
)

#: Ops that loop over more than they return; ``cat`` is here because its buffer is always real.
REDUCTION = frozenset(
    [
        "all",
        "amax",
        "amin",
        "any",
        "argmax",
        "argmin",
        "cat",
        "logsumexp",
        "max",
        "mean",
        "min",
        "norm",
        "prod",
        "std",
        "sum",
        "var",
        "var_mean",
        "prepare_softmax_online",
        "xor_sum",
        "median",
        "_softmax",
        "_log_softmax",
        "max_pool2d_with_indices",
        "_low_memory_max_pool_with_offsets",
        "avg_pool2d",
        "avg_pool3d",
    ]
)

#: Inductor will not compute these twice on a CPU (``should_realize_on_reuse``).
HEAVY = frozenset({"exp", "sigmoid"})

#: Draws from a seed that Inductor makes a buffer, however few read them.
DRAWN = frozenset({"inductor_random"})

#: Attention kernels are tagged as random whatever their dropout is.
_ATTENTION_DROPOUT = {
    "_scaled_dot_product_flash_attention_for_cpu": 3,
    "_scaled_dot_product_flash_attention": 3,
    "_scaled_dot_product_efficient_attention": 5,
    "_scaled_dot_product_cudnn_attention": 5,
}


def op_name(node: fx.Node) -> str:
    """``"mm"`` for ``aten.mm.default``; the target's name for anything else."""
    target = node.target
    if isinstance(target, _torch.OpOverload):
        return target._schema.name.split("::", 1)[-1]
    return str(getattr(target, "__name__", target))


def is_named(node: fx.Node, name: str) -> bool:
    """Whether the node is an op of that name, or in a module of it (:func:`in_module`)."""
    return (node.op == "call_function" and op_name(node) == name) or in_module(node, name)


def classify(node: fx.Node) -> Kind:
    """How the node executes once lowered."""
    if node.op in ("placeholder", "get_attr"):
        return Kind.SOURCE
    target = node.target
    if target is operator.getitem:
        base = node.args[0]
        assert isinstance(base, fx.Node)
        return Kind.REDUCTION if classify(base) == Kind.REDUCTION else Kind.PART
    if not isinstance(target, _torch.OpOverload):
        return Kind.EXTERN
    name = op_name(node)
    if name in REDUCTION and not (name in ("max", "min") and len(node.all_input_nodes) > 1):
        return Kind.REDUCTION
    if torch.Tag.pointwise in target.tags or name in POINTWISE:
        return Kind.POINTWISE
    return Kind.EXTERN


def is_random(node: fx.Node) -> bool:
    """Whether running the node again would draw new random numbers."""
    target = node.target
    if not isinstance(target, _torch.OpOverload):
        return False
    name = op_name(node)
    if name == "inductor_seeds" or name == "inductor_seed":
        return True
    if torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    place = _ATTENTION_DROPOUT.get(name)
    if place is None:
        return True
    dropout = node.args[place] if len(node.args) > place else node.kwargs.get("dropout_p", 0.0)
    return dropout != 0.0


def runs_twice(node: fx.Node) -> bool:
    """Whether computing the node a second time gives the same value and nothing else.

    Ops outside aten and prims may hold state torch does not know of, so they do not.
    """
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        base = node.args[0]
        return isinstance(base, fx.Node) and runs_twice(base)
    if is_loop(node):
        return True
    target = node.target
    if not isinstance(target, _torch.OpOverload):
        return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool))
    if target.namespace not in ("aten", "prims", "inductor") or target._schema.is_mutable:
        return False
    if torch.Tag.data_dependent_output in target.tags:
        return False
    if torch.Tag.dynamic_output_shape in target.tags:
        return False
    return not is_random(node)

"""Every private name of torch this project uses, imported in this folder and nowhere else.

Checked by running on torch 2.13.0 (CPU), and by reading against the sources of 2.11.0
and 2.12.0: where they differ, a comment names the release. ``tests/test_house.py``
imports each name. When a release moves something, this folder is what to mend.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, TypeVar

import sympy
import torch
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
from functorch.compile import min_cut_rematerialization_partition
from torch import fx
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._dynamo import disable as disable_dynamo
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.compile_utils import fx_graph_cse
from torch._functorch.partitioners import (
    _extract_fwd_bwd_modules as extract_modules,
    _is_tangent as is_tangent,
    _must_be_in_backward as must_be_in_backward,
    cleanup_recompute_tags,
    force_save_bw_mutation_src,
    force_save_collectives,
    force_save_effectful_ops,
    has_recomputable_ops,
    raise_getitems,
    thread_graphsafe_rng_from_hops,
)
from torch._guards import TracingContext, detect_fake_mode
from torch._inductor import compile_fx as inductor_compile_fx, list_mode_options, list_options
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.custom_graph_pass import CustomGraphPass, CustomPartitionerFn
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch._inductor.utils import get_dtype_size
from torch._inductor.virtualized import V
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.autograd import _profiler_enabled as profiler_enabled
from torch.fx._lazy_graph_module import _LazyGraphModule as LazyGraphModule
from torch.fx.traceback import annotate  # public, but not kept backward compatible
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy
from torch.utils.flop_counter import flop_registry

__all__ = [
    "CheckpointPolicy",
    "CustomGraphPass",
    "CustomPartitionerFn",
    "GraphLowering",
    "HigherOrderOperator",
    "LazyGraphModule",
    "OpOverload",
    "TracingContext",
    "V",
    "annotate",
    "aot_autograd",
    "cleanup_recompute_tags",
    "compile_fx",
    "compile_fx_inner",
    "default_cache_dir",
    "detect_fake_mode",
    "disable_dynamo",
    "extract_modules",
    "flop_registry",
    "force_save_bw_mutation_src",
    "force_save_collectives",
    "force_save_effectful_ops",
    "functorch_config",
    "fx_graph_cse",
    "get_dtype_size",
    "has_recomputable_ops",
    "inductor_compile_fx",
    "inductor_config",
    "is_tangent",
    "list_mode_options",
    "list_options",
    "min_cut_rematerialization_partition",
    "must_be_in_backward",
    "profiler_enabled",
    "raise_getitems",
    "select_decomp_table",
    "thread_graphsafe_rng_from_hops",
    "tree_leaves",
    "unset_fake_temporarily",
]

aten = torch.ops.aten
E = TypeVar("E", bound=BaseException)

#: Ops that return a view without saying so in their schema.
UNANNOTATED_VIEWS = frozenset({aten._unsafe_view.default, aten.lift_fresh.default})

#: A size nothing is known of (an unbacked symbol) is taken to be this.
UNKNOWN_SIZE = 4096


def size_hint(size: torch.SymInt) -> int:
    """The integer a symbolic size had when it was traced, else :data:`UNKNOWN_SIZE`."""
    value = getattr(size.node, "hint", None)  # a nested int has none, or a symbolic one
    return int(value) if isinstance(value, int) else UNKNOWN_SIZE


def size_expr(size: torch.SymInt) -> sympy.Expr:
    """The sympy expression behind a symbolic size."""
    return size.node.expr


def is_symbolic(value: Any) -> bool:
    """Whether a traced value is a symbolic number or a tensor with a symbolic size."""
    if isinstance(value, torch.SymInt):
        return True
    return isinstance(value, torch.Tensor) and any(
        isinstance(size, torch.SymInt) for size in value.shape
    )


def storage_key(tensor: torch.Tensor) -> Any:
    """Equal for tensors that share memory."""
    if tensor.layout != torch.strided:
        return id(tensor)
    return tensor.untyped_storage()._cdata


def sparse_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The dense tensors a sparse one is made of."""
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    return []


def guard_fits(expression: sympy.Basic) -> bool:
    """Evaluate a symbolic bound while compiling, which makes it a guard of the step."""
    context = TracingContext.try_get()
    fake_mode = context.fake_mode if context else detect_fake_mode()
    if fake_mode is None or fake_mode.shape_env is None:
        return bool(expression)
    return bool(fake_mode.shape_env.evaluate_expr(expression))


def copy_graph(module: fx.GraphModule) -> fx.GraphModule:
    """A module of its own graph that shares constants and submodules with ``module``.

    ``copy.deepcopy`` would copy what ``meta`` refers to, which may be tensors of the user.
    """
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(module.graph, env))
    (old,) = module.graph.find_nodes(op="output")
    (new,) = graph.find_nodes(op="output")
    new.args = fx.node.map_arg(old.args, env.__getitem__)
    new.meta = copy.copy(old.meta)
    copied = fx.GraphModule(module, graph)
    copied.meta = copy.copy(module.meta)
    return copied


@contextlib.contextmanager
def donated_buffers(
    forward: fx.GraphModule, backward: fx.GraphModule, num_outputs: int
) -> Iterator[None]:
    """Within the block, Inductor sees which saved tensors the backward may overwrite.

    AOTAutograd records this only after the split, which a dry run comes before: saved
    tensors that share memory with no input, no output and no gradient.
    """
    context = TracingContext.try_get()
    if context is None or not functorch_config.donated_buffer:
        yield
        return
    (output,) = forward.graph.find_nodes(op="output")
    (gradients,) = backward.graph.find_nodes(op="output")
    others = [
        *forward.graph.find_nodes(op="placeholder"),
        *output.args[0][:num_outputs],
        *gradients.args[0],
    ]
    taken = {
        storage_key(node.meta["val"])
        for node in others
        if isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)
    }
    donated = [
        place
        for place, node in enumerate(backward.graph.find_nodes(op="placeholder"))
        if isinstance(value := node.meta.get("val"), torch.Tensor)
        and not is_tangent(node)
        and storage_key(value) not in taken
    ]
    kept, context.fw_metadata = context.fw_metadata, SimpleNamespace(bw_donated_idxs=donated)
    try:
        yield
    finally:
        context.fw_metadata = kept


def compiler_config(module: fx.GraphModule) -> Any:
    """What Inductor carries from the forward's compilation to the backward's."""
    create = inductor_compile_fx.create_compiler_config_extra
    if "config" in inspect.signature(create).parameters:  # 2.11
        return create(inductor_config)
    return create(module)


def sizevar_hint(graph: GraphLowering, expression: Any) -> int:
    """The integer a size in a lowered graph stands for."""
    return int(graph.sizevars.optimization_hint(expression, fallback=UNKNOWN_SIZE))


def describe(value: Any) -> str:
    """An example input as text that is equal in every process."""
    if isinstance(value, torch.Tensor):
        stride = value.stride() if value.layout == torch.strided else ()
        return f"{value.dtype} {tuple(value.shape)} {stride} {value.device} {value.requires_grad}"
    return repr(value)


def mode_patches(mode: str | None) -> dict[str, Any]:
    """Inductor's config for one of ``torch.compile``'s modes."""
    return dict(list_mode_options(mode)) if mode else {}


def records_kernels() -> bool:
    """Whether Inductor records kernels as CUDA graphs, where no option says so."""
    return bool(inductor_config.triton.cudagraphs)


def graph_passes(given: Any, ours: CustomGraphPass) -> CustomGraphPass:
    """A user's own graph passes followed by ours, as Inductor's config takes them."""
    if given is None:
        return ours
    return _Chain([*(given if isinstance(given, (list, tuple)) else [given]), ours])


class _Chain(CustomGraphPass):
    """Several graph passes as one: 2.11 and 2.12 take no list of them."""

    def __init__(self, passes: list[Callable[[fx.Graph], None]]) -> None:
        self.passes = passes

    def __call__(self, graph: fx.Graph) -> None:
        for each in self.passes:
            each(graph)

    def uuid(self) -> Any:
        """``None``, which turns torch's caches off, when one of the passes has no identity."""
        ids = [getattr(each, "uuid", lambda: None)() for each in self.passes]
        return tuple(ids) if all(ids) else None


def gave_up() -> bool:
    """Whether this frame runs in eager because Dynamo could not capture it (a graph break)."""
    return callable(get_eval_frame_callback())


def keeps_tensors(node: Any) -> bool:
    """Whether an autograd node saves tensors, asked without unpacking them."""
    return hasattr(type(node), "_raw_saved_tensors")


def raw_saved(node: Any) -> Any:
    """What an autograd node saves, packed. Raises ``RuntimeError`` once it was freed."""
    return node._raw_saved_tensors


def boxed(gm: fx.GraphModule) -> Callable[..., Any]:
    """A graph run op by op, that lets go of its inputs as it reads them for the last time."""

    def run(args: list[Any]) -> Any:
        return fx.Interpreter(gm).boxed_run(args)  # one that lives on would keep its outputs

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def aot_eager(
    gm: fx.GraphModule,
    example_inputs: Any,
    compile_side: Callable[..., Any],
    compile_inference: Callable[..., Any],
    partition: Callable[..., Any],
    decompositions: Any = None,
) -> Callable[..., Any]:
    """AOTAutograd with Inductor's decompositions and no code generation."""
    backend = aot_autograd(
        fw_compiler=compile_side,
        bw_compiler=compile_side,
        inference_compiler=compile_inference,
        partition_fn=partition,
        decompositions=decompositions or select_decomp_table,
        keep_inference_input_mutations=True,
    )
    with functorch_config.patch(enable_autograd_cache=False):
        return backend(gm, example_inputs)


@dataclasses.dataclass(frozen=True)
class TensorShape:
    """A tensor a lowered op reads, as plain data at hinted sizes."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def fallback_arguments(kernel: Any) -> tuple[Any, Any]:
    """The arguments a ``FallbackKernel`` calls its op with, tensors as :class:`TensorShape`."""
    graph = V.graph

    def describe(node: Any) -> TensorShape:
        return TensorShape(
            tuple(sizevar_hint(graph, s) for s in node.get_size()),
            tuple(sizevar_hint(graph, s) for s in node.get_stride()),
            node.get_dtype(),
            node.get_device(),
        )

    args, kwargs = kernel.unflatten_args(
        [describe(node) for node in kernel.inputs], kernel.constant_args
    )
    return args, {**kernel.kwargs, **kwargs}


@contextlib.contextmanager
def real_tensors() -> Iterator[None]:
    """Within the block, ops run on real tensors even while a graph is being compiled."""
    with unset_fake_temporarily(), torch.no_grad(), torch._C._DisableTorchDispatch():
        yield


def profiled_tree(prof: torch.profiler.profile) -> list[Any]:
    """The roots of what a finished profile recorded, allocations among the leaves."""
    results = prof.profiler.kineto_results if prof.profiler is not None else None
    return [] if results is None else list(results.experimental_event_tree())


def cause_of(error: BaseException | None, kind: type[E]) -> E | None:
    """The first error of a kind among an error and what it was raised from."""
    while error is not None:
        if isinstance(error, kind):
            return error
        error = error.__cause__ or error.__context__
    return None

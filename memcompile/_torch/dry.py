"""Private torch that a dry run needs: Inductor's lowering, stopped at its wrapper.

Checked by running on torch 2.13.0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

from torch import fx
from torch._inductor.codegen.cpp import CppKernelProxy, CppVecKernel
from torch._inductor.codegen.cpp_utils import LocalBufferContext
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V

from memcompile._torch import cause_of, copy_graph, inductor_config

__all__ = ["CppKernelProxy", "CppVecKernel", "GraphLowering", "LocalBufferContext", "V", "dry_run"]

_codegen_functions = CppKernelProxy.codegen_functions


def _scalar_only(
    self: CppKernelProxy, functions: Sequence[Callable[..., Any]], sizes: Sequence[Any]
) -> None:
    """Write a C++ kernel's scalar form alone.

    It decides which buffers are dropped or written in place; the vector forms that
    follow are most of the work and decide nothing, except whether the loops of an
    outer-loop fusion agree: those are tiled, and left empty.
    """
    if isinstance(V.local_buffer_context, LocalBufferContext):
        functions = [_scalar_call(function) for function in functions]
    else:
        self.picked_vec_isa = None
    _codegen_functions(self, functions, sizes)


def _scalar_call(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*indices: Any) -> Any:
        return None if isinstance(V.kernel, CppVecKernel) else function(*indices)

    call.original_fn = getattr(function, "original_fn", function)  # type: ignore[attr-defined]
    return call


class _Lowered(Exception):
    """Carries the finished wrapper out of a dry run, before anything is compiled."""

    def __init__(self, graph: GraphLowering) -> None:
        self.graph = graph


def dry_run(
    gm: fx.GraphModule, compile_side: Callable[[fx.GraphModule], Any]
) -> GraphLowering | None:
    """Lower one side with Inductor up to its wrapper, building no kernel.

    ``compile_side`` calls Inductor on the copy it is given. Returns ``None`` for a
    graph that Inductor answers without lowering (it has no call).
    """
    module = copy_graph(gm)

    def stop(self: GraphLowering) -> None:
        self.codegen()
        raise _Lowered(self)

    uncached = {"fx_graph_cache": False, "fx_graph_remote_cache": False}
    with (
        mock.patch.object(GraphLowering, "compile_to_module", stop),
        mock.patch.object(CppKernelProxy, "codegen_functions", _scalar_only),
        inductor_config.patch(uncached),
    ):
        try:
            compile_side(module)
        except _Lowered as lowered:
            return lowered.graph
        except Exception as error:
            cause = cause_of(error, _Lowered)
            if cause is None:
                raise
            return cause.graph
    return None

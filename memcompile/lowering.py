"""To Inductor, and the exact peak back, before anything runs.

A dry run takes one side through Inductor's post-grad passes, scheduling and wrapper,
building no kernel. The wrapper's lines then say which buffer is allocated, reused
and freed when: walking them gives the bytes the allocator will see.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from memcompile import _torch
from memcompile._torch.dry import dry_run
from memcompile._torch.transfers import is_transfer, offload, reload
from memcompile.step import hint, tensor_size, tensors


@dataclasses.dataclass(frozen=True)
class Side:
    """One lowered side: bytes above what lives when it starts."""

    peak: int
    unpooled: int  #: the peak were every buffer freed at its last use, none held for another
    end: int  #: bytes still alive when it returns
    unread: tuple[str, ...] = ()  #: wrapper lines the walk does not know


@dataclasses.dataclass(frozen=True)
class Lowered:
    """Both sides of a step."""

    peak: int  #: total bytes, what lives before the step included
    unpooled: int  #: the same with ``allow_buffer_reuse`` off
    forward: Side
    backward: Side | None
    between: int  #: bytes alive when the backward starts, ``before`` excluded


#: Bytes an op allocates inside itself, given its fallback kernel; see ``memcompile.scratch``.
Scratch = Callable[[Any], int]


class Lowering:
    """Lowers splits of one captured graph.

    Args:
        num_model_outputs: outputs of the graph Dynamo captured.
        num_model_inputs: its inputs.
        scratch: bytes a library op allocates inside itself.
    """

    def __init__(self, num_model_outputs: int, num_model_inputs: int, scratch: Scratch) -> None:
        self.num_model_outputs = num_model_outputs
        self.num_model_inputs = num_model_inputs
        self.scratch = scratch
        self.runs = 0
        self.seconds = 0.0  #: spent in dry runs

    def step(
        self, forward: fx.GraphModule, backward: fx.GraphModule, num_outputs: int, before: int
    ) -> Lowered:
        """The lowered peak of a training step; ``before`` is what lives when it starts."""
        self.runs += 1
        fw = self._side(forward, self._compile_forward(False), owned=False)
        (output,) = forward.graph.find_nodes(op="output")
        returned, saved = output.args[0][:num_outputs], output.args[0][num_outputs:]
        held = _Held(forward)
        held.add(returned)
        held.add(saved)
        between = max(held.bytes, fw.end)
        tangents = sum(
            _bytes_of(n)
            for n in backward.graph.find_nodes(op="placeholder")
            if _torch.is_tangent(n)
        )
        names = {n.name for n in held.owners(returned)}
        landed = {n.name for n in saved if isinstance(n, fx.Node) and is_transfer(n.target)}
        with _torch.donated_buffers(forward, backward, num_outputs):
            bw = self._side(
                backward, self._compile_backward(), owned=True, lent=names, landed=landed
            )
        start = between + tangents
        peak = before + max(fw.peak, start + bw.peak)
        unpooled = before + max(fw.unpooled, start + bw.unpooled)
        return Lowered(peak, unpooled, fw, bw, between)

    def inference(self, module: fx.GraphModule, before: int) -> Lowered:
        """The lowered peak of a graph without a backward."""
        self.runs += 1
        side = self._side(module, self._compile_forward(True), owned=False)
        return Lowered(before + side.peak, before + side.unpooled, side, None, 0)

    def _side(
        self,
        module: fx.GraphModule,
        compile_side: Callable[[fx.GraphModule], Any],
        *,
        owned: bool,
        lent: set[str] | None = None,
        landed: set[str] | None = None,
    ) -> Side:
        started = time.perf_counter()
        graph = dry_run(module, compile_side)
        self.seconds += time.perf_counter() - started
        if graph is None:
            return Side(0, 0, 0)
        with _torch.V.set_graph_handler(graph):
            given = graph, owned, lent or set(), self.scratch
            apart = Walk(*given, pooled=False, landed=landed).run()
            side = Walk(*given, landed=landed).run()
            return dataclasses.replace(side, unpooled=min(side.peak, apart.peak))

    def _compile_forward(self, is_inference: bool) -> Callable[[fx.GraphModule], Any]:
        def compile_side(module: fx.GraphModule) -> Any:
            return _torch.inductor_compile_fx.compile_fx_forward(
                module,
                _inputs(module),
                num_orig_model_outputs=self.num_model_outputs,
                num_example_inputs=self.num_model_inputs,
                compiler_config_extra=_torch.compiler_config(module),
                is_inference=is_inference,
            )

        return compile_side

    def _compile_backward(self) -> Callable[[fx.GraphModule], Any]:
        def compile_side(module: fx.GraphModule) -> Any:
            return _torch.inductor_compile_fx.compile_fx_backward(
                module, _inputs(module), compiler_config_extra=_torch.compiler_config(module)
            )

        return compile_side


def _inputs(module: fx.GraphModule) -> list[Any]:
    return [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]


def _bytes_of(node: fx.Node) -> int:
    return sum(hint(tensor_size(t)) for t in tensors(node))


class _Held:
    """Bytes a forward's outputs keep alive: each storage once, inputs not counted."""

    def __init__(self, module: fx.GraphModule) -> None:
        from memcompile.step import is_view, view_base

        self.roots: dict[fx.Node, fx.Node] = {}
        for node in module.graph.nodes:
            self.roots[node] = self.roots[view_base(node)] if is_view(node) else node
        self.seen: set[fx.Node] = set()
        self.bytes = 0

    def owners(self, outputs: Sequence[Any]) -> list[fx.Node]:
        return [self.roots[o] for o in outputs if isinstance(o, fx.Node)]

    def add(self, outputs: Sequence[Any]) -> None:
        for root in self.owners(outputs):
            if root.target is offload:
                continue  # on the host
            if root.op == "call_function" and root not in self.seen:
                self.seen.add(root)
                self.bytes += _bytes_of(root)


class Walk:
    """Replays the allocations, reuses and frees of one finished wrapper.

    Inductor holds a buffer past its last use when a later one of the same size can have its
    memory; ``pooled=False`` tells what the same lines come to without that.
    """

    def __init__(
        self,
        graph: Any,
        owned: bool,
        lent: set[str],
        scratch: Scratch,
        pooled: bool = True,
        landed: set[str] | None = None,
    ) -> None:
        self.graph, self.owned, self.lent, self.scratch = graph, owned, lent, scratch
        self.pooled = pooled
        self.landed = landed or set()  #: inputs that lie on the host
        self.root: dict[str, str] = {}
        self.size: dict[str, int] = {}
        self.names: dict[str, int] = {}
        self.parts: dict[str, list[str]] = {}
        self.live = 0
        self.peak = 0
        self.unread: list[str] = []
        self.bodies: dict[Any, Side] = {}  #: of loops walked already, by their graphs
        self.gone: set[str] = set()  #: freed here, held for another buffer by Inductor
        self.outputs = set(graph.get_output_names())

    def run(self) -> Side:
        """Walk every line once."""
        self._inputs()
        lines = list(self.graph.wrapper_code.lines)
        for line in lines:
            if type(line).__name__ == "MultiOutputLine":
                self.parts.setdefault(line.arg_name, []).append(line.result_name)
        for line in lines:
            handler = getattr(self, "_on_" + type(line).__name__, None)
            if handler is not None:
                handler(line)
            elif isinstance(line, str) and re.match(r"buf\d+ = (?!\[None\])", line):
                self.unread.append(line)
        kept = {self.root.get(name, name) for name in self.outputs}
        end = sum(size for root, size in self.size.items() if root in kept)
        return Side(self.peak, self.peak, end, tuple(self.unread))

    def _inputs(self) -> None:
        """Inputs the side owns (saved activations) are freed by it; their bytes count as zero
        at the start, so freeing one goes below zero."""
        for name, value in self.graph.graph_inputs.items():
            if name.startswith(("primals", "tangents")) or not self.owned:
                continue
            if name in self.landed:
                continue
            node = getattr(value, "data", value)
            try:
                size = self._bytes(getattr(node, "data", node))
            except (AttributeError, NotImplementedError, TypeError):
                continue
            self.root[name], self.size[name], self.names[name] = name, size, 1
            if name in self.lent:
                self.names[name] += 1

    # -- the lines of torch's wrapper -------------------------------------------------

    def _on_AllocateLine(self, line: Any) -> None:
        self._allocate(line.node.get_name(), self._bytes(line.node))

    def _on_ReuseLine(self, line: Any) -> None:
        old, new = line.node.get_name(), line.reused_as
        if not self.pooled and old in self.gone:
            self._allocate(new.get_name(), self._bytes(new))
            return
        self._alias(new.get_name(), old)
        if line.delete_old and old not in self.outputs:
            self._free(old)

    def _on_ReinterpretLine(self, line: Any) -> None:
        self._alias(line.reused_as.get_name(), line.node.get_name())

    def _on_FreeIfNotReusedLine(self, line: Any) -> None:
        name = line.node.get_name()
        if not line.is_reused:
            self._free(name)
        elif not self.pooled:
            self.gone.add(name)
            self._free(name)

    def _on_FreeLine(self, line: Any) -> None:
        self._free(line.node.get_name())

    def _on_ExternKernelAllocLine(self, line: Any) -> None:
        self._results(line.node)
        self._work(line.node)  # on top of its results, which it allocates first

    def _results(self, node: Any) -> None:
        """The tensors a library op returns: several parts, one, or a view of an input."""
        name = node.get_name()
        parts = self.parts.get(name)
        op = getattr(node, "op_overload", None)
        if is_transfer(op) and op is not reload:
            for part in parts or [name]:  # on the host, or what was copied and is whole now
                self._alias(part, next(iter(node.get_inputs_that_alias_output()), ""))
            return
        if parts is not None:
            for part in parts:
                self._part(part, self.graph.get_buffer(part))
            return
        try:
            size = self._bytes(node)
        except (AttributeError, NotImplementedError, TypeError):
            return
        aliases = node.get_inputs_that_alias_output()
        if aliases:
            self._alias(name, aliases[0])
        else:
            self._allocate(name, size)

    def _part(self, name: str, buffer: Any) -> None:
        aliases = buffer.get_inputs_that_alias_output()
        known = [a for a in aliases if a in self.root]
        if known:
            self._alias(name, known[0])
        else:
            self._allocate(name, self._bytes(buffer))

    def _on_EnterSubgraphLine(self, line: Any) -> None:
        """A loop's body: what it allocates is gone after each trip."""
        body = self.bodies.get(line.graph)
        if body is None:
            with _torch.V.set_graph_handler(line.graph):
                body = Walk(line.graph, False, set(), self.scratch, self.pooled).run()
            self.bodies[line.graph] = body
            self.unread += body.unread
        self.peak = max(self.peak, self.live + body.peak)

    def _on_ExternKernelOutLine(self, line: Any) -> None:
        self._work(line.node)

    # -- bytes ------------------------------------------------------------------------

    def _bytes(self, node: Any) -> int:
        count = getattr(node, "count", None)
        if count is not None and not callable(count):  # a workspace
            return self._hint(count) * _torch.get_dtype_size(node.get_dtype())
        numel = self._hint(self.graph.get_allocation_storage_size(node))
        return numel * _torch.get_dtype_size(node.get_dtype())

    def _hint(self, expression: Any) -> int:
        return _torch.sizevar_hint(self.graph, expression)

    def _allocate(self, name: str, size: int) -> None:
        if name in self.root:
            return
        self.root[name], self.size[name], self.names[name] = name, size, 1
        self.live += size
        self.peak = max(self.peak, self.live)

    def _work(self, node: Any) -> None:
        self.peak = max(self.peak, self.live + self.scratch(node))

    def _alias(self, new: str, old: str) -> None:
        root = self.root.get(old)
        if root is not None and new not in self.root:
            self.root[new] = root
            self.names[root] += 1

    def _free(self, name: str) -> None:
        root = self.root.pop(name, None)
        if root is None:
            return
        self.names[root] -= 1
        if self.names[root] == 0:
            self.live -= self.size.pop(root)

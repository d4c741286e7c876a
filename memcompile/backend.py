"""``memopt``: from ``torch.compile`` through the pipeline to Inductor.

Nothing here decides: it hands each captured graph to :class:`memcompile.compiler.Compiler`
at the place where torch splits a joint graph, and turns what goes wrong into errors
that users can catch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import fx

from memcompile import _torch, decided, live, scratch, sizes, store, watch
from memcompile._torch.draws import exact_draws
from memcompile._torch.fusion import in_order, prompt_kernels
from memcompile._torch.loops import cached_loops, released_loops
from memcompile._torch.pieces import any_fake
from memcompile._torch.units import whole_units
from memcompile.analysis.cost import calibrate
from memcompile.analysis.timeline import HELD
from memcompile.compiler import Compiler, Outcome
from memcompile.contract import Context, Pass
from memcompile.errors import MemcompileError
from memcompile.explain import Explained
from memcompile.lowering import Lowering
from memcompile.marks import marks, modules
from memcompile.options import Options, format_bytes, warn_if_above_free
from memcompile.pipeline import Pipeline
from memcompile.planning import roomy
from memcompile.registry import resolve, source_key, spell
from memcompile.report import MoveRow, Report
from memcompile.version import __version__, source_digest

log = logging.getLogger(__name__)

#: What the promise does not cover, said in every report.
OUTSIDE = (
    "optimizer state, and gradients that already exist when the step starts",
    "eager code between forward and backward, and outputs the caller keeps",
    "the allocator's own rounding and fragmentation",
)


def memopt(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The ``torch.compile`` backend: a step that fits ``options["budget"]``.

    Args:
        gm: the graph Dynamo captured.
        example_inputs: its inputs, fake or real.
        options: see :class:`memcompile.Options`.
        mode: one of torch's modes, where no options are given.

    An :class:`OptionsError`, a :class:`memcompile.BudgetError`, or a pass's error under
    ``strict``, is raised when the compiled graph is first called, before any of it runs:
    torch would wrap what a backend raises, or run the model eagerly over its budget. Where a
    graph comes in pieces (DDP), the first of them raises it.
    """
    error = live.refused()
    if error is not None:
        return _raises(error, gm)
    try:
        parsed = Options.parse(options)
        if mode is not None and mode != "default":
            parsed = dataclasses.replace(parsed, mode=mode)
        return roomy(_Job(gm, example_inputs, parsed).compile)()
    except Exception as error:
        own = _torch.cause_of(error, MemcompileError)
        if own is None:
            raise
        live.refuse(own)
        return _raises(own, gm)


def _raises(error: MemcompileError, gm: fx.GraphModule) -> Callable[..., Any]:
    """A compiled graph that raises instead of running."""

    @_torch.disable_dynamo
    def refuse(*args: Any, **kwargs: Any) -> Any:
        if any_fake(args):  # torch wants to know what the next piece is given
            return gm(*args, **kwargs)
        raise type(error).with_traceback(error, None)

    return refuse


class _Job:
    """One captured graph on its way through torch."""

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> None:
        self.gm, self.example_inputs, self.options = gm, example_inputs, options
        self.device = _device(gm, example_inputs)
        limit = options.limit
        budget = int(limit.value) - options.reserve_bytes if limit.kind == "bytes" else None
        if budget is not None:
            warn_if_above_free(self.device, budget, held=live.tensor_bytes(example_inputs))
        passes = resolve(options.pipeline)
        self.watch = watch.current()
        self.marks = marks(gm)
        if any(each.by_module for each in passes):
            self.marks = f"{self.marks};{modules(gm)}"
        self.code = self._code()
        self.decision_key = self._decision_key(passes)
        self.decision = self._decision()
        exact = self.decision.exact if self.decision is not None else frozenset[str]()
        recorded = bool(self._patches().get("triton.cudagraphs", _torch.records_kernels()))
        context = Context(options.strict, budget, self.device.type, exact, recorded)
        self.pipeline = Pipeline(passes, context)
        (output,) = gm.graph.find_nodes(op="output")
        outputs = output.args[0]
        number = len(outputs) if isinstance(outputs, (list, tuple)) else 1
        self.lowering = Lowering(number, len(example_inputs), scratch.of)
        self.held = live.held(example_inputs)
        self.compiler = Compiler(options, self.pipeline, self.lowering, self.held.bytes)
        self.filed: list[Report] = []  #: one a graph that torch splits or lowers: most often one
        self.key = self._key()
        self.graph_key = self._graph_key()

    def _key(self) -> str:
        """Covers everything a plan depends on beside the graph."""
        parts = [
            f"{__version__}:{source_digest()}",
            torch.__version__,
            self.options.key(),
            self.marks,
            self.pipeline.key(),
            self.decision.key() if self.decision is not None else "",
            str(self.compiler.held),
            calibrate(self.device).to_json(),
        ]
        return hashlib.sha256("|".join(parts).encode()).hexdigest()

    def _graph_key(self) -> str:
        """Names this captured graph, its inputs and options: where its report is stored."""
        described = [_torch.describe(value) for value in self.example_inputs]
        return _digest(self.key, str(self.gm.code), *described)[:40]

    def _code(self) -> str:
        """Names what Dynamo captured: its code and its inputs, symbolic sizes as symbols."""
        given = zip(self.gm.graph.find_nodes(op="placeholder"), self.example_inputs, strict=False)
        described = [_torch.describe(n.meta.get("example_value", value)) for n, value in given]
        return _digest(str(self.gm.code), self.marks, *described)

    def _decision_key(self, passes: Sequence[Pass]) -> str:
        """Names all that numbers depend on: neither a budget nor what is held changes any."""
        plain = Options(
            lower=self.options.lower, inductor=self.options.inductor, mode=self.options.mode
        )
        as_eager = self._table() is None and _torch.inductor_config.fallback_random
        parts = [
            str(as_eager),
            *(part for each in passes for part in (source_key(each), *map(_state, each.parts))),
        ]
        text = re.sub(r" at 0x[0-9a-fA-F]+", "", "\n".join(parts))
        return _digest(__version__, torch.__version__, self.code, plain.key(), text)[:40]

    def _decision(self) -> decided.Decision | None:
        """What calibration decided for this graph, or is trying."""
        if self.watch is not None and self.watch.exact is not None:
            return self.watch.decision(self.decision_key)
        return decided.load(self.decision_key)

    def compile(self) -> Callable[..., Any]:
        """Compile, then file the report of what was planned or read from the cache."""
        compiled = self._eager() if self.options.lower == "eager" else self._inductor()
        if not self.filed:
            self.filed.append(store.load(self.graph_key) or self._missing())
            self.filed[0].name = self.options.name
            self.filed[0].fidelity = self._fidelity(self.filed[0])
        if self.watch is None:
            for report in self.filed:
                store.add(report)
        report = self.filed[-1]
        inputs, self.example_inputs = self.example_inputs, ()  # torch 2.11 holds on to the job
        if self.compiler.planner is not None and self.compiler.planner.draft.step.dynamic:
            sizes.remember(report, self.compiler.planner)
        if report.kind != "training":
            return compiled
        label = report.name or f"graph {report.index}"
        return live.watch(compiled, label, report.held_after, inputs)

    def _inductor(self) -> Callable[..., Any]:
        patches = {
            **self._patches(),
            "custom_partitioner_fn": _Partitioner(self),
            "joint_custom_pre_pass": _torch.graph_passes(
                self.options.inductor.get("joint_custom_pre_pass"), _Rewrites(self)
            ),
        }
        with whole_units():  # here too: what is cached is loaded without the inner compiler
            return _torch.compile_fx(
                self.gm,
                self.example_inputs,
                inner_compile=roomy(self._inner),
                config_patches=patches,
                decompositions=self._table(),
            )

    def _patches(self) -> dict[str, Any]:
        """What the user asks of Inductor."""
        return {**_torch.mode_patches(self.options.mode), **self.options.inductor}

    def _table(self) -> dict[Any, Any] | None:
        """The decompositions to trace with, where it is not Inductor's choice."""
        return None if self.watch is None else self.watch.decompositions

    def _inner(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
        """Inductor's inner compiler; graphs without a backward are checked on the way."""
        if kwargs.get("is_inference"):
            gm, explained = self.compiler.whole(gm)
            self._planned(gm, None, explained)
            self._file(explained, "inference")
        patches = {} if self.compiler.pooled else {"allow_buffer_reuse": False}
        patched = _torch.inductor_config.patch(patches)
        fusion = prompt_kernels(HELD) if self.compiler.prompt else contextlib.nullcontext()
        ordered = in_order(self.compiler.ordered)
        loops = released_loops(), cached_loops(gm)
        with contextlib.ExitStack() as stack:
            for context in (patched, *loops, exact_draws(), fusion, ordered, whole_units()):
                stack.enter_context(context)
            return _torch.compile_fx_inner(gm, example_inputs, **kwargs)

    def _eager(self) -> Callable[..., Any]:
        def run(gm: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
            run = _torch.boxed(gm)
            return run if self.watch is None else self.watch.recorded(gm, run)

        def infer(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            self.rewrite(gm)
            gm, explained = self.compiler.whole(gm)
            self._planned(gm, None, explained)
            self._file(explained, "inference")
            return run(gm, inputs)

        def partition(gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
            self.rewrite(gm)
            return self.partition(gm, **kwargs)

        inputs = self.example_inputs
        return _torch.aot_eager(self.gm, inputs, run, infer, partition, self._table())

    def rewrite(self, gm: fx.GraphModule) -> None:
        """Run the rewrites on a joint graph; called by torch, before Inductor's own passes."""
        if self.watch is None:
            self.pipeline.rewrite(gm)
            return
        exact = self.pipeline.context.exact
        seen = self.watch.starts(self.decision_key, self.code, gm, exact)
        self.pipeline.rewrite(gm, seen.changed)
        seen.done(gm)

    def partition(
        self,
        gm: fx.GraphModule,
        *,
        num_fwd_outputs: int,
        static_lifetime_input_indices: Sequence[int] | None = None,
        **_: Any,
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Split a joint graph as planned; called by torch."""
        static = tuple(static_lifetime_input_indices or ())
        outcome: Outcome = self.compiler.step(gm, num_fwd_outputs, static)
        forward, backward = outcome.split.forward, outcome.split.backward
        self._planned(forward, backward, outcome.explained, num_fwd_outputs)
        self._file(outcome.explained, "training")
        return forward, backward

    def _planned(
        self, forward: fx.GraphModule, backward: Any, explained: Explained, outputs: int = 0
    ) -> None:
        if self.watch is not None:
            self.watch.planned(forward, backward, outputs, self._inexact(explained.moves))

    def _inexact(self, moves: Sequence[MoveRow]) -> list[MoveRow]:
        """The moves taken that may change numbers."""
        names = {spell(each) for each in self.pipeline.passes if each.exactness == "no"}
        return [move for move in moves if move.by in names]

    def _fidelity(self, report: Report) -> str:
        """What is known of the error of what may change numbers; "" where nothing does."""
        moves = self._inexact(report.moves)
        inexact = [ran for ran in report.passes if ran.exactness == "no"]
        if self.decision is not None and inexact:
            return self.decision.sentence(move.value for move in moves)
        return decided.UNCHECKED if moves or any(ran.changed for ran in inexact) else ""

    def _file(self, explained: Explained, kind: str) -> None:
        spent = self.lowering.seconds
        values = {
            field.name: getattr(explained, field.name) for field in dataclasses.fields(explained)
        }
        values["planning_seconds"] = max(0.0, explained.planning_seconds - spent)
        report = Report(
            name=self.options.name,
            index=0,
            kind=kind,
            torch=torch.__version__,
            device=calibrate(self.device).device,
            lower=self.options.lower,
            budget_text="" if self.options.budget is None else str(self.options.budget),
            reserve=self.options.reserve_bytes,
            passes=tuple(self.pipeline.ran),
            outside=OUTSIDE,
            notes=(*self.compiler.notes, *self._holder_notes()),
            schedulings=self.lowering.runs,
            lowering_seconds=spent,
            held_before=self.compiler.held,
            **values,
        )
        report.fidelity = self._fidelity(report)
        self.filed.append(report)
        if self.watch is None or self.watch.exact is not None:
            store.save(self.graph_key, report)

    def _holder_notes(self) -> list[str]:
        held, notes = self.held, []
        if held.by_graphs:
            size = format_bytes(held.by_graphs)
            notes.append(f"after a graph break: {size} are held by {', '.join(held.graphs)}")
        if held.by_pieces:
            size, names = format_bytes(held.by_pieces), ", ".join(held.pieces)
            notes.append(f"a piece of a graph that was split: {size} are held by {names}")
        return notes

    def _missing(self) -> Report:
        """The graph came from torch's cache and its report is gone: say so."""
        note = "compiled from torch's cache; the report of its planning was not found on disk"
        return Report(
            name=self.options.name, index=0, kind="", torch=torch.__version__,
            device=str(self.device), lower=self.options.lower, budget=None,
            budget_text=str(self.options.budget or ""), reserve=self.options.reserve_bytes,
            before=0, floor=None, inductor=None, predicted=0, lowered=None, notes=(note,),
            outside=OUTSIDE, cached=True,
        )  # fmt: skip


class _Hook:
    """What torch's config holds of a job. Torch copies and prints its config freely."""

    def __init__(self, job: _Job) -> None:
        self.job = job

    def __deepcopy__(self, memo: object) -> _Hook:
        return self

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (self.uuid(),)

    def __repr__(self) -> str:
        return f"<memopt {self.job.key[:12]}>"

    def uuid(self) -> str:
        return self.job.key


class _Partitioner(_Hook, _torch.CustomPartitionerFn):
    """Where torch splits a joint graph, we do."""

    def __call__(self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any) -> Any:
        return self.job.partition(gm, **kwargs)


class _Rewrites(_Hook, _torch.CustomGraphPass):
    """The rewrites of the pipeline, before Inductor matches any pattern."""

    def __call__(self, graph: fx.Graph) -> None:
        module = graph.owning_module
        assert module is not None
        self.job.rewrite(module)


def _state(part: object) -> str:
    """What an object that a pass works by holds; a module holds its source alone."""
    if isinstance(part, ModuleType):
        return part.__name__
    return f"{type(part).__qualname__} {sorted(getattr(part, '__dict__', {}).items(), key=str)}"


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _device(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> torch.device:
    values = [*example_inputs, *gm.parameters(), *gm.buffers()]
    devices = [v.device for v in values if isinstance(v, torch.Tensor)]
    return next((d for d in devices if d.type != "cpu"), torch.device("cpu"))

"""Loops: a region of a step, run chunk by chunk by one compiled body.

The loop is ``torch.ops.higher_order.while_loop``. It carries a counter, one full buffer
for each output that is put together from slices, and one accumulator for each that is
added up; the body views its slice of every sliced input, computes, and writes in place.
A length that the chunk does not divide gets a second loop of one trip on the same buffers.
"""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections.abc import Callable, Container, Iterator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from memcompile import _torch
from memcompile._torch.loops import lower_added_products
from memcompile._torch.symbols import size_node, size_of, uncached, unguarded
from memcompile.analysis.cost import Rates
from memcompile.body import (
    ADDED_IN_PLACE,
    START,
    Body,
    Trips,
    accumulator,
    given,
    trips,
)
from memcompile.inplace import overwritable
from memcompile.lengths import size_expr
from memcompile.region import Part, Region
from memcompile.step import GROUP, OVER, Step, hint, loops_in, must_save
from memcompile.trip import LoopCost, cost

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class _Site:
    """One loop that was written: what its bodies are traced from."""

    cond: str  #: under which name the module has it
    body: str
    part: Part
    run: Trips
    inputs: list[fx.Node]
    values: list[Any]  #: fake, of what it carries and of what it is given


class Looped:
    """A copy of a step's graph in which the sides of a region are loops.

    Args:
        step: the step.
        region: what the loops hold.
        chunks: how many.
        rates: what the device can do, for the loops' predicted seconds.
    """

    def __init__(self, step: Step, region: Region, chunks: int, rates: Rates) -> None:
        self.step, self.region, self.rates = step, region, rates
        self.chunks = chunks
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.sites: list[_Site] = []
        self._known_costs: dict[Any, LoopCost] = {}
        self.part_of: dict[fx.Node, Part] = {}
        self.done: set[int] = set()
        self.traced: dict[str, fx.GraphModule] = {}  #: once they are traced, the loops' functions
        self.asked: tuple[Any, ...] = ()  #: of symbolic sizes, while tracing them
        self.sizes: dict[Any, fx.Node] = {}  #: symbolic ones, by expression
        for part in (region.late, region.early):
            if part is not None:
                moved = [node for node in part.nodes if node not in region.again]
                self.part_of.update(dict.fromkeys(moved, part))

    def write(self) -> fx.GraphModule:
        """The new joint graph; its outputs and placeholders are those of the old one."""
        self.outline()
        self.fill(self.module)
        return self.module

    def fill(self, module: fx.GraphModule) -> None:
        """Put the loops' functions into a graph that has the loops; drafts do without them."""
        if not self.traced:
            self._trace_all()
        for name, function in self.traced.items():
            setattr(module, name, function)
        costs = self.costs()
        for node in loops_of(module.graph, costs):
            node.meta["asked"], node.meta["loop"] = self.asked, costs[body_of(node)]

    def _trace_all(self) -> None:
        lower_added_products()
        with unguarded(getattr(self._fake_mode(), "shape_env", None)) as asked:
            traced = {name: make() for site in self.sites for name, make in self._makers(site)}
        fixed = [e for e in asked if not e.is_Boolean and not e.is_Relational]
        if fixed:
            raise ValueError(f"the loop would hold at one value of {fixed[0]} alone")
        self.traced, self.asked = traced, tuple(asked)

    def _makers(self, site: _Site) -> Iterator[tuple[str, Callable[[], fx.GraphModule]]]:
        """The functions of one loop by name, to be traced."""

        def more(counter: torch.Tensor, *rest: Any) -> torch.Tensor:
            return aten.lt.Scalar(counter, size_of(rest, site.run.count))

        trip = Body(self.region, site.part, site.run, site.inputs).run
        yield site.cond, lambda: self._trace(more, site.values)
        yield site.body, lambda: _returning_buffers(self._trace(trip, site.values))

    # -- other counts of chunks ---------------------------------------------------------------

    def costs(self, chunks: int | None = None) -> dict[str, LoopCost]:
        """By the name of its body what each loop costs, or would with so many chunks.

        Where that takes more loops or fewer, the first one stands for all of its side.
        """
        runs = trips(self.region.size, self.chunks if chunks is None else chunks)
        found: dict[str, LoopCost] = {}
        for part in dict.fromkeys(id(site.part) for site in self.sites):
            sites = [site for site in self.sites if id(site.part) == part]
            each = [self._cost(sites[0].part, run) for run in runs]
            if len(runs) != len(sites):
                most, total = max(c.bytes for c in each), sum(c.seconds for c in each)
                each = [LoopCost(most, total), *(LoopCost(0, 0.0) for _ in sites[1:])]
            found |= {site.body: what for site, what in zip(sites, each, strict=True)}
        return found

    def _cost(self, part: Part, run: Trips) -> LoopCost:
        key = id(part), str(run)
        if key not in self._known_costs:
            self._known_costs[key] = cost(self.step, self.region, part, run, self.rates)
        return self._known_costs[key]

    def recounted(self, chunks: int) -> Looped | None:
        """The same loops with so many chunks; ``None`` where that takes more loops or fewer."""
        runs = trips(self.region.size, chunks)
        if len(runs) != len(trips(self.region.size, self.chunks)):
            return None
        new = copy.copy(self)
        new.chunks, new.traced, new.asked = chunks, {}, ()
        new.sites = [
            dataclasses.replace(site, run=runs[number % len(runs)])
            for number, site in enumerate(self.sites)
        ]
        return new

    # -- the graph ------------------------------------------------------------------------

    def outline(self) -> fx.GraphModule:
        """The new joint graph with bodies that are empty yet."""
        with unguarded(getattr(self._fake_mode(), "shape_env", None)):
            self.module = self._outline()
        return self.module

    def _outline(self) -> fx.GraphModule:
        last = {id(part): part.nodes[-1] for part in self.part_of.values()}
        for node in self.step.nodes:
            part = self.part_of.get(node)
            if node.op == "output":
                new = self.graph.output(fx.node.map_arg(node.args[0], self._emit))
                new.meta.update(node.meta)
            elif part is None:
                self._emit(node)
            elif node is last[id(part)]:
                self._loop(part)
        for site in self.sites:
            setattr(self.step.module, site.cond, torch.nn.Module())
            setattr(self.step.module, site.body, torch.nn.Module())
        self.graph.eliminate_dead_code()
        module = _torch.LazyGraphModule(self.step.module, self.graph)
        module.meta.update(self.step.module.meta)
        return module

    def _emit(self, node: fx.Node) -> fx.Node:
        """The node in the new graph, with all that it needs before it."""
        if node not in self.env:
            part = self.part_of.get(node)
            if part is not None:
                self._loop(part)
            else:
                for argument in node.all_input_nodes:
                    self._emit(argument)
                self.env[node] = self.graph.node_copy(node, self.env.__getitem__)
        return self.env[node]

    def _loop(self, part: Part) -> None:
        """Emit a part's loop, after all that it reads."""
        if id(part) in self.done:
            return
        self.done.add(id(part))
        inputs = given(part)
        read = [self._emit(n) for n in inputs] + self._symbols()
        buffers = [self._buffer(n) for n in part.outputs]
        for run in trips(self.region.size, self.chunks):
            for buffer in buffers:
                buffer.meta["buffer"] = True
            buffers = self._while(part, run, inputs, read, buffers)
        for node, buffer in zip(part.outputs, buffers, strict=True):
            buffer._rename(node.name)  # what was kept is known by its name
        for node, buffer in zip(part.outputs, buffers, strict=True):
            new = self.env[node] = self._finished(node, buffer)
            if must_save(node):
                new.meta["recompute"] = node.meta["recompute"]

    # -- around a loop --------------------------------------------------------------------

    def _call(
        self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: fx.Node
    ) -> fx.Node:
        # Named after it: a number more would be another node's name, and values are known by names.
        name = f"{like.name}_{target.__name__.split('.')[0]}"
        new = self.graph.create_node("call_function", target, args, kwargs, name)
        values = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self._fake_mode():
            new.meta["val"] = target(*values[0], **values[1])
        self._describe(new, like)
        return new

    def _describe(self, new: fx.Node, like: fx.Node) -> None:
        """Where it comes from; and that what the backward's loop writes is made there."""
        for key in ("stack_trace", "nn_module_stack"):
            if key in like.meta:
                new.meta[key] = like.meta[key]
        if like in self.step.sides.late:
            new.meta["partitioner_tag"] = "must_be_in_backward"

    def _fake_mode(self) -> Any:
        return _torch.detect_fake_mode([self.region.seed.meta["val"]])

    def _buffer(self, node: fx.Node) -> fx.Node:
        """The whole of an output, with the strides its readers expect."""
        value, place = node.meta["val"], self.region.places[node]
        dtype, fill = value.dtype, 0.0
        if isinstance(place, str):
            dtype, fill = accumulator(dtype), START[place]
            if not dtype.is_floating_point and place != "sum":
                info = torch.iinfo(dtype)
                fill = info.min if place == "max" else info.max
        order = sorted(range(value.dim()), key=lambda d: -hint(value.stride(d)))
        options = {
            "dtype": dtype,
            "layout": torch.strided,
            "device": value.device,
            "pin_memory": False,
        }
        shape = [self._size(value.shape[d]) for d in order]
        fill = bool(fill) if dtype == torch.bool else fill if dtype.is_floating_point else int(fill)
        full = self._call(aten.full.default, (shape, fill), options, node)
        full.meta["buffer"] = True
        if order == list(range(value.dim())):
            return full
        back = [order.index(d) for d in range(value.dim())]
        return self._call(aten.permute.default, (full, back), {}, node)

    def _size(self, size: Any) -> Any:
        """A symbolic size as a node of the new graph, computed from those of the inputs."""
        if isinstance(size, int):
            return size
        expression = size_expr(size)
        if expression not in self.sizes:
            symbols = {size_expr(n.meta["val"]): n for n in self._symbols()}
            self.sizes[expression] = size_node(self.graph, symbols, size)
        return self.sizes[expression]

    def _symbols(self) -> list[fx.Node]:
        """The symbolic sizes among the inputs."""
        found = [n for n in self.step.placeholders if isinstance(n.meta["val"], torch.SymInt)]
        return [self._emit(n) for n in found]

    def _finished(self, node: fx.Node, buffer: fx.Node) -> fx.Node:
        value = node.meta["val"]
        if buffer.meta["val"].dtype == value.dtype:
            return buffer
        convert = torch.ops.prims.convert_element_type.default
        return self._call(convert, (buffer, value.dtype), {}, node)

    def _while(
        self,
        part: Part,
        run: Trips,
        inputs: list[fx.Node],
        read: list[fx.Node],
        buffers: list[fx.Node],
    ) -> list[fx.Node]:
        like = part.nodes[-1]
        options = {
            "dtype": torch.int64,
            "layout": torch.strided,
            "device": "cpu",
            "pin_memory": False,
        }
        counter = self._call(aten.full.default, ([], 0), options, like)
        counter.meta["buffer"] = True
        carried = (counter, *buffers)
        values = [n.meta["val"] for n in (*carried, *read)]
        number = len(self.sites)
        names = [self._name(f"loop_cond_{number}"), self._name(f"loop_body_{number}")]
        self.sites.append(_Site(names[0], names[1], part, run, inputs, values))
        functions = [self.graph.get_attr(name) for name in names]
        target, args = torch.ops.higher_order.while_loop, (*functions, carried, tuple(read))
        loop = self.graph.create_node("call_function", target, args, name=f"while_loop_{like.name}")
        loop.meta["val"] = tuple(n.meta["val"] for n in carried)
        loop.meta[GROUP] = part.outputs[0].name
        loop.meta[OVER] = overwritable(self.step, self.region, part, inputs)
        loop.meta["loop"] = self._cost(part, run)
        self._describe(loop, like)
        outs = []
        for number, (node, buffer) in enumerate(zip(part.outputs, buffers, strict=True), 1):
            args, name = (loop, number), f"{node.name}_parts"
            out = self.graph.create_node("call_function", operator.getitem, args, name=name)
            out.meta = {k: v for k, v in buffer.meta.items() if k != "buffer"}
            outs.append(out)
        return outs

    def _name(self, wanted: str) -> str:
        number, name = 0, wanted
        while hasattr(self.step.module, name):
            number += 1
            name = f"{wanted}_{number}"
        return name

    def _trace(self, function: Any, values: list[Any]) -> fx.GraphModule:
        mode = self._fake_mode()
        _allow_scalar_outputs(mode)
        with uncached(mode), mode, torch.no_grad():
            # A fake tensor keeps the number it was read as: each trace reads a counter of its own.
            counter = torch.empty_like(values[0])
            module = make_fx(function)(counter, *values[1:])
        for node in module.graph.nodes:
            node.meta.pop("from_node", None)
        return module


def loops_of(graph: fx.Graph, names: Container[str]) -> list[fx.Node]:
    """The loops of a graph whose bodies have such names."""
    return [node for node in loops_in(graph) if body_of(node) in names]


def body_of(loop: fx.Node) -> str:
    """Under which name a loop's graph has its body."""
    function = loop.args[1]
    assert isinstance(function, fx.Node)
    return str(function.target)


def _returning_buffers(body: fx.GraphModule) -> fx.GraphModule:
    """The body returns the buffers it was given, not what wrote into them: they are the same."""
    (output,) = body.graph.find_nodes(op="output")
    written = {n: n.args[0] for n in body.graph.nodes if n.target in ADDED_IN_PLACE.values()}
    output.args = fx.node.map_arg(output.args, lambda n: written.get(n, n))
    body.recompile()
    return body


def _allow_scalar_outputs(mode: Any) -> None:
    """Let a loop's body read its counter as a number, while it is traced and lowered."""
    env = mode.shape_env
    if env is not None and not env.settings.allow_scalar_outputs:
        env.settings = dataclasses.replace(env.settings, allow_scalar_outputs=True)

"""Offload: keep values in the host's memory from the forward to the backward.

Copies run on a stream of their own, beside the kernels; the engine writes them where the link's
measured bandwidth says that they are hidden, and counts what is not. Cf. Rhu et al., "vDNN:
Virtualized Deep Neural Networks for Scalable, Memory-Efficient Neural Network Design" (2016), §3.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from torch import fx

from memcompile.contract import Context, Host, Proposal, Proposer, on_host
from memcompile.step import Step, hint, is_loop, must_save

#: What a move is called, by whether the kernels wait for its copies.
NAMES = {False: "host", True: "host, waited for"}


@dataclasses.dataclass(frozen=True)
class Offload(Proposer):
    """Offer to keep values on the host, and so what codecs store of them."""

    name: ClassVar[str] = "offload"
    by_default: ClassVar[bool] = False

    least: int = 2**20  #: bytes; smaller values stay on the device
    host: int = 16 * 2**30  #: bytes of pinned memory that a graph may take

    def __post_init__(self) -> None:
        for name in ("least", "host"):
            given = getattr(self, name)
            whole = isinstance(given, (int, float)) and not isinstance(given, bool)
            if not whole or given < 0 or given != int(given):
                raise ValueError(f"{name}={given!r} is no number of bytes from 0 up")
            object.__setattr__(self, name, int(given))

    def propose(self, step: Step, context: Context) -> Iterable[Proposal]:
        """Every large value of the step's accelerator, with and without waiting for its copies."""
        reason = refusal(step, context)
        if reason is not None:
            context.remark(reason)
        elif not step.tangents:
            context.note("a graph that is not split keeps nothing for a backward")
        else:
            free = able(step)
            for value in step.early_values():
                if value in free and step.bytes(value) >= self.least and on_device(value, step):
                    how = on_host(value, Host(self.host))
                    for waits, name in NAMES.items():
                        there = dataclasses.replace(how, host=Host(self.host, waits))
                        yield Proposal(value, name, there)

    def upon(self, offered: Sequence[Proposal], step: Step, context: Context) -> Iterable[Proposal]:
        """What codecs store, stored on the host."""
        if refusal(step, context) is not None or not step.tangents:
            return
        free = able(step)
        for move in offered:
            how = move.rebuild
            if how is None or how.host is not None or move.value not in free:
                continue
            large = sum(map(step.bytes, how.stored)) >= max(self.least, 1)
            if large and all(on_device(stored, step) for stored in how.stored):
                for waits, name in NAMES.items():
                    there = dataclasses.replace(how, host=Host(self.host, waits))
                    yield dataclasses.replace(move, how=f"{move.how}, {name}", rebuild=there)


def refusal(step: Step, context: Context) -> str | None:
    """Why nothing of this step may leave the device."""
    if step.device.type == "cpu":
        return "on the CPU values are in the host's memory already"
    if step.device.type != "cuda":
        return f"copies to and from {step.device.type} devices are not written"
    if context.recorded:
        return "CUDA graphs (mode='reduce-overhead') are recorded without memory of the host"
    return None


def able(step: Step) -> frozenset[fx.Node]:
    """Early values that nobody writes to, as far as the graph tells, and that may go.

    What the forward returns is alive anyway. An op without a schema may write to what it reads; a
    loop writes to the buffers that it carries.
    """
    stay = {step.roots[output] for output in step.node_outputs()}
    for node in step.nodes:
        schema = getattr(node.target, "_schema", None)
        silent = schema is None and node.target is not operator.getitem
        if node.op == "call_function" and (silent or (schema and schema.is_mutable)):
            written = node.args[2] if is_loop(node) else node.all_input_nodes
            stay.update(step.roots[read] for read in written if isinstance(read, fx.Node))
    return frozenset(v for v in step.early_values() if v not in stay and not must_save(v))


def on_device(node: fx.Node, step: Step) -> bool:
    """Whether a value is one tensor on the step's device, in memory without gaps or overlaps."""
    tensor = node.meta["val"]
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
        return False
    dims = zip(tensor.stride(), tensor.shape, strict=True)
    expected = 1
    for stride, size in sorted((hint(a), hint(b)) for a, b in dims if hint(b) != 1):
        if stride != expected:
            return False
        expected *= size
    return tensor.device == step.device

"""Compress: keep what is needed late in the fewest bytes, and lose nothing.

Two ways. A *codec* stores a value encoded (``bits``, ``integers``, ``floats``, and whatever a
package registers). And what follows from values that are kept anyway is not stored at all: masks
from what they were compared on, one side of a GELU, copies and products of smaller factors. That
is recomputation without library calls: elementwise ops and copies alone, and products that are
much larger than their factors. Cf. Jain et al., "Gist" (2018); structure first, data never.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from collections.abc import Iterable
from typing import ClassVar

import torch
from memcompile_passes.compress.bits import Bits
from memcompile_passes.compress.floats import Floats
from memcompile_passes.compress.integers import Integers
from torch import fx

from memcompile.analysis.ops import DRAWN, classify, op_name, runs_twice
from memcompile.analysis.timeline import Kind
from memcompile.contract import Codec, Context, Exactness, Proposal, Proposer, rebuild
from memcompile.step import Step, hint, must_save, tensor_size

#: The entry points of codecs.
GROUP = "memcompile.codecs"
#: The built-in codecs, all of them exact.
EXACT: tuple[Codec, ...] = (Bits(), Integers(), Floats())
#: A product is made again where it is so many times as large as its factors.
OUTER = 4


@dataclasses.dataclass(frozen=True)
class Compress(Proposer):
    """Offer codecs, and to make again what follows from values that are kept anyway."""

    name: ClassVar[str] = "compress"
    by_default: ClassVar[bool] = False

    least: int = 256  #: bytes; smaller values are left alone
    codecs: tuple[str | Codec, ...] | str = "default"  #: names, or codecs; "default": built-in
    factors: bool = True  #: whether to make values again that follow from others

    def __post_init__(self) -> None:
        if self.least < 0:
            raise ValueError(f"least={self.least} is below 0")
        given = (self.codecs,) if isinstance(self.codecs, (str, Codec)) else tuple(self.codecs)
        object.__setattr__(self, "codecs", given[0] if given == ("default",) else given)
        self._chosen  # noqa: B018  what is misspelt is an error now

    @functools.cached_property
    def _chosen(self) -> tuple[Codec, ...]:
        """The codecs, in order; one of each name."""
        found: dict[str, Codec] = {}
        for given in (self.codecs,) if isinstance(self.codecs, str) else self.codecs:
            for codec in EXACT if given == "default" else (_codec(given),):
                if found.setdefault(codec.name, codec) is not codec:
                    raise ValueError(f"two codecs are named {codec.name!r}; name each once")
        return tuple(found.values())

    @property
    def parts(self) -> tuple[object, ...]:
        """The codecs: an edit of theirs is an edit of the pass."""
        return (*EXACT, *self._chosen)

    @property
    def exactness(self) -> Exactness:
        """That of the least exact codec."""
        order: list[Exactness] = ["bits", "rounding", "no"]
        return max((codec.exactness for codec in self._chosen), key=order.index, default="bits")

    def propose(self, step: Step, context: Context) -> Iterable[Proposal]:
        """For each value the ways there are to store less of it."""
        for value in step.early_values():
            tensor = value.meta["val"]
            if must_save(value) or not isinstance(tensor, torch.Tensor):
                continue
            if self.factors and (how := follows(value)):
                yield Proposal(value, how)
            if tensor.layout == torch.strided and step.bytes(value) >= self.least:
                yield from self._encoded(value, step)

    def _encoded(self, value: fx.Node, step: Step) -> Iterable[Proposal]:
        for codec in self._chosen:
            coding = codec.coding(value, step)
            if coding is None or hint(coding.bytes(value.meta["val"])) >= step.bytes(value):
                continue
            made = rebuild(value, coding.decode, coding.encode, coding.reads)
            stored = sum(hint(tensor_size(out.meta["val"])) for out in _outputs(made.encode))
            if stored != hint(coding.bytes(value.meta["val"])):
                raise ValueError(
                    f"codec {codec.name} says {hint(coding.bytes(value.meta['val']))} bytes of "
                    f"node {value.name} and stores {stored}; mend its byte formula"
                )
            yield Proposal(value, codec.name, made)


def follows(value: fx.Node) -> str | None:
    """How a value follows from others by what costs no more than decoding; ``None``: not so."""
    if not runs_twice(value) or any(op_name(n) in DRAWN for n in (value, *value.all_input_nodes)):
        return None  # a draw is not kept: what is made of it is stored
    tensor, kind = value.meta["val"], classify(value)
    if op_name(value) in ("bmm", "mm"):
        given = sum(hint(tensor_size(a.meta["val"])) for a in value.all_input_nodes)
        return "factors" if hint(tensor_size(tensor)) >= OUTER * given else None
    if op_name(value) == "cat":
        return "factors"
    if kind != Kind.POINTWISE:
        return None
    if tensor.dtype is torch.bool:
        return "mask"
    given = max((tensor.numel() for tensor in _tensors(value)), default=0)
    return "factors" if hint(given) < hint(tensor.numel()) else "elementwise"


def _tensors(value: fx.Node) -> list[torch.Tensor]:
    found = (argument.meta.get("val") for argument in value.all_input_nodes)
    return [tensor for tensor in found if isinstance(tensor, torch.Tensor)]


def _outputs(encode: fx.GraphModule | None) -> list[fx.Node]:
    if encode is None:
        return []
    (output,) = encode.graph.find_nodes(op="output")
    return list(output.args[0])


def _codec(given: str | Codec) -> Codec:
    """A codec by its name: a built-in one, or one that a package registers."""
    if isinstance(given, Codec):
        return given
    for codec in EXACT:
        if codec.name == given:
            return codec
    points = importlib.metadata.entry_points(group=GROUP)
    for point in points:
        if point.name == given:
            loaded = point.load()
            if not (isinstance(loaded, type) and issubclass(loaded, Codec)):
                raise ValueError(f"entry point {point.name!r} ({point.value}) is not a Codec")
            if loaded.name != point.name:
                raise ValueError(
                    f"entry point {point.name!r} ({point.value}) is a codec named {loaded.name!r}"
                )
            return loaded()
    known = sorted({*(codec.name for codec in EXACT), *(point.name for point in points)})
    raise ValueError(f"no codec is named {given!r}; there are {', '.join(known)}")

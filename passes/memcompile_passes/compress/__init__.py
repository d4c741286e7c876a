"""Compress: keep what is needed late in the fewest bytes, and lose nothing unless asked to.

Two ways. A *codec* stores a value encoded (``bits``, ``integers``, ``floats``, and whatever a
package registers). And what follows from values that are kept anyway is not stored at all: masks
from what they were compared on, one side of a GELU, copies and products of smaller factors. That
is recomputation without library calls: elementwise ops and copies alone, and products that are
larger than both their factors together. Cf. Jain et al., "Gist" (2018); structure first, data
never. What is lost with ``lossy=`` is a bounded share of each number; ``sensitive`` values lose
nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from memcompile_passes.compress.bits import Bits
from memcompile_passes.compress.floats import Floats
from memcompile_passes.compress.fp8 import Fp8
from memcompile_passes.compress.groups import Groups
from memcompile_passes.compress.integers import DTYPES, Checked, Integers
from memcompile_passes.compress.scaled import Scaled, cast
from memcompile_passes.compress.sensitive import Read, is_sensitive, unknown
from memcompile_passes.compress.triangles import Triangles
from memcompile_passes.compress.whole import Int2, Int4, Int8
from torch import fx

from memcompile.analysis.ops import DRAWN, classify, op_name, runs_twice
from memcompile.analysis.timeline import Kind
from memcompile.contract import Codec, Context, Exactness, Proposal, Proposer, rebuild
from memcompile.marks import is_full_precision
from memcompile.step import Step, hint, must_save, tensor_size

#: The entry points of codecs.
GROUP = "memcompile.codecs"
#: The built-in codecs, all of them exact.
EXACT: tuple[Codec, ...] = (Bits(), Integers(), Floats(), Triangles())
#: The lossy ones.
LOSSY: dict[str, type[Scaled]] = {codec.name: codec for codec in (Fp8, Int8, Int4, Int2)}
#: What lossy codecs work by: an edit of those files is a cache miss.
SHARED = (Groups((), 0, False), cast(torch.int8), Read.FREELY)
#: A product is made again where it is so many times as large as its factors together.
OUTER = 2


@dataclasses.dataclass(frozen=True)
class Compress(Proposer):
    """Offer codecs, and to make again what follows from values that are kept anyway."""

    name: ClassVar[str] = "compress"
    by_default: ClassVar[bool] = False

    least: int = 256  #: bytes; smaller values are left alone
    codecs: tuple[str | Codec, ...] | str = "default"  #: names, or codecs; "default": built-in
    factors: bool = True  #: whether to make values again that follow from others
    fits: str = ""  #: what integers of no proved bounds fit, checked: uint8, int8, int16, int32
    lossy: str = ""  #: what else floats may be kept as: fp8, int8, int4, int2
    group: int = 64  #: elements that share a scale there, at most
    stochastic: bool = False  #: whether int8 rounds as int4 and int2 do
    seed: int = 0  #: of that rounding
    sensitive: tuple[str, ...] | str = "default"  #: what loses nothing: kinds, ops, modules

    def __post_init__(self) -> None:
        if self.least < 0:
            raise ValueError(f"least={self.least} is below 0")
        names = self.sensitive if isinstance(self.sensitive, (list, tuple)) else [self.sensitive]
        if not all(isinstance(name, str) and name for name in names):
            raise ValueError(
                f"sensitive={self.sensitive!r} names no kinds, ops or modules; write one, such as "
                "sensitive=exp, or several as sensitive=('default','head.*')"
            )
        if isinstance(self.sensitive, list):
            object.__setattr__(self, "sensitive", tuple(self.sensitive))
        given = (self.codecs,) if isinstance(self.codecs, (str, Codec)) else tuple(self.codecs)
        object.__setattr__(self, "codecs", given[0] if given == ("default",) else given)
        self._chosen  # noqa: B018  what is misspelt is an error now

    @functools.cached_property
    def _chosen(self) -> tuple[Codec, ...]:
        """The codecs, in order; one of each name."""
        found: dict[str, Codec] = {}
        named = (self.codecs,) if isinstance(self.codecs, str) else self.codecs
        for given in (*named, *self._checked, *self._lossy):
            for codec in EXACT if given == "default" else (_codec(given),):
                if found.setdefault(codec.name, codec) is not codec:
                    raise ValueError(f"two codecs are named {codec.name!r}; name each once")
        return tuple(found.values())

    @functools.cached_property
    def _checked(self) -> tuple[Checked, ...]:
        """The codec of integers that the user says fit."""
        if not self.fits:
            return ()
        known = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
        if self.fits not in known:
            raise ValueError(f"fits={self.fits!r}; allowed: {', '.join(known)}")
        return (Checked(known[self.fits]),)

    @functools.cached_property
    def _lossy(self) -> tuple[Scaled, ...]:
        """The built-in lossy codec that is asked for."""
        if not self.lossy:
            return ()
        if self.lossy not in LOSSY:
            raise ValueError(f"lossy={self.lossy!r}; allowed: {', '.join(LOSSY)}")
        given: dict[str, Any] = {"group": self.group}
        if self.lossy != "fp8":
            given |= {"stochastic": self.stochastic or self.lossy != "int8", "seed": self.seed}
        return (LOSSY[self.lossy](**given),)

    @property
    def by_module(self) -> bool:
        """``sensitive`` may name modules."""
        return self.sensitive != "default"

    @property
    def parts(self) -> tuple[object, ...]:
        """The codecs: an edit of theirs is an edit of the pass."""
        return (*EXACT, *self._chosen, *(SHARED if self.lossy else ()))

    @property
    def exactness(self) -> Exactness:
        """That of the least exact codec."""
        order: list[Exactness] = ["bits", "rounding", "no"]
        return max((codec.exactness for codec in self._chosen), key=order.index, default="bits")

    def propose(self, step: Step, context: Context) -> Iterable[Proposal]:
        """For each value the ways there are to store less of it."""
        codecs = sorted(self._chosen, key=lambda codec: codec.exactness == "no")
        losing = [codec for codec in codecs if codec.exactness == "no"]
        if losing and step.late_from is not None:  # what it returns may hang on any value
            context.note("nothing is lost in a graph that is not split")
            codecs = [codec for codec in codecs if codec not in losing]
        elif losing:
            self._tell(losing, step, context)
        for value in step.early_values():
            tensor = value.meta["val"]
            if must_save(value) or not isinstance(tensor, torch.Tensor):
                continue
            if self.factors and (how := follows(value)):
                yield Proposal(value, how)
            if tensor.layout == torch.strided and step.bytes(value) >= self.least:
                yield from self._encoded(codecs, value, step, context)

    def _tell(self, losing: list[Codec], step: Step, context: Context) -> None:
        """What is named and is not there; and how far each codec may be off."""
        for name in self._sensitive:
            if unknown(step, name):
                context.remark(f"sensitive={name!r} is no kind, op or module of this graph")
        context.note(", ".join(f"{codec.name} (error {codec.error:.2g})" for codec in losing))

    @property
    def _sensitive(self) -> tuple[str, ...]:
        return (self.sensitive,) if isinstance(self.sensitive, str) else self.sensitive

    def _encoded(
        self, codecs: list[Codec], value: fx.Node, step: Step, context: Context
    ) -> Iterable[Proposal]:
        least = step.bytes(value)
        for codec in codecs:
            if codec.exactness == "no" and (
                value.name in context.exact
                or is_full_precision(value)
                or is_sensitive(value, step, self._sensitive)
            ):
                continue
            coding = codec.coding(value, step)
            if coding is None:
                continue
            said = hint(coding.bytes(value.meta["val"]))
            if said >= (least if codec.exactness == "no" else step.bytes(value)):
                continue  # a lossy one only where it takes less than the exact ones
            made = rebuild(value, coding.decode, coding.encode, coding.reads)
            stored = sum(hint(tensor_size(out.meta["val"])) for out in _outputs(made.encode))
            if stored != said:
                raise ValueError(
                    f"codec {codec.name} says {said} bytes of "
                    f"node {value.name} and stores {stored}; mend its byte formula"
                )
            least = min(least, said)
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

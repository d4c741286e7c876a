"""Cast: contractions in 16 bits, and what the backward needs in 16 bits; all else in fp32.

Mixed precision as a rewrite of the joint graph (Micikevicius et al., "Mixed Precision Training",
2018), where autocast works op by op on the forward alone. Which ops may be cast, which follow and
which never: ``rules.py``, after TensorFlow's grappler (``auto_mixed_precision``: allow, infer,
deny, clear). ``islands.py`` finds what a scientific model needs in fp32, ``casting.py`` makes
the casts, ``stored.py`` says what is kept between the sides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import ClassVar

import torch
from memcompile_passes.cast import casting, copies, islands, rules, stored
from memcompile_passes.cast.casting import Casting, is_float32
from memcompile_passes.cast.islands import clear_users, find_islands, paired, tensor
from memcompile_passes.cast.rules import CONTRACTIONS
from memcompile_passes.cast.stored import Stored
from torch import fx

from memcompile.analysis.ops import is_named, op_name
from memcompile.contract import Context, Exactness, Rewrite
from memcompile.marks import is_full_precision
from memcompile.step import Step, hint

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Cast(Rewrite):
    """Mixed precision: see the page ``docs/precision.md``."""

    name: ClassVar[str] = "cast"
    by_default: ClassVar[bool] = False
    idempotent: ClassVar[bool] = True

    dtype: str = "bf16"  #: "bf16" or "fp16"
    keep: str | tuple[str, ...] = ()  #: ops and modules whose numbers stay in fp32

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is neither 'bf16' nor 'fp16'")
        names = [self.keep] if isinstance(self.keep, str) else self.keep
        if not isinstance(names, (list, tuple)) or not all(
            isinstance(name, str) and name for name in names
        ):
            raise ValueError(
                f"keep={self.keep!r} names no ops or modules; write an op's name, or a module's "
                "name or class, such as keep=bmm, or several as keep=('bmm','structure.*')"
            )
        object.__setattr__(self, "keep", self.keep if isinstance(self.keep, str) else tuple(names))

    @property
    def exactness(self) -> Exactness:
        """Numbers are rounded to 16 bits."""
        return "no"

    @property
    def by_module(self) -> bool:
        """``keep`` names modules."""
        return bool(self.keep)

    @property
    def parts(self) -> tuple[object, ...]:
        """The rules, and what works by them."""
        return (rules, islands, casting, copies, stored)

    def rewrite(self, module: fx.GraphModule, context: Context) -> bool:
        """Cast the contractions, then what is kept for the backward."""
        graph = module.graph
        contractions = [n for n in graph.nodes if _is_contraction(n)]
        lowered = [n for n in contractions if _is_half(n)]
        if lowered:
            if not all(n.meta.get("cast") for n in lowered):
                context.remark(f"left alone: {lowered[0].name} is in 16 bits already")
            return False
        kept = self._kept(graph, context)
        chosen = self._chosen(graph, contractions, kept, context.exact)
        if not chosen:
            return False
        (output,) = graph.find_nodes(op="output")
        casts = Casting(graph, DTYPES[self.dtype])
        for node in chosen:
            if _only_grows(node):
                casts.widen(node)
            else:
                casts.lower(node)
                node.meta["cast"] = self.dtype
        graph.eliminate_dead_code()
        marked = frozenset(n.name for n in graph.nodes if is_full_precision(n))
        Stored(casts, Step(module, len(output.args[0])), kept | marked).rewrite()
        casts.settle()
        graph.eliminate_dead_code()
        return True

    def _chosen(
        self,
        graph: fx.Graph,
        contractions: list[fx.Node],
        kept: frozenset[str],
        exact: frozenset[str],
    ) -> list[fx.Node]:
        """The contractions to cast, in order."""
        whole = find_islands(graph)
        named = {n: "kept" for n in contractions if n.name in kept or _reads(n, exact)}
        whole |= paired(contractions, named)
        whole |= {n: "marked" for n in contractions if is_full_precision(n)}  # its backward, too
        return [n for n in contractions if n not in whole and is_float32(_given(n))]

    def _kept(self, graph: fx.Graph, context: Context) -> frozenset[str]:
        """Names of nodes whose numbers stay as they are."""
        found = set(context.exact)
        for name in [self.keep] if isinstance(self.keep, str) else self.keep:
            nodes = {n.name for n in graph.nodes if _is_named(n, name)}
            if not nodes:
                context.remark(f"keep={name!r} is no op and no module of this graph")
            found |= nodes
        return frozenset(found)


def _is_contraction(node: fx.Node) -> bool:
    return node.op == "call_function" and op_name(node) in CONTRACTIONS


def _given(node: fx.Node) -> fx.Node:
    return node.all_input_nodes[0]


def _is_half(node: fx.Node) -> bool:
    value = tensor(_given(node))
    return value is not None and value.dtype in DTYPES.values()


def _only_grows(node: fx.Node) -> bool:
    """Whether it gives an output of the graph that is larger than all it reads.

    So are gradients of weights where there are few rows: 16 bits would be one more copy.
    """
    value, read = tensor(node), [v for n in node.all_input_nodes if (v := tensor(n)) is not None]
    if value is None or hint(value.numel()) <= sum(hint(v.numel()) for v in read):
        return False
    return any(user.op == "output" for user in clear_users(node))


def _reads(node: fx.Node, names: Iterable[str]) -> bool:
    """Whether a contraction reads one of the values, as it is or moved about."""
    return any(argument.name in names for argument in node.all_input_nodes)


def _is_named(node: fx.Node, name: str) -> bool:
    return node.op == "call_function" and is_named(node, name)

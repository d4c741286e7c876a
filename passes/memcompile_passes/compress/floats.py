"""Floats: values that are numbers of a narrower dtype, kept in that dtype.

Mixed precision casts 16-bit values up, and masks are made floats to be multiplied with; what
only moves such numbers about holds them still. Which values do is read off the graph. Not-a-number
stays one; which of its bit patterns is not kept.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from memcompile_passes.compress.bits import coded
from memcompile_passes.compress.integers import narrowed
from torch import fx

from memcompile.analysis.ops import op_name
from memcompile.analysis.ranges import MOVES, Ranges
from memcompile.contract import Codec, Coding
from memcompile.step import Step

#: How many ops back is looked.
DEPTH = 24
#: From the fewest numbers to the most; a dtype holds all numbers of those that stand in its row.
HOLDS: dict[torch.dtype, tuple[torch.dtype, ...]] = {
    torch.bool: (),
    torch.uint8: (torch.bool,),
    torch.int16: (torch.bool, torch.uint8),
    torch.bfloat16: (torch.bool, torch.uint8),
    torch.float16: (torch.bool, torch.uint8),
    torch.float32: (torch.bool, torch.uint8, torch.int16, torch.bfloat16, torch.float16),
}


class Floats(Codec):
    """Floats that the graph proves to be a narrower dtype's numbers."""

    name: ClassVar[str] = "floats"

    def coding(self, value: fx.Node, step: Step) -> Coding | None:
        """As bits where there are only zeros and ones."""
        tensor = value.meta["val"]
        if not tensor.dtype.is_floating_point or not tensor.dim():
            return None
        narrow = holder(value, Ranges.of(step))
        if narrow is torch.bool:
            return coded(tensor, 1)
        return None if narrow is None else narrowed(tensor.dtype, narrow)


def holder(value: Any, ranges: Ranges, depth: int = DEPTH) -> torch.dtype | None:
    """The narrowest dtype that is seen to hold all numbers of a value; ``None``: nothing is."""
    if isinstance(value, (bool, int, float)):
        return _of_number(value)
    tensor = value.meta.get("val") if isinstance(value, fx.Node) else None
    if not isinstance(tensor, torch.Tensor):
        return None
    if not tensor.dtype.is_floating_point:
        return _of_bounds(ranges.bounds(value))
    found = None
    if value.op == "call_function" and depth:
        name, args = op_name(value), value.args
        if name in (*MOVES, *SAME):
            found = holder(args[0], ranges, depth - 1)
        elif name in SEVERAL:
            every = [holder(each, ranges, depth - 1) for each in SEVERAL[name](args)]
            found = _joined(every)
        elif name == "mul":
            found = _product([holder(each, ranges, depth - 1) for each in args])
        elif name == "sub" and len(args) == 2 and not value.kwargs and _is_one(args[0]):
            only = holder(args[1], ranges, depth - 1)
            found = only if only is torch.bool else None
        elif name in ("full", "full_like"):
            found = _of_number(args[1])
    own = tensor.dtype if tensor.dtype in HOLDS else None
    return found if found is not None and (own is None or found in HOLDS[own]) else own


#: Ops whose result is made of their first argument's numbers, and of zeros.
SAME = frozenset({"convert_element_type", "_to_copy", "relu"})
#: Ops whose result is made of several values' numbers, and where those stand.
SEVERAL = {
    "cat": lambda args: args[0],
    "stack": lambda args: args[0],
    "where": lambda args: args[1:],
    "constant_pad_nd": lambda args: [args[0], *(args[2:] or (0,))],
    "maximum": lambda args: args,
    "minimum": lambda args: args,
}


def _of_number(number: Any) -> torch.dtype | None:
    if not isinstance(number, (bool, int, float)) or number != number:
        return None
    whole = abs(number) < 2**15 and number == int(number) and str(float(number)) != "-0.0"
    if whole:
        return _of_bounds((int(number), int(number)))
    return torch.bfloat16 if number in (float("inf"), float("-inf")) else None


def _of_bounds(bounds: tuple[int, int] | None) -> torch.dtype | None:
    if bounds is None:
        return None
    if bounds[0] >= 0 and bounds[1] <= 255:
        return torch.bool if bounds[1] <= 1 else torch.uint8
    return torch.int16 if bounds[0] >= -(2**15) and bounds[1] < 2**15 else None


def _joined(dtypes: list[torch.dtype | None]) -> torch.dtype | None:
    """The narrowest dtype that holds the numbers of all of them."""
    for wide, narrow in HOLDS.items():
        if all(each is not None and (each is wide or each in narrow) for each in dtypes):
            return wide
    return None


def _product(dtypes: list[torch.dtype | None]) -> torch.dtype | None:
    """Something times zeros and ones; below zero, whole numbers would lose the sign of a zero."""
    if len(dtypes) != 2 or torch.bool not in dtypes or None in dtypes:
        return None
    wide = _joined(dtypes)
    return None if wide is torch.int16 else wide


def _is_one(value: Any) -> bool:
    if isinstance(value, fx.Node) and value.op == "call_function":
        return op_name(value) in ("full", "full_like") and value.args[1] == 1
    return isinstance(value, (int, float)) and value == 1

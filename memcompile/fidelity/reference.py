"""The step in double precision, eager, with the draws of the step in its own precision."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode

from memcompile import _torch
from memcompile._torch.modes import TorchDispatchMode, enable_python_dispatcher
from memcompile.testing.numbers import own, wide

#: Ops tagged as random that do more than draw: they draw inside themselves.
_INSIDE = ("attention", "rnn", "rrelu")


@dataclasses.dataclass
class Draws:
    """What eager code drew, in order."""

    drawn: list[tuple[Any, torch.Tensor]] = dataclasses.field(default_factory=list)
    place: int = 0
    missed: int = 0  #: draws that were made anew: they were not those that are kept

    def next(self, op: Any, shape: torch.Size) -> torch.Tensor | None:
        """The next draw, where it is of this op and shape."""
        self.place += 1
        if self.place <= len(self.drawn):
            other, value = self.drawn[self.place - 1]
            if other is op and value.shape == shape:
                return value
        self.missed += 1
        return None


class Dropouts(TorchFunctionMode):
    """Has dropouts run as the one op that they are traced as."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The function; a dropout as a compiler sees it."""
        traced = "dropout" in getattr(func, "__name__", "") or (
            func is torch.nn.functional.scaled_dot_product_attention
            and (args[4] if len(args) > 4 else (kwargs or {}).get("dropout_p", 0.0))
        )
        with enable_python_dispatcher() if traced else contextlib.nullcontext():
            return func(*args, **(kwargs or {}))


class Recorded(TorchDispatchMode):
    """Runs as ever, and keeps each draw.

    Args:
        draws: where they are kept.
        table: how compiled code draws, by op; empty: as eager code does.
    """

    def __init__(self, draws: Draws, table: Mapping[Any, Any]) -> None:
        super().__init__()
        self.draws, self.table = draws, table

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The op itself; what it drew is kept."""
        result = NotImplemented
        if op in self.table and is_draw(op):
            result = self.table[op](*args, **(kwargs or {}))
        if result is NotImplemented:
            result = op(*args, **(kwargs or {}))
        if is_draw(op):
            self.draws.drawn.append((op, own(_drawn(op, result))))
        return result


class Widened(TorchDispatchMode):
    """Runs every op in double precision, whatever casts the code holds, on given draws."""

    def __init__(self, draws: Draws) -> None:
        super().__init__()
        self.draws = draws

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The op in double precision."""
        kwargs = kwargs or {}
        written = _written(op)  # what is written to keeps its own precision
        kept = {place: args[place] for place in written if place in range(len(args))}
        kept |= {name: kwargs[name] for name in written if name in kwargs}
        args, kwargs = fx.node.map_aggregate((args, kwargs), wide)
        args = tuple(kept.get(place, value) for place, value in enumerate(args))
        kwargs = {name: kept.get(name, value) for name, value in kwargs.items()}
        result = op(*args, **kwargs)
        return self._replayed(op, args, result) if is_draw(op) else result

    def _replayed(self, op: Any, args: Any, result: Any) -> Any:
        """The op's result with the draw that is kept in place of its own."""
        fresh = _drawn(op, result)
        kept = self.draws.next(op, fresh.shape)
        if kept is None:
            return result
        if op is torch.ops.aten.native_dropout.default:
            scale = 0.0 if args[1] == 1 else 1 / (1 - args[1])
            return args[0] * kept * scale, kept
        return fresh.copy_(kept)


def _written(op: Any) -> list[Any]:
    """Places and names of the arguments that an op writes to."""
    if not op._schema.is_mutable:
        return []
    known = enumerate(op._schema.arguments)
    written = [(at, a.name) for at, a in known if a.alias_info and a.alias_info.is_write]
    return [each for pair in written for each in pair]


def is_draw(op: Any) -> bool:
    """Whether an op's result is what it draws."""
    if not isinstance(op, _torch.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded not in op.tags:
        return False
    return not any(part in op._schema.name for part in _INSIDE)


def _drawn(op: Any, result: Any) -> torch.Tensor:
    """The draw in an op's result: of a dropout its mask."""
    return result[-1] if isinstance(result, (list, tuple)) else result

"""Equal to the bit, or how far apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch

_WIDE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}


@dataclasses.dataclass(frozen=True)
class Result:
    """One thing a step computes: an output, a gradient, or an input it writes to."""

    group: str
    label: str
    value: Any


def own(value: Any) -> Any:
    """A copy that shares no memory; what is no tensor, as it is."""
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def wide(value: Any) -> Any:
    """A tensor, or a dtype, in double precision; anything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.to(_WIDE.get(value.dtype, value.dtype))
    return _WIDE.get(value, value) if isinstance(value, torch.dtype) else value


def same(one: Any, two: Any) -> bool:
    """Whether two values are the same to the bit, signs of zero and NaNs included."""
    if isinstance(one, (list, tuple)) and isinstance(two, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    if not (isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor)):
        return type(one) is type(two) and one == two
    if one.dtype != two.dtype or one.shape != two.shape or one.layout != two.layout:
        return False
    if one.layout != torch.strided:
        return same(one.to_dense(), two.to_dense())
    return torch.equal(_bytes(one), _bytes(two))


def difference(one: Any, two: Any) -> str:
    """How two values differ, for people."""
    if not (isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor)):
        return f"{one!r} is now {two!r}"
    if one.dtype != two.dtype or one.shape != two.shape:
        return f"{one.dtype}{list(one.shape)} is now {two.dtype}{list(two.shape)}"
    gap = _gap(one, two).abs()
    if not gap.any():
        return "in the sign of a zero or in a NaN"
    return f"by up to {gap.max().item():.3g}, in {int((gap != 0).sum())} of {gap.numel()} elements"


def relative(value: Any, to: Any, scale: float) -> float:
    """The norm of the difference over that of ``to``, or over 1e-4 of ``scale`` if larger."""
    if not (isinstance(value, torch.Tensor) and isinstance(to, torch.Tensor)):
        return 0.0 if value == to else float("inf")
    if value.shape != to.shape:
        return float("inf")
    gap = float(_gap(value, to).norm())
    return gap / max(_norm(to), 1e-4 * scale, 1e-300) if gap else gap


def norms(results: Iterable[Result]) -> dict[str, float]:
    """The largest norm in each group."""
    largest: dict[str, float] = {}
    for result in results:
        largest[result.group] = max(largest.get(result.group, 0.0), _norm(result.value))
    return largest


def epsilon(value: Any) -> float:
    """One rounding in the value's dtype; 0 where nothing is rounded."""
    known = isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())
    return torch.finfo(value.dtype).eps if known else 0.0


def _bytes(value: torch.Tensor) -> torch.Tensor:
    plain = value.detach().resolve_conj().resolve_neg()
    return plain.contiguous().reshape(-1).view(torch.uint8)


def _gap(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    """The difference in double precision; 0 where both are one infinity, or NaN."""
    kind = torch.complex128 if one.is_complex() or two.is_complex() else torch.float64
    one, two = (value.detach().to(kind) for value in (one, two))
    equal = (one == two) | (one.isnan() & two.isnan())
    return torch.where(equal, 0, one - two)


def _norm(value: Any) -> float:
    if not _is_dense(value) or value.dtype == torch.bool:
        return 0.0
    return float(wide(value.detach()).abs().double().norm())


def _is_dense(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided

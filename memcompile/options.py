"""The user's options: ``torch.compile(model, backend="memopt", options={...})``.

``Options(...)`` takes them as keywords and ``Options.parse(mapping)`` as torch's dict; both
check everything at once and compile nothing. What is wrong is an :class:`OptionsError` that
names the option, the value, and what is allowed.
"""

from __future__ import annotations

import dataclasses
import decimal
import difflib
import fractions
import functools
import json
import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from memcompile import _torch
from memcompile.errors import MemcompileError

#: Bytes in each unit a user may write, by its lower-case spelling.
UNITS: Mapping[str, int] = {
    "b": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgtp", 1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgtp", 1)},
}

_BYTES_ALLOWED = 'bytes as a whole number, or text such as "8GiB", "1.5GB" or "512 MiB"'
_BUDGET_ALLOWED = (
    f'{_BYTES_ALLOWED}; a share of Inductor\'s step peak such as "60%" (above 0%, at most 100%); '
    '"min" for the least peak; or None for no budget'
)
_RESERVE_ALLOWED = f"{_BYTES_ALLOWED}; zero is allowed"
_PASSES_ALLOWED = 'None, text such as "recompute" or "default,mine", or a list of texts and passes'
_LOWERINGS = ("inductor", "eager")
_PRECISIONS = ("bf16", "fp16")


class OptionsError(MemcompileError, ValueError):
    """An option that is unknown, of the wrong type, or out of range."""

    def __init__(self, option: str, value: object, allowed: str) -> None:
        super().__init__(f"{option}={value!r} is not valid; allowed: {allowed}")


@dataclasses.dataclass(frozen=True)
class Budget:
    """What ``budget=`` asks for: a number of bytes, a share, the least peak, or nothing."""

    kind: Literal["bytes", "share", "min", "none"]
    value: float = 0  #: "bytes": bytes (``int``); "share": above 0, at most 1; otherwise 0

    @classmethod
    def parse(cls, given: object) -> Budget:
        """Read a budget as a user writes it. Raises :class:`OptionsError`."""
        if given is None:
            return cls("none")
        if isinstance(given, str):
            text = given.strip()
            if text.lower() == "min":
                return cls("min")
            if text.endswith("%"):
                return cls("share", _share(given))
        return cls("bytes", _whole_bytes("budget", given, least=1, allowed=_BUDGET_ALLOWED))

    def __str__(self) -> str:
        """As a user would write it: ``Budget.parse(str(budget))`` is the same budget."""
        if self.kind == "bytes":
            return f"{int(self.value)}B"
        if self.kind == "share":
            return f"{_percent(self.value)}%"
        return self.kind


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of ``memopt``, checked.

    Fields hold what the user wrote; :attr:`limit` and :attr:`reserve_bytes` hold what it means.
    """

    budget: int | float | str | None = None  #: peak of the whole step: see :class:`Budget`
    reserve: int | float | str = 0  #: bytes taken off the budget for what no graph sees
    passes: str | Sequence[Any] | None = None  #: texts and passes; None: every exact built-in
    precision: str | None = None  #: "bf16" or "fp16": contractions in 16 bits; None: as written
    strict: bool = False  #: refuse what could only be done in part
    lower: str = "inductor"  #: "inductor", or "eager" for tests and debugging
    inductor: Mapping[str, Any] = dataclasses.field(default_factory=dict)  #: config patches
    mode: str | None = None  #: torch.compile's own modes
    name: str = ""  #: a label in reports

    def __post_init__(self) -> None:
        Budget.parse(self.budget)
        _whole_bytes("reserve", self.reserve, least=0, allowed=_RESERVE_ALLOWED)
        _check_passes(self.passes)
        _check_inductor(self.inductor)
        object.__setattr__(self, "inductor", dict(self.inductor))
        limit = self.limit
        if limit.kind == "bytes" and self.reserve_bytes >= limit.value:
            raise OptionsError("reserve", self.reserve, f"less than budget={self.budget!r}")
        if "custom_partitioner_fn" in self.inductor:
            allowed = "any of Inductor's settings but custom_partitioner_fn, which is memopt's own"
            raise OptionsError("inductor", dict(self.inductor), allowed)
        if self.precision is not None and self.precision not in _PRECISIONS:
            raise OptionsError("precision", self.precision, f"None, {_listed(_PRECISIONS)}")
        if not isinstance(self.strict, bool):
            raise OptionsError("strict", self.strict, "True or False")
        if self.lower not in _LOWERINGS:
            raise OptionsError("lower", self.lower, _listed(_LOWERINGS))
        if self.mode is not None and self.mode not in _modes():
            raise OptionsError("mode", self.mode, f"None, {_listed(_modes())}")
        if not isinstance(self.name, str):
            raise OptionsError("name", self.name, "text")

    @classmethod
    def parse(cls, given: Mapping[str, Any] | None) -> Options:
        """Read the dict given as ``torch.compile(..., options=...)``.

        Raises :class:`OptionsError` as the constructor does, and for unknown keys.
        """
        if given is None:
            return cls()
        if not isinstance(given, Mapping):
            raise OptionsError("options", given, "a dict of options")
        known = [field.name for field in dataclasses.fields(cls)]
        for key, value in given.items():
            if key not in known:
                raise _unknown(key, value, known)
        return cls(**given)

    @property
    def limit(self) -> Budget:
        """What ``budget`` means."""
        return Budget.parse(self.budget)

    @property
    def reserve_bytes(self) -> int:
        """What ``reserve`` means, in bytes."""
        return _whole_bytes("reserve", self.reserve, least=0, allowed=_RESERVE_ALLOWED)

    @property
    def pipeline(self) -> Sequence[Any]:
        """``passes``, behind the cast that ``precision`` asks for."""
        given = "default" if self.passes is None else self.passes
        rest = [given] if isinstance(given, str) else list(given)
        return rest if self.precision is None else [f"cast{{dtype={self.precision}}}", *rest]

    def key(self) -> str:
        """A stable text that covers all that changes the compiled code, but not ``passes``.

        Two spellings of one budget have one key; ``name`` is left out. The caller adds its
        passes, whose fields and source it knows.
        """
        patches = {key: _stable(value) for key, value in self.inductor.items()}
        parts = [
            str(self.limit), self.reserve_bytes, self.precision, self.strict, self.lower, patches,
            self.mode,
        ]  # fmt: skip
        return json.dumps(parts, sort_keys=True)


def parse_bytes(text: str) -> int:
    """Read ``"8GiB"``, ``"1.5 GB"`` or ``"4096"`` as bytes, rounded down to a whole number.

    Units are B, KB to PB (powers of 1000) and KiB to PiB (powers of 1024), in any case.
    Raises ``ValueError`` for anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", text.lower(), re.ASCII)
    unit = UNITS.get(match[2] or "b") if match else None
    if match is None or unit is None:
        raise ValueError(f"{text!r} is not a number of bytes; expected {_BYTES_ALLOWED}")
    return math.floor(fractions.Fraction(match[1]) * unit)


def format_bytes(count: int) -> str:
    """``count`` bytes for people, in binary units: ``"512 B"``, ``"1.50 GiB"``."""
    sign, size = ("-", -count) if count < 0 else ("", count)
    if size < 1024:
        return f"{sign}{size} B"
    power = min((size.bit_length() - 1) // 10, 5)
    if round(size / 1024**power, 2) >= 1024 and power < 5:
        power += 1
    return f"{sign}{size / 1024**power:.2f} {'KMGTP'[power - 1]}iB"


def free_bytes(device: torch.device | str) -> int | None:
    """Bytes this process could still take on ``device``; None where nobody knows.

    On the CPU: what the system calls available, within the container's limit. On CUDA: what
    the driver has free, and what this process's caching allocator holds unused.
    """
    where = torch.device(device)
    if where.type == "cuda":
        unused = torch.cuda.memory_reserved(where) - torch.cuda.memory_allocated(where)
        return torch.cuda.mem_get_info(where)[0] + unused
    if where.type == "cpu":
        known = [size for size in (_system_available(), _container_limit()) if size is not None]
        return min(known, default=None)
    return None


def warn_if_above_free(device: torch.device | str, size: int, held: int = 0) -> None:
    """Warn when a budget of ``size`` bytes cannot be had on ``device``.

    ``held`` is the part of it that is taken already: parameters, buffers, inputs (bytes).
    """
    free = free_bytes(device)
    if free is not None and size - held > free:
        taken = f" besides the {format_bytes(held)} already held" if held else ""
        warnings.warn(
            f"the budget of {format_bytes(size)} is above what {torch.device(device)} has free: "
            f"{format_bytes(free)}{taken}; the step may run out of memory within its budget",
            stacklevel=2,
        )


def _share(given: str) -> float:
    """``"60%"`` as 0.6."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*%", given.strip(), re.ASCII)
    share = float(fractions.Fraction(match[1]) / 100) if match else 0.0
    if not 0 < share <= 1:
        raise OptionsError("budget", given, _BUDGET_ALLOWED)
    return share


def _percent(share: float) -> str:
    """``share`` as a plain decimal percentage: 0.6 as ``"60"``."""
    return f"{(decimal.Decimal(repr(share)) * 100).normalize():f}"


def _whole_bytes(option: str, given: object, *, least: int, allowed: str) -> int:
    """A number or a text as bytes, at least ``least``."""
    size = -1
    if isinstance(given, str):
        try:
            size = parse_bytes(given)
        except ValueError as error:
            raise OptionsError(option, given, allowed) from error
    elif isinstance(given, (int, float)) and not isinstance(given, bool):
        size = int(given) if given == given // 1 else -1
    if size < least:
        raise OptionsError(option, given, allowed)
    return size


def _check_passes(given: object) -> None:
    """Texts and objects only; which texts name a pass is the registry's to say."""
    if given is None or isinstance(given, str):
        return
    if isinstance(given, (bytes, Mapping)) or not isinstance(given, Sequence):
        raise OptionsError("passes", given, _PASSES_ALLOWED)
    for item in given:
        data = isinstance(item, (bool, int, float, bytes, Sequence, Mapping)) or item is None
        if isinstance(item, type) or (data and not isinstance(item, str)):
            raise OptionsError("passes", given, f"{_PASSES_ALLOWED}; {item!r} is neither")


def _check_inductor(given: object) -> None:
    """Config patches must name options that Inductor has."""
    if not isinstance(given, Mapping):
        raise OptionsError("inductor", given, "a dict of torch._inductor.config options")
    for key in given:
        if key not in _inductor_options():
            near = difflib.get_close_matches(str(key), _inductor_options(), n=3)
            hint = f"; did you mean {_listed(near)}?" if near else ""
            raise OptionsError("inductor", dict(given), f"options of torch._inductor.config{hint}")


def _unknown(key: object, value: object, known: Sequence[str]) -> OptionsError:
    """The error for a key that is no option of ours."""
    if key in _inductor_options():
        return OptionsError(
            f"options[{key!r}]",
            value,
            f"{_listed(known)}; this one is Inductor's: write inductor={{{key!r}: {value!r}}}",
        )
    near = difflib.get_close_matches(str(key), known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return OptionsError(f"options[{key!r}]", value, f"{_listed(known)}{hint}")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)


@functools.cache
def _inductor_options() -> tuple[str, ...]:
    return tuple(_torch.list_options())


@functools.cache
def _modes() -> tuple[str, ...]:
    return tuple(_torch.list_mode_options())


def _stable(value: object) -> str:
    """A text for a config value that is the same in every process."""
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, Mapping):
        return str(sorted((str(key), _stable(item)) for key, item in value.items()))
    if isinstance(value, (set, frozenset)):
        return str(sorted(_stable(item) for item in value))
    if isinstance(value, (list, tuple)):
        return str([_stable(item) for item in value])
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _system_available() -> int | None:
    """Linux's MemAvailable, else the free pages, in bytes."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _container_limit() -> int | None:
    """The memory limit of this control group, in bytes, if it has one."""
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            text = file.read().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def total_budget(options: Options, before: int, inductor: int) -> int | None:
    """The budget in total bytes, the reserve taken off; ``None`` for none and for "min"."""
    limit: Budget = options.limit
    if limit.kind == "bytes":
        return int(limit.value) - options.reserve_bytes
    if limit.kind == "share":
        return before + int(limit.value * (inductor - before)) - options.reserve_bytes
    return None

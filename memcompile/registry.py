"""Passes by name, from entry points; pipelines as text and as objects.

``"default,mine{size=4}"`` is the default passes, then ``mine`` with an option.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib.metadata
import inspect
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType

from memcompile.contract import Pass
from memcompile.errors import PassError

GROUP = "memcompile.passes"
_ITEM = re.compile(r"\s*([A-Za-z_][\w-]*)\s*(?:\{(.*)\})?\s*\Z", re.DOTALL)


def available() -> dict[str, type[Pass]]:
    """Installed passes by name, third parties' too.

    Raises:
        PassError: two packages register one name, or an entry point is no pass.
    """
    found: dict[str, type[Pass]] = {}
    owners: dict[str, str] = {}
    for point in importlib.metadata.entry_points(group=GROUP):
        owner = point.dist.name if point.dist else "?"
        if point.name in found and owners[point.name] != owner:
            raise PassError(
                f"two passes are named {point.name!r}: from {owners[point.name]} and from {owner}; "
                "uninstall one of them"
            )
        found[point.name], owners[point.name] = _load(point), owner
    return found


def _load(point: importlib.metadata.EntryPoint) -> type[Pass]:
    loaded = point.load()
    if not (isinstance(loaded, type) and issubclass(loaded, Pass)):
        raise PassError(f"entry point {point.name!r} ({point.value}) is not a memcompile.Pass")
    if loaded.name != point.name:
        raise PassError(
            f"entry point {point.name!r} ({point.value}) is a pass named {loaded.name!r}; "
            "give both the same name"
        )
    return loaded


def defaults() -> list[Pass]:
    """The built-in passes that are exact and on by default; a stranger's only when named."""
    passes = []
    for point in importlib.metadata.entry_points(group=GROUP):
        if point.dist is None or point.dist.name == "memcompile":
            configured = _load(point)()
            if configured.exactness != "no" and configured.by_default:
                passes.append(configured)
    return passes


def resolve(given: str | Sequence[str | Pass] | None) -> list[Pass]:
    """The passes a user asks for, configured, in order.

    Raises:
        PassError: an unknown name or option, or two passes of one name.
    """
    given = "default" if given is None else given
    items: Iterable[str | Pass] = [given] if isinstance(given, str) else given
    passes: list[Pass] = []
    for item in items:
        passes.extend(_parse(item) if isinstance(item, str) else [item])
    names: dict[str, Pass] = {}
    for each in passes:
        if not isinstance(each, Pass):
            raise PassError(f"{each!r} is not a pass; give names or configured Pass objects")
        if each.name in names and each != names[each.name]:
            raise PassError(
                f"two passes are named {each.name!r}: {spell(names[each.name])} and {spell(each)}; "
                "name each pass once"
            )
        names[each.name] = each
    return list(names.values())


def _parse(text: str) -> list[Pass]:
    passes: list[Pass] = []
    for part in _split(text):
        match = _ITEM.match(part)
        if match is None:
            raise PassError(f"cannot read {part!r} in passes={text!r}; write name{{option=value}}")
        name, options = match.group(1), match.group(2)
        if name == "default" and options is None:
            passes.extend(defaults())
        else:
            passes.append(_configure(name, options or ""))
    return passes


def _split(text: str) -> list[str]:
    """Split at the commas outside braces and brackets."""
    parts, depth, start = [], 0, 0
    for place, char in enumerate(text):
        depth += (char in "{[(") - (char in "}])")
        if char == "," and depth == 0:
            parts.append(text[start:place])
            start = place + 1
    parts.append(text[start:])
    return [part for part in parts if part.strip()]


def _configure(name: str, options: str) -> Pass:
    points = importlib.metadata.entry_points(group=GROUP)
    known = sorted({point.name for point in points})
    if name not in known:
        raise PassError(f"no pass is named {name!r}; installed: {', '.join(known)}")
    owners = {p.dist.name if p.dist else "?" for p in points if p.name == name}
    if len(owners) > 1:
        both = " and ".join(sorted(owners))
        raise PassError(f"two passes are named {name!r}: from {both}; uninstall one of them")
    cls = _load(next(p for p in points if p.name == name))
    fields = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = {}
    for part in _split(options):
        key, equals, value = part.partition("=")
        key = key.strip()
        if not equals or key not in fields:
            allowed = ", ".join(sorted(fields)) or "none"
            raise PassError(f"pass {name!r} has no option {part.strip()!r}; its options: {allowed}")
        values[key] = _value(value.strip())
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise PassError(f"pass {name}{{{options}}}: {error}") from error


def _value(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def spell(configured: Pass) -> str:
    """How a pipeline spells a configured pass: ``name{option=value}``, defaults left out."""
    changed = []
    for field in dataclasses.fields(configured):  # type: ignore[arg-type]
        value = getattr(configured, field.name)
        if value != field.default:
            changed.append(f"{field.name}={value!r}")
    return configured.name + (f"{{{','.join(changed)}}}" if changed else "")


def source_key(configured: Pass) -> str:
    """Changes whenever the pass's fields, its source file or that of one of its parts change."""
    cls = type(configured)
    sources = dict.fromkeys(_source(each) for each in (cls, *configured.parts))
    digest = hashlib.sha256(b"\0".join(sources)).hexdigest()[:16]
    return f"{cls.__module__}.{cls.__qualname__}:{spell(configured)}:{digest}"


def _source(part: object) -> bytes:
    found = part if isinstance(part, (type, ModuleType)) else type(part)
    try:
        return Path(inspect.getfile(found)).read_bytes()
    except (OSError, TypeError):
        return repr(found).encode()

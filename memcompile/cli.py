"""``memcompile``: look at reports, passes and rates from a shell."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from memcompile.folders import reports_folder
from memcompile.report import Report
from memcompile.show import size, text


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0, or 2 with the reason on stderr."""
    arguments = _parser().parse_args(argv)
    try:
        for line in arguments.run(arguments):
            print(line, flush=True)
    except BrokenPipeError:  # such as `memcompile show x | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"memcompile: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(
        prog="memcompile",
        description="Look at what the torch.compile backend 'memopt' did, and what it works with.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    show = commands.add_parser("show", help="print a stored report, or draw it as HTML")
    show.add_argument("report", type=Path, metavar="REPORT.json", help="a report as JSON")
    show.add_argument(
        "--html", type=Path, metavar="OUT", help="also write the standalone picture to OUT"
    )
    show.add_argument("--width", type=int, metavar="N", help="columns (default: the terminal's)")
    show.set_defaults(run=_show)

    reports = commands.add_parser(
        "reports",
        help="list stored reports",
        description="List the reports under $MEMCOMPILE_CACHE/reports, or, where that is not "
        "set, under memcompile/reports in Inductor's cache directory; the newest first.",
    )
    reports.set_defaults(run=_reports)

    passes = commands.add_parser("passes", help="list installed passes and their options")
    passes.set_defaults(run=_passes)

    rates = commands.add_parser(
        "rates", help="print the rates that predicted times are made of, measured once a device"
    )
    rates.add_argument("--device", default="cpu", help="such as cpu or cuda:0 (default: cpu)")
    rates.set_defaults(run=_rates)
    return parser


# --- show --------------------------------------------------------------------------------


def _show(arguments: argparse.Namespace) -> Iterator[str]:
    """One report as text, and as a picture when asked."""
    report = _read(arguments.report)
    width = arguments.width or max(80, shutil.get_terminal_size((100, 24)).columns)
    yield text(report, width=width).rstrip("\n")
    if arguments.html:
        report.html(str(arguments.html))
        yield f"\nwrote {arguments.html}"


def _read(path: Path) -> Report:
    """The report in a file; what is wrong with it names the file."""
    try:
        return Report.from_json(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


# --- reports -----------------------------------------------------------------------------


def _reports(arguments: argparse.Namespace) -> Iterator[str]:
    """A line for each stored report, the newest first; what cannot be read says so."""
    folder = reports_folder()
    paths = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    if not paths:
        yield f"no reports under {folder}"
    for path in paths:
        try:
            yield f"{path}  {_summary(_read(path))}"
        except (OSError, ValueError) as error:
            print(f"memcompile: {error}", file=sys.stderr)


def _summary(report: Report) -> str:
    """A report in a few words."""
    peak = report.predicted if report.lowered is None else report.lowered
    budget = "no budget" if report.budget is None else f"budget {size(report.budget)}"
    return (
        f"{report.name} #{report.index}  {report.kind} on {report.device}  {budget}  "
        f"peak {size(peak)} (Inductor: {size(report.inductor)})"
    )


# --- passes ------------------------------------------------------------------------------


def _passes(arguments: argparse.Namespace) -> Iterator[str]:
    """Each installed pass: its name, what it does, its options."""
    from memcompile import registry

    found = registry.available()
    if not found:
        yield "no passes are installed"
    for name, cls in sorted(found.items()):
        yield f"{name}: {_first_line(cls)}"
        for field in dataclasses.fields(cls):  # type: ignore[arg-type]  # each is a dataclass
            yield f"    {field.name}: {_type(field)}{_default(field)}"


def _first_line(cls: type) -> str:
    """The first paragraph of a class's own docstring, on one line."""
    return " ".join((cls.__doc__ or "").strip().split("\n\n")[0].split())


def _type(field: dataclasses.Field[object]) -> str:
    """A field's type, as its author wrote it."""
    return field.type.__name__ if isinstance(field.type, type) else str(field.type)


def _default(field: dataclasses.Field[object]) -> str:
    """A field's default; nothing where one must be given."""
    if field.default is not dataclasses.MISSING:
        return f" = {field.default!r}"
    if field.default_factory is not dataclasses.MISSING:
        return f" = {field.default_factory()!r}"
    return ""


# --- rates -------------------------------------------------------------------------------


def _rates(arguments: argparse.Namespace) -> Iterator[str]:
    """The calibrated rates of a device, a line each."""
    import torch

    from memcompile.analysis import cost

    rates = cost.calibrate(torch.device(arguments.device))
    for field in dataclasses.fields(rates):
        yield from _rate(field.name, getattr(rates, field.name))


def _rate(name: str, value: object) -> Iterator[str]:
    """One rate, or one for each key of a table of them."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _rate(f"{name}[{key}]", entry)
    else:
        yield f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}"


if __name__ == "__main__":
    raise SystemExit(main())

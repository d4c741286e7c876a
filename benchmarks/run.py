"""Measure memopt, Inductor and its peers on the subjects, in one process, sides alternating.

python benchmarks/run.py --subjects llama --markdown

Prints, for each subject: measured, lowered and predicted step peaks, step times over
Inductor's with Inductor against itself as the noise, gradients, and which of the
project's limits are met. The figures depend on nothing else running.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / ".cache" / "inductor"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # random weights: nothing is fetched

import argparse  # noqa: E402
import dataclasses  # noqa: E402
import datetime  # noqa: E402
import json  # noqa: E402
import platform  # noqa: E402
from collections.abc import Callable, Collection, Sequence  # noqa: E402

import torch  # noqa: E402
from measuring import Plan, measure  # noqa: E402
from records import Found, Where  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn  # noqa: E402
from subjects import SUBJECTS  # noqa: E402
from tables import markdown, show  # noqa: E402
from verdicts import Verdict, judge, tally  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write what was asked for after each subject."""
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    console = Console(width=None if Console().is_terminal else 200)
    place = where(args.device)
    console.print(f"{place.name} ({place.device}), torch {place.torch}, {place.threads} threads")
    results: list[Found] = []
    verdicts: list[Verdict] = []
    for name in args.subjects:
        subject = SUBJECTS[name](args.scale, device=args.device)
        with Progress(
            TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(),
            console=console, transient=True,
        ) as progress:  # fmt: skip
            bar = progress.add_task(name, total=1)
            found = measure(subject, args.scale, args.plan, teller(progress, bar))
        del subject
        results.append(found)
        own = judge(found)
        verdicts += own
        show(console, found, own)
        write(args, place, results, verdicts)
    console.print(f"limits: {tally(verdicts)}")


def teller(progress: Progress, bar: TaskID) -> Callable[[str, float], None]:
    """Moves the bar."""

    def tell(doing: str, share: float) -> None:
        progress.update(bar, description=doing, completed=share)

    return tell


def write(
    args: argparse.Namespace, place: Where, results: list[Found], verdicts: list[Verdict]
) -> None:
    """The files asked for, as far as the run has come."""
    data = {
        "where": dataclasses.asdict(place),
        "plan": dataclasses.asdict(args.plan),
        "subjects": [dataclasses.asdict(found) for found in results],
        "verdicts": [dataclasses.asdict(verdict) for verdict in verdicts],
    }
    device = torch.device(args.device).type
    name = f"{place.date}-{device}-{place.torch}.md"
    write_files(args.json, data, args.markdown, name, markdown(place, results, verdicts))


def write_files(
    json_file: Path | None, data: dict[str, Any], page: Path | None, name: str, text: str
) -> None:
    """``data`` to the one, ``text`` to the other: a ``.md`` file, or ``name`` in a folder."""
    if json_file:
        json_file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    if page:
        path = page if page.suffix == ".md" else page / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def where(device: str) -> Where:
    """The device, torch and threads of this process."""
    named = torch.device(device)
    name = torch.cuda.get_device_name(named) if named.type == "cuda" else processor()
    version = torch.__version__.split("+")[0]
    today = datetime.date.today().isoformat()
    return Where(device, name, version, torch.get_num_threads(), today)


def processor() -> str:
    """The CPU's name, as Linux gives it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.machine()


def named_subjects(parser: argparse.ArgumentParser, text: str, known: Collection[str]) -> list[str]:
    """What ``--subjects`` names; a usage error where that is nothing, or not known."""
    names = [name for name in text.split(",") if name]
    unknown = sorted(set(names) - set(known))
    if unknown or not names:
        parser.error(f"--subjects {','.join(unknown)}: choose from {', '.join(known)}")
    return names


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; ``args.plan`` holds what to measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--subjects", default=",".join(SUBJECTS), help="comma-separated; default: %(default)s"
    )
    parser.add_argument("--scale", choices=("default", "small"), default="default")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; default: %(default)s")
    parser.add_argument("--threads", type=int, help="of the CPU; default: torch's")
    parser.add_argument("--budgets", type=int, help="from Inductor's peak down; default: 8")
    parser.add_argument("--pairs", type=int, help="alternated, of each time; default: 20")
    parser.add_argument(
        "--judged", action="store_true", help="time only what a limit is held against"
    )
    parser.add_argument(
        "--peers", help="activation_memory_budget of Inductor's; default: 0.5,0.3,0.1; '' for none"
    )
    parser.add_argument(
        "--no-float64", action="store_true", help="leave gradients against float64 out"
    )
    parser.add_argument("--quick", action="store_true", help="3 budgets, 5 pairs, one peer")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all figures to a file")
    parser.add_argument(
        "--markdown", type=Path, nargs="?", const=RESULTS, metavar="OUT",
        help="write the tables to a .md file, or a folder; alone: to benchmarks/results/",
    )  # fmt: skip
    args = parser.parse_args(argv)
    args.subjects = named_subjects(parser, args.subjects, SUBJECTS)
    defaults = Plan(3, 5, (0.3,)) if args.quick else Plan()
    budgets = defaults.budgets if args.budgets is None else args.budgets
    pairs = defaults.pairs if args.pairs is None else args.pairs
    if budgets < 1 or pairs < 0 or pairs == 1:
        parser.error("--budgets must be at least 1, --pairs 0 (no times) or at least 2")
    peers = defaults.activation_budgets
    if args.peers is not None:
        peers = tuple(float(text) for text in args.peers.split(",") if text)
    args.plan = Plan(budgets, pairs, peers, not args.judged, not args.no_float64)
    return args


if __name__ == "__main__":
    main()

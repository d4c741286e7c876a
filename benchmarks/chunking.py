"""Judge chunking: loops beside recomputation alone and Inductor, at the same budgets.

python benchmarks/chunking.py --markdown
python benchmarks/chunking.py --longest --markdown

The first prints, for each subject, step peaks and times as ratios to Inductor's training
step at a budget equal to the limit on the peak and at "min", with and without loops. The
second prints the longest sequences whose training step fits --memory. Each of several subjects
is measured in a process of its own. Nothing else should be running.
"""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Rates and scratch sizes stay where they are while kernels are compiled anew.
os.environ.setdefault("MEMCOMPILE_CACHE", str(ROOT / ".cache" / "memcompile"))

import run  # noqa: E402, I001  (sets the other folders before torch is imported)

import argparse  # noqa: E402
import concurrent.futures  # noqa: E402
import dataclasses  # noqa: E402
import multiprocessing  # noqa: E402
from collections.abc import Callable, Sequence  # noqa: E402

import chunk_study  # noqa: E402
import longest  # noqa: E402
import torch  # noqa: E402
from chunk_limits import LIMITS, in_order, judge  # noqa: E402
from layers import LAYERS  # noqa: E402
from measuring import Plan  # noqa: E402
from records import Found, Where  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: E402
from verdicts import Verdict, tally  # noqa: E402

from memcompile import Options, OptionsError  # noqa: E402


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write what was asked for as far as the run has come."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    console = Console(width=None if Console().is_terminal else 260)
    place = run.where("cpu")
    console.print(f"{place.name}, torch {place.torch}, {place.threads} threads")
    if args.longest:
        find_longest(args, place, console)
    else:
        study(args, place, console)


def study(args: argparse.Namespace, place: Where, console: Console) -> None:
    """The table of peaks and times, and what it is held against."""
    results: dict[str, Found] = {}
    verdicts: list[Verdict] = []
    for name in in_order(args.subjects):
        with bar(console) as progress:
            tell = run.teller(progress, progress.add_task(name, total=1))
            if len(args.subjects) == 1:
                results[name] = measured(name, args, tell)
            else:
                results[name] = measured_alone(name, args)
        own = judge(results[name], LIMITS[name], results)
        verdicts += own
        chunk_study.show(console, results[name], own)
        data = {
            "where": dataclasses.asdict(place),
            "plan": dataclasses.asdict(args.plan),
            "limits": {name: dataclasses.asdict(LIMITS[name]) for name in results},
            "subjects": {name: dataclasses.asdict(found) for name, found in results.items()},
            "verdicts": [dataclasses.asdict(verdict) for verdict in verdicts],
        }
        text = chunk_study.markdown(place, list(results.values()), verdicts)
        file = f"{place.date}-cpu-{place.torch}-chunking.md"
        run.write_files(args.json, data, args.markdown, file, text)
    console.print(f"limits: {tally(verdicts)}")


def measured(
    name: str, args: argparse.Namespace, tell: Callable[[str, float], None] = lambda *_: None
) -> Found:
    """All sides of one subject, in this process."""
    subject, limit = LAYERS[name](args.scale), LIMITS[name]
    return chunk_study.study(subject, limit, args.scale, args.plan, tell, args.cached)


def measured_alone(name: str, args: argparse.Namespace) -> Found:
    """The same in a process of its own.

    What a subject frees, the C library keeps for the next one: of the attention layer Inductor's
    step takes 73 ms by itself and 58 ms after the triangle's, with the same kernels.
    """
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        1, context, torch.set_num_threads, (args.threads,)
    ) as pool:
        return pool.submit(measured, name, args).result()


def find_longest(args: argparse.Namespace, place: Where, console: Console) -> None:
    """The longest sequences. What a way reached is where the next one starts."""
    found: list[longest.Longest] = []
    for task in longest.tasks(args.scale):
        if task.name not in args.subjects:
            continue
        start = task.first
        for way in (way for way in task.ways if way in (args.ways or task.ways)):
            with bar(console) as progress:
                row = progress.add_task(way, total=1)
                tell = lambda text: progress.update(row, description=text)  # noqa: B023, E731
                one = longest.longest(task, way, args.memory, start, tell)
            start = one.length or start
            found.append(one)
            longest.show(console, [one])
            data = {
                "where": dataclasses.asdict(place),
                "memory": args.memory,
                "longest": [dataclasses.asdict(each) for each in found],
            }
            file = f"{place.date}-cpu-{place.torch}-longest.md"
            text = longest.markdown(place, args.memory, found)
            run.write_files(args.json, data, args.markdown, file, text)


def bar(console: Console) -> Progress:
    """What is being done, on one line that goes away."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; ``args.plan`` holds what to measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--subjects", default=",".join(LIMITS), help="comma-separated; default: %(default)s"
    )
    parser.add_argument("--scale", choices=("default", "small"), default="default")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument(
        "--pairs", type=int, default=20, help="alternated, of each time; default: %(default)s"
    )
    parser.add_argument(
        "--no-float64", action="store_true", help="leave gradients against float64 out"
    )
    parser.add_argument(
        "--cached", action="store_true", help="use kernels on disk; no compile times then"
    )
    parser.add_argument(
        "--longest", action="store_true",
        help="instead: the longest sequences that fit, of the subjects attention and evoformer",
    )  # fmt: skip
    parser.add_argument("--ways", default="", help="for --longest, with semicolons; default: all")
    parser.add_argument("--memory", default="1GiB", help="for --longest; default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all figures to a file")
    parser.add_argument(
        "--markdown", type=Path, nargs="?", const=run.RESULTS, metavar="OUT",
        help="write the tables to a .md file, or a folder; alone: to benchmarks/results/",
    )  # fmt: skip
    args = parser.parse_args(argv)
    args.subjects = run.named_subjects(parser, args.subjects, LIMITS)
    if args.longest and not {"attention", "evoformer"} & set(args.subjects):
        parser.error("--longest: choose --subjects from attention, evoformer")
    args.ways = [way.strip() for way in args.ways.split(";") if way]
    known = {way for task in longest.tasks(args.scale) for way in task.ways}
    if unknown := sorted(set(args.ways) - known):
        parser.error(f"--ways {';'.join(unknown)}: choose from {'; '.join(sorted(known))}")
    if args.pairs < 0 or args.pairs == 1 or args.threads < 1:
        parser.error("--pairs must be 0 (no times) or at least 2, --threads at least 1")
    try:
        memory = Options(budget=args.memory).limit
    except OptionsError as error:
        parser.error(f"--memory {args.memory}: {error}")
    if memory.kind != "bytes":
        parser.error(f"--memory {args.memory}: expected bytes, as in 1GiB")
    args.memory = memory.value
    args.plan = Plan(0, args.pairs, (), float64=not args.no_float64)
    return args


if __name__ == "__main__":
    main()

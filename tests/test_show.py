"""How reports look: the figures are in the text, the page stands alone, nothing escapes."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import types
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from memcompile import cli
from memcompile.folders import reports_folder
from memcompile.report import KINDS, LoopRow, MoveRow, Point, Ran, Report, ValueRow
from memcompile.show import change, duration, html, sample, size, text

MIB = 2**20
LAYER_OPS = ("layer_norm", "mm", "softmax", "bmm", "gelu", "addmm", "add")


# --- reports made by hand ----------------------------------------------------------------


def training(layers: int, keep: float) -> tuple[Point, ...]:
    """The timeline of a training step: ``keep`` is the share of activations saved."""
    nodes = [(op, layer) for layer in range(layers) for op in LAYER_OPS]
    before = {"parameters": 48 * MIB, "inputs": 6 * MIB}
    total, top = 0, [("primals_1", 24 * MIB)]
    forward: list[Point] = []
    backward: list[Point] = []
    for at, (op, layer) in enumerate(nodes):
        name, source = f"{op}_{layer}", f"model.py:{40 + layer} in forward"
        alive = 4 * MIB if op == "softmax" else MIB + 100_000 * LAYER_OPS.index(op)
        total += int(keep * alive)
        top = sorted([*top, (name, int(keep * alive))], key=lambda row: -row[1])[:5]
        live = {**before, "saved": total, "temporaries": alive}
        forward.append(Point(name, source, "forward", live, tuple(top)))
        rebuilt = 6 * MIB if keep < 1 and op == "softmax" else 2 * MIB
        grown = 24 * MIB * (len(nodes) - at) // len(nodes)
        live = {**before, "saved": total, "temporaries": rebuilt, "gradients": grown, "outputs": 4}
        backward.append(Point(f"{name}_backward", source, "backward", live, tuple(top)))
    return (*forward, *reversed(backward))


def report(layers: int = 12, **changes: Any) -> Report:
    """A whole report of a small transformer's training step."""
    before, after = training(layers, 1.0), training(layers, 0.35)
    peaks = [max(point.bytes for point in points) for points in (before, after)]
    moves = tuple(
        MoveRow(
            by="recompute",
            value=f"{op}_{layer}",
            how="keep" if op == "add" and layer == 0 else "recompute",
            source=f"model.py:{40 + layer} in forward",
            bytes=(4 if op == "softmax" else 1) * MIB,
            seconds=-1e-5 if op == "add" else 2e-5,
        )
        for layer in range(layers)
        for op in ("softmax", "gelu", "add")
    )
    values = tuple(
        ValueRow(
            f"softmax_{n}", "aten._softmax.default", f"model.py:{40 + n} in forward",
            (8, "s0", "s0"), "torch.float32", 4 * MIB, "saved",
        )
        for n in range(12)
    )  # fmt: skip
    made = Report(
        name="Evoformer", index=0, kind="training", torch="2.13.0", device="cpu",
        lower="inductor", budget=peaks[1] + MIB, budget_text="40%", reserve=2 * MIB,
        before=54 * MIB, floor=peaks[1] - 9 * MIB, inductor=peaks[0], predicted=peaks[1],
        lowered=peaks[1] + 4096, measured=peaks[1] + 8192, seconds=0.0021, step_seconds=0.120,
        peak_expression="48*s0**2 + 1024", moves=moves,
        passes=(Ran("recompute{late=True}", "bits", True, "36 moves offered"),
                Ran("cast", "rounding", False, "no autocast region found")),
        largest=values, timeline_before=before, timeline_after=after,
        graph_before="def joint(): ...", forward="def forward(): ...",
        outside=("optimizer state", "existing .grad"), notes=("2 random ops kept",),
        planning_seconds=1.25, schedulings=2,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def looped(layers: int = 12, **changes: Any) -> Report:
    """:func:`report` with two of its layers in loops, a loop a side."""
    rows = tuple(
        LoopRow(
            by="chunk{max_chunks=16}", value=f"softmax_{layer}",
            source=f"model.py:{40 + layer} in forward", dim=2, length=1097, chunks=16, nodes=62,
            bytes=4 * MIB, peak_before=(90 - layer) * MIB, peak_after=(89 - layer) * MIB,
            at=(f"softmax_{layer}", f"softmax_{layer}_backward"),
        )
        for layer in (0, 1)
    )  # fmt: skip
    return report(layers, loops=rows, **changes)


def bare(**changes: Any) -> Report:
    """A report in which everything that may be missing is missing."""
    made = Report(
        name="", index=3, kind="inference", torch="2.13.0", device="cpu", lower="eager",
        budget=None, budget_text="", reserve=0, before=0, floor=None, inductor=None,
        predicted=0, lowered=None,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


# --- reading pages -----------------------------------------------------------------------


class Reader(HTMLParser):
    """Collects a page's tags, its links and its embedded JSON."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.data = ""
        self._embedded = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [f"{k}={v}" for k, v in attrs if k in ("src", "href", "srcset", "action")]
        self._embedded = ("id", "data") in attrs

    def handle_data(self, data: str) -> None:
        if self._embedded:
            self.data += data

    def handle_endtag(self, tag: str) -> None:
        self._embedded = False


def embedded(page: str) -> dict[str, Any]:
    return json.loads(Reader(page).data)


# --- figures -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (None, "-"),
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.98 KiB"),
        (1536, "1.50 KiB"),
        (-3 * MIB, "-3.00 MiB"),
        (8 * 2**30, "8.00 GiB"),
        (5000 * 2**40, "5000.0 TiB"),
    ],
)
def test_size(count: int | None, shown: str) -> None:
    assert size(count) == shown


def test_durations_have_units_and_changes_have_signs() -> None:
    assert duration(2.5) == "2.50 s"
    assert duration(0.0021) == "2.10 ms"
    assert duration(2e-6) == "2.0 us"
    assert duration(float("nan")) == "-"
    assert (change(0.0021), change(0.0), change(-0.0021)) == ("+2.10 ms", "0 s", "-2.10 ms")


# --- text --------------------------------------------------------------------------------


def test_text_has_every_figure() -> None:
    shown = report()
    lines = text(shown, width=110).splitlines()
    step = (shown.inductor or 0) - shown.before
    for label, peak in (
        ("Inductor's peak", shown.inductor),
        ("budget (40%)", shown.budget),
        ("floor", shown.floor),
        ("predicted", shown.predicted),
        ("lowered", shown.lowered),
        ("measured", shown.measured),
    ):
        assert peak is not None
        (line,) = [line for line in lines if line.startswith(label)]
        assert size(peak) in line
        assert f"{peak:,}" in line
        assert size(peak - shown.before) in line
        assert f"{100 * (peak - shown.before) / step:.1f} %" in line
    whole = "\n".join(lines)
    for figure in ("+2.10 ms (+1.8 %)", "120.00 ms", "48*s0**2 + 1024", "2 schedulings"):
        assert figure in whole
    for words in ("recompute{late=True}", "36 moves offered", "optimizer state", "2 random ops"):
        assert words in whole


def test_repeated_moves_are_one_line() -> None:
    lines = text(report()).splitlines()
    grouped = [line.split() for line in lines if re.match(r"recompute +recompute +softmax ", line)]
    assert grouped == [["recompute", "recompute", "softmax", "12", "48.0", "MiB", "+240.0", "us"]]


def test_each_loop_is_a_line_with_its_peaks_and_source() -> None:
    shown = text(looped(), width=120)
    lines = [line.split() for line in shown.split("\nLoops\n")[1].split("\n\n")[0].splitlines()]
    (row,) = [line for line in lines if line[:1] == ["softmax_1"]]
    assert row[2:-3] == ["2", "1,097", "16", "4.00", "MiB", "89.0", "MiB", "88.0", "MiB"]
    assert row[-3:] == ["model.py:41", "in", "forward"]
    assert "2 regions run chunk by chunk: the least peak falls from 90.0 MiB to 88.0 MiB." in shown
    assert "chunk by chunk" not in text(report())


def test_ten_largest_values_with_their_sources() -> None:
    shown = text(report(moves=())).split("Largest values at the peak")[1].split("Passes")[0]
    rows = [line for line in shown.splitlines() if line.startswith("softmax_")]
    assert len(rows) == 10
    assert "float32[8, s0, s0]" in rows[0]
    assert "model.py:40 in forward" in rows[0]


def test_verdicts() -> None:
    assert "Fits the budget: the measured peak leaves" in text(report())
    over = report(budget=60 * MIB, measured=None, lowered=61 * MIB)
    assert "OVER the budget: the lowered peak is 1.00 MiB above it." in text(over)
    assert "No budget: Inductor's own split" in text(bare())
    assert "Budget min: the least peak" in text(bare(budget_text="min"))


def test_str_is_the_text() -> None:
    assert str(report()) == text(report())


@given(st.text(), st.integers(40, 200))
@settings(max_examples=50, deadline=None)
def test_text_survives_any_name(name: str, width: int) -> None:
    shown = text(hostile(name), width=width)
    assert all(len(line) <= width for line in shown.splitlines() if line.isascii())
    assert all(c.isprintable() or c == "\n" for c in shown)


#: Texts that would break a careless page.
HOSTILE = ("</script>", "<!--<script>", "]]>", "/*DATA*/", "\\u003c", "\ud800", "\u2028", "$&")


# --- the page ----------------------------------------------------------------------------


def hostile(name: str) -> Report:
    """A report in which every text is ``name``."""
    point = Point(name, name, "forward", {"saved": 5}, ((name, 5),))
    return bare(
        name=name, kind=name, torch=name, device=name, budget_text=name, peak_expression=name,
        moves=(MoveRow(name, name, name, name, 1, 0.1),),
        loops=(LoopRow(name, name, name, 0, 2, 2, 1, 5, 5, 4, (name,)),),
        passes=(Ran(name, name, True, name),),
        largest=(ValueRow(name, name, name, (name,), name, 5, name),),
        timeline_before=(point,), timeline_after=(point,), graph_before=name, forward=name,
        backward=name, outside=(name,), notes=(name,),
    )  # fmt: skip


def test_page_stands_alone() -> None:
    page = html(report())
    reader = Reader(page)
    assert reader.links == []
    assert not {"link", "img", "iframe", "object", "embed", "base"} & set(reader.tags)
    assert set(re.findall(r"https?://[^\"'\s]+", page)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(", page)
    assert "default-src 'none'" in page


def test_page_carries_the_report() -> None:
    shown = report()
    data = embedded(html(shown))
    assert data["kinds"] == list(KINDS)
    assert data["budget"] == shown.budget
    before, after = data["panels"]
    for panel, points in ((before, shown.timeline_before), (after, shown.timeline_after)):
        assert panel["nodes"] == len(points)
        assert panel["boundary"] == len(points) // 2
        peak = panel["points"][panel["peak"]]
        assert sum(peak["live"]) == max(point.bytes for point in points)
        assert peak["node"] == points[peak["at"]].node
        assert peak["source"].startswith("model.py:")
        assert peak["largest"][0] == ["primals_1", 24 * MIB]
    assert [table["title"] for table in data["tables"]] == [
        "Peaks", "Moves, grouped", "The 10 biggest moves", "Largest values at the peak", "Passes"
    ]  # fmt: skip


@pytest.mark.parametrize("layers", [12, 700])
def test_the_picture_shows_where_each_loop_runs(layers: int) -> None:
    data = embedded(html(looped(layers)))
    assert data["loops"][1] == [
        "loop around softmax_1", "62 ops in 16 chunks of dimension 2, 1,097 long",
        "4.00 MiB whole, 256.0 KiB a chunk", "least peak 89.0 MiB → 88.0 MiB",
        "model.py:41 in forward",
    ]  # fmt: skip
    before, after = data["panels"]
    assert {point["loop"] for point in before["points"]} == {None}
    at = {point["node"]: point["loop"] for point in after["points"] if point["loop"] is not None}
    assert at == {
        "softmax_0": 0, "softmax_0_backward": 0, "softmax_1": 1, "softmax_1_backward": 1
    }  # fmt: skip


@given(st.text(min_size=1) | st.sampled_from(HOSTILE))
@settings(max_examples=80, deadline=None)
def test_no_text_breaks_the_page(name: str) -> None:
    page = html(hostile(name))
    page.encode("utf-8")
    assert Reader(page).tags == Reader(html(bare())).tags
    data = embedded(page)
    assert data["panels"][0]["points"][0]["node"] == name
    assert data["panels"][0]["points"][0]["largest"] == [[name, 5]]
    assert data["texts"][0] == ["Graph before", name]
    assert data["loops"][0][0] == f"loop around {name}"
    assert data["panels"][1]["points"][0]["loop"] == 0


def test_empty_report_has_a_page_and_a_text() -> None:
    data = embedded(html(bare()))
    assert [panel["peak"] for panel in data["panels"]] == [None, None]
    assert [panel["points"] for panel in data["panels"]] == [[], []]
    assert "graph #3" in text(bare())


def test_html_is_written_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    report().html(str(path))
    assert path.read_text("utf-8") == html(report())


# --- sampling ----------------------------------------------------------------------------


@given(st.lists(st.integers(0, 10**12), max_size=400), st.integers(1, 50))
@settings(deadline=None)
def test_sampling_keeps_maxima(heights: list[int], limit: int) -> None:
    points = [Point(f"n{at}", "", "forward", {"saved": b}) for at, b in enumerate(heights)]
    kept = sample(points, limit)
    assert kept == sorted(set(kept))
    assert len(kept) <= limit + 3
    assert max((heights[at] for at in kept), default=0) == max(heights, default=0)
    if points:
        assert (kept[0], kept[-1]) == (0, len(points) - 1)


def test_a_long_timeline_keeps_its_boundary_and_stays_small() -> None:
    page = html(report(layers=700))
    panel = embedded(page)["panels"][0]
    assert panel["nodes"] == 9800
    assert panel["boundary"] in [point["at"] for point in panel["points"]]
    assert len(panel["points"]) < 1010
    assert len(page) < 1_000_000


# --- JSON --------------------------------------------------------------------------------


def test_json_round_trip() -> None:
    assert Report.from_json(report().to_json()) == report()
    assert Report.from_json(bare().to_json()) == bare()
    assert Report.from_json(looped().to_json()) == looped()


@given(st.text())
@settings(max_examples=30, deadline=None)
def test_json_round_trip_of_any_text(name: str) -> None:
    assert Report.from_json(hostile(name).to_json()) == hostile(name)


@pytest.mark.parametrize("broken", ["", "{}", "[]", "3", '{"moves": 1}'])
def test_what_is_no_report_says_so(broken: str) -> None:
    with pytest.raises(ValueError, match="not a memcompile report"):
        Report.from_json(broken)


# --- the command line --------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A report store with one report in it."""
    monkeypatch.setenv("MEMCOMPILE_CACHE", str(tmp_path))
    path = tmp_path / "reports" / "one.json"
    path.parent.mkdir()
    path.write_text(report().to_json(), "utf-8")
    return path


def test_show(stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "picture.html"
    assert cli.main(["show", str(stored), "--html", str(picture), "--width", "100"]) == 0
    assert capsys.readouterr().out == f"{text(report(), width=100)}\nwrote {picture}\n"
    assert picture.read_text("utf-8") == html(report())


def test_reports(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (stored.parent / "broken.json").write_text("{}", "utf-8")
    assert cli.main(["reports"]) == 0
    out, err = capsys.readouterr()
    (line,) = out.splitlines()
    assert line.startswith(f"{stored}  Evoformer #0  training on cpu  budget ")
    assert "broken.json: not a memcompile report" in err


def test_reports_of_an_empty_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEMCOMPILE_CACHE", str(tmp_path))
    assert cli.main(["reports"]) == 0
    assert capsys.readouterr().out == f"no reports under {tmp_path / 'reports'}\n"


def test_store_is_beside_inductors_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MEMCOMPILE_CACHE", raising=False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert reports_folder() == tmp_path / "memcompile" / "reports"


@pytest.mark.parametrize("content", [None, "{}", "\xff"])
def test_errors_go_to_stderr_with_exit_2(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "report.json"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    assert cli.main(["show", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert str(path) in err


@pytest.mark.parametrize("argv", [[], ["nothing"], ["show"]])
def test_usage_errors_exit_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2


def _stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **members: object) -> None:
    """Put a module of the given members where ``name`` is imported from."""
    module = types.ModuleType(name)
    vars(module).update(members)
    parent, _, leaf = name.rpartition(".")
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sys.modules[parent], leaf, module, raising=False)


def test_passes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    @dataclasses.dataclass(frozen=True)
    class Chunk:
        """Split a dimension
        over a loop.

        More words.
        """

        dims: tuple[str, ...]
        max_chunks: int = 16
        tags: list[str] = dataclasses.field(default_factory=list)

    import memcompile

    monkeypatch.setitem(sys.modules, "memcompile", memcompile)
    _stand_in(monkeypatch, "memcompile.registry", available=lambda: {"chunk": Chunk})
    assert cli.main(["passes"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "chunk: Split a dimension over a loop.",
        "    dims: tuple[str, ...]",
        "    max_chunks: int = 16",
        "    tags: list[str] = []",
    ]


def test_rates(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    @dataclasses.dataclass(frozen=True)
    class Rates:
        device: str
        bandwidth: float
        matmul: dict[str, float]

    import memcompile.analysis

    monkeypatch.setitem(sys.modules, "memcompile.analysis", memcompile.analysis)
    rates = Rates("a cpu", 1.25e10, {"float32": 1e11})
    _stand_in(monkeypatch, "memcompile.analysis.cost", calibrate=lambda device: rates)
    assert cli.main(["rates"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "device: a cpu",
        "bandwidth: 1.25e+10",
        "matmul[float32]: 1e+11",
    ]

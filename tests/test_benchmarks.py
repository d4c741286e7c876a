"""The benchmark: a whole run on a tiny subject, and the verdicts on figures made up here."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts import their neighbours, as when they are run."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))


def ratio(median: float, spread: float = 0.0):
    from records import Ratio

    return Ratio(median, median - spread / 2, median + spread / 2, 20, 0.1)


def found(**changes: object):
    from records import Duel, Found, Row

    rows = [
        Row("Inductor", "inductor", peak=1000, time=ratio(1.0)),
        Row("checkpointed, Inductor", "peer", peak=500, time=ratio(1.3)),
        Row("memopt, no budget", "free", peak=1000, lowered=1000, schedulings=1, time=ratio(1.0)),
        Row("memopt, least peak", "min", peak=400, lowered=400, schedulings=2),
    ]
    for number, budget in enumerate((1000, 750, 500)):
        rows.append(
            Row(
                f"budget {number}",
                "budget",
                budget,
                budget - 5,
                predicted=budget - 10,
                lowered=budget - 5,
                added=float(number),
                schedulings=2,
                time=ratio(1.1),
            )
        )
    duels = [Duel("checkpointed, Inductor", "budget 2", ratio(0.9))]
    made = Found("llama", "small", False, noise=ratio(1.0, 0.01), rows=rows, duels=duels)
    return dataclasses.replace(made, **changes)


def statuses(made) -> dict[str, str]:
    from verdicts import judge

    return {verdict.limit: verdict.status for verdict in judge(made)}


def test_all_limits_met() -> None:
    assert set(statuses(found()).values()) == {"met", "not measured"}  # no shares, no numbers


@pytest.mark.parametrize(
    ("label", "changes", "limit"),
    [
        ("budget 1", {"peak": 751}, "measured ≤ budget"),
        ("budget 1", {"lowered": 700}, "|lowered/measured − 1| ≤ 2%"),
        ("memopt, least peak", {"peak": 501}, "floor ≤ compiled checkpointing"),
        ("memopt, no budget", {"peak": 1001}, "no budget: peak ≤ Inductor's"),
        ("budget 2", {"schedulings": 4}, "≤ 3 schedulings"),
        ("budget 2", {"added": 0.5}, "predicted peak and time monotone in the budget, "
         "lowered peak to 2 %"),
        ("budget 2", {"failed": True}, "≥ 2 of 3 budgets feasible, the rest BudgetError"),
    ],
)  # fmt: skip
def test_a_limit_is_missed(label: str, changes: dict[str, object], limit: str) -> None:
    made = found()
    for name, value in changes.items():
        setattr(made.row(label), name, value)
    assert statuses(made)[limit] == "missed"


def test_time_is_missed_only_beyond_the_noise() -> None:
    limit = "time ≤ that of checkpointed, Inductor, at its peak"
    noise = found().noise_margin
    for median, status in ((1 + noise / 2, "within noise"), (1 + 2 * noise, "missed")):
        made = found()
        made.duels[0].time = ratio(median)
        assert statuses(made)[limit] == status
    assert statuses(found(noise=ratio(1.0, 2.0)))[limit] == "not measured"
    made.duels[0].time = None  # asked for no pairs
    assert statuses(made)[limit] == "not measured"
    made.row("budget 2").peak = None  # refused: the peer reaches what we do not
    assert statuses(made)[limit] == "missed"


def test_budgets_are_even_and_include_both_ends() -> None:
    from measuring import evenly

    assert evenly(1000, 300, 8) == [1000, 900, 800, 700, 600, 500, 400, 300]
    assert evenly(1000, 300, 1) == [300]


@pytest.mark.long
def test_a_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import run
    import subjects

    def tiny(scale, dtype=torch.float32, device="cpu"):
        torch.manual_seed(0)
        model = subjects.Llama(1, 16, 2, 40, 32, 32)
        tokens = torch.randint(32, (2, 33))
        return subjects.Subject("tiny", model, (tokens,), list(model.blocks))

    monkeypatch.setitem(subjects.SUBJECTS, "tiny", tiny)
    out, page = tmp_path / "out.json", tmp_path / "page.md"
    asked = "--subjects tiny --scale small --budgets 1 --pairs 2 --peers="
    run.main([*asked.split(), "--json", str(out), "--markdown", str(page)])

    (data,) = json.loads(out.read_text())["subjects"]
    rows = {row["label"]: row for row in data["rows"]}
    assert not [row for row in rows.values() if row["failed"]]
    (budget,) = (row["budget"] for row in rows.values() if row["kind"] == "budget")
    assert budget == rows["checkpointed, Inductor"]["peak"]
    timed = [row for row in rows.values() if row["peak"] is not None]
    assert all(row["time"]["pairs"] == 2 for row in timed)
    free = rows["memopt, no budget"]
    assert free["schedulings"] == 1 and free["numbers"]["error"] > 0
    assert "of Inductor's" in page.read_text()
    assert "limits:" in capsys.readouterr().out


def test_what_cannot_be_measured_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    import run

    for argv in (["--subjects", "nobody"], ["--budgets", "0"], ["--pairs", "1"]):
        with pytest.raises(SystemExit):
            run.parse(argv)
    assert "choose from" in capsys.readouterr().err


def chunk_found():
    """Figures of one subject of the study of chunking, all limits met."""
    from chunk_limits import ALONE, CHUNK
    from records import Found, Numbers, Row

    right = Numbers(True, 0.0, 0.0, 1.0, worst=1.0, worst_name="x")

    def ours(label: str, kind: str, passes: str, peak: int, **more: object) -> Row:
        made = {"lowered": peak, "predicted": peak, "time": ratio(0.7), "numbers": right}
        return Row(label, kind, passes=passes, peak=peak, **{**made, **more})

    rows = [
        Row("eager", "eager", peak=2000, time=ratio(1.5)),
        Row("Inductor", "inductor", peak=1000, time=ratio(1.0)),
        ours("alone", "min", ALONE, 900),
        ours("chunk", "min", CHUNK, 100),
        ours("chunk at 12%", "budget", CHUNK, 115, budget=120),
        Row("alone at 12%", "budget", 120, passes=ALONE, floor=900, refused=True, note="no"),
        ours("chunk at alone's", "level", CHUNK, 900, budget=900),
    ]
    return Found("attention", "small", False, noise=ratio(1.0, 0.01), rows=rows)


def chunk_statuses(made, limit=None, others=None) -> dict[str, str]:
    from chunk_limits import Limit, judge

    limit = limit or Limit(0.12, 0.8, below_alone=0.75, time_at_alone=1.2)
    return {v.limit: v.status for v in judge(made, limit, others or {})}


def test_all_limits_on_chunking_met() -> None:
    assert set(chunk_statuses(chunk_found()).values()) == {"met"}


@pytest.mark.parametrize(
    ("label", "changes", "limit"),
    [
        ("chunk at 12%", {"peak": None, "floor": 130}, "peak ≤ 0.12x Inductor's"),
        ("chunk at 12%", {"peak": None, "floor": 130},
         "time ≤ 0.80x Inductor's at 0.12x Inductor's peak"),
        ("chunk at 12%", {"peak": 121}, "peak ≤ 0.12x Inductor's"),
        ("chunk at 12%", {"peak": 121}, "measured ≤ budget"),
        ("chunk at 12%", {"time": "slow"}, "time ≤ 0.80x Inductor's at 0.12x Inductor's peak"),
        ("chunk", {"peak": 700}, "least peak ≤ 0.75x that of recomputation alone"),
        ("chunk at alone's", {"time": "slow"},
         "time ≤ 1.20x at the least peak of recomputation alone"),
    ],
)  # fmt: skip
def test_a_limit_on_chunking_is_missed(label: str, changes: dict[str, object], limit: str) -> None:
    made = chunk_found()
    for name, value in changes.items():
        setattr(made.row(label), name, ratio(1.3) if value == "slow" else value)
    assert chunk_statuses(made)[limit] == "missed"


def test_a_prime_length_is_held_to_its_neighbour() -> None:
    from chunk_limits import Limit, in_order

    limit = Limit(0.12, 0.8, beside="attention-beside")
    others = {"attention-beside": chunk_found()}
    text = "least share of the peak ≤ 1.05x that of attention"
    made = chunk_found()
    assert chunk_statuses(made, limit, others)[text] == "met"
    made.row("chunk").peak = 106
    assert chunk_statuses(made, limit, others)[text] == "missed"
    missing = "least share of the peak ≤ 1.05x that of attention-beside"
    assert chunk_statuses(made, limit, {})[missing] == "not measured"
    order = in_order(["attention-prime", "vocabulary", "attention-beside"])
    assert order == ["attention-beside", "attention-prime", "vocabulary"]


@pytest.mark.parametrize("power", [1, 2, 3])
@pytest.mark.parametrize("start", [60, 100, 900])
@pytest.mark.parametrize("known", [True, False], ids=["measured", "refused or not"])
def test_the_longest_length_is_found(
    power: int, start: int, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import longest

    memory, tried = 400**power + 7, []

    def measured(task, way, length, memory):
        tried.append(length)
        total = 5 + length**power
        return longest.Trial(length, total, total if known else None, total <= memory)

    monkeypatch.setattr(longest, "measured", measured)
    task = longest.Task("made up", lambda length: None, 100, {})
    found = longest.longest(task, "some way", memory, start, lambda text: None)
    assert found.length <= 400 < found.refused
    assert found.refused <= 1.1 * found.length + 1
    assert found.total == 5 + found.length**power
    assert len(tried) == len(set(tried)) <= (6 if known else 12)


@pytest.mark.parametrize("rewrite", ["attention", "attention, unrolled", "evoformer"])
def test_chunks_by_hand_compute_the_same(rewrite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peers are honest: same parameters, loss and gradients, and less memory."""
    import by_hand
    import layers
    import sides
    import subjects

    monkeypatch.setattr(by_hand, "QUERIES", 16)
    monkeypatch.setattr(by_hand, "ROWS", 5)
    if rewrite == "evoformer":
        subject = subjects.evoformer("small", residues=17)
        chunked = by_hand.evoformer_by_hand(subject)
    else:
        subject = layers.distance_attention("small", length=83)
        chunked = by_hand.attention_by_hand(subject, unrolled="unrolled" in rewrite)
    for module in (subject.module, chunked.module):
        for part in module.modules():
            if hasattr(part, "p"):
                part.p = 0.0  # a dropout mask would be drawn in another order
    exact = sides.float64(subject)
    loss, gradients = sides.float64(chunked)
    torch.testing.assert_close(loss, exact[0])
    assert len(gradients) == len(exact[1])
    for ours, theirs in zip(gradients, exact[1], strict=True):
        torch.testing.assert_close(ours, theirs)
    assert sides.eager(chunked, "").peak().bytes < 0.8 * sides.eager(subject, "").peak().bytes


def test_every_layer_has_its_limit_and_a_gradient_everywhere() -> None:
    import layers
    import sides
    from chunk_limits import LIMITS

    assert set(LIMITS) == set(layers.LAYERS)
    for name, build in layers.LAYERS.items():
        subject = build("small")
        if subject.training:
            _, gradients = sides.eager(subject, name).numbers()
            assert all(gradient.any() for gradient in gradients), name


@pytest.mark.long
def test_a_study_of_chunking(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import chunking
    import layers
    from chunk_limits import LIMITS, Limit

    monkeypatch.setitem(layers.LAYERS, "tiny", lambda scale: layers.attention(scale, small=64))
    monkeypatch.setitem(LIMITS, "tiny", Limit(0.6, 5.0))
    out, page = tmp_path / "out.json", tmp_path / "page.md"
    asked = "--subjects tiny --scale small --pairs 2 --cached"
    chunking.main([*asked.split(), "--json", str(out), "--markdown", str(page)])

    data = json.loads(out.read_text())
    rows = {row["label"]: row for row in data["subjects"]["tiny"]["rows"]}
    assert not [row for row in rows.values() if row["failed"]]
    inductor = rows["Inductor"]["peak"]
    met, refused = rows["chunk at 60% of Inductor's"], rows["recompute alone at 60%"]
    assert met["budget"] == refused["budget"] == int(0.6 * inductor)
    assert met["peak"] <= met["budget"] and met["loops"] and met["time"]["pairs"] == 2
    assert refused["refused"] and refused["floor"] > refused["budget"]
    assert rows["chunk, least peak"]["peak"] < rows["recompute alone, least peak"]["peak"]
    assert met["numbers"]["relative"] < 1e-5 and rows["Inductor"]["numbers"]["error"] == 1
    status = {verdict["limit"]: verdict["status"] for verdict in data["verdicts"]}
    assert status["peak ≤ 0.60x Inductor's"] == "met"
    table = [line for line in page.read_text().splitlines() if line.startswith("| attention")]
    assert len(table) >= len(rows) and "BudgetError: floor" in page.read_text()
    assert "limits:" in capsys.readouterr().out


@pytest.mark.slow
def test_inference_is_measured_without_gradients() -> None:
    import chunk_study
    import layers
    from chunk_limits import LIMITS
    from measuring import Plan

    subject = layers.attention("small", small=48)
    module = subject.module.layer.requires_grad_(False)

    class Run(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = module

        def forward(self, x: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.layer(x, bias),)

    subject = dataclasses.replace(subject, module=Run(), training=False)
    plan = Plan(0, 0, ())
    made = chunk_study.study(
        subject, LIMITS["inference"], "small", plan, lambda doing, share: None, cached=True
    )
    assert not [row for row in made.rows if row.failed]
    least = made.row("chunk, least peak")
    assert least.numbers is not None and least.numbers.relative < 1e-5
    assert least.numbers.worst_name in ("outputs' means", "output 0")
    assert least.peak < made.inductor.peak


def test_what_the_study_of_chunking_cannot_do_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    import chunking

    for argv, text in (
        (["--subjects", "nobody"], "choose from"),
        (["--pairs", "1"], "--pairs"),
        (["--longest", "--subjects", "vocabulary"], "attention, evoformer"),
        (["--longest", "--ways", "nobody"], "choose from"),
        (["--memory", "60%"], "expected bytes"),
        (["--memory", "lots"], "--memory"),
    ):
        with pytest.raises(SystemExit):
            chunking.parse(argv)
        assert text in capsys.readouterr().err


def test_inductors_own_chunking_says_where_it_does_not_apply() -> None:
    import layers
    import sides

    with pytest.raises(sides.DoesNotApply), sides.planned_anew():
        sides.auto_chunked(layers.attention("small", small=32), "auto_chunker")

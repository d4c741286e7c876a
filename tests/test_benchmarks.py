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


@pytest.mark.slow
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
    asked = "--subjects tiny --scale small --budgets 2 --pairs 2 --peers="
    run.main([*asked.split(), "--json", str(out), "--markdown", str(page)])

    (data,) = json.loads(out.read_text())["subjects"]
    rows = {row["label"]: row for row in data["rows"]}
    assert not [row for row in rows.values() if row["failed"]]
    budgets = [row for row in rows.values() if row["kind"] == "budget"]
    assert [row["budget"] for row in budgets] == [
        rows["Inductor"]["peak"],
        rows["checkpointed, Inductor"]["peak"],
    ]
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

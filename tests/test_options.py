"""What a user may write in `options=`, and what is said about the rest."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from memcompile import options
from memcompile.options import (
    UNITS,
    Budget,
    Options,
    OptionsError,
    format_bytes,
    free_bytes,
    parse_bytes,
    warn_if_above_free,
)

GIB = 1024**3


@dataclasses.dataclass(frozen=True)
class MyPass:
    chunks: int = 4


# Budgets.


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (None, Budget("none")),
        (8 * GIB, Budget("bytes", 8 * GIB)),
        (8e9, Budget("bytes", 8_000_000_000)),
        ("8GiB", Budget("bytes", 8 * GIB)),
        (" 8 gib ", Budget("bytes", 8 * GIB)),
        ("1.5GB", Budget("bytes", 1_500_000_000)),
        ("512 MiB", Budget("bytes", 512 * 1024**2)),
        ("4096", Budget("bytes", 4096)),
        ("60%", Budget("share", 0.6)),
        ("12.5 %", Budget("share", 0.125)),
        ("100%", Budget("share", 1.0)),
        ("min", Budget("min")),
    ],
)
def test_a_budget_means_what_it_says(written: Any, meant: Budget) -> None:
    assert Options(budget=written).limit == meant


@pytest.mark.parametrize(
    "written",
    [
        *(0, -1, 0.6, math.nan, math.inf, -math.inf, True, False, []),
        *("", "0", "0%", "101%", "-5%", "%", "lots", "8 Gigs", "8 GiB GiB", "-8GiB"),
        *("nan", "inf", "1e9", "0.4B", "8,5GB", "٣GiB"),
    ],
)
def test_a_bad_budget_names_itself_and_what_is_allowed(written: Any) -> None:
    with pytest.raises(OptionsError) as caught:
        Options(budget=written)
    text = str(caught.value)
    assert text.startswith(f"budget={written!r}")
    assert '"8GiB"' in text and '"60%"' in text and '"min"' in text and "None" in text


def test_an_options_error_is_a_value_error() -> None:
    with pytest.raises(ValueError):
        Options(budget=-1)


@settings(deadline=None)
@given(st.integers(1, 2**60))
def test_bytes_survive_being_written(count: int) -> None:
    assert Budget.parse(str(Budget.parse(count))) == Budget("bytes", count)


@settings(deadline=None)
@given(st.floats(0, 1, exclude_min=True))
def test_shares_survive_being_written(share: float) -> None:
    assert Budget.parse(str(Budget("share", share))) == Budget("share", share)


@pytest.mark.parametrize("kind", ["min", "none"])
def test_the_other_budgets_write_themselves(kind: Any) -> None:
    assert str(Budget(kind)) == kind


# Reserve.


def test_a_reserve_is_bytes_and_may_be_zero() -> None:
    assert Options(reserve="1GiB").reserve_bytes == GIB
    assert Options(reserve=0).reserve_bytes == Options(reserve="0").reserve_bytes == 0


@pytest.mark.parametrize("written", [-1, "10%", "min", None, True, 1.5, math.nan, "x"])
def test_a_bad_reserve_is_refused(written: Any) -> None:
    with pytest.raises(OptionsError, match="reserve="):
        Options(reserve=written)


# Bytes as text.


@settings(deadline=None)
@given(st.integers(0, 2**50), st.sampled_from(sorted(UNITS)))
def test_every_unit_multiplies(count: int, unit: str) -> None:
    assert parse_bytes(f"{count} {unit}") == parse_bytes(f"{count}{unit.upper()}")
    assert parse_bytes(f"{count}{unit}") == count * UNITS[unit]


@settings(deadline=None)
@given(st.integers(0, 2**60))
def test_formatted_bytes_read_back_to_half_a_percent(count: int) -> None:
    assert parse_bytes(format_bytes(count)) == pytest.approx(count, rel=0.005)


@settings(deadline=None)
@given(st.text(max_size=12))
def test_any_text_is_bytes_or_a_value_error(text: str) -> None:
    try:
        assert parse_bytes(text) >= 0
    except ValueError as error:
        assert repr(text) in str(error)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (3 * GIB // 2, "1.50 GiB"),
        (1024**2 - 1, "1.00 MiB"),
        (-3 * GIB // 2, "-1.50 GiB"),
    ],
)
def test_bytes_are_written_for_people(count: int, text: str) -> None:
    assert format_bytes(count) == text


# The dict that torch.compile hands over.


def test_nothing_given_is_the_defaults() -> None:
    assert Options.parse(None) == Options.parse({}) == Options()
    assert Options().limit.kind == "none"


def test_a_dict_is_the_same_as_keywords() -> None:
    given = {"budget": "60%", "strict": True, "lower": "eager", "mode": "max-autotune"}
    assert Options.parse(given) == Options(**given)


def test_an_unknown_key_lists_the_known_and_the_nearest() -> None:
    with pytest.raises(OptionsError) as caught:
        Options.parse({"buget": 5})
    text = str(caught.value)
    assert "'buget'" in text and "did you mean 'budget'?" in text
    assert all(repr(field.name) in text for field in dataclasses.fields(Options))


def test_an_inductor_key_says_where_it_belongs() -> None:
    with pytest.raises(OptionsError, match=r"write inductor=\{'max_autotune': True\}"):
        Options.parse({"max_autotune": True})
    assert Options.parse({"inductor": {"max_autotune": True}}).inductor == {"max_autotune": True}


def test_an_unknown_inductor_key_names_its_neighbours() -> None:
    with pytest.raises(OptionsError, match="did you mean 'max_autotune'"):
        Options(inductor={"max_autotun": True})


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("strict", 1, "True or False"),
        ("lower", "triton", "'inductor', 'eager'"),
        ("lower", [], "'inductor', 'eager'"),
        ("mode", "fast", "'reduce-overhead'"),
        ("mode", ["default"], "'reduce-overhead'"),
        ("name", 3, "text"),
        ("inductor", ["max_autotune"], "dict"),
        ("passes", 3, "text such as"),
        ("passes", MyPass(), "list of texts and passes"),
        ("passes", {"chunk": 4}, "list of texts and passes"),
        ("passes", ["recompute", 3], "3 is neither"),
        ("passes", [MyPass], "MyPass"),
        ("passes", [["recompute"]], "neither"),
    ],
)
def test_every_option_is_checked(option: str, value: Any, allowed: str) -> None:
    with pytest.raises(OptionsError) as caught:
        Options.parse({option: value})
    assert str(caught.value).startswith(f"{option}={value!r}")
    assert allowed in str(caught.value)


@pytest.mark.parametrize("value", [None, "default,mine", [], ["recompute", MyPass()], (MyPass(),)])
def test_passes_are_kept_as_given(value: Any) -> None:
    assert Options(passes=value).passes is value


def test_options_that_are_no_dict_are_refused() -> None:
    with pytest.raises(OptionsError, match="options="):
        Options.parse("budget=8GiB")  # type: ignore[arg-type]


def test_options_do_not_change_under_the_user() -> None:
    patches = {"max_autotune": True}
    mine = Options(inductor=patches)
    patches.clear()
    assert mine.inductor == {"max_autotune": True}
    with pytest.raises(dataclasses.FrozenInstanceError):
        mine.budget = 3  # type: ignore[misc]


# The cache key.


def test_two_spellings_share_a_key_and_a_label_is_no_part_of_it() -> None:
    assert Options(budget="512 MiB").key() == Options(budget=512 * 1024**2, name="mine").key()
    patches = {"max_autotune": True, "debug": False}
    backwards = dict(reversed(patches.items()))
    assert Options(inductor=patches).key() == Options(inductor=backwards).key()


def test_all_that_changes_the_code_changes_the_key() -> None:
    others: list[dict[str, Any]] = [
        {},
        {"budget": 10},
        {"budget": "10%"},
        {"budget": "min"},
        {"reserve": 10},
        {"strict": True},
        {"lower": "eager"},
        {"inductor": {"max_autotune": True}},
        {"inductor": {"max_autotune": False}},
        {"mode": "default"},
    ]
    assert len({Options(**other).key() for other in others}) == len(others)


def test_a_key_holds_no_address() -> None:
    patches = {"post_grad_custom_post_pass": lambda graph: None, "debug": object()}
    assert "0x" not in Options(inductor=patches).key()


# The device's free memory.


def test_a_budget_above_free_memory_warns() -> None:
    with pytest.warns(UserWarning, match=r"budget of 1024\.00 PiB is above what cpu has free"):
        warn_if_above_free("cpu", 2**60)


def test_a_budget_that_fits_is_silent_and_what_is_held_does_not_count() -> None:
    free = free_bytes("cpu")
    assert free is not None and free > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_above_free("cpu", 1)
        warn_if_above_free("cpu", 2**60, held=2**60)
        warn_if_above_free("meta", 2**60)


def test_a_container_limit_bounds_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "_container_limit", lambda: 1000)
    assert free_bytes("cpu") == 1000

"""Passes by name: pipelines as text and as objects, and what a typing error gets."""

import dataclasses
import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from typing import ClassVar

import pytest
from memcompile_example import PackBools
from torch import fx

import memcompile
from memcompile import Context, PassError, Rewrite
from memcompile.registry import available, defaults, resolve, source_key, spell


@dataclasses.dataclass(frozen=True)
class Sized(Rewrite):
    """A pass with one option of each kind."""

    name: ClassVar[str] = "sized"
    size: int = 4
    share: float = 0.5
    mode: str = "fp8"
    deep: bool = False
    dims: tuple[int, ...] = (0, 1)
    only: str | None = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size={self.size} is below 1")

    def rewrite(self, module: fx.GraphModule, context: Context) -> bool:
        return False


@pytest.fixture
def sized(monkeypatch: pytest.MonkeyPatch) -> None:
    """``sized`` as if a package had registered it."""
    install(monkeypatch, ("sized", Sized, "stranger"), ("pack_bools", PackBools, "example"))


def install(monkeypatch: pytest.MonkeyPatch, *points: tuple[str, object, str]) -> None:
    class Point:
        def __init__(self, name: str, loaded: object, owner: str) -> None:
            self.name, self.value, self.loaded = name, f"{owner}:{name}", loaded
            self.dist = type("Dist", (), {"name": owner})

        def load(self) -> object:
            return self.loaded

    found = [Point(*point) for point in points]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: found)


def test_the_defaults_are_the_exact_built_ins() -> None:
    names = [each.name for each in defaults()]
    assert "recompute" in names
    assert all(each.exactness != "no" for each in defaults())
    assert resolve(None) == resolve("default") == defaults()
    assert resolve("") == resolve([]) == []


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("sized", [Sized()]),
        (" sized { size = 8 } ", [Sized(size=8)]),
        ("sized{size=8,share=0.25,deep=True}", [Sized(size=8, share=0.25, deep=True)]),
        ("sized{mode=fp4}", [Sized(mode="fp4")]),
        ("sized{mode='fp4'}", [Sized(mode="fp4")]),
        ("sized{dims=(2, 3)},pack_bools{least=1}", [Sized(dims=(2, 3)), PackBools(1)]),
        ("pack_bools,sized{only=None}", [PackBools(), Sized()]),
        ("sized,sized", [Sized()]),
        (["pack_bools", Sized(size=2)], [PackBools(), Sized(size=2)]),
    ],
)
def test_pipelines_are_read(text: str, passes: list[memcompile.Pass], sized: None) -> None:
    assert resolve(text) == passes


@pytest.mark.parametrize(
    ("configured", "text"),
    [
        (Sized(), "sized"),
        (Sized(size=8), "sized{size=8}"),
        (Sized(mode="fp4", dims=()), "sized{mode='fp4',dims=()}"),
        (Sized(only="None"), "sized{only='None'}"),
        (Sized(share=1e-3, deep=True), "sized{share=0.001,deep=True}"),
    ],
)
def test_spelling_goes_round(configured: Sized, text: str, sized: None) -> None:
    assert spell(configured) == text
    assert resolve(text) == [configured]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("siced", "no pass is named 'siced'; installed: pack_bools, sized"),
        ("sized{sice=8}", "'sized' has no option 'sice=8'; its options: .*size"),
        ("sized{8}", "'sized' has no option '8'"),
        ("sized{size=8", "cannot read 'sized{size=8' in passes='sized{size=8'"),
        ("sized pack_bools", "cannot read 'sized pack_bools'"),
        ("sized{size=0}", "pass sized{size=0}: size=0 is below 1"),
        ("sized,sized{size=8}", r"two passes are named 'sized': sized and sized\{size=8\}"),
        ("default{size=1}", "no pass is named 'default'"),
    ],
)
def test_what_is_misspelt_is_an_error(text: str, says: str, sized: None) -> None:
    with pytest.raises(PassError, match=says):
        resolve(text)


def test_two_packages_may_not_share_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, ("sized", Sized, "one"), ("sized", Sized, "two"))
    with pytest.raises(PassError, match="two passes are named 'sized': from one and from two"):
        available()


@pytest.mark.parametrize(
    ("name", "loaded", "says"),
    [
        ("sized", int, "is not a memcompile.Pass"),
        ("sized", spell, "is not a memcompile.Pass"),
        ("other", Sized, "is a pass named 'sized'; give both the same name"),
    ],
)
def test_a_wrong_entry_point_is_an_error(
    name: str, loaded: object, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, (name, loaded, "stranger"))
    with pytest.raises(PassError, match=says):
        available()


def test_an_edit_of_the_source_changes_the_key(tmp_path: Path) -> None:
    source = Path(sys.modules[PackBools.__module__].__file__ or "").read_text()
    edited = source.replace("& places", "&  places")
    assert edited != source
    key = key_of(tmp_path / "one.py", source)
    assert key_of(tmp_path / "two.py", source) == key
    assert key_of(tmp_path / "three.py", edited) != key
    assert source_key(PackBools(least=9)) != source_key(PackBools())


def key_of(path: Path, source: str) -> str:
    """The key of the pass in ``source``, imported from ``path``."""
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("edited_pass", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["edited_pass"] = module  # where dataclasses and inspect look
    try:
        spec.loader.exec_module(module)
        return source_key(module.PackBools())
    finally:
        del sys.modules["edited_pass"]

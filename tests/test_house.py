"""The house rules that no linter holds. (Import floors are in pyproject.toml.)"""

import ast
import re
import subprocess
import sys
import tomllib
import types
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("memcompile/**/*.py"), *ROOT.glob("passes/**/*.py")])
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
DOOR = ROOT / "memcompile" / "_torch"  #: the only importer of private torch API


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


# ---------------------------------------------------------------- private torch API


def imports(tree: ast.AST) -> Iterator[tuple[int, str, str]]:
    """``(line, local name, what it stands for)`` of every absolute import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.asname or alias.name, alias.name
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                yield node.lineno, alias.asname or alias.name, f"{node.module}.{alias.name}"


def private_torch(source: str) -> Iterator[tuple[int, str]]:
    """Where ``source`` imports or reaches into ``torch._…``, under whatever local name."""
    tree = ast.parse(source)
    stands_for = {"torch": "torch"}
    for line, local, name in imports(tree):
        stands_for[local] = name
        if is_private(name):
            yield line, name

    def dotted(node: ast.expr) -> str:
        if isinstance(node, ast.Attribute):
            return f"{dotted(node.value)}.{node.attr}"
        return stands_for.get(node.id, "") if isinstance(node, ast.Name) else ""

    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(name := dotted(node)):
            yield node.lineno, name


def is_private(name: str) -> bool:
    package, *parts = name.split(".")
    if package not in ("torch", "functorch") or parts[:1] == ["ops"]:  # ops have such names
        return False
    return any(part.startswith("_") and not part.startswith("__") for part in parts)


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_private_torch_has_one_door(path: Path) -> None:
    if path.parent != DOOR:
        found = [f"{path}:{line}: {name}" for line, name in private_torch(path.read_text())]
        assert not found, "move to memcompile/_torch/:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch._inductor.config", True),
        ("from torch import _C", True),
        ("def f():\n    from torch._dynamo.utils import counters as c", True),
        ("import torch\ntorch.fx.experimental._config.x", True),
        ("import torch.utils as u\nu._pytree.tree_map", True),
        ("from functorch.compile import _x", True),
        ("import torch\ntorch.ops.aten._softmax.default\ntorch.__version__", False),
        ("from memcompile._torch import compile_fx\nself._dynamo", False),
    ],
)
def test_private_torch_is_seen(source: str, found: bool) -> None:
    assert bool(list(private_torch(source))) is found


@pytest.mark.parametrize(
    "room",
    [
        "memcompile._torch",
        "memcompile._torch.draws",
        "memcompile._torch.dry",
        "memcompile._torch.fusion",
        "memcompile._torch.loops",
        "memcompile._torch.modes",
        "memcompile._torch.pieces",
        "memcompile._torch.packing",
        "memcompile._torch.transfers",
    ],
)
def test_everything_behind_the_door_is_there(room: str) -> None:
    door = import_module(room)
    assert door.__all__
    assert [name for name in door.__all__ if not hasattr(door, name)] == []


# ------------------------------------------------------------------------ the package


def test_only_declared_dependencies_are_imported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = project["dependencies"] + project["optional-dependencies"]["viz"]
    declared = {re.split(r"\W", need)[0] for need in needs}
    declared |= {"functorch", "memcompile", "memcompile_passes"}  # torch brings functorch
    for path in SOURCES:
        tops = {name.split(".")[0] for _, _, name in imports(ast.parse(path.read_text()))}
        assert tops - declared - sys.stdlib_module_names == set(), relative(path)


def test_torch_finds_the_backend_without_importing_it() -> None:
    code = (
        "import sys, torch._dynamo as dynamo;"
        "assert 'memopt' in dynamo.list_backends(), dynamo.list_backends();"
        "assert 'memcompile' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_no_file_is_long(path: Path) -> None:
    lines = path.read_text().count("\n")
    assert lines <= 400


# -------------------------------------------------------------------------- the pages


def snippets(page: str) -> str:
    """A page's Python, all else blanked: what fails is at the page's own line."""
    code, fence, exempt = [], None, False
    for line in page.splitlines():
        bare = line.strip()
        if fence is None:
            if match := re.match(r"\s*(`{3,}|~{3,})(\w*)", line):
                fence, runs = match[1], match[2] == "python" and not exempt
                indent = len(line) - len(line.lstrip())
            exempt = bare == "<!-- not run -->" or (exempt and not bare)
            code.append("")
        elif bare == fence:
            fence, exempt = None, False
            code.append("")
        else:
            code.append(line[indent:] if runs else "")
    return "\n".join(code)


def test_snippets_keep_their_lines() -> None:
    page = """text\n```python\na = 1\n```\n<!-- not run -->\n\n```python\n!\n```
```bash\nrm\n```\n* item\n  ```python\n  b = a\n  ```"""
    assert snippets(page).split("\n") == [
        *["", "", "a = 1", "", "", "", "", "", "", "", "", "", "", "", "b = a", ""]
    ]


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_snippet_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"page_{page.stem.replace('-', '_')}"
    file = tmp_path / f"{name}.py"  # a real file and module, as dataclasses and Dynamo expect
    file.write_text(snippets(page.read_text()))
    module = types.ModuleType(name)
    module.__file__ = str(file)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.chdir(tmp_path)
    exec(compile(file.read_text(), str(file), "exec"), module.__dict__)

"""C++ kernels are compiled together: a graph's as one unit, and each by itself where that fails."""

import re
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import memopt
from torch._inductor.codecache import CppPythonBindingsCodeCache
from torch._inductor.exc import InductorError
from torch._inductor.utils import fresh_cache

from memcompile._torch import units
from memcompile._torch.units import ALONE, Binding


@pytest.fixture
def sources() -> Iterator[list[str]]:
    """What is given to the C++ compiler, no kernel of an earlier run at hand."""
    given, load = [], CppPythonBindingsCodeCache.load_async

    def load_async(code: str, *args: Any, **kwargs: Any) -> Any:
        given.append(code)
        return load(code, *args, **kwargs)

    with (
        fresh_cache(),
        mock.patch.object(CppPythonBindingsCodeCache, "load_async", staticmethod(load_async)),
    ):
        yield given


def functions(source: str) -> int:
    """Of how many kernels a source is."""
    return len(re.findall(r'extern "C"\s+void\s+kernel', source))


def step(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
    for weight in weights:
        x = torch.tanh(x @ weight) * 2
    return x.square().mean()


def run(call: Any) -> list[torch.Tensor]:
    torch.manual_seed(0)
    x, *weights = (torch.randn(8, 8, requires_grad=True) for _ in range(4))
    loss = call(x, *weights)
    loss.backward()
    return [loss.detach(), x.grad, *(w.grad for w in weights)]


@pytest.mark.parametrize("threads", [1, 2])
def test_kernels_of_a_graph_are_compiled_together(threads: int, sources: list[str]) -> None:
    with torch._inductor.config.patch(compile_threads=threads):
        got = run(memopt(step, "min", "inductor"))
    torch.testing.assert_close(got, run(step))
    assert len(sources) == 2  # forward and backward
    assert all(2 <= functions(source) <= units.MOST for source in sources)


def test_many_kernels_are_several_units(
    sources: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "MOST", 2)
    torch.testing.assert_close(run(memopt(step, "min", "inductor")), run(step))
    assert len(sources) > 2 and max(map(functions, sources)) == 2


def test_kernels_are_compiled_alone_where_the_unit_is_not(sources: list[str]) -> None:
    with mock.patch.object(Binding, "text", lambda self, kernels: "this is no C++"):
        torch.testing.assert_close(run(memopt(step, "min", "inductor")), run(step))
    assert len([s for s in sources if functions(s) == 1]) >= 4


def test_an_error_of_a_kernels_own_is_raised(sources: list[str]) -> None:
    broken = mock.patch.object(
        units.Kernel, "__init__", lambda self, types, source: vars(self).update(
            argtypes=types, source=source.replace("auto tmp0", "auto tmp0 = nothing; auto tmp1")
        ),
    )  # fmt: skip
    with broken, pytest.raises(InductorError, match="nothing"):
        run(memopt(step, "min", "inductor"))


def test_what_cannot_stand_beside_others_is_left_alone() -> None:
    kernel = '#include <a.h>\nextern "C"  void  kernel(float* x)\n{\n}\n'
    assert ALONE.fullmatch(kernel)
    assert not ALONE.fullmatch("static int helper() { return 1; }\n" + kernel)
    assert Binding.of("another text for bindings") is None

"""The one door to private torch, where releases differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from memcompile import _torch


class Named(_torch.CustomGraphPass):
    """A graph pass that notes its calls."""

    def __init__(self, name: str | None, calls: list[str | None]) -> None:
        self.name, self.calls = name, calls

    def __call__(self, graph: fx.Graph) -> None:
        self.calls.append(self.name)

    def uuid(self) -> str | None:
        return self.name


def test_a_users_graph_passes_run_before_ours() -> None:
    calls: list[str | None] = []
    a, b, ours = (Named(name, calls) for name in ("a", "b", "ours"))
    assert _torch.graph_passes(None, ours) is ours
    for given, order in ((a, ["a", "ours"]), ([a, b], ["a", "b", "ours"])):
        calls.clear()
        chain = _torch.graph_passes(given, ours)
        chain(fx.Graph())
        assert calls == order
        assert chain.uuid() == tuple(order)


def test_passes_without_an_identity_are_not_cached() -> None:
    ours = Named("ours", [])
    assert _torch.graph_passes(lambda graph: None, ours).uuid() is None
    assert _torch.graph_passes(Named(None, []), ours).uuid() is None


def test_a_compilers_config_is_made_as_each_release_makes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = fx.GraphModule(torch.nn.Module(), fx.Graph())
    assert hasattr(_torch.compiler_config(module), "cudagraphs")

    def of_2_11(config: Any) -> Any:
        return config

    monkeypatch.setattr(_torch.inductor_compile_fx, "create_compiler_config_extra", of_2_11)
    assert _torch.compiler_config(module) is _torch.inductor_config

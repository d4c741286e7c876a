"""``check_pass`` lets good passes through and says what is wrong with bad ones."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import ClassVar

import pytest
import torch
from memcompile_example import PackBools
from torch import fx, nn

from memcompile import (
    Context,
    PassError,
    Proposal,
    Proposer,
    Rewrite,
    Step,
    available,
    rebuild,
)
from memcompile.contract import Exactness
from memcompile.testing import capture, check_pass

aten = torch.ops.aten


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 8))


def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


def data() -> tuple[nn.Module, torch.Tensor]:
    return net(), torch.randn(24, 16)


# ------------------------------------------------------------------------------ proposers


def floats(step: Step) -> Iterator[fx.Node]:
    """Early float values of some size."""
    for value in step.early_values():
        tensor = value.meta["val"]
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.dim() == 2:
            yield value


@dataclasses.dataclass(frozen=True)
class Codec(Proposer):
    """Offers what ``kind`` names, right or wrong."""

    name: ClassVar[str] = "codec"
    kind: str = "half"
    exact: Exactness = "bits"

    @property
    def exactness(self) -> Exactness:
        return self.exact

    def propose(self, step: Step, context: Context) -> Iterable[Proposal]:
        for value in floats(step):
            if self.kind == "random" or self.kind == "recompute":
                yield Proposal(value)
            elif self.kind == "half":
                yield Proposal(
                    value, "half", rebuild(value, lambda s: s.float(), lambda s: s.half())
                )
            elif self.kind == "double":
                yield Proposal(
                    value, "wide", rebuild(value, lambda s: s.float(), lambda s: s.double())
                )
            elif self.kind == "shape":
                yield Proposal(
                    value, "flat", rebuild(value, lambda s: s.flatten(), lambda s: s + 0)
                )
            elif self.kind == "twins":
                yield Proposal(
                    value, "half", rebuild(value, lambda s: s.float(), lambda s: s.half())
                )
                yield Proposal(value, "half", rebuild(value, lambda s: s + 1, lambda s: s + 0))
        if self.kind == "late":
            yield from (Proposal(node) for node in step.sides.late if node.op == "call_function")
        if self.kind == "edits":
            step.graph.erase_node(step.graph.call_function(aten.neg.default, (step.primals[0],)))
            step.output.append(step.nodes[0])
        if self.kind == "raises":
            raise KeyError("something of mine")


@pytest.mark.parametrize("dynamic", [None, True])
def test_recompute_is_sound(dynamic: bool | None) -> None:
    checked = check_pass(available()["recompute"](), loss, *data(), dynamic=dynamic)
    assert checked.by == "recompute" and checked.error == 0.0
    assert checked.moves > 3 and checked.after < checked.before


@pytest.mark.parametrize("dynamic", [None, True])
def test_pack_bools_is_sound(dynamic: bool | None) -> None:
    checked = check_pass(PackBools(), loss, *data(), dynamic=dynamic)
    assert checked.moves == 2 and checked.error == 0.0 and not checked.changed
    masks = 2 * 24 * 16
    assert checked.before - checked.after == masks * 7 // 8


def test_a_lossy_codec_is_held_to_what_it_says() -> None:
    checked = check_pass(Codec(exact="no"), loss, *data())
    assert 1e-6 < checked.error < 1e-2
    with pytest.raises(PassError, match="decode gives other bits than the value has: by up to"):
        check_pass(Codec(), loss, *data())
    with pytest.raises(PassError, match="more than rounding"):
        check_pass(Codec(exact="rounding"), loss, *data())


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("random", r"run node \w*(rand|bernoulli|inductor)\w* (.* )?again"),
        ("double", "stores .* bytes more than keeping the value does"),
        ("shape", r"decode for node \w+ gives torch.float32\[\d+\]"),
        ("twins", "two moves named 'half' for node"),
        ("late", "not an early value"),
        ("raises", "KeyError: 'something of mine'"),
    ],
)
def test_a_bad_proposer_is_caught(kind: str, says: str) -> None:
    with pytest.raises(PassError, match=says) as caught:
        check_pass(Codec(kind, "no" if kind == "double" else "bits"), loss, *data())
    assert f"codec{{kind={kind!r}" in str(caught.value)


def test_the_error_names_the_source_line() -> None:
    with pytest.raises(PassError, match=r"node \w+: .*\[\w+\.py:\d+ in \w+\]"):
        check_pass(Codec(), loss, *data())


# ------------------------------------------------------------------------------- rewrites


@dataclasses.dataclass(frozen=True)
class Edit(Rewrite):
    """Edits products as ``kind`` names, right or wrong."""

    name: ClassVar[str] = "edit"
    idempotent: ClassVar[bool] = True
    kind: str = "swap"
    exact: Exactness = "bits"

    @property
    def exactness(self) -> Exactness:
        return self.exact

    def rewrite(self, module: fx.GraphModule, context: Context) -> bool:
        graph, changed = module.graph, False
        for node in graph.find_nodes(op="call_function", target=aten.mul.Tensor):
            left, right = node.args
            if self.kind in ("swap", "again"):  # a product commutes
                swap = self.kind == "again" or str(left) < str(right)
                if swap and isinstance(left, fx.Node) and isinstance(right, fx.Node):
                    node.args, changed = (right, left), True
            elif self.kind in ("lies", "wrong"):
                node.target, changed = aten.add.Tensor, self.kind == "wrong"
            elif self.kind == "larger" and aten.cat.default not in {u.target for u in node.users}:
                changed = True
                with graph.inserting_after(node):
                    wide = graph.call_function(aten.cat.default, ([node] * 9,))
                    wide.meta["val"] = torch.cat([node.meta["val"]] * 9)
                with graph.inserting_after(wide):
                    back = graph.call_function(aten.slice.Tensor, (wide, 0, 0, 24))
                    back.meta["val"] = node.meta["val"]
                node.replace_all_uses_with(back, delete_user_cb=lambda user, w=wide: user is not w)
        if self.kind == "broken":
            node = next(iter(graph.find_nodes(op="call_function")))
            (output,) = graph.find_nodes(op="output")
            output.append(node)
            changed = True
        return changed or self.kind == "nothing"


def test_a_good_rewrite_passes() -> None:
    checked = check_pass(Edit(), loss, *data())
    assert checked.changed and checked.error == 0.0 and checked.after <= checked.before


def test_a_rewrite_that_changes_nothing_passes() -> None:
    assert not check_pass(Edit("none"), loss, *data()).changed


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("lies", "changed the graph and returned False"),
        ("nothing", "returned True and changed nothing"),
        ("broken", "raised"),
        ("again", "says idempotent = True and changed its own result again"),
        ("wrong", r"from node mul\w* on: output 0 differs, by up to .* \[\w+.py:\d+ in \w+\]"),
        ("larger", "raises the predicted peak from"),
    ],
)
def test_a_bad_rewrite_is_caught(kind: str, says: str) -> None:
    with pytest.raises(PassError, match=says) as caught:
        check_pass(Edit(kind), loss, *data())
    assert f"edit{{kind={kind!r}}}" in str(caught.value)


@dataclasses.dataclass(frozen=True)
class Reorder(Rewrite):
    """Sums in another order: the same function, other rounding."""

    name: ClassVar[str] = "reorder"
    exact: Exactness = "rounding"

    @property
    def exactness(self) -> Exactness:
        return self.exact

    def rewrite(self, module: fx.GraphModule, context: Context) -> bool:
        changed = False
        for node in module.graph.find_nodes(op="call_function", target=aten.mean.default):
            (base,) = node.args
            with module.graph.inserting_before(node):
                flipped = module.graph.call_function(aten.flip.default, (base, [0]))
            flipped.meta["val"] = base.meta["val"]
            node.args, changed = (flipped,), True
        return changed


def test_rounding_is_told_from_error() -> None:
    checked = check_pass(Reorder(), lambda x: (x * 1.7).exp().mean(), _leaf(37, 11))
    assert 0.0 < checked.error < 1e-6
    with pytest.raises(PassError, match='say exactness "rounding" or "no"'):
        check_pass(Reorder("bits"), lambda x: (x * 1.7).exp().mean(), _leaf(37, 11))


def _leaf(*size: int) -> torch.Tensor:
    return torch.randn(*size).requires_grad_()


# ------------------------------------------------------------------------- around a graph


def test_the_class_itself_is_checked() -> None:
    class Loose(Rewrite):
        name = "loose"

        def rewrite(self, module: fx.GraphModule, context: Context) -> bool:
            return False

    with pytest.raises(PassError, match=r"loose is not @dataclasses.dataclass\(frozen=True\)"):
        check_pass(Loose(), loss, *data())
    with pytest.raises(PassError, match="no pass; derive it from Rewrite or Proposer"):
        check_pass("recompute", loss, *data())  # type: ignore[arg-type]
    with pytest.raises(PassError, match="exactness 'perhaps'"):
        check_pass(Edit(exact="perhaps"), loss, *data())  # type: ignore[arg-type]


def test_graph_breaks_give_several_graphs_and_inference_none_late() -> None:
    def broken(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = model(x)
        torch._dynamo.graph_break()
        return x.square().mean()

    assert len(capture(broken, *data())) == 2
    assert check_pass(available()["recompute"](), broken, *data()).graphs == 2
    with torch.no_grad():
        (graph,) = capture(loss, *data())
    assert not graph.step.tangents


def test_a_buffer_the_step_writes_is_compared() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU())
    assert check_pass(available()["recompute"](), loss, model, torch.randn(24, 16)).error == 0.0


def test_an_integer_function_computes_no_step() -> None:
    with pytest.raises(ValueError, match="captured no graph"):
        capture(lambda x: x, 3)

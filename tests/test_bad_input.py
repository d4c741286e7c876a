"""Bad input: the step is right, or an error says what is wrong and whose fault it is."""

import dataclasses
import re
from collections.abc import Iterator
from typing import ClassVar

import pytest
import torch
from helpers import assert_same, check, expected, memopt, planned, stack, tensor
from torch import fx, nn

import memcompile
from memcompile import BudgetError, OptionsError, PassError

# ---------------------------------------------------------------- models


def test_an_empty_module() -> None:
    check(nn.Sequential(), tensor(3))
    check(nn.Identity(), tensor(3, grad=False))


def test_a_function_without_inputs() -> None:
    torch.testing.assert_close(memopt(lambda: torch.arange(3) + 1, "min")(), torch.arange(1, 4))


@pytest.mark.parametrize("lower", ["eager", "inductor"])
def test_outputs_that_are_integers_only(lower: str) -> None:
    step = stack(1)
    check(lambda x: (step(x).argmax(-1), (x > 0).sum()), tensor(4, 8), lower=lower)


def test_no_trainable_parameter_and_no_gradient() -> None:
    reports = check(stack(1).requires_grad_(False), tensor(4, 8, grad=False))
    assert [report.kind for report in reports] == ["inference"]


def test_only_numbers_in_and_out() -> None:
    assert memopt(lambda a, b: a * b + 1, "min")(3, 4) == 13


def test_inputs_in_every_memory_order() -> None:
    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x.exp() @ y).sin() * x.sum()

    whole = tensor(8, 9, grad=False)
    for view in (whole.t(), whole[::2, 1:5], whole.flip(0)[:, ::3], whole[:1].expand(4, -1)):
        x = view.detach().requires_grad_()
        got, wanted = (
            torch.autograd.grad(call(x, tensor(x.shape[1], 3)).sum(), x)
            for call in (memopt(step, "min"), step)
        )
        torch.testing.assert_close(got, wanted)


def test_channels_last() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).double()
    model = model.to(memory_format=torch.channels_last)
    x = tensor(2, 3, 6, 5, grad=False).to(memory_format=torch.channels_last).requires_grad_()
    check(model, x)


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0,)], ids=str)
@pytest.mark.parametrize("lower", ["eager", "inductor"])
def test_tensors_of_no_elements(shape: tuple[int, ...], lower: str) -> None:
    check(lambda x: (x.exp() * 2).sin().sum(0), tensor(*shape), lower=lower)


def test_scalar_tensors() -> None:
    check(lambda x, y: (x.exp() * y).sin(), tensor(), torch.tensor(2.0, dtype=torch.float64))


@pytest.mark.parametrize("lower", ["eager", "inductor"])
def test_complex_tensors(lower: str) -> None:
    values = torch.complex(tensor(4, 3, grad=False), tensor(4, 3, grad=False) + 1)
    check(lambda z: (z.exp() * z).sin() @ z.conj().t(), values.requires_grad_(), lower=lower)


def test_sparse_inputs() -> None:
    eye = torch.eye(4, dtype=torch.float64)

    def step(matrix: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.sparse.mm(matrix, x.exp()).sin()

    check(step, eye.to_sparse(), tensor(4, 3))


def test_a_sparse_embedding_gradient() -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 4, sparse=True, dtype=torch.float64)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.embed(tokens).sin()

    model, tokens = Sparse(), torch.tensor([[1, 1, 6]])
    got, _ = planned(model, [tokens], "min")
    wanted = expected(model, [tokens])
    torch.testing.assert_close(
        got.parameters["embed.weight"].to_dense(), wanted.parameters["embed.weight"].to_dense()
    )


def test_not_a_number_is_not_hidden() -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        return (x.log() * x).exp()  # NaN where x is negative

    check(step, tensor(4, 3))


def test_half_precision() -> None:
    model = stack(1).to(torch.bfloat16)
    x = tensor(4, 8, dtype=torch.bfloat16)
    got, _ = planned(model, [x], "min")
    assert_same(got, expected(model, [x]), rtol=5e-2, atol=5e-2)


# ---------------------------------------------------------------- ops


@pytest.fixture
def library() -> Iterator[torch.library.Library]:
    with torch.library._scoped_library("memcompile_tests", "FRAGMENT") as made:
        yield made


def test_an_op_without_a_fake_kernel_is_named(library) -> None:
    library.define("nameless(Tensor x) -> Tensor")
    library.impl("nameless", lambda x: x.sin(), "CPU")

    def step(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.memcompile_tests.nameless(x.exp()) * 2

    x = tensor(4, 3, grad=False)
    with pytest.raises(Exception, match="nameless"):
        memopt(step, "min", fullgraph=True)(x)


def test_a_custom_op_runs_once_because_it_may_hold_state(library) -> None:
    calls: list[int] = []

    def run(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return x.sin()

    library.define("counted(Tensor x) -> Tensor")
    library.impl("counted", run, "CPU")
    library.impl("counted", lambda x: torch.empty_like(x), "Meta")
    torch.library.register_autograd(
        "memcompile_tests::counted",
        lambda ctx, gradient: gradient * ctx.saved_tensors[0].cos(),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
        lib=library,
    )

    def step(x: torch.Tensor) -> torch.Tensor:
        hidden = torch.ops.memcompile_tests.counted(x.exp())
        return (hidden.exp() * hidden).sin()

    for budget in (None, "min"):
        calls.clear()
        planned(step, [tensor(32, 8)], budget)
        assert len(calls) == 1, budget


def test_a_size_that_depends_on_data() -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        chosen = x[x[:, 0] > 0]
        return (chosen.exp() @ x.t()).sin().sum() + torch.nonzero(x > 0).sum()

    check(step, tensor(6, 3))


@pytest.mark.parametrize("lower", ["eager", "inductor"])
def test_a_size_that_depends_on_data_in_the_graph(lower: str) -> None:
    def step(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        chosen = places.nonzero().squeeze(1)
        return (x[chosen].exp() * 2).sin().sum() * x.sum()

    places = torch.tensor([1, 0, 1, 1, 0, 0])
    with torch._dynamo.config.patch(
        capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True
    ):
        check(step, tensor(6, 3), places, lower=lower)


def test_a_number_read_from_a_tensor() -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        return x.exp() * x.detach().abs().max().item()

    check(step, tensor(6, 3))


def test_a_branch_on_data() -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        hidden = x.exp()
        return hidden.sin() if hidden.sum() > 0 else hidden.cos()

    check(step, tensor(6, 3))


def test_the_models_own_error_is_the_users() -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        return x.exp() @ x

    with pytest.raises(Exception, match=r"size|shape|mat1"):
        memopt(step, "min")(tensor(4, 3))


# ---------------------------------------------------------------- passes


@dataclasses.dataclass(frozen=True)
class Honest(memcompile.Rewrite):
    """Turns ``sin`` into ``sin`` of a copy: a change that changes no number."""

    name: ClassVar[str] = "honest"

    def rewrite(self, module: fx.GraphModule, context: memcompile.Context) -> bool:
        changed = False
        for node in sines(module):
            with module.graph.inserting_before(node):
                copied = module.graph.call_function(torch.ops.aten.clone.default, (node.args[0],))
            copied.meta.update(node.args[0].meta)
            node.args = (copied,)
            changed = True
        return changed


@dataclasses.dataclass(frozen=True)
class SaysNothingChanged(Honest):
    name: ClassVar[str] = "silent"

    def rewrite(self, module: fx.GraphModule, context: memcompile.Context) -> bool:
        for node in sines(module):
            node.target = torch.ops.aten.cos.default
        return False


@dataclasses.dataclass(frozen=True)
class SaysItChanged(Honest):
    name: ClassVar[str] = "boastful"

    def rewrite(self, module: fx.GraphModule, context: memcompile.Context) -> bool:
        return True


@dataclasses.dataclass(frozen=True)
class Raises(Honest):
    name: ClassVar[str] = "raising"

    def rewrite(self, module: fx.GraphModule, context: memcompile.Context) -> bool:
        for node in sines(module):
            node.target = torch.ops.aten.cos.default
        raise KeyError("no such dimension")


@dataclasses.dataclass(frozen=True)
class UsesBeforeItIsMade(Honest):
    name: ClassVar[str] = "breaking"

    def rewrite(self, module: fx.GraphModule, context: memcompile.Context) -> bool:
        for node in sines(module):
            node.args = (list(module.graph.nodes)[-2],)
        return True


@dataclasses.dataclass(frozen=True)
class DropsAnOutput(Honest):
    name: ClassVar[str] = "dropping"

    def rewrite(self, module: fx.GraphModule, context: memcompile.Context) -> bool:
        (output,) = module.graph.find_nodes(op="output")
        output.args = ((None, *output.args[0][1:]),)
        return True


@dataclasses.dataclass(frozen=True)
class ForgetsTheFakeValue(Honest):
    name: ClassVar[str] = "forgetful"

    def rewrite(self, module: fx.GraphModule, context: memcompile.Context) -> bool:
        for node in sines(module):
            with module.graph.inserting_before(node):
                node.args = (
                    module.graph.call_function(torch.ops.aten.clone.default, (node.args[0],)),
                )
        return True


@dataclasses.dataclass(frozen=True)
class AnswersNone(Honest):
    name: ClassVar[str] = "mute"

    def rewrite(self, module: fx.GraphModule, context: memcompile.Context) -> bool:
        return None  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class ReplacesTheGraph(Honest):
    name: ClassVar[str] = "replacing"

    def rewrite(self, module: fx.GraphModule, context: memcompile.Context) -> bool:
        module.graph = fx.Graph()
        return True


@dataclasses.dataclass(frozen=True)
class RaisesWhileProposing(memcompile.Proposer):
    name: ClassVar[str] = "no-ideas"

    def propose(self, step: memcompile.Step, context: memcompile.Context):
        raise ZeroDivisionError("no ideas")


@dataclasses.dataclass(frozen=True)
class ProposesWhatIsLate(memcompile.Proposer):
    name: ClassVar[str] = "too-late"

    def propose(self, step: memcompile.Step, context: memcompile.Context):
        return [memcompile.Proposal(node) for node in step.nodes if node in step.sides.late]


@dataclasses.dataclass(frozen=True)
class ProposesNonsense(memcompile.Proposer):
    name: ClassVar[str] = "nonsense"

    def propose(self, step: memcompile.Step, context: memcompile.Context):
        return ["recompute everything"]


@dataclasses.dataclass(frozen=True)
class DecodesAnotherShape(memcompile.Proposer):
    name: ClassVar[str] = "misshapen"

    def propose(self, step: memcompile.Step, context: memcompile.Context):
        for value in step.early_values():
            how = memcompile.rebuild(value, lambda x: x[..., :1], lambda x: x)
            yield memcompile.Proposal(value, "misshapen", how)


def sines(module: fx.GraphModule) -> list[fx.Node]:
    return module.graph.find_nodes(op="call_function", target=torch.ops.aten.sin.default)


def step_with_sines(x: torch.Tensor) -> torch.Tensor:
    return ((x.sin().exp() @ x.t()).sin() * 2).exp().sum()


FAULTY = {
    SaysNothingChanged: "returned False",
    SaysItChanged: "returned True",
    Raises: "KeyError",
    UsesBeforeItIsMade: "raised",
    DropsAnOutput: "outputs",
    ForgetsTheFakeValue: "meta",
    AnswersNone: "None",
    ReplacesTheGraph: "inputs|outputs",
    RaisesWhileProposing: "ZeroDivisionError",
    ProposesWhatIsLate: "not an early value",
    ProposesNonsense: "raised",
    DecodesAnotherShape: "shape",
}


def faulty() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("kind", FAULTY, ids=lambda kind: kind.name)


@pytest.mark.parametrize("lower", ["eager", "inductor"])
def test_a_rewrite_that_keeps_the_contract_is_applied(lower: str) -> None:
    reports = check(step_with_sines, tensor(5, 3), lower=lower, passes=["default", Honest()])
    assert [ran.changed for ran in reports[0].passes if ran.by == "honest"] == [True]
    if lower == "eager":  # Inductor's own passes drop the copy again
        assert "clone" in reports[0].graph_before


@faulty()
def test_a_pass_that_breaks_its_contract_is_left_out_and_named(kind) -> None:
    (report,) = check(step_with_sines, tensor(5, 3), passes=["default", kind()])
    (note,) = [ran.note for ran in report.passes if ran.by == kind.name]
    assert re.search(FAULTY[kind], note), note
    assert not any(ran.changed for ran in report.passes)


@faulty()
def test_under_strict_a_pass_that_breaks_its_contract_is_an_error(kind) -> None:
    compiled = memopt(step_with_sines, "min", passes=["default", kind()], strict=True)
    with pytest.raises(PassError, match=kind.name) as caught:
        compiled(tensor(5, 3))
    assert re.search(FAULTY[kind], str(caught.value))


def test_a_pass_that_lies_does_so_under_inductor_in_vain() -> None:
    passes = ["default", SaysNothingChanged(), Raises()]
    check(step_with_sines, tensor(5, 3), lower="inductor", passes=passes)


def test_a_faulty_pass_does_not_stop_the_next_one() -> None:
    passes = ["default", Raises(), Honest()]
    (report,) = check(step_with_sines, tensor(5, 3), passes=passes)
    assert {ran.by: ran.changed for ran in report.passes}["honest"]


@dataclasses.dataclass(frozen=True)
class Sized(Honest):
    name: ClassVar[str] = "honest"
    size: int = 1


def test_two_passes_of_one_name_are_an_error_that_names_them() -> None:
    compiled = memopt(step_with_sines, passes=["default", Honest(), Sized(size=2)])
    with pytest.raises(PassError, match="two passes are named 'honest'"):
        compiled(tensor(5, 3))


def test_an_unknown_pass_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(PassError, match=r"'recomptue'.*recompute"):
        memopt(step_with_sines, passes="recomptue")(tensor(5, 3))


# ---------------------------------------------------------------- budgets and options


class Noted(nn.Module):
    """Writes down that it ran, in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = stack(2)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.inner(x).square().sum()


@pytest.mark.parametrize("suppress", [False, True])
@pytest.mark.parametrize("lower", ["eager", "inductor"])
def test_a_budget_out_of_reach_is_refused_before_anything_runs(lower: str, suppress) -> None:
    model = Noted()
    with torch._dynamo.config.patch(suppress_errors=suppress):
        compiled = memopt(model, "4KiB", lower)
        for _ in range(2):
            with pytest.raises(BudgetError) as caught:
                compiled(tensor(64, 8))
    assert model.calls.item() == 0
    error = caught.value
    assert error.budget == 4096 < error.floor
    assert str(error.floor) in str(error)
    assert error.node in str(error)
    assert error.source.startswith("helpers.py:") and error.source in str(error)


def test_the_floor_an_error_names_is_a_budget_that_is_met() -> None:
    model, x = stack(3), [tensor(64, 8)]
    with pytest.raises(BudgetError) as caught:
        planned(model, x, "8KiB")
    got, (report,) = planned(model, x, caught.value.floor)
    assert_same(got, expected(model, x))
    assert report.lowered <= caught.value.floor


def test_the_floor_includes_the_reserve_that_was_asked_for() -> None:
    model, x = stack(2), [tensor(64, 8)]
    with pytest.raises(BudgetError, match=r"reserve=4\.00 KiB") as caught:
        planned(model, x, "8KiB", reserve="4KiB")
    _, (report,) = planned(model, x, caught.value.floor + 4096, reserve="4KiB")
    assert report.lowered <= caught.value.floor


def test_a_reserve_above_the_budget_is_refused() -> None:
    with pytest.raises(memcompile.OptionsError, match="less than budget"):
        memopt(stack(1), "4KiB", reserve="1MiB")(tensor(4, 8))


def test_after_a_refusal_the_model_still_runs_in_eager_and_under_another_budget() -> None:
    model, x = stack(2), tensor(64, 8)
    with pytest.raises(BudgetError):
        memopt(model, "4KiB")(x)
    torch.testing.assert_close(memopt(model, "min")(x), model(x))


BAD_OPTIONS = [
    {"budge": "8GiB"},
    {"budget": "8 elephants"},
    {"budget": -1},
    {"budget": "0%"},
    {"reserve": -5},
    {"lower": "triton"},
    {"max_autotune": True},  # Inductor's own go in inductor={…}
    {"inductor": {"no_such_setting": 1}},
]


@pytest.mark.parametrize("options", BAD_OPTIONS, ids=str)
@pytest.mark.parametrize("suppress", [False, True])
def test_a_bad_option_is_an_error_the_user_can_catch(options, suppress: bool) -> None:
    compiled = torch.compile(stack(1), backend="memopt", options=options)
    (name,) = options
    with (
        torch._dynamo.config.patch(suppress_errors=suppress),
        pytest.raises(OptionsError, match=name),
    ):
        compiled(tensor(4, 8))


def test_options_are_checked_without_compiling() -> None:
    with pytest.raises(OptionsError, match=r"budge.*did you mean"):
        memcompile.Options.parse({"budge": 1})

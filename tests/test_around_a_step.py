"""Everything around a step: what users do to a model besides calling it once."""

import copy
import gc
from collections.abc import Iterator

import pytest
import torch
from helpers import (
    Block,
    assert_same,
    check,
    expected,
    memopt,
    middle,
    new_reports,
    observe,
    planned,
    short_planning,
    stack,
    tensor,
)
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import memcompile


@pytest.fixture
def autograd_in_graph() -> Iterator[None]:
    """Dynamo traces ``torch.autograd.grad`` and ``backward`` into the graph."""
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        yield


# ---------------------------------------------------------------- mutation


def test_an_input_changed_in_place_is_changed_the_same_way() -> None:
    def step(x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        hidden = x.tanh()
        seen.mul_(0.5).add_(hidden.detach())
        return (hidden * seen).exp()

    check(step, tensor(5, 3), tensor(5, 3, grad=False))


def test_an_input_changed_after_its_old_value_was_read() -> None:
    def step(x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        before = (x + seen).sin()
        seen.zero_()
        return before * x + seen

    check(step, tensor(5, 3), tensor(5, 3, grad=False))


def test_an_intermediate_changed_in_place() -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        hidden = x * 2
        hidden[1:].mul_(x[1:].exp())
        hidden.relu_()
        return hidden.sin() * hidden

    check(step, tensor(6, 3))


def test_a_slice_of_an_input_changed_in_place() -> None:
    def step(x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        memory[1:3] = x.detach()
        return (memory.sum(0) * x.exp()).tanh()

    check(step, tensor(2, 3), tensor(5, 3, grad=False))


def test_two_inputs_that_share_memory_and_one_is_changed() -> None:
    def step(x: torch.Tensor, whole: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        part.add_(1)
        return (x * whole).sin().sum() + part.sum()

    def run(call) -> tuple[torch.Tensor, ...]:
        x, whole = tensor(4, 3), tensor(4, 3, grad=False)
        out = call(x, whole, whole[:2])
        out.backward()
        return out.detach(), x.grad, whole

    wanted = run(step)
    for budget in (None, "min"):
        torch._dynamo.reset()
        torch.testing.assert_close(run(memopt(step, budget)), wanted)


def test_batch_norm_in_training_keeps_its_running_statistics() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2)
    ).double()
    check(model, tensor(2, 2, 7, 6))


def test_a_buffer_the_forward_updates() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block().double()
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
            self.register_buffer("average", torch.zeros(8, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = self.block(x)
            self.calls += 1
            with torch.no_grad():
                self.average.lerp_(out.mean(0), 0.1)
            return out - self.average

    check(Counting(), tensor(5, 8))


# ---------------------------------------------------------------- aliases and outputs


def test_views_of_inputs_and_of_intermediates_as_outputs() -> None:
    def step(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden = (x @ x.t()).sigmoid()
        return hidden, hidden.t(), hidden[1:, ::2], x.view(-1), hidden.view(2, -1).unbind()[0]

    check(step, tensor(4, 3))


def test_an_output_that_is_an_input_or_a_parameter() -> None:
    class Echo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block().double()

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return x, self.block(x), self.block.down.bias

    check(Echo(), tensor(5, 8))


def test_one_tensor_returned_twice() -> None:
    def step(x: torch.Tensor) -> list[torch.Tensor]:
        hidden = x.sin().exp()
        return [hidden, hidden, hidden * x]

    check(step, tensor(4, 3))


def test_outputs_in_dicts_with_numbers_and_none() -> None:
    def step(batch: dict[str, torch.Tensor]) -> dict[str, object]:
        hidden = (batch["left"] @ batch["right"]).tanh()
        return {"hidden": hidden, "loss": (hidden.sum(), None), "size": 3, "scale": 0.5}

    check(step, {"left": tensor(4, 3), "right": tensor(3, 4)})


def test_outputs_that_need_no_gradient() -> None:
    def step(x: torch.Tensor, mask: torch.Tensor):
        hidden = x.exp() * mask
        return hidden.sum(0), hidden.argmax(1), hidden.detach() * 2, mask + 1, hidden > 1

    check(step, tensor(4, 3), tensor(4, 3, grad=False))


def test_an_output_nobody_uses_gets_no_gradient() -> None:
    def step(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = x.exp()
        return hidden.sin(), hidden.cos()

    check(step, tensor(4, 3), loss=lambda outputs: outputs[0].sum())


# ---------------------------------------------------------------- parameters


def test_tied_weights_get_the_sum_of_their_gradients() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.block = Block()
            self.head = nn.Linear(8, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(self.head(self.block(self.embed(tokens))).flatten(0, 1),
                                   tokens.flatten())  # fmt: skip

    check(Tied().double(), torch.arange(10).view(2, 5) % 11)


def test_one_module_called_twice() -> None:
    block = Block().double()
    check(nn.Sequential(block, nn.Tanh(), block), tensor(5, 8))


def test_unused_parameters_keep_no_gradient() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = Block().double(), nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    check(Idle(), tensor(5, 8))
    seen, _ = planned(Idle(), [tensor(5, 8)], "min")
    assert seen.parameters["idle.weight"] is None


def test_frozen_parameters_get_no_gradient() -> None:
    model = stack(3)
    model[0].requires_grad_(False)
    model[2].up.weight.requires_grad_(False)
    check(model, tensor(5, 8, grad=False))


# ---------------------------------------------------------------- gradient switches


def test_a_part_under_no_grad() -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        hidden = x.exp().sin()
        with torch.no_grad():
            scale = hidden.abs().amax(1, keepdim=True).sqrt()
        return (hidden / scale).tanh() * hidden

    check(step, tensor(5, 3))


def test_a_part_under_enable_grad_inside_no_grad() -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scale = x.exp()
            with torch.enable_grad():
                hidden = x.sin() * scale
        return hidden.exp()

    check(step, tensor(5, 3))


def test_detach_stops_the_gradient() -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        hidden = x.exp()
        return (hidden - hidden.logsumexp(1, keepdim=True).detach()).sin() * hidden.detach()

    check(step, tensor(5, 3))


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode], ids=lambda g: g.__name__)
@pytest.mark.parametrize("lower", ["eager", "inductor"])
def test_inference_is_compiled_and_reported(guard, lower: str) -> None:
    model, x = stack(2), tensor(5, 8, grad=False)
    with guard():
        wanted = model(x)
        since = len(memcompile.reports())
        torch.testing.assert_close(memopt(model, None, lower)(x), wanted)
    (report,) = new_reports(since)
    assert report.kind == "inference"
    assert report.lowered > report.before


def test_inference_over_its_budget_is_refused() -> None:
    model, x = stack(2), tensor(64, 8, grad=False)
    with torch.no_grad(), pytest.raises(memcompile.BudgetError, match=r"floor|least"):
        memopt(model, budget=x.nbytes)(x)


def test_a_model_trained_and_evaluated_by_turns() -> None:
    model = stack(2, dropout=0.5)
    x = tensor(5, 8)
    compiled = memopt(copy.deepcopy(model), "min")
    compiled(x).sum().backward()
    compiled.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model.eval()(x))


# ---------------------------------------------------------------- dynamic shapes


def dynamic_model() -> nn.Module:
    return nn.Sequential(stack(2), nn.Linear(8, 2).double())


def compiles_of(compiled, *lengths: int) -> int:
    """Graphs compiled while running a training step of each length."""
    since = len(memcompile.reports())
    with short_planning():
        for length in lengths:
            compiled(tensor(length, 8)).square().sum().backward()
    return len(new_reports(since))


@pytest.mark.slow
@pytest.mark.parametrize("lower", ["eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_lengths_that_fit_the_budget_share_one_plan(lower: str) -> None:
    model = dynamic_model()
    _, reports = planned(model, [tensor(40, 8)], "min", lower)
    torch._dynamo.reset()
    compiled = memopt(copy.deepcopy(model), middle(reports), lower, dynamic=True)
    assert compiles_of(compiled, 40) == 1
    assert compiles_of(compiled, 39, 33, 21, 12, 40) == 0


def test_a_length_that_does_not_fit_recompiles_once_or_is_refused() -> None:
    model = dynamic_model()
    _, (report,) = planned(model, [tensor(40, 8)], "min")
    torch._dynamo.reset()
    compiled = memopt(copy.deepcopy(model), middle([report]), dynamic=True)
    assert compiles_of(compiled, 20) == 1
    assert compiles_of(compiled, 40) == 1, "the plan for 20 does not fit 40: once more"
    assert compiles_of(compiled, 38, 22, 39) == 0
    with pytest.raises(memcompile.BudgetError):
        compiled(tensor(400, 8))
    assert compiles_of(compiled, 30) == 0, "a refused length takes nothing from the others"


def test_a_length_whose_peak_lies_elsewhere_is_not_let_through() -> None:
    """Short lengths peak where bytes grow with the length, long ones where with its square."""
    weight = tensor(8, 64, grad=False)

    def step(x: torch.Tensor) -> torch.Tensor:
        wide = (x @ weight).exp().sin().sum()
        with torch.no_grad():
            scale = (x @ x.t()).exp().sin().sum()  # saved by nobody
        return wide * scale

    _, (long,) = planned(step, [tensor(160, 8)], "min")
    torch._dynamo.reset()
    budget = int(0.9 * long.lowered)
    compiled = memopt(step, budget, dynamic=True)
    assert compiles_of(compiled, 32) == 1
    with pytest.raises(memcompile.BudgetError):
        compiled(tensor(160, 8))


def test_dynamic_lengths_are_right_at_every_budget() -> None:
    model = dynamic_model()
    for budget in (None, "min", "90%"):
        torch._dynamo.reset()
        module = copy.deepcopy(model)
        compiled = memopt(module, budget, dynamic=True)
        for length in (12, 7, 30):
            module.zero_grad()
            with short_planning():
                got = observe(module, compiled, [tensor(length, 8)])
            assert_same(got, expected(model, [tensor(length, 8)]))


def test_a_dimension_marked_dynamic() -> None:
    model = dynamic_model()
    compiled = memopt(copy.deepcopy(model), "min")
    since = len(memcompile.reports())
    for length in (12, 7, 30):
        x = tensor(length, 8)
        torch._dynamo.mark_dynamic(x, 0)
        got = observe(None, compiled, [x])
        assert_same_outputs(got.outputs, model(tensor(length, 8)))
    assert len(new_reports(since)) <= 2


def test_lengths_torch_finds_to_be_dynamic_by_itself() -> None:
    model = dynamic_model()
    compiled = memopt(copy.deepcopy(model), "min")
    assert compiles_of(compiled, 12, 7, 30, 25, 9) == 2


def test_a_size_that_becomes_a_number_in_the_graph() -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        return (x.exp() / x.shape[0]).sin() * (x.shape[0] + 1)

    for length in (12, 7):
        check(step, tensor(length, 3), dynamic=True)


def assert_same_outputs(got, wanted) -> None:
    torch.testing.assert_close(got, wanted.detach())


# ---------------------------------------------------------------- graph breaks


def broken(x: torch.Tensor, model: nn.Module) -> torch.Tensor:
    hidden = model[0](x)
    torch._dynamo.graph_break()
    return model[1](hidden.sin())


@pytest.mark.parametrize("lower", ["eager", "inductor"])
def test_a_graph_break_gives_two_reports_and_the_same_step(lower: str) -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = stack(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return broken(x, self.model)

    reports = check(Broken(), tensor(5, 8), lower=lower)
    assert len(reports) == 2


def test_a_later_graph_gets_what_the_earlier_one_leaves() -> None:
    model, x = stack(2), tensor(64, 8)
    since = len(memcompile.reports())
    memopt(lambda x: broken(x, model))(x)
    first, second = new_reports(since)
    held = first.lowered - first.before
    torch._dynamo.reset()
    alone = second.lowered - second.held_before
    tight = max(first.lowered, alone) + held // 8
    with pytest.raises(memcompile.BudgetError, match=r"held|break"):
        memopt(lambda x: broken(x, model), tight)(x)


def test_a_loop_with_a_break_in_it() -> None:
    model = stack(1)

    def step(x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = model(x)
            torch._dynamo.graph_break()
        return x

    check(step, tensor(5, 8))


# ---------------------------------------------------------------- backward inside


def test_autograd_grad_inside_the_graph(autograd_in_graph: None) -> None:
    def step(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss = (x @ weight).tanh().square().sum()
        (gradient,) = torch.autograd.grad(loss, weight)
        return loss.detach(), gradient

    check(step, tensor(5, 3, grad=False), tensor(3, 4))


def test_backward_inside_the_graph(autograd_in_graph: None) -> None:
    model = stack(2)
    x = tensor(5, 8, grad=False)
    model(x).square().sum().backward()
    wanted = {name: p.grad for name, p in model.named_parameters()}
    for budget in (None, "min"):
        torch._dynamo.reset()
        module = copy.deepcopy(model)
        module.zero_grad()

        def step(x: torch.Tensor, module: nn.Module = module) -> torch.Tensor:
            loss = module(x).square().sum()
            loss.backward()
            return loss.detach()

        since = len(memcompile.reports())
        memopt(step, budget)(x)
        got = {name: p.grad for name, p in module.named_parameters()}
        torch.testing.assert_close(got, wanted)
        assert len(new_reports(since)) == 1, "one graph, no split"


def test_backward_inside_the_graph_fits_a_budget(autograd_in_graph: None) -> None:
    """Late is a gap in the order, not the word backward."""
    model, x = stack(4), tensor(64, 8, grad=False)

    def step(x: torch.Tensor) -> torch.Tensor:
        loss = model(x).square().sum()
        loss.backward()
        return loss.detach()

    since = len(memcompile.reports())
    memopt(step)(x)
    (free,) = new_reports(since)
    model.zero_grad()
    torch._dynamo.reset()
    memopt(step, "min")(x)
    least = memcompile.reports()[-1]
    assert least.lowered - least.before < 0.8 * (free.lowered - free.before)


def energy_and_force(model: nn.Module):
    def step(position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pair = (position[:, None] - position[None]).square().sum(-1, keepdim=True)
        energy = model(torch.exp(-pair).expand(-1, -1, 8)).sum()
        (force,) = torch.autograd.grad(energy, position, create_graph=True)
        return energy, -force

    return step


@pytest.mark.slow
@pytest.mark.parametrize("lower", ["eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_energy_and_force_training(autograd_in_graph: None, lower: str) -> None:
    class Potential(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = stack(1)

        def forward(self, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return energy_and_force(self.net)(position)

    reports = check(Potential(), tensor(5, 3), lower=lower)
    assert len(reports) == 1


# ---------------------------------------------------------------- optimizers


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW], ids=lambda k: k.__name__)
def test_a_compiled_optimizer_step(kind) -> None:
    def train(call) -> list[torch.Tensor]:
        model = stack(1)
        optimizer = kind(model.parameters(), lr=0.1)
        update = call(optimizer.step)
        for _ in range(3):
            optimizer.zero_grad()
            model(tensor(5, 8)).square().sum().backward()
            update()
        return [p.detach() for p in model.parameters()]

    wanted = train(lambda step: torch.compile(step, backend="aot_eager"))
    torch._dynamo.reset()
    torch.testing.assert_close(train(memopt), wanted)
    torch._dynamo.reset()
    torch.testing.assert_close(train(lambda step: memopt(step, "min")), wanted)


@pytest.mark.parametrize("budget", [None, "min"])
def test_training_follows_eager_for_several_steps(budget) -> None:
    def train(call) -> list[torch.Tensor]:
        model = nn.Sequential(stack(2), nn.BatchNorm1d(8).double())
        compiled = call(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            compiled(tensor(6, 8, grad=False)).square().sum().backward()
            optimizer.step()
        return [*(p.detach() for p in model.parameters()), *model.buffers()]

    torch.testing.assert_close(train(lambda m: memopt(m, budget)), train(lambda m: m))


def test_gradients_accumulate_over_several_steps() -> None:
    def train(call) -> list[torch.Tensor]:
        model = stack(2)
        compiled = call(model)
        for size in (5, 5, 5):
            (compiled(tensor(size, 8)).square().sum() / 3).backward()
        return [p.grad for p in model.parameters()]

    torch.testing.assert_close(train(lambda m: memopt(m, "min")), train(lambda m: m))


# ---------------------------------------------------------------- the backward again


def test_retain_graph_lets_the_backward_run_twice() -> None:
    def run(call) -> list[torch.Tensor]:
        model = stack(2)
        loss = call(model)(tensor(5, 8)).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        return [p.grad for p in model.parameters()]

    for budget in (None, "min"):
        torch._dynamo.reset()
        torch.testing.assert_close(run(lambda m, b=budget: memopt(m, b)), run(lambda m: m))


def test_retain_graph_with_inductor() -> None:
    def run(call) -> list[torch.Tensor]:
        model = stack(1)
        loss = call(model)(tensor(5, 8)).square().sum()
        with torch._functorch.config.patch(donated_buffer=False):
            loss.backward(retain_graph=True)
            loss.backward()
        return [p.grad for p in model.parameters()]

    with torch._functorch.config.patch(donated_buffer=False):
        got = run(lambda m: memopt(m, "min", "inductor"))
    torch.testing.assert_close(got, run(lambda m: m))


def test_create_graph_through_a_compiled_block_is_an_error_not_a_wrong_number() -> None:
    x = tensor(5, 8)
    out = memopt(stack(1), "min")(x).square().sum()
    (gradient,) = torch.autograd.grad(out, x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.square().sum().backward()


def test_the_backward_of_one_step_after_the_forward_of_the_next() -> None:
    def run(call) -> list[torch.Tensor]:
        left, right = stack(2), stack(1)
        first, second = call(left, None), call(right, "min")
        x = tensor(5, 8)
        losses = [first(x).sum(), second(x).sum(), first(x * 2).square().sum()]
        for loss in reversed(losses):
            loss.backward()
        return [x.grad, *(p.grad for m in (left, right) for p in m.parameters())]

    torch.testing.assert_close(run(memopt), run(lambda m, _: m))


def test_a_forward_that_is_never_followed_by_a_backward_holds_nothing() -> None:
    model = memopt(stack(1), "min")
    for _ in range(3):
        torch.testing.assert_close(model(tensor(5, 8)), stack(1)(tensor(5, 8)))
    since = len(memcompile.reports())
    memopt(stack(2), "min")(tensor(5, 8))
    (report,) = new_reports(since)
    assert report.held_before == 0


# ---------------------------------------------------------------- around compiled blocks


@pytest.mark.parametrize("reentrant", [False, True])
def test_eager_checkpoint_around_a_compiled_block(reentrant: bool) -> None:
    def run(call) -> list[torch.Tensor]:
        blocks = [call(block) for block in stack(3)]
        x = start = tensor(5, 8)
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=reentrant)
        x.square().sum().backward()
        return [start.grad, *(p.grad for block in blocks for p in block.parameters())]

    torch.testing.assert_close(run(lambda m: memopt(m, "min")), run(lambda m: m))


def test_only_the_inner_block_is_compiled() -> None:
    def run(call) -> list[torch.Tensor]:
        model = stack(3)
        model[1] = call(model[1])
        model(tensor(5, 8)).square().sum().backward()
        return [p.grad for p in model.parameters()]

    torch.testing.assert_close(run(lambda m: memopt(m, "min")), run(lambda m: m))


def test_module_compile_in_place() -> None:
    model = stack(2)
    wanted = expected(model, [tensor(5, 8)])
    model.compile(backend="memopt", options={"budget": "min", "lower": "eager"})
    assert_same(observe(model, model, [tensor(5, 8)]), wanted)


def test_hooks_on_modules_and_tensors_still_fire() -> None:
    fired: list[str] = []

    def run(call) -> list[torch.Tensor]:
        model = stack(2)
        model[0].register_forward_hook(lambda *_: fired.append("forward") or None)
        model[1].up.weight.register_hook(lambda g: g * 2)
        model[0].up.weight.register_post_accumulate_grad_hook(lambda _: fired.append("grad"))
        call(model)(tensor(5, 8)).square().sum().backward()
        return [p.grad for p in model.parameters()]

    wanted, before = run(lambda m: m), fired.copy()
    fired.clear()
    torch.testing.assert_close(run(lambda m: memopt(m, "min")), wanted)
    assert fired == before


def test_a_saved_tensor_is_not_changed_under_the_backward() -> None:
    """The optimizer may not write a parameter that a pending backward still reads."""
    model = stack(1)
    loss = memopt(model, "min")(tensor(5, 8)).square().sum()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("lower", ["eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_autocast_by_the_user_outside(lower: str) -> None:
    model, x = stack(2).float(), tensor(6, 8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = expected(model, [x])
        for budget in (None, "min"):
            got, _ = planned(model, [x], budget, lower)
            assert_same(got, wanted, rtol=5e-2, atol=5e-2)
            assert got.outputs.dtype == wanted.outputs.dtype


def test_autocast_by_the_user_inside() -> None:
    model = stack(2).float()

    def step(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float().square().mean()

    check(step, tensor(6, 8, dtype=torch.float32), close={"rtol": 5e-2, "atol": 5e-2})


def test_float64_stays_float64() -> None:
    seen, _ = planned(stack(1), [tensor(5, 8)], "min", "inductor")
    assert seen.outputs.dtype == torch.float64
    assert {g.dtype for g in seen.parameters.values()} == {torch.float64}


def test_a_compiled_function_with_closures_and_keywords() -> None:
    scale = torch.tensor(3.0, dtype=torch.float64)

    def step(x: torch.Tensor, *, power: int = 2, name: str = "") -> torch.Tensor:
        return (x.sin() * scale) ** power

    x = tensor(5, 3)
    torch.testing.assert_close(
        memopt(step, "min")(x, power=3, name="cube"), step(x, power=3, name="cube")
    )


def test_nested_compiles_are_one_step() -> None:
    inner = memopt(stack(1), "min")

    def run(x: torch.Tensor) -> torch.Tensor:
        return inner(x.sin()) * 2

    got = memopt(run, "min")(tensor(5, 8))
    torch.testing.assert_close(got, stack(1)(tensor(5, 8).sin()) * 2)


def test_a_module_deep_in_others() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict({"a": nn.ModuleList([stack(1), nn.Sequential(stack(1))])})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for part in self.parts["a"]:
                x = part(x)
            return x

    check(Deep(), tensor(5, 8))


def test_dynamo_reset_plans_the_same_again() -> None:
    model, x = stack(3), [tensor(16, 8)]
    _, (first,) = planned(model, x, "min")
    _, (second,) = planned(model, x, "min")
    assert first.moves == second.moves
    assert (first.predicted, first.seconds) == (second.predicted, second.seconds)


def test_fullgraph_and_a_name_for_the_report() -> None:
    _, (report,) = planned(stack(1), [tensor(5, 8)], "min", fullgraph=True, name="trunk")
    assert report.name == "trunk"


@pytest.mark.parametrize("run_backward", [True, False], ids=["trained", "only called"])
def test_a_compiled_graph_keeps_none_of_its_first_inputs(run_backward: bool) -> None:
    compiled, x = memopt(stack(1), "min"), tensor(7, 8)
    storage = StorageWeakRef(x.untyped_storage())
    loss = compiled(x).sum()
    if run_backward:
        loss.backward()
    del x, loss
    gc.collect()
    assert storage.expired()


def test_data_parallel_over_one_process(tmp_path) -> None:
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_gloo_available()):
        pytest.skip("torch has no gloo")
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:

        def run(call) -> list[torch.Tensor]:
            model = stack(2)
            wrapped = call(nn.parallel.DistributedDataParallel(model))
            for _ in range(2):
                wrapped(tensor(5, 8)).square().sum().backward()
            return [p.grad for p in model.parameters()]

        torch.testing.assert_close(run(lambda m: memopt(m, "min")), run(lambda m: m))
    finally:
        distributed.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.parametrize("lower", ["eager", "inductor"])
def test_the_same_step_on_cuda(lower: str) -> None:
    model = stack(2).cuda()
    check(model, tensor(16, 8).detach().cuda().requires_grad_(), lower=lower)

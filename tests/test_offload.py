"""Offload: what is kept on the host, when it is copied, and that nothing else changes.

No test but the last ones has a device: steps are planned on fake CUDA tensors and run on the CPU
(``offload_subjects``), or planned and run on the CPU as if it were one (``as_if_on_a_device``).
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import memcompile_passes.offload
import pytest
import torch
from helpers import memopt
from hypothesis import HealthCheck, given, settings, strategies as st
from memcompile_passes.compress import Compress
from memcompile_passes.offload import Offload
from memcompile_passes.recompute import Recompute
from offload_subjects import CUDA, Link, Planned, captured, joint, plan, run
from torch import Tensor, fx, nn

import memcompile
import memcompile.show
from memcompile import _torch
from memcompile._torch import transfers
from memcompile.analysis.cost import FIXED, use_rates
from memcompile.analysis.timeline import Timeline, kernel_seconds
from memcompile.contract import Context, Host
from memcompile.draft import Draft
from memcompile.plan import Plan
from memcompile.planner import Planner
from memcompile.report import Report
from memcompile.split import split
from memcompile.step import Step
from memcompile.testing import Captured, capture, check_pass
from memcompile.ways import pinned_bytes

SMALL = Offload(least=1024)


# -- subjects ------------------------------------------------------------------------------


def mlp(dropout: float = 0.0, blocks: int = 3) -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Linear(48, 48), nn.GELU(), nn.LayerNorm(48), nn.Dropout(dropout))
    return nn.Sequential(*(copy.deepcopy(layer) for _ in range(blocks) for layer in layers))


def odd(x: Tensor) -> Tensor:
    """Views, a transposed value, booleans, whole numbers, half precision, a value returned."""
    weight = torch.linspace(-1, 1, x.shape[-1] ** 2).view(x.shape[-1], -1)
    scores = (x @ weight).mT.tanh()  # strides of a transposed value
    places = scores.argsort(-1)
    mask = scores > 0.1
    low = (scores.to(torch.bfloat16) * 3).exp()
    mixed = torch.where(mask, low.float(), scores.gather(-1, places).sin())
    first, second = mixed.chunk(2, -1)
    return (first * second.cos()).flip(-1).cumsum(-1)


def tied(x: Tensor) -> tuple[Tensor, Tensor]:
    """One weight twice, and a value that is returned, too."""
    weight = torch.linspace(-1, 1, x.shape[-1] ** 2).view(x.shape[-1], -1)
    hidden = torch.sigmoid(x @ weight)
    return hidden, torch.sigmoid((hidden.exp() @ weight.mT).sin()).square()


def scalar(function: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
    def loss(x: Tensor) -> Tensor:
        return sum(out.square().mean() for out in _torch.tree_leaves(function(x)))

    return loss


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)).requires_grad_()


SUBJECTS: dict[str, Callable[[], Captured]] = {
    "mlp": lambda: captured(scalar(mlp()), rows(96, 48)),
    "dropout": lambda: captured(scalar(mlp(0.2)), rows(96, 48)),
    "odd": lambda: captured(odd, rows(3, 30, 14)),
    "tied": lambda: captured(tied, rows(37, 21)),
    "dynamic": lambda: captured(scalar(mlp(0.2)), rows(96, 48), dynamic=True),
}


@pytest.fixture(scope="module")
def subject() -> Callable[[str], Captured]:
    found: dict[str, Captured] = {}

    def get(name: str) -> Captured:
        if name not in found:
            found[name] = SUBJECTS[name]()
        return found[name]

    return get


def assert_same_bits(got: list[Any], wanted: list[Any]) -> None:
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert torch.equal(one, other), (one - other).abs().max()


# -- numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "passes"),
    [
        *((name, [SMALL]) for name in SUBJECTS),
        ("dropout", [Recompute(), SMALL]),
        ("dropout", [Compress(), SMALL]),
        ("dynamic", [Recompute(), Compress(), SMALL]),
    ],
    ids=lambda given: given if isinstance(given, str) else "-".join(p.name for p in given),
)
def test_the_planned_step_has_the_bits_of_the_unplanned(
    subject: Callable[[str], Captured], name: str, passes: list[Any]
) -> None:
    """Under copies that hold poison until they are waited for, and backwards run twice."""
    graph = subject(name)
    outputs, gradients = joint(graph)
    planned, link = plan(graph, "min", passes, strict=True), Link()
    got = run(graph, planned.outcome.split, link, backwards=2)
    assert_same_bits(got[0], outputs)
    assert_same_bits(got[1], gradients)
    assert_same_bits(got[2], gradients)
    stored = sum(len(s.move.rebuild.stored) for s in planned.drafted.stays)
    assert link.count == 3 * stored  # out once, back in each backward
    assert stored or len(passes) > 1


def test_what_is_read_too_soon_shows(subject: Callable[[str], Captured]) -> None:
    """The tests above can fail: what is read before it is there is poison."""
    graph = subject("mlp")
    cut = plan(graph, "min", [SMALL]).outcome.split

    class Hasty(Link):
        def wait(self, moved: Tensor, source: Tensor | None = None) -> Tensor:
            if source is not None:
                return super().wait(moved, source)
            self.under_way.pop(moved.data_ptr())
            return moved

    with pytest.raises(AssertionError):
        assert_same_bits(run(graph, cut, Hasty())[1], joint(graph)[1])


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(taken=st.data())
def test_any_choice_of_moves_has_the_same_bits(
    subject: Callable[[str], Captured], taken: st.DataObject
) -> None:
    """Whichever values go, encoded or not, waited for or not."""
    graph = subject("dropout")
    step, context = graph.step, Context(device="cuda")
    if "moves" not in graph.__dict__:
        first = list(Compress().propose(step, context))
        alone = list(Offload(least=1).propose(step, context))
        graph.__dict__["moves"] = first + alone + list(Offload(least=1).upon(first, step, context))
        graph.__dict__["results"] = joint(graph)
    draft = Draft(step, FIXED, frozenset(), fused=False)
    kept = frozenset(n for n in draft.needed_late if n.op == "call_function")
    chosen = {}
    for value in kept:
        ways = [m for m in graph.__dict__["moves"] if m.value is value and m.rebuild is not None]
        if ways and (way := taken.draw(st.sampled_from([None, *ways]))) is not None:
            chosen[value] = way
    drafted = draft.under(Plan(kept - set(chosen), chosen))
    outputs, gradients = graph.__dict__["results"]
    got = run(graph, split(step, drafted), Link(), backwards=1)
    assert_same_bits(got[0], outputs)
    assert_same_bits(got[1], gradients)


@pytest.mark.parametrize("name", ["dropout", "odd"])
def test_each_move_alone_and_all_together(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """By the ops' own kernels, as a stranger's pass is checked."""
    monkeypatch.setattr(memcompile_passes.offload, "refusal", lambda step, context: None)
    function = scalar(mlp(0.2, blocks=1)) if name == "dropout" else scalar(odd)
    given = rows(8, 48) if name == "dropout" else rows(3, 10, 6)
    checked = check_pass(Offload(least=512), function, given)
    assert checked.moves and checked.error == 0.0
    assert checked.after < checked.before


# -- what is offered -----------------------------------------------------------------------


def offers(graph: Captured, offload: Offload = SMALL, **context: Any) -> list[Any]:
    return list(offload.propose(graph.step, Context(device="cuda", **context)))


def test_large_values_of_the_device_are_offered(subject: Callable[[str], Captured]) -> None:
    step = subject("tied").step
    found = {move.value for move in offers(subject("tied"), Offload(least=256))}
    assert found and all(step.bytes(value) >= 256 for value in found)
    outputs = {step.roots[output] for output in step.node_outputs()}
    assert outputs.isdisjoint(found)  # the first, which the backward reads, too
    assert all(value.op == "call_function" and step.roots[value] is value for value in found)
    assert not offers(subject("tied"), Offload())  # nothing of a mebibyte


def test_values_elsewhere_and_values_written_to_are_not_offered(
    subject: Callable[[str], Captured],
) -> None:
    step = subject("mlp").step
    before = [move.value.name for move in offers(subject("mlp"))]
    first, second = step.graph.nodes, before[::2]
    victim = next(node for node in first if node.name == second[0])
    value = victim.meta["val"]
    with _torch.detect_fake_mode([value]):
        victim.meta["val"] = torch.empty_like(value, device="cpu")
    assert victim.name not in [move.value.name for move in offers(subject("mlp"))]
    victim.meta["val"] = value
    written = next(node for node in step.nodes if node.name == second[1])
    with step.graph.inserting_before(step.output):
        step.graph.call_function(torch.ops.aten.zero_.default, (written,))
    again = Step(step.module, step.num_outputs)
    names = [m.value.name for m in SMALL.propose(again, Context(device="cuda"))]
    assert written.name in before and written.name not in names and victim.name in names


def test_values_with_gaps_stay() -> None:
    step = captured(scalar(mlp()), rows(96, 48)).step
    value = next(node for node in step.early_values() if step.bytes(node) > 1024)
    tensor = value.meta["val"]
    assert memcompile_passes.offload.on_device(value, step)
    with _torch.detect_fake_mode([tensor]):
        value.meta["val"] = torch.empty_strided((96, 48), (64, 1), device=CUDA)
    assert not memcompile_passes.offload.on_device(value, step)


def test_cuda_graphs_are_refused(subject: Callable[[str], Captured]) -> None:
    context = Context(device="cuda", recorded=True)
    assert not list(SMALL.propose(subject("mlp").step, context))
    assert "CUDA graphs" in context.remarks[0]
    assert not list(SMALL.upon([], subject("mlp").step, context))


def test_a_backend_with_cuda_graphs_says_so() -> None:
    for options, recorded in (
        ({"mode": "reduce-overhead"}, True),
        ({"inductor": {"triton.cudagraphs": True}}, True),
        ({}, False),
    ):
        seen: list[bool] = []

        def propose(self: Offload, step: Step, context: Context) -> Iterator[Any]:
            seen.append(context.recorded)  # noqa: B023
            return iter(())

        torch.compiler.reset()
        with mock.patch.object(Offload, "propose", propose):
            memopt(torch.sin, "min", passes="offload", **options)(rows(4)).sum().backward()
        assert seen == [recorded]


def test_on_the_cpu_it_is_refused_with_a_reason() -> None:
    torch.compiler.reset()
    memopt(scalar(mlp()), "min", passes="offload{least=0}")(rows(8, 48)).backward()
    ran = memcompile.reports()[-1].passes[0]
    assert ran.by == "offload{least=0}" and ran.note.startswith("offered 0 moves; on the CPU")
    assert not memcompile.reports()[-1].stays
    torch.compiler.reset()
    with pytest.raises(memcompile.PassError, match="in the host's memory already"):
        memopt(scalar(mlp()), "min", passes="offload", strict=True)(rows(8, 48))


def test_a_graph_without_a_split_keeps_nothing() -> None:
    (graph,) = capture(torch.no_grad()(scalar(mlp())), rows(96, 48))
    step = Step(_torch.copy_graph(graph.module), graph.num_outputs)
    context = Context(device="cuda")
    with mock.patch.object(memcompile_passes.offload, "refusal", lambda step, context: None):
        assert not list(SMALL.propose(step, context)) and not list(SMALL.upon([], step, context))
    assert "not split" in context.remarks[0]


@pytest.mark.parametrize("field", ["least", "host"])
@pytest.mark.parametrize("given", [-1, 0.5, "much", True])
def test_options_are_bytes(field: str, given: Any) -> None:
    with pytest.raises(ValueError, match=field):
        Offload(**{field: given})
    assert getattr(Offload(**{field: 2e9}), field) == 2_000_000_000


# -- what is planned -----------------------------------------------------------------------


def places(line: Timeline) -> dict[str, int]:
    return {op.node.name: place for place, op in enumerate(line.ops)}


def elapsed(line: Timeline) -> list[float]:
    """Seconds gone before each op, and after the last."""
    seconds = kernel_seconds(line.ops, line.real, FIXED.memory, FIXED.launch)
    return list(itertools.accumulate(seconds, initial=0.0))


def stays(planned: Planned) -> list[Any]:
    assert planned.drafted.stays
    return list(planned.drafted.stays)


def test_copies_run_behind_kernels(subject: Callable[[str], Captured]) -> None:
    """Where a copy is not waited for, as much time goes by as it takes; and not much more."""
    planned = plan(subject("mlp"), "75%", [SMALL])
    out, home = planned.drafted.forward, planned.drafted.backward
    gone, later = elapsed(out), elapsed(home)
    assert any(not stay.stalled for stay in stays(planned))
    for stay in stays(planned):
        if stay.stalled:
            continue
        name, takes = stay.move.value.name, stay.bytes / FIXED.to_host
        left, landed = places(out)[f"offload_{name}"], places(out)[stay.landed.name]
        assert gone[landed + 1] - gone[left + 1] >= takes
        reads = places(home)[f"reload_{name}"]
        begun = home.since[reads]
        assert later[reads] - later[begun] >= takes
        assert begun > 1 and landed < len(out.ops) - 1, "not at the ends"


def test_memory_is_free_between_the_copies(subject: Callable[[str], Captured]) -> None:
    planned = plan(subject("mlp"), "min", [SMALL])
    out, home = planned.drafted.forward, planned.drafted.backward
    for stay in stays(planned):
        name = stay.move.value.name
        value, landed = places(out)[name], places(out)[stay.landed.name]
        assert value in out.alive(landed) and value not in out.alive(len(out.ops) - 1)
        back = places(home)[f"reload_{name}"]
        begun = home.since[back]
        assert back in home.alive(begun) and back not in home.alive(begun - 1)
        assert name not in {op.node.name for op in home.ops if op.bytes}
    assert planned.drafted.hosted == sum(stay.bytes for stay in stays(planned))
    assert planned.drafted.peak < planned.compiler.planner.ground_draft.peak


def test_what_is_copied_is_alive_until_then_and_no_longer(
    subject: Callable[[str], Captured],
) -> None:
    """In the graphs: nothing but the wait holds what has left, and the wait does."""
    graph = subject("mlp")
    forward = plan(graph, "min", [SMALL]).outcome.split.forward
    nodes = list(forward.graph.nodes)
    (output,) = forward.graph.find_nodes(op="output")
    sent = forward.graph.find_nodes(op="call_function", target=transfers.offload)
    assert sent
    for node in sent:
        (value,), (wait,) = node.args, node.users
        assert wait.target is transfers.wait and wait.args == (node, value)
        assert list(wait.users) == [output]
        last = max(nodes.index(user) for user in value.users)
        assert last == nodes.index(wait) or value not in output.args[0]
    link, born = Link(), []

    class Watching(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            found = super().run_node(n)
            if n in {node.args[0] for node in sent}:
                born.append(weakref.ref(found))
            return found

    with torch.no_grad():
        kept = Watching(forward).run(*graph.arguments())
    gc.collect()
    assert born and all(ref() is None for ref in born)
    assert kept is not None and not link.under_way


def test_seconds_are_what_the_link_cannot_hide(subject: Callable[[str], Captured]) -> None:
    fast, slow = (dataclasses.replace(FIXED, to_host=rate, from_host=rate) for rate in (1e12, 1e7))
    with use_rates(fast):
        quick = plan(subject("mlp"), "min", [SMALL])
    with use_rates(slow):
        late = plan(subject("mlp"), "min", [SMALL])
    assert quick.drafted.link.stalled == 0
    assert late.drafted.link.stalled > 10 * quick.drafted.seconds
    assert late.outcome.explained.seconds >= late.drafted.link.stalled
    assert late.drafted.link.busy >= late.drafted.link.stalled
    total = sum(stay.stalled for stay in late.drafted.stays)
    assert total == pytest.approx(late.drafted.link.stalled)


def test_the_cheapest_way_is_taken(subject: Callable[[str], Captured]) -> None:
    """Over a slow link values are made again, over a fast one they are kept on the host."""
    taken = []
    for rate in (1e5, 1e13):
        rates = dataclasses.replace(FIXED, to_host=rate, from_host=rate, launch=1e-9)
        with use_rates(rates):
            planned = plan(subject("mlp"), "80%", [Recompute(), SMALL])
        taken.append([move.how for move in planned.outcome.explained.moves])
    assert "recompute" in taken[0] and not any("host" in how for how in taken[0])
    assert any("host" in how for how in taken[1])


def test_waiting_reaches_lower_than_holding(subject: Callable[[str], Captured]) -> None:
    """Over a link that is behind all the time, what leaves would stay in memory till the end."""
    step = subject("mlp").step
    slow = dataclasses.replace(FIXED, to_host=1e7, from_host=1e7)
    draft = Draft(step, slow, frozenset(), fused=False)
    kept = frozenset(n for n in draft.needed_late if n.op == "call_function")
    drafted = {}
    for waits in (False, True):
        moves = {m.value: m for m in offers(subject("mlp")) if m.rebuild.host.waits is waits}
        chosen = {value: move for value, move in moves.items() if value in kept}
        drafted[waits] = draft.under(Plan(kept - set(chosen), chosen))
    assert drafted[True].peak < drafted[False].peak
    (_,) = {stay.landed for stay in drafted[False].stays}  # all at the end
    assert len({stay.landed for stay in drafted[True].stays}) > 1
    assert drafted[True].hosted == drafted[False].hosted
    for waits in (False, True):
        assert drafted[waits].link.stalled > 0.9 * drafted[waits].link.busy


@pytest.mark.parametrize("limit", [0, 40_000, 70_000])
def test_the_host_is_no_bottomless_pit(subject: Callable[[str], Captured], limit: int) -> None:
    planned = plan(subject("mlp"), "min", [Offload(least=1024, host=limit)])
    planner = planned.compiler.planner
    assert planner is not None
    for rung in planner.ladder.rungs:
        pinned = [pinned_bytes(planner.draft.step, m) for m in rung.plan.rebuilt.values()]
        assert sum(pinned) <= limit
    assert bool(planned.drafted.stays) == bool(limit)


def test_pinned_memory_comes_in_powers_of_two(subject: Callable[[str], Captured]) -> None:
    move = next(m for m in offers(subject("mlp")) if subject("mlp").step.bytes(m.value) == 18432)
    assert pinned_bytes(subject("mlp").step, move) == 32768
    assert isinstance(move.rebuild.host, Host)


def test_what_codecs_store_goes_to_the_host_as_one_move(
    subject: Callable[[str], Captured],
) -> None:
    """Encoding and copying are one move: the planner takes it where the link is short."""
    graph = subject("dropout")
    with use_rates(dataclasses.replace(FIXED, to_host=2e8, from_host=2e8)):
        bits = Compress(codecs="bits", factors=False)
        planned = plan(graph, "min", [bits, Offload(least=256, host=6000)])
    both = [stay for stay in stays(planned) if stay.move.how.startswith("bits, host")]
    assert both
    for stay in both:
        assert stay.move.by.startswith("compress")
        assert stay.bytes * 8 == planned.compiler.planner.draft.step.bytes(stay.move.value)
    notes = {ran.by: ran.note for ran in planned.compiler.pipeline.ran}
    assert "moves upon others'" in notes["offload{least=256,host=6000}"]


def test_a_lossy_move_stays_lossy_on_the_host(subject: Callable[[str], Captured]) -> None:
    passes = [Compress(codecs=(), factors=False, lossy="int8"), SMALL]
    step, context = subject("mlp").step, Context(device="cuda")
    (lossy, offload) = passes
    first = [dataclasses.replace(m, by="compress") for m in lossy.propose(step, context)]
    more = list(offload.upon(first, step, context))
    assert more and {m.by for m in more} == {"compress"}  # whose exactness is "no"
    assert {m.how for m in more} == {"int8, host", "int8, host, waited for"}


def test_without_a_rate_nothing_goes(subject: Callable[[str], Captured]) -> None:
    with use_rates(dataclasses.replace(FIXED, to_host=0.0)):
        planned = plan(subject("mlp"), "min", [Recompute(), SMALL])
    assert not planned.drafted.stays
    assert planned.compiler.notes == ["nothing is kept on the host: the link's rate is not known"]


def test_fused_drafts_hold_what_is_copied(subject: Callable[[str], Captured]) -> None:
    """As Inductor would lower it: what leaves is in memory, though kernels would fuse over it."""
    step = subject("mlp").step
    draft = Draft(step, FIXED, frozenset(), fused=True)
    kept = frozenset(n for n in draft.needed_late if n.op == "call_function")
    planner = Planner(draft, Plan(kept), offers(subject("mlp")))
    ladder = planner.build()
    assert not draft.grouped and ladder.floor.peak < planner.ground_draft.peak
    drafted = planner.drafted(ladder.floor.plan)
    for stay in drafted.stays:
        place = places(drafted.forward)[stay.move.value.name]
        assert drafted.forward.real.real[place]


# -- what is reported ----------------------------------------------------------------------


def report(planned: Planned) -> Report:
    explained = planned.outcome.explained
    values = {f.name: getattr(explained, f.name) for f in dataclasses.fields(explained)}
    return Report(
        name="", index=0, kind="training", torch="", device="", lower="eager",
        budget_text="min", reserve=0, **values,
    )  # fmt: skip


def test_the_report_says_what_lies_on_the_host(subject: Callable[[str], Captured]) -> None:
    planned = plan(subject("mlp"), "min", [SMALL])
    found = report(planned)
    assert found.host == planned.drafted.hosted == sum(stay.bytes for stay in found.stays)
    assert {stay.value for stay in found.stays} == {
        move.value for move in found.moves if "host" in move.how
    }
    for stay in found.stays:
        assert stay.landed in found.forward and stay.source.startswith("test_offload.py")
    (line,) = [line for line in memcompile.show.sentences(found) if "on the host" in line]
    assert line.startswith(f"{len(found.stays)} values") and "beside the kernels" in line
    assert "On the host" in str(found)
    assert "On the host" in memcompile.show.html(found)
    assert Report.from_json(found.to_json()) == found
    step = planned.compiler.planner.draft.step
    held = {*planned.drafted.saved, *(step.roots[node] for node in step.node_outputs())}
    on_device = sum(step.bytes(node) for node in held if node.op == "call_function")
    assert found.held_after == found.before + on_device


def test_the_report_says_why(subject: Callable[[str], Captured]) -> None:
    """Of each value the ways there were, and what each was likely to cost."""
    planned = plan(subject("dropout"), "min", [Recompute(), Compress(codecs="bits"), SMALL])
    rows = {move.value: move for move in planned.outcome.explained.moves if move.how != "keep"}
    assert rows and all(row.how in dict(row.offered) for row in rows.values())
    ways = dict(next(row for row in rows.values() if "bits" in dict(row.offered)).offered)
    assert {"recompute", "bits", "host", "host, waited for"} <= set(ways)
    assert ways["host, waited for"] > ways["host"] and all(cost >= 0 for cost in ways.values())
    assert "Why" in str(report(planned))


def test_moments_add_up_with_copies(subject: Callable[[str], Captured]) -> None:
    found = report(plan(subject("mlp"), "min", [SMALL]))
    assert max(point.bytes for point in found.timeline_after) == found.predicted


def test_the_symbolic_peak_counts_copies(subject: Callable[[str], Captured]) -> None:
    planned = plan(subject("dynamic"), "min", [SMALL])
    assert stays(planned)
    planner = planned.compiler.planner
    pairs = memcompile.symbolic.peak_expressions(planner.draft.step, planned.drafted)
    assert max(value for _, value in pairs) == planned.drafted.peak


# -- compiled and run, on the CPU as if it were a device -----------------------------------


@pytest.fixture
def as_if_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memcompile_passes.offload, "refusal", lambda step, context: None)


def compiled_step(
    function: Any, x: Tensor, budget: Any = "min", **more: Any
) -> tuple[Tensor, Tensor, Report]:
    torch.compiler.reset()
    torch.manual_seed(0)
    given = x.detach().clone().requires_grad_()
    loss = memopt(function, budget, passes=[SMALL], strict=True, **more)(given)
    (gradient,) = torch.autograd.grad(loss, given)
    return loss.detach(), gradient, memcompile.reports()[-1]


@pytest.mark.usefixtures("as_if_on_a_device")
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_step_is_eagers(dynamic: bool) -> None:
    model, x = mlp().double(), rows(96, 48).double()
    loss, gradient, found = compiled_step(scalar(model), x, dynamic=dynamic)
    assert found.stays and found.lowered < found.inductor
    wanted = scalar(model)(x)
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-9, atol=1e-11)
    (eager,) = torch.autograd.grad(wanted, x)
    torch.testing.assert_close(gradient, eager, rtol=1e-9, atol=1e-11)
    assert bool(found.peak_expression) == dynamic


@pytest.mark.usefixtures("as_if_on_a_device")
def test_retained_forsaken_and_repeated_steps() -> None:
    torch.compiler.reset()
    model, x = mlp(), rows(96, 48)
    step = memopt(scalar(model), "min", passes=[SMALL])
    loss = step(x)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (again,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, again)
    del loss
    step(x)  # a forward without a backward
    (later,) = torch.autograd.grad(step(x), x)
    assert torch.equal(first, later)
    assert transfers.copies_under_way() == 0


@pytest.mark.slow
@pytest.mark.usefixtures("as_if_on_a_device")
def test_inductor_keeps_the_order_and_the_bytes() -> None:
    """Copies stand among the kernels where they were planned, and hold nothing on the device."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(48, 48) if i % 2 else nn.Tanh() for i in range(8)))
    x, orders = rows(96, 48), list[list[str]]()
    run = memcompile.lowering.Walk.run

    def noted(self: Any) -> Any:
        lines = self.graph.wrapper_code.lines
        nodes = [line.node for line in lines if type(line).__name__ == "ExternKernelAllocLine"]
        calls = [str(getattr(node, "op_overload", "")) for node in nodes]
        orders.append([name.split(".")[1] for name in calls if name.startswith("memcompile.")])
        return run(self)

    with mock.patch.object(memcompile.lowering.Walk, "run", noted):
        loss, gradient, found = compiled_step(scalar(model), x, lower="inductor")
    wanted = scalar(model)(x)
    torch.testing.assert_close(loss, wanted.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted, x)[0])
    assert found.stays and found.lowered < found.inductor
    count = len(found.stays)
    forward = next(order for order in orders if "offload" in order)
    backward = next(order for order in orders if "reload" in order)
    assert forward.count("offload") == forward.count("wait") == count
    assert backward.count("reload") == backward.count("wait") == count
    assert forward != ["offload"] * count + ["wait"] * count or count < 2
    sent = count * 96 * 48 * 4
    assert found.host == sent
    assert found.lowered == pytest.approx(found.predicted, rel=0.1)


# -- on a device ---------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("lower", ["eager", "inductor"])
def test_on_cuda_numbers_and_peak(lower: str) -> None:
    """The same numbers as without the pass, and the peak falls by what lies on the host."""
    model = nn.Sequential(*(nn.Linear(1024, 1024) if i % 2 else nn.Tanh() for i in range(16)))
    model, x = model.cuda(), torch.randn(8192, 1024, device="cuda")
    found: dict[str, Any] = {}
    for passes in ("", "offload"):
        torch.compiler.reset()
        options = {"budget": "min", "passes": passes, "lower": lower}
        step = torch.compile(scalar(model), backend="memopt", options=options)

        def once(step: Any = step) -> list[Tensor]:
            return list(torch.autograd.grad(step(x), list(model.parameters())))

        peak = memcompile.measure_peak(once, device="cuda")
        found[passes] = once(), peak.bytes, memcompile.reports()[-1]
    (plain, before, _), (moved, after, said) = found[""], found["offload"]
    assert said.stays and said.host >= 8192 * 1024 * 4
    assert after < before - said.host / 2
    assert after <= 1.02 * (said.lowered - said.before) + 2**25
    for one, other in zip(moved, plain, strict=True):
        if lower == "eager":
            assert torch.equal(one, other)
        else:  # kernels are fused otherwise, and sums rounded elsewhere
            torch.testing.assert_close(one, other)
    assert transfers.copies_under_way() == 0


@pytest.mark.gpu
def test_on_cuda_strides_streams_and_interruptions() -> None:
    value = torch.randn(512, 300, device="cuda").t()
    host = transfers.wait(transfers.offload(value), value)
    torch.cuda.synchronize()
    assert host.is_pinned() and host.stride() == value.stride()
    assert torch.equal(host, value.cpu())
    for _ in range(20):
        again = transfers.reload(host, value.device)
        del again  # never waited for: what is made in its place must not be written to
        fresh = torch.zeros(300, 512, device="cuda")
        torch.cuda.synchronize()
        assert not fresh.any()
    again = transfers.wait(transfers.reload(host, value.device))
    assert torch.equal(again, value) and again.stride() == value.stride()
    assert transfers.copies_under_way() == 0


@pytest.mark.gpu
def test_on_cuda_the_link_is_measured() -> None:
    rates = memcompile.analysis.cost.measure_rates(torch.device("cuda"))
    assert 1e8 < rates.to_host < 1e12 and 1e8 < rates.from_host < 1e12

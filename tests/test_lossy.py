"""Lossy codecs: a bound on every number, no number unscaled, and sensitive values left alone."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from helpers import memopt
from hypothesis import given, settings
from memcompile_passes.compress import LOSSY, Compress
from memcompile_passes.compress.groups import LEAST, Groups
from memcompile_passes.compress.scaled import Scaled
from memcompile_passes.compress.sensitive import KINDS, is_sensitive
from memcompile_passes.compress.whole import Int2, Int4, Int8, uniform
from test_compress import (
    KERNEL,
    LATE,
    Masked,
    chain,
    pointers,
    shrink,
    strided,
    written as loops_written,
)
from torch import nn
from torch._inductor.utils import run_and_get_code

import memcompile
from memcompile import Context, PassError
from memcompile.registry import resolve, source_key, spell
from memcompile.testing import capture, check_pass

CODECS = [LOSSY["fp8"](), Int8(), Int8(stochastic=True), Int4(), Int2(), Int4(group=17, seed=3)]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def names(codec: Scaled) -> str:
    return repr(codec) + ("~" if getattr(codec, "stochastic", False) else "")


# -- one value -----------------------------------------------------------------------------------


def values(kind: str, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Numbers of one kind."""
    x = torch.randn(shape)
    made = {
        "normal": lambda: x,
        "zero": lambda: torch.zeros(shape),
        "constant": lambda: torch.full(shape, -0.37),
        "denormal": lambda: x * (1e-7 if dtype == torch.float16 else 1e-41),
        "spread": lambda: x * 10.0 ** torch.randint(-4, 5, shape),
        "largest": lambda: x.sign() * torch.finfo(dtype).max,
        "broken": lambda: x / (torch.rand(shape) > 0.2) * (torch.rand(shape) > 0.1) / 0.5,
    }
    numbers = made[kind]().to(dtype)
    if kind == "broken" and numbers.numel() > 1:
        numbers.view(-1)[0], numbers.view(-1)[-1] = float("nan"), float("-inf")
    return numbers


def largest(x: torch.Tensor, groups: Groups) -> torch.Tensor:
    """For each number the largest finite magnitude in its group, in float64."""
    turned = groups.turned(x)
    cut = groups.cut(turned).double()
    most = torch.where(cut.isfinite(), cut.abs(), 0.0).amax(1, keepdim=True)
    return groups.back(groups.mend(most.expand_as(cut), turned))


@settings(max_examples=150)
@given(
    codec=st.sampled_from(CODECS),
    shape=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    dtype=st.sampled_from(FLOATS),
    how=st.sampled_from(["plain", "transposed", "apart"]),
    kind=st.sampled_from(["normal", "zero", "constant", "denormal", "spread", "largest", "broken"]),
    signs=st.booleans(),
)
def test_every_number_is_within_its_bound(
    codec: Scaled, shape: list[int], dtype: torch.dtype, how: str, kind: str, signs: bool
) -> None:
    signs &= codec.keeps_signs
    x = values(kind, shape, dtype)
    x = strided(x, how) if x.dim() > 1 else x
    coding = codec.coded(x, signs)
    stored = coding.encode(x)
    assert sum(part.nbytes for part in stored) == coding.bytes(x)
    back = coding.decode(*stored)
    assert back.dtype == dtype and back.shape == x.shape
    assert torch.equal(back.isfinite(), x.isfinite())  # what was not is NaN, and nothing else is
    assert not back.isinf().any()
    most = largest(x, Groups.of(x, codec.group)).clamp_min(LEAST)
    rounding = torch.finfo(dtype).eps / 2 * most + torch.finfo(dtype).smallest_normal * 2**-9
    if signs:
        rounding = rounding + (2.0**-24 if dtype == torch.float16 else 2.0**-126)
        assert torch.equal(back[x.isfinite()].sign(), x[x.isfinite()].sign())
    gap = (back.double() - x.double()).abs()
    assert bool((gap <= codec.error * most * (1 + 1e-6) + rounding)[x.isfinite()].all())
    if kind == "zero":
        assert not back.any()


@pytest.mark.parametrize("codec", CODECS, ids=names)
def test_an_outlier_spoils_no_more_than_its_group(codec: Scaled) -> None:
    """Nothing is stored unscaled: numbers far beyond a format's range come back as close."""
    for scale in (1e-30, 1.0, 1e30):
        x = torch.linspace(-1, 1, 1024) * scale
        x[0] *= 1e6
        back = codec.coded(x).decode(*codec.coded(x).encode(x))
        assert bool(((back - x)[codec.group :].abs() <= codec.error * scale * 1.001).all())


def test_rounding_to_the_nearest_is_within_half_a_step() -> None:
    x = torch.randn(64, 64)
    back = Int8().coded(x).decode(*Int8().coded(x).encode(x))
    assert bool(((back - x).abs() <= Int8().error / 2 * largest(x, Groups.of(x, 64))).all())


@pytest.mark.parametrize("codec", [Int8(stochastic=True), Int4(), Int2()], ids=names)
def test_stochastic_rounding_is_right_on_average(codec: Scaled) -> None:
    x = torch.rand(512, 64) * 0.1 + 0.2
    x[:, 0] = 1.0
    coding = codec.coded(x)
    gap = (coding.decode(*coding.encode(x)) - x)[:, 1:]
    # The mean of n draws is off by at most 5 deviations of half a step over sqrt(n).
    assert abs(float(gap.mean())) < 5 * codec.error / 2 / gap.numel() ** 0.5


def test_the_draw_is_the_same_again_and_reads_no_random_stream() -> None:
    x = torch.randn(100, 64)
    state = torch.get_rng_state()
    one, two = (Int4().coded(x).encode(x) for _ in range(2))
    other = Int4(seed=1).coded(x).encode(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0], other[0])
    drawn = uniform(torch.full((1000, 64), 0.3), 0)
    assert float(drawn.min()) >= 0 and float(drawn.max()) < 1
    counts = torch.histc(drawn, 64, 0, 1)
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 120  # chi squared, 63 degrees: p < 1e-4
    assert abs(float((drawn[:, 1:] - 0.5).mul(drawn[:, :-1] - 0.5).mean())) < 0.002


# -- saved bytes ---------------------------------------------------------------------------------


def tanhs(dtype: torch.dtype) -> tuple[nn.Module, Callable[..., torch.Tensor], torch.Tensor]:
    """A network of which tanh's outputs are all that is saved, and its input."""
    model, late = chain(4, nn.Tanh).to(dtype), LATE.to(dtype)
    return model, lambda x: (model(x).view(-1, 8) @ late).sum(), torch.randn(64, 64, dtype=dtype)


@pytest.mark.parametrize(
    ("lossy", "dtype", "least"),
    [
        ("int8", torch.float32, 3.5),
        ("fp8", torch.float32, 3.5),
        ("int8", torch.bfloat16, 1.9),
        ("fp8", torch.bfloat16, 1.9),
        ("int4", torch.float32, 6.0),
    ],
)
def test_kept_values_take_fewer_bytes(lossy: str, dtype: torch.dtype, least: float) -> None:
    """The same values are kept, encoded."""
    _, step, x = tanhs(dtype)
    shrunk = shrink(step, x, passes=f"compress{{lossy={lossy},factors=False}}")
    assert list(shrunk.moves.values()) == [lossy] * len(shrunk.moves)
    assert len(shrunk.moves) == 4
    assert shrunk.factor >= least


# -- whole steps ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("lossy", "dynamic"), [("fp8", False), ("int8", False), ("int4", True)])
def test_every_move_is_sound(lossy: str, dynamic: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(13, 24), nn.Tanh(), nn.Linear(24, 12), nn.ReLU())

    def step(x: torch.Tensor) -> torch.Tensor:
        return (model(x).cos() * 2).square().mean()

    configured = Compress(least=0, lossy=lossy)
    checked = check_pass(configured, step, torch.randn(9, 7, 13), dynamic=dynamic)
    assert checked.exactness == "no"
    assert 0 < checked.error < 3 * LOSSY[lossy]().error
    assert checked.after < checked.before


@pytest.mark.parametrize(("lossy", "word"), [("int8", "int8_t"), ("int4", "int32_t")])
def test_compiled_steps_are_as_close_as_eager_ones(lossy: str, word: str) -> None:
    """Outputs have no error at all; gradients have that of the codec, in kernels too."""
    model, step, x = tanhs(torch.float32)

    def gradients(passes: str, lower: str) -> tuple[torch.Tensor, torch.Tensor]:
        torch._dynamo.reset()
        model.zero_grad()
        loss = memopt(step, "min", lower, passes=passes, strict=True)(x)
        loss.backward()
        return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])

    exact_loss, exact = gradients("", "eager")
    errors = []
    for lower in ("eager", "inductor"):
        passes = f"compress{{lossy={lossy},factors=False}}"
        (loss, got), codes = run_and_get_code(functools.partial(gradients, passes, lower))
        assert lossy in [move.how for move in memcompile.reports()[-1].moves]
        torch.testing.assert_close(loss, exact_loss, rtol=1e-4, atol=0)
        errors.append(float((got - exact).norm() / exact.norm()))
    assert min(errors) > 0 and max(errors) < LOSSY[lossy]().error
    assert max(errors) < 1.3 * min(errors)  # the same codes, but for numbers at a step's edge

    forward, backward = codes  # no function of the forward's only encodes, none only decodes
    written = [pointers(given) for _, given, _ in KERNEL.findall(forward)]
    encoding = [set(dtypes.values()) for dtypes in written if word in dtypes.values()]
    assert len(encoding) >= 2 and all("float" in dtypes for dtypes in encoding)
    read = [given for _, given, _ in KERNEL.findall(backward) if word in given]
    assert len(read) >= 3 and all(given.count(word) == 1 for given in read)
    assert all(dtypes == {"float"} for dtypes in loops_written(backward))


def test_kernels_give_the_codes_that_eager_ops_give() -> None:
    """All codecs in one compiled function, a padded last group and NaNs among it."""
    x = values("broken", [37, 21], torch.float32)
    codings = [codec.coded(x, codec.keeps_signs) for codec in CODECS]

    @torch.compile
    def both(x: torch.Tensor) -> tuple[list[Any], list[Any]]:
        stored = [coding.encode(x) for coding in codings]
        return stored, [c.decode(*s) for c, s in zip(codings, stored, strict=True)]

    stored, back = both(x)
    for coding, codes, got in zip(codings, stored, back, strict=True):
        for one, two in zip(codes, coding.encode(x), strict=True):
            same = one.float().nan_to_num(99) == two.float().nan_to_num(99)
            assert float(same.float().mean()) > 0.99
        torch.testing.assert_close(got, coding.decode(*codes), equal_nan=True)


def test_a_mask_made_again_from_an_encoded_value_is_the_same() -> None:
    """A ReLU asks its kept output for signs alone, and int8 keeps those."""
    weight = torch.randn(16, 16, requires_grad=True)

    def step(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (F.relu(x @ weight) * 3).sum()  # the gradient is the mask's

    x = torch.randn(32, 16)
    assert check_pass(Compress(least=0, lossy="int8"), step, x, weight).error == 0.0
    graph = capture(lambda x, w: F.relu(x @ w).square().sum(), x, weight)[0]
    offered = Compress(lossy="int8").propose(graph.step, Context())
    assert "relu" in {move.value.name for move in offered if move.how == "int8"}
    offered = Compress(lossy="int4").propose(graph.step, Context())
    assert "relu" not in {move.value.name for move in offered if move.how == "int4"}


# -- sensitive values ----------------------------------------------------------------------------


class Attention(nn.Module):
    """Masked attention with a norm: logits, statistics, probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` (N, 32) -> the same."""
        y = self.norm(x)
        mask = torch.ones(len(x), len(x)).tril() == 0
        weights = (y @ y.T).masked_fill(mask, -1e9).softmax(-1)
        return F.gelu(self.out(weights @ y))


def offered(
    function: Callable[..., Any], *inputs: Any, exact: frozenset[str] = frozenset(), **options: Any
) -> set[str]:
    """Names of the values that are offered to be kept as int8."""
    (graph, *_) = capture(function, *inputs)
    found = Compress(least=0, lossy="int8", **options).propose(graph.step, Context(exact=exact))
    return {move.value.name for move in found if move.how == "int8"}


def test_logits_and_statistics_lose_nothing() -> None:
    model = Attention()

    def step(x: torch.Tensor) -> torch.Tensor:
        return model(x).square().mean()

    x = torch.randn(24, 32)
    names = offered(step, x)
    step_of = capture(step, x)[0].step
    by_name = {node.name: node for node in step_of.nodes}
    kinds = {
        name: [kind for kind, is_kind in KINDS.items() if is_kind(node, step_of)]
        for name, node in by_name.items()
        if node in step_of.early_values() and isinstance(node.meta["val"], torch.Tensor)
    }
    assert {"div", "addmm"} <= names  # probabilities, and what GELU reads
    assert not names & {name for name, found in kinds.items() if found}
    assert "statistics" in kinds["rsqrt"] and "statistics" in kinds["amax"]
    assert "logits" in kinds["mm"] and ["logits", "masked"] in kinds.values()
    assert "mm" in offered(step, x, sensitive=())


@pytest.mark.parametrize(
    ("function", "kinds"),
    [
        (lambda x: x.sin() > 0.5, ["compared"]),
        (lambda x: x.sin() > 0, []),  # its sign is kept
        (lambda x: F.relu(x.sin() + 1) > 0, ["compared"]),  # the sign of another number
        (lambda x: x.sin().round(), ["compared"]),
        (lambda x: x.sin().topk(2)[1], ["compared"]),
        (lambda x: F.silu(x.sin()), []),
        (lambda x: x.sin().mul(2).exp(), ["logits"]),
        (lambda x: x.sin() @ x.sin().T, []),
        (lambda x: x.sin().view(-1, 3).sum(), ["coordinates"]),
    ],
)
def test_sensitive_by_what_reads_a_value(function: Any, kinds: list[str]) -> None:
    def step(x: torch.Tensor) -> Any:
        return function(x)

    (graph, *_) = capture(step, torch.randn(6, 6))
    value = next(n for n in graph.step.nodes if n.name in ("sin", "sin_1"))
    found = [kind for kind, is_kind in KINDS.items() if is_kind(value, graph.step)]
    if kinds == ["coordinates"]:
        (view,) = [n for n in graph.step.nodes if "view" in n.name]
        assert KINDS["coordinates"](view, graph.step)
    else:
        assert found == kinds


def test_ops_and_modules_are_named_and_calibration_is_heeded() -> None:
    model = nn.ModuleDict({"one": nn.Linear(16, 16), "two": nn.Linear(16, 16)})

    def step(x: torch.Tensor) -> torch.Tensor:
        return model["two"](model["one"](x).tanh()).tanh().square().mean()

    x = torch.randn(8, 16)
    every = offered(step, x)
    assert {"tanh", "tanh_1"} <= every
    assert "tanh" not in "".join(offered(step, x, sensitive=("default", "tanh")))
    graph = capture(step, x)[0].step
    two = {n.name for n in graph.nodes if is_sensitive(n, graph, ("two",))}
    assert two and not two & {n.name for n in graph.nodes if is_sensitive(n, graph, ("one",))}
    assert offered(step, x, sensitive="two").isdisjoint(two)
    assert offered(step, x, exact=frozenset({"tanh"})) == every - {"tanh"}
    context = Context()
    list(Compress(lossy="int8", sensitive="twoo").propose(graph, context))
    assert "sensitive='twoo' is no kind, op or module of this graph" in context.remarks


def test_losses_of_exact_codecs_are_not_asked_for() -> None:
    """Where an exact codec stores as little, no lossy one is offered; nor for doubles."""

    def step(x: torch.Tensor) -> torch.Tensor:
        return (x.sin().bfloat16().float() * F.dropout(x, 0.5)).tanh().sum()

    x = torch.randn(64, 64, requires_grad=True)
    (graph, *_) = capture(step, x)
    for value, hows in moves(graph.step, "int8").items():
        if value.meta["val"].dtype == torch.bool:
            assert "int8" not in hows
    (graph, *_) = capture(lambda x: x.sin().tanh().sum(), x.detach().double().requires_grad_())
    assert not [h for hows in moves(graph.step, "int8").values() for h in hows if h == "int8"]


def moves(step: Any, lossy: str) -> dict[Any, list[str]]:
    found: dict[Any, list[str]] = {}
    for move in Compress(lossy=lossy).propose(step, Context()):
        found.setdefault(move.value, []).append(move.how)
    return found


def test_nothing_is_lost_without_a_backward() -> None:
    """What an inference graph returns may hang on any value that it holds for a while."""
    model, x = chain(3, nn.Tanh).requires_grad_(False), torch.randn(64, 64)

    def step(x: torch.Tensor) -> torch.Tensor:
        first = model(x)
        return (first @ first.T).sin().sum() + first.sum()

    compiled = memopt(step, "min", passes="compress{lossy=int8}", strict=True)
    torch.testing.assert_close(compiled(x), step(x))
    report = memcompile.reports()[-1]
    assert report.kind == "inference" and "nothing is lost" in report.passes[0].note
    assert "int8" not in [move.how for move in report.moves]


# -- options -------------------------------------------------------------------------------------


def test_the_report_says_that_nothing_was_checked() -> None:
    _, step, x = tanhs(torch.float32)
    memopt(step, "min", passes="compress{lossy=int8}", strict=True)(x).backward()
    report = memcompile.reports()[-1]
    (ran,) = report.passes
    assert ran.exactness == "no" and "int8 (error 0.0079)" in ran.note
    assert report.fidelity.startswith("unchecked")
    torch._dynamo.reset()
    memopt(step, "min", passes="compress", strict=True)(x).backward()
    assert not memcompile.reports()[-1].fidelity


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lossy=fp9", "lossy='fp9'; allowed: fp8, int8, int4, int2"),
        ("lossy=fp8,group=4", "group=4; allowed: 8 to 65536"),
        ("lossy=fp8,group=0", "group=0; allowed: 8 to 65536"),
        ("lossy=fp8,group=None", "group=None; allowed"),
        ("lossy=int8,sensitive=3", "sensitive=3 names no kinds"),
        ("lossy=int8,sensitive=''", "names no kinds"),
    ],
)
def test_what_is_misspelt_is_an_error(text: str, says: str) -> None:
    with pytest.raises(PassError, match=says):
        resolve(f"compress{{{text}}}")


def test_options_are_spelt_and_in_the_key() -> None:
    (configured,) = resolve("compress{lossy=int4,group=32,seed=5,sensitive=('default','mm')}")
    assert resolve(spell(configured)) == [configured]
    assert configured.exactness == "no" and Compress().exactness == "bits"
    keys = [
        source_key(dataclasses.replace(configured, **{option: value}))
        for option, value in [("seed", 5), ("seed", 6), ("group", 64), ("sensitive", "mm")]
    ]
    assert len(set(keys)) == 4
    files = {type(part).__module__.rsplit(".", 1)[-1] for part in configured.parts}
    assert {"whole", "scaled", "groups", "sensitive"} <= files


def test_masks_among_them_keep_their_bits() -> None:
    """Lossy beside exact codecs: whatever holds zeros and ones is bits."""
    model = Masked(16, torch.float32)
    (graph, *_) = capture(model, torch.randn(4, 9, 16), torch.rand(4, 9, 16) < 0.5)
    hows = moves(graph.step, "int8")
    masks = [h for v, h in hows.items() if v.meta["val"].dtype == torch.bool]
    assert masks and all("bits" in how or "mask" in how for how in masks)
    assert not any("int8" in how for how in masks)

"""Mixed precision in the graph: what is cast, what never is, and what is kept in 16 bits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import fresh_copy, memopt, observe
from memcompile_passes.cast import Cast
from memcompile_passes.cast.rules import CLEAR, CONTRACTIONS, GEOMETRY, SHARP
from torch import Tensor, fx, nn
from torch.nn import functional as F

import memcompile
from memcompile import Context, PassError, _torch
from memcompile.analysis.ops import op_name
from memcompile.pipeline import Pipeline
from memcompile.split import inductor_split
from memcompile.step import Step, module_names
from memcompile.testing import check_pass
from memcompile.testing.running import Captured, capture

BF16, FP32 = torch.bfloat16, torch.float32


def casted(
    function: Callable[..., Any], *inputs: Any, context: Context | None = None, **options: Any
) -> tuple[Captured, fx.GraphModule, bool]:
    """The first graph of a function, as it is and cast, and whether the pass says it changed."""
    graph = capture(function, *inputs)[0]
    module = _torch.copy_graph(graph.module)
    pipeline = Pipeline([Cast(**options)], context or Context(strict=True))
    return graph, module, pipeline.rewrite(module)


def contractions(module: fx.GraphModule) -> list[fx.Node]:
    return [n for n in module.graph.nodes if op_name(n) in CONTRACTIONS]


def dtypes(module: fx.GraphModule, name: str) -> set[torch.dtype]:
    """Of what the ops of a name read."""
    nodes = [n for n in module.graph.nodes if n.op == "call_function" and op_name(n) == name]
    assert nodes, name
    return {n.all_input_nodes[0].meta["val"].dtype for n in nodes}


def casts(module: fx.GraphModule, dtype: torch.dtype) -> list[fx.Node]:
    target = torch.ops.prims.convert_element_type.default
    return [n for n in module.graph.nodes if n.target is target and n.args[1] == dtype]


def saved(graph: Captured, module: fx.GraphModule) -> list[fx.Node]:
    """What Inductor's own split keeps from the forward to the backward."""
    step = Step(module, graph.num_outputs, graph.static)
    forward = inductor_split(step)[0].forward
    (output,) = forward.graph.find_nodes(op="output")
    return [n for n in output.args[0][graph.num_outputs :] if n.op != "placeholder"]


class Layer(nn.Module):
    """A norm, two layers and a residual."""

    def __init__(self, width: int = 64, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def stack(layers: int = 2, norm: type[nn.Module] = nn.LayerNorm) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Layer(norm=norm) for _ in range(layers)))


class Attention(nn.Module):
    """Attention by plain products."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return (q @ k.mT / 4).softmax(-1) @ v


# ----------------------------------------------------------------------- what is cast


def test_contractions_read_and_give_16_bits_and_all_else_is_fp32() -> None:
    _, module, changed = casted(stack(), torch.randn(300, 64))
    assert changed and contractions(module)
    for node in contractions(module):
        assert {n.meta["val"].dtype for n in node.all_input_nodes} == {BF16}
        assert node.meta["val"].dtype == BF16
    for name in ("var_mean", "erf", "rsqrt", "sum"):
        assert dtypes(module, name) == {FP32}


def test_contractions_keep_their_names_and_outputs_their_dtypes() -> None:
    graph, module, _ = casted(stack(), torch.randn(40, 64))
    assert {n.name for n in contractions(graph.module)} == {n.name for n in contractions(module)}
    (output,) = module.graph.find_nodes(op="output")
    assert {n.meta["val"].dtype for n in output.all_input_nodes} == {FP32}


def test_nothing_is_cast_twice() -> None:
    _, module, _ = casted(nn.Sequential(Attention(), Attention()), torch.randn(2, 20, 32))
    down = [n.args[0] for n in casts(module, BF16)]
    assert len(set(down)) == len(down), "a value is cast by two nodes"
    views = {"view", "permute", "transpose", "expand", "select", "split", "unsqueeze", "alias"}
    for node in down:
        assert op_name(node) not in views, f"{node} could be cast before it is moved about"
        assert node not in casts(module, FP32), f"{node} was 16 bits already"


def test_attention_by_library_call_is_cast_with_its_backward() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    inputs = [torch.randn(2, 4, 33, 16, requires_grad=True) for _ in range(3)]
    _, module, _ = casted(attend, *inputs)
    names = [op_name(n) for n in contractions(module)]
    assert len(names) == 2 and all("attention" in name for name in names)
    for node in contractions(module):
        kinds = {n.name: n.meta["val"].dtype for n in node.all_input_nodes}
        assert list(kinds.values())[:3] == [BF16] * 3
    (statistic,) = [n for n in contractions(module)[1].all_input_nodes if n.meta["val"].dim() == 3]
    assert statistic.meta["val"].dtype == FP32


def test_convolutions_are_cast_with_their_backward() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    _, module, _ = casted(net, torch.randn(2, 3, 12, 11))
    assert dtypes(module, "convolution") == dtypes(module, "convolution_backward") == {BF16}


def test_the_table_of_contractions_is_torchs_own() -> None:
    one, two = torch.randn(2, 3, 3), torch.randn(2, 3, 3)
    with torch.autocast("cpu", BF16):
        assert torch.mm(one[0], two[0]).dtype == torch.bmm(one, two).dtype == BF16
        assert torch.addmm(one[0], one[0], two[0]).dtype == BF16
        assert torch.addbmm(one[0], one, two).dtype == torch.baddbmm(one, one, two).dtype == BF16
    listed = {"addbmm", "addmm", "addmv", "baddbmm", "bmm", "convolution", "mm", "mv"}
    assert listed <= CONTRACTIONS
    for name in listed:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "AutocastCUDA")
    for name in ("exp", "log", "reciprocal", "rsqrt", "pow.Tensor_Scalar"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "AutocastCUDA")
        assert name.split(".")[0] in SHARP
    assert not CONTRACTIONS & (SHARP | CLEAR | GEOMETRY)


# ---------------------------------------------------------------------- what never is


def test_an_outer_product_mean_stays_in_fp32_and_so_does_its_backward() -> None:
    def mean(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
        return torch.einsum("sic,sjd->ijcd", a, b / a.shape[0]).flatten(-2) @ w

    a, b, w = (torch.randn(s, requires_grad=True) for s in ((21, 5, 4), (21, 5, 4), (16, 8)))
    _, module, _ = casted(mean, a, b, w)
    whole = [n for n in contractions(module) if n.meta["val"].dtype == FP32]
    assert len(whole) == 3, "forward, and a gradient of each factor"
    assert any(n.meta["val"].dtype == BF16 for n in contractions(module)), "the layer behind it"


@pytest.mark.parametrize(
    "norm", ["divided", "by masks"], ids=["a count", "a sum of masks"]
)  # fmt: skip
def test_a_mean_is_known_by_what_divides_the_product(norm: str) -> None:
    def mean(a: Tensor, mask: Tensor) -> Tensor:
        product = torch.einsum("si,sj->ij", a, a)
        if norm == "divided":
            return product / a.shape[0]
        return product / (torch.einsum("si,sj->ij", mask, mask) + 1e-3)

    _, module, _ = casted(mean, torch.randn(9, 8, requires_grad=True), torch.ones(9, 8))
    first = contractions(module)[0]
    assert first.meta["val"].dtype == FP32


def test_rotations_and_coordinates_stay_in_fp32() -> None:
    class Structure(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.points = nn.Linear(32, 32), nn.Linear(32, 12)
            self.out = nn.Linear(32, 3)

        def forward(self, x: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.hidden(x).relu()
            points = self.points(hidden).unflatten(-1, (4, 3))
            return torch.einsum("nij,npj->npi", turn, points), self.out(hidden)

    graph, module, _ = casted(Structure(), torch.randn(10, 32), torch.randn(10, 3, 3))
    early = Step(module, graph.num_outputs).sides.early
    forward = [n for n in contractions(module) if n in early]
    low = [n for n in forward if n.meta["val"].dtype == BF16]
    assert len(forward) == 4 and len(low) == 1 and "hidden" in module_names(low[0])


def test_what_reads_distances_stays_in_fp32_until_they_are_bounded() -> None:
    class Messages(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.raw, self.radial = nn.Linear(17, 16), nn.Linear(8, 16)

        def forward(self, h: Tensor, x: Tensor) -> Tensor:
            apart = x[:, None] - x[None]
            square = apart.square().sum(-1, keepdim=True)
            pairs = torch.cat([h[:, None].expand(-1, len(x), -1), square], -1)
            return self.raw(pairs) + self.radial((-square * torch.arange(8)).exp())

    _, module, _ = casted(Messages(), torch.randn(7, 16), torch.randn(7, 3, requires_grad=True))
    kinds: dict[str, set[torch.dtype]] = {}
    for node in contractions(module):
        kinds.setdefault(module_names(node)[-2], set()).add(node.meta["val"].dtype)
    assert kinds == {"raw": {FP32}, "radial": {BF16}}


def test_spectra_stay_complex64() -> None:
    def layer(x: Tensor, w: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(x) * w.sum(0)[: x.shape[-1] // 2 + 1]) @ w

    _, module, _ = casted(layer, torch.randn(6, 8, requires_grad=True), torch.randn(8, 8))
    assert dtypes(module, "_fft_r2c") == {FP32} and dtypes(module, "_fft_c2r") == {torch.complex64}


def test_a_loss_reads_no_rounded_probability() -> None:
    def loss(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(x @ w, labels)

    x, w = torch.randn(300, 16, requires_grad=True), torch.randn(16, 40, requires_grad=True)
    graph, module, _ = casted(loss, x, w, torch.randint(40, (300,)))
    late = [n for n in module.graph.nodes if op_name(n) == "exp"][-1]
    (logs,) = late.all_input_nodes
    assert op_name(logs) == "sub", "log probabilities as the forward has them, in fp32"
    kept = [n.meta["val"] for n in saved(graph, module)]
    assert max(v.numel() for v in kept if v.dtype == FP32) <= 300


@pytest.mark.parametrize("keep", ["addmm", "0.up", "Layer", ("1.*", "0.*")])
def test_ops_and_modules_are_kept_by_name(keep: Any) -> None:
    _, module, changed = casted(stack(), torch.randn(300, 64), keep=keep)
    kept = [n for n in contractions(module) if n.meta["val"].dtype == FP32]
    if keep == "0.up":
        assert changed and len(kept) == 3, "forward, and both gradients"
    elif keep == "addmm":
        assert changed is False or all(n.meta["val"].dtype == FP32 for n in kept)
    else:
        assert not changed


def test_a_name_of_nothing_is_remarked_on() -> None:
    with pytest.raises(PassError, match="keep='decoder' is no op and no module"):
        casted(stack(), torch.randn(4, 64), keep="decoder")
    with pytest.raises(ValueError, match="keep=3"):
        Cast(keep=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dtype='fp8'"):
        Cast(dtype="fp8")


def test_nodes_that_are_to_stay_exact_are_not_cast() -> None:
    graph, plain, _ = casted(stack(), torch.randn(40, 64))
    product = contractions(graph.module)[0].name
    read = contractions(graph.module)[1].args[1].name
    _, module, _ = casted(
        stack(), torch.randn(40, 64), context=Context(strict=True, exact=frozenset([product, read]))
    )
    by_name = {n.name: n for n in module.graph.nodes}
    assert by_name[product].meta["val"].dtype == FP32
    assert contractions(module)[1].meta["val"].dtype == FP32, "it reads a value that stays exact"
    assert not any(n.args[0].name == read for n in casts(module, BF16))
    assert len(casts(module, BF16)) < len(casts(plain, BF16))


@pytest.mark.parametrize("kind", ["float64", "integers", "no contraction", "complex"])
def test_graphs_with_nothing_to_cast_are_left_as_they_are(kind: str) -> None:
    x: Tensor = torch.randn(6, 6)
    x = {"float64": x.double(), "integers": (x * 9).long(), "complex": x + 0j}.get(kind, x)

    def function(x: Tensor) -> Tensor:
        return x.softmax(-1) if kind == "no contraction" else x @ x

    assert casted(function, x)[2] is False


def test_a_model_under_autocast_is_left_alone_and_said_to_be() -> None:
    class Under(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.head = stack(1), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", BF16):
                x = self.model(x)
            return self.head(x)

    context = Context()
    graph, module, changed = casted(Under(), torch.randn(9, 64), context=context)
    assert not changed and "in 16 bits already" in context.remarks[0]
    kinds = [n.meta["val"].dtype for n in contractions(module)]
    assert kinds == [n.meta["val"].dtype for n in contractions(graph.module)]


# ------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("tied", [False, True])
def test_no_16_bit_copy_of_a_parameter_is_kept(tied: bool) -> None:
    model = stack(3)
    if tied:
        model[2].up.weight = model[0].up.weight
    graph, module, _ = casted(model, torch.randn(40, 64))
    for node in saved(graph, module):
        made = [n for n in ancestors(node) if op_name(n) in (*CONTRACTIONS, "var_mean")]
        assert made or op_name(node) == "getitem", f"{node} is made of inputs alone"
    weights = [n for n in casts(module, BF16) if n.args[0].name.startswith("primals")]
    assert weights and all(n.meta["recompute"].name == "MUST_RECOMPUTE" for n in weights)


class Modes(nn.Module):
    """Numbers of a field times complex matrices, and a linear map, as in a spectral operator."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(20, 16, 16, 2))
        self.up = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = torch.bmm(torch.fft.fft(x, dim=-1), torch.view_as_complex(self.weight))
        return self.up(torch.fft.ifft(mixed, dim=-1).real)


@pytest.mark.parametrize("dynamic", [False, True])
def test_no_conjugate_of_a_parameter_is_kept(dynamic: bool) -> None:
    x = torch.randn(20, 9, 16, requires_grad=True)
    (graph,) = capture(model := Modes(), x, dynamic=dynamic)

    def conjugates(module: fx.GraphModule) -> list[fx.Node]:
        found = [n for n in saved(graph, module) if op_name(n) == "_conj"]
        return [n for n in found if n.meta["val"].shape[-1] == n.meta["val"].shape[-2]]

    assert conjugates(graph.module), "without the pass it is"
    module = _torch.copy_graph(graph.module)
    assert Cast().rewrite(module, Context())
    assert not conjugates(module)
    assert check_pass(Cast(), model, x, dynamic=dynamic).error < 0.02


def ancestors(node: fx.Node) -> set[fx.Node]:
    found, todo = set(), list(node.all_input_nodes)
    while todo:
        if (read := todo.pop()) not in found:
            found.add(read)
            todo += read.all_input_nodes
    return found


@pytest.mark.parametrize("budget", [None, "min"])
def test_the_planner_keeps_no_16_bit_copy_of_a_parameter(budget: str | None) -> None:
    model = stack(3)
    memopt(model, budget, precision="bf16")(torch.randn(300, 64)).square().mean().backward()
    report = memcompile.reports()[-1]
    returned = report.forward.rsplit("return (", 1)[1].split(")")[0]
    assert "primals" in returned
    assert not [name for name in returned.split(", ") if "primals" in name and "bf16" in name]


def test_a_step_of_weights_alone_peaks_no_higher_than_in_fp32() -> None:
    """pytorch #133637: autocast keeps a 16-bit copy of each weight."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(96, 96, bias=False) for _ in range(6)))
    found = check_pass(Cast(), model, torch.randn(8, 96))
    assert found.after <= found.before


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_a_norm_keeps_16_bits_of_its_rows(norm: type[nn.Module]) -> None:
    """pytorch #188955: the fp32 upcast of an activation is kept instead of the activation."""
    graph, module, _ = casted(stack(3, norm), torch.randn(40, 64))
    kept = [n.meta["val"] for n in saved(graph, module)]
    assert max(v.numel() for v in kept if v.dtype == FP32) <= 40, "statistics alone"
    plain = sum(n.meta["val"].nbytes for n in saved(graph, graph.module))
    assert sum(v.nbytes for v in kept) < 0.4 * plain


def test_a_norm_that_reads_another_order_keeps_its_rows_alone() -> None:
    """The forward's norm reads a contiguous copy of the sums, its backward the sums themselves."""
    model, z = TriangleMultiplication(16), torch.randn(1, 24, 24, 16)
    graph, module, _ = casted(model, z)
    kept = [n.meta["val"] for n in saved(graph, module) if n.meta["val"].numel() >= 24 * 24 * 16]
    assert {value.dtype for value in kept} == {BF16}
    assert sum(v.numel() for v in kept) == 24 * 24 * 16 * (2 * 2 + 3), "two pairs, rows, two gates"
    assert check_pass(Cast(), model, z).error < 0.02


def test_probabilities_are_kept_once() -> None:
    graph, module, _ = casted(Attention(), torch.randn(3, 40, 32))
    square = [n for n in saved(graph, module) if n.meta["val"].numel() == 3 * 40 * 40]
    assert [n.meta["val"].dtype for n in square] == [BF16]


# ------------------------------------------------------------------- it computes the same


class Norms(nn.Module):
    """Buffers that the step writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 8, 3), nn.BatchNorm1d(8)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Tied(nn.Module):
    """A table that is the head too, and a parameter that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(21, 64), Layer()
        self.unused = nn.Parameter(torch.randn(3))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.layer(self.table(tokens))
        return x @ self.table.weight.T, x[:, ::2]


class Views(nn.Module):
    """Overlapping slices, a transposed input, a part without gradient, several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 7)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
        y = self.layer(x.mT)
        with torch.no_grad():
            fixed = y[..., :5].sum(-1, keepdim=True)
        z = torch.cat([y[:, 1:], y[:, :-1]], -1) @ torch.cat([y[:, :1], y[:, 1:2]], -1).mT
        return z.squeeze(-1), y.flip(0) * fixed, 3


SUBJECTS: dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...]]]] = {
    "odd sizes": lambda: (stack(), (torch.randn(37, 64, requires_grad=True),)),
    "rms norm": lambda: (stack(2, nn.RMSNorm), (torch.randn(3, 11, 64, requires_grad=True),)),
    "attention": lambda: (Attention(), (torch.randn(2, 19, 32, requires_grad=True),)),
    "batch norm": lambda: (Norms(), (torch.randn(5, 3, 17, requires_grad=True),)),
    "tied": lambda: (Tied(), (torch.randint(21, (4, 9)),)),
    "views": lambda: (Views(), (torch.randn(5, 6, 9, requires_grad=True),)),
}


def distance(one: Any, two: Any) -> float:
    """The norm of all differences over that of ``two``."""
    leaves = [torch.utils._pytree.tree_leaves(each) for each in (one, two)]
    pairs = [(a, b) for a, b in zip(*leaves, strict=True) if isinstance(b, Tensor)]
    pairs = [(a.detach(), b.detach()) for a, b in pairs if b.is_floating_point()]
    apart = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    return (apart / sum(float(b.double().square().sum()) for _, b in pairs)) ** 0.5


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("name", SUBJECTS)
def test_outputs_and_gradients_are_no_worse_than_under_autocast(name: str, dtype: str) -> None:
    torch.manual_seed(0)
    model, inputs = SUBJECTS[name]()
    exact_model = copy.deepcopy(model).double()
    exact_inputs = [x.detach().double() if x.is_floating_point() else x for x in inputs]
    for given, known in zip(exact_inputs, inputs, strict=True):
        given.requires_grad_(known.requires_grad)
    exact = observe(exact_model, exact_model, exact_inputs)
    under = copy.deepcopy(model)

    def autocast(*given: Any) -> Any:
        with torch.autocast("cpu", {"bf16": BF16, "fp16": torch.float16}[dtype]):
            return under(*given)

    peer = observe(under, autocast, inputs)
    ours_model = copy.deepcopy(model)
    compiled = memopt(ours_model, precision=dtype, strict=True, fullgraph=True)
    ours = observe(ours_model, compiled, inputs)
    for field in ("outputs", "parameters", "buffers"):
        wanted = getattr(exact, field)
        if field == "buffers" and name != "batch norm":
            continue
        error, theirs = (distance(getattr(seen, field), wanted) for seen in (ours, peer))
        assert 0 < error <= 1.25 * theirs, (field, error, theirs)
    assert all(p.grad is None or p.grad.dtype == FP32 for p in ours_model.parameters())


def test_dropout_draws_what_it_draws_without_casts() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.Dropout(0.5), nn.Linear(64, 32))
    x = torch.randn(50, 32)

    def run(**options: Any) -> Tensor:
        torch._dynamo.reset()
        torch.manual_seed(3)
        compiled = memopt(model, **options)
        return torch.autograd.grad(compiled(x).sum(), model[2].weight)[0]

    plain, low = run(), run(precision="bf16")
    assert torch.equal(plain == 0, low == 0) and 0 < distance(low, plain) < 0.02


def test_dynamic_lengths_share_one_graph() -> None:
    model = stack(1)
    compiled = memopt(model, precision="bf16", strict=True, dynamic=True, fullgraph=True)
    since = len(memcompile.reports())
    for length in (37, 50, 64):
        x = torch.randn(length, 64)
        assert 0 < distance(compiled(x), model(x)) < 0.01
    assert len(memcompile.reports()) == since + 1


def test_inference_is_cast_too() -> None:
    model, x = stack(), torch.randn(30, 64)
    compiled = memopt(model, precision="bf16", strict=True, fullgraph=True)
    with torch.no_grad():
        got = compiled(x)
    assert got.dtype == FP32 and 0 < distance(got, model(x)) < 0.01
    ran = memcompile.reports()[-1].passes[0]
    assert ran.name.startswith("cast") and ran.changed if hasattr(ran, "name") else ran


def test_the_pass_keeps_its_contract() -> None:
    for model, x in ((stack(), torch.randn(40, 64)), (Attention(), torch.randn(2, 40, 32))):
        found = check_pass(Cast(), model, x)
        assert found.changed and found.exactness == "no" and found.after < found.before
        assert 0 < found.error < 0.05


class TriangleMultiplication(nn.Module):
    """Boltz's: gated edges, summed over the third node."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(width)
        self.edges, self.gates = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        self.out, self.gate = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, z: Tensor) -> Tensor:
        x = self.norm(z)
        a, b = (self.edges(x) * self.gates(x).sigmoid()).chunk(2, -1)
        summed = torch.einsum("bikd,bjkd->bijd", a, b)
        return self.out(self.norm_out(summed)) * self.gate(x).sigmoid()


@pytest.mark.slow
def test_a_triangle_multiplication_is_as_good_as_under_eager_autocast() -> None:
    """pytorch #168126: compiled autocast is far off eager's."""
    torch.manual_seed(0)
    model, z = TriangleMultiplication(16), torch.randn(1, 24, 24, 16)
    exact = observe(m := copy.deepcopy(model).double(), m, [z.double()])
    under = copy.deepcopy(model)

    def autocast(z: Tensor) -> Tensor:
        with torch.autocast("cpu", BF16):
            return under(z)

    peer = observe(under, autocast, [z])
    ours = observe(model, memopt(model, lower="inductor", precision="bf16", strict=True), [z])
    for field in ("outputs", "parameters"):
        error, theirs = (distance(getattr(s, field), getattr(exact, field)) for s in (ours, peer))
        assert 0 < error <= 2 * theirs


# ------------------------------------------------------------------------------ options


def test_precision_is_checked_and_part_of_the_key() -> None:
    keys = {memcompile.Options(precision=p).key() for p in (None, "bf16", "fp16")}
    assert len(keys) == 3
    with pytest.raises(memcompile.OptionsError, match=r"precision='fp8'.*'bf16', 'fp16'"):
        memcompile.Options(precision="fp8")


def test_precision_puts_the_cast_in_front() -> None:
    memopt(stack(1), precision="bf16", passes="recompute")(torch.randn(4, 64)).sum().backward()
    assert [ran.by for ran in memcompile.reports()[-1].passes] == ["cast", "recompute"]
    with pytest.raises(PassError, match="two passes are named 'cast'"):
        memopt(stack(1), precision="bf16", passes="cast{dtype=fp16}")(torch.randn(4, 64))


# --------------------------------------------------------------------------------- fp16


def test_a_triangle_multiplication_does_not_leave_the_range_of_fp16() -> None:
    torch.manual_seed(0)
    model, z = TriangleMultiplication(16), torch.randn(1, 48, 48, 16)
    with torch.no_grad():
        model.edges.bias.fill_(50.0)  # 48 products of about 25 * 25 are above 65504 / 4
        model.edges.weight.mul_(200.0)
    ours = observe(model, memopt(model, precision="fp16", strict=True), [z])
    assert all(bool(t.isfinite().all()) for t in (*ours.outputs, *ours.parameters.values()))
    with torch.autocast("cpu", torch.float16):
        assert not bool(model(z).isfinite().all()), "under autocast it does"


def trained(steps: int, scaled: bool) -> tuple[float, float]:
    """First and last loss of a regression whose gradients are below fp16's least number."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 1))
    x = torch.randn(256, 16)
    target = x[:, :1] * x[:, 1:2]

    def loss_of(x: Tensor, target: Tensor) -> Tensor:
        return 1e-6 * F.mse_loss(model(x), target)

    compiled = memopt(loss_of, precision="fp16", strict=True, fullgraph=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, eps=1e-20)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, enabled=scaled)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = compiled(x, target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return losses[0], losses[-1]


def test_fp16_trains_under_torchs_own_scaler_and_not_without() -> None:
    first, last = trained(60, scaled=True)
    assert last < 0.3 * first
    first, last = trained(60, scaled=False)
    assert last > 0.8 * first, "gradients underflow to zero"


def test_inputs_are_left_as_they_were_given() -> None:
    x = torch.randn(20, 64)
    before = fresh_copy(x)
    memopt(stack(1), precision="bf16")(x).sum().backward()
    assert torch.equal(x, before)

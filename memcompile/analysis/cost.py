"""Seconds per node, from a roofline calibrated once on the device at hand.

A node costs the longer of its arithmetic and its memory traffic, and one launch. A node that
Inductor inlines into its consumer costs its arithmetic alone. The figures rank moves against
each other; they are not a promise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import operator
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.fx.node

from memcompile import _torch
from memcompile.analysis import benchmark
from memcompile.folders import cache_folder, replace_text
from memcompile.step import hint


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: Ops that take many instructions an element, by their name without overload.
SLOW_OPS = _names(
    """
    acos acosh asin asinh atan atan2 atanh cos cosh cumprod cumsum digamma elu erf erfc erfinv
    exp exp2 expm1 gelu gelu_backward lgamma log log10 log1p log2 log_sigmoid_forward logaddexp
    logcumsumexp logit logsumexp mish pow sigmoid silu silu_backward sin sinh softplus tan tanh
    _softmax _log_softmax _log_softmax_backward_data
    bernoulli inductor_randint inductor_random native_dropout normal_functional rand rand_like
    randint randint_like randn randn_like
    embedding_dense_backward index_add index_put scatter_add scatter_reduce
    argsort histc kthvalue median mode sort topk unique_dim _unique2
    """
)

#: Ops that read only as much of their inputs as they write.
GATHER_OPS = _names("embedding gather grid_sampler_2d index index_select take take_along_dim")

#: Ops that only describe a tensor anew, or whose result the next op writes.
FREE_OPS = _names(
    """
    _unsafe_view empty empty_like empty_strided new_empty new_empty_strided lift_fresh
    inductor_lookup_seed wait_tensor sym_size sym_stride sym_numel sym_storage_offset
    """
)

#: Attention ops without a flop formula in torch, and one that counts the same arguments.
_FLOPS_AS: Mapping[str, str] = {
    f"_scaled_dot_product_{kind}{side}": f"_scaled_dot_product_flash_attention{side}"
    for kind in ("flash_attention_for_cpu", "fused_attention_overrideable")
    for side in ("", "_backward")
}


@dataclasses.dataclass(frozen=True)
class Rates:
    """How fast a device is, each figure rounded to two significant digits."""

    device: str  #: the device's own name
    threads: int  #: intra-op threads (CPU); 0 elsewhere
    matmul: Mapping[str, float]  #: flop/s by dtype: {"float32": 1.2e11, ...}
    memory: float  #: bytes/s read or written
    cheap: float  #: elements/s of plain arithmetic
    slow: float  #: elements/s of exp, erf, tanh and the like
    launch: float  #: seconds to start one kernel
    to_host: float = 0.0  #: bytes/s copied to pinned memory of the host; 0 on the host itself
    from_host: float = 0.0  #: and back

    def matmul_rate(self, dtype: torch.dtype) -> float:
        """Flop/s for ``dtype``; eight-bit floats as bfloat16, the rest as float32."""
        name = str(dtype).removeprefix("torch.")
        other = "bfloat16" if name.startswith("float8") else "float32"
        return self.matmul.get(name) or self.matmul.get(other) or self.matmul["float32"]

    def to_json(self) -> str:
        """As JSON text; :meth:`from_json` reads it back."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Rates:
        """Read what :meth:`to_json` wrote. Raises ``ValueError`` on anything else."""
        try:
            rates = cls(**json.loads(text))
            figures = [*rates.matmul.values(), rates.memory, rates.cheap, rates.slow, rates.launch]
            links = (rates.to_host, rates.from_host)
            if not all(0 < figure < math.inf for figure in figures) or not all(
                0 <= figure < math.inf for figure in links
            ):
                raise ValueError("a rate is not a positive number")
            rates.matmul["float32"]
        except (TypeError, AttributeError, KeyError, ValueError) as error:
            raise ValueError(f"not memcompile rates: {error}") from error
        return rates


#: Rates of no device in particular, the same everywhere: for tests.
FIXED = Rates(
    device="fixed",
    threads=0,
    matmul={"float32": 1e11, "bfloat16": 1e11, "float16": 1e11, "float64": 5e10},
    memory=1e10,
    cheap=1e10,
    slow=1e9,
    launch=5e-6,
    to_host=1e9,
    from_host=1e9,
)

_forced: list[Rates] = []
_known: dict[Path, Rates] = {}


@contextlib.contextmanager
def use_rates(rates: Rates) -> Iterator[Rates]:
    """Make :func:`calibrate` answer ``rates`` within the block, in every thread."""
    _forced.append(rates)
    try:
        yield rates
    finally:
        _forced.pop()


def calibrate(device: torch.device | str) -> Rates:
    """The rates of ``device``: measured once, then read from disk.

    In order: those of :func:`use_rates`; those that ``MEMCOMPILE_RATES`` names (``"fixed"``
    or a JSON file); those on disk for this device, thread count and torch version; else a
    benchmark of about a second, whose result is stored.
    """
    if _forced:
        return _forced[-1]
    named = os.environ.get("MEMCOMPILE_RATES")
    if named:
        return FIXED if named == "fixed" else Rates.from_json(Path(named).read_text("utf-8"))
    where = torch.device(device)
    path = _rates_file(where)
    if path not in _known:
        _known[path] = _load(path) or _store(path, measure_rates(where))
    return _known[path]


def measure_rates(device: torch.device) -> Rates:
    """Benchmark ``device`` afresh, in about a second.

    On the CPU one thread is timed, and its arithmetic counts once for each thread; bandwidth
    is shared, and grows about as their square root. Timing all threads at once would read
    other processes' load: on a busy machine every parallel call waits for its slowest core.
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    with benchmark.one_thread(device):
        products = benchmark.matmul_rates(device)
        memory = benchmark.memory_rate(device)
        cheap = benchmark.element_rate(device, [torch.add, torch.mul])
        slow = benchmark.element_rate(device, [torch.exp, torch.erf, torch.tanh])
        launch = benchmark.launch_seconds(device)
        links = benchmark.link_rates(device)
    scale = max(threads, 1)
    return Rates(
        device=benchmark.device_name(device),
        threads=threads,
        matmul={dtype: _two_digits(rate * scale) for dtype, rate in products.items()},
        memory=_two_digits(memory * math.sqrt(scale)),
        cheap=_two_digits(cheap * scale),
        slow=_two_digits(slow * scale),
        launch=_two_digits(launch),
        to_host=_two_digits(links[0]),
        from_host=_two_digits(links[1]),
    )


def node_seconds(
    node: torch.fx.Node,
    rates: Rates,
    *,
    materialised: bool = True,
    reads: int | None = None,
    writes: int | None = None,
) -> float:
    """Predicted seconds of one node that carries ``meta["val"]``. Never raises.

    ``materialised=False`` says that Inductor inlines the node into a consumer: it moves no
    bytes and launches nothing. ``reads`` and ``writes`` are the bytes moved where the caller
    knows them (a fused group), else those of the node's own arguments and result.
    """
    name = _op_name(node)
    if _is_free(node, name):
        return 0.0
    compute = _compute_seconds(node, name, rates)
    if not materialised:
        return compute
    written = _bytes(_results(node)) if writes is None else writes
    read = _bytes_read(node, name) if reads is None else reads
    return max(compute, (read + written) / rates.memory) + rates.launch


def node_flops(node: torch.fx.Node) -> int:
    """Floating-point operations of a matrix product, convolution or attention; else 0."""
    known = _torch.flop_registry
    formula = known.get(_packet(node)) or known.get(_counted_as(_op_name(node)))
    if formula is None:
        return 0
    try:
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), _shape_of_node)
        return int(formula(*args, **kwargs, out_val=_shape_of(node.meta.get("val"))))
    except Exception:  # a formula may refuse arguments it has not met: count it as no product
        return 0


def _compute_seconds(node: torch.fx.Node, name: str, rates: Rates) -> float:
    """Seconds of arithmetic."""
    if isinstance(node.target, _torch.HigherOrderOperator):
        return 0.0
    flops = node_flops(node)
    if flops:
        return flops / rates.matmul_rate(_compute_dtype(node))
    return _elements(node, name) / (rates.slow if _is_slow(node, name) else rates.cheap)


def _is_free(node: torch.fx.Node, name: str) -> bool:
    """Whether a node is no work at all: an input, a view, an item of a tuple."""
    if node.op not in ("call_function", "call_method", "call_module"):
        return True
    if node.target is operator.getitem or name in FREE_OPS:
        return True
    if getattr(node.target, "is_view", False):
        return True
    value = node.meta.get("val")
    return value is not None and not isinstance(value, (torch.Tensor, tuple, list))


def _is_slow(node: torch.fx.Node, name: str) -> bool:
    if name == "pow" and len(node.args) > 1 and isinstance(node.args[1], (int, float)):
        return node.args[1] not in (-2, -1, -0.5, 0, 0.5, 1, 2, 3, 4)
    return name in SLOW_OPS


def _elements(node: torch.fx.Node, name: str) -> int:
    """Elements the node works on: of its results, or of its inputs if those are more."""
    tensors = list(_results(node))
    if name not in GATHER_OPS:
        tensors += _arguments(node)
    return max((_numel(tensor.shape) for tensor in tensors), default=0)


def _bytes_read(node: torch.fx.Node, name: str) -> int:
    if name in GATHER_OPS:
        indices = [t for t in _arguments(node) if not t.dtype.is_floating_point]
        return _bytes(_results(node)) + _bytes(indices)
    return _bytes(_arguments(node))


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes that reading or writing each tensor once moves; expanded dimensions count once."""
    return sum(_extent(tensor) * tensor.dtype.itemsize for tensor in tensors)


def _extent(tensor: torch.Tensor) -> int:
    """Distinct elements of a strided tensor."""
    if tensor.layout != torch.strided:
        return _numel(tensor.shape)
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return _numel(size for size, stride in pairs if isinstance(stride, torch.SymInt) or stride != 0)


def _numel(sizes: Iterable[Any]) -> int:
    return math.prod(hint(size) for size in sizes)


def _results(node: torch.fx.Node) -> list[torch.Tensor]:
    return _tensors(node.meta.get("val"))


def _arguments(node: torch.fx.Node) -> list[torch.Tensor]:
    return [tensor for source in node.all_input_nodes for tensor in _results(source)]


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors(item)]
    return [value] if isinstance(value, torch.Tensor) else []


def _compute_dtype(node: torch.fx.Node) -> torch.dtype:
    """The dtype a product multiplies in: that of its first floating-point argument."""
    floats = [t.dtype for t in [*_arguments(node), *_results(node)] if t.dtype.is_floating_point]
    return floats[0] if floats else torch.float32


def _packet(node: torch.fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", node.target)


def _op_name(node: torch.fx.Node) -> str:
    """``mm`` for ``torch.ops.aten.mm.default``."""
    return node.target if isinstance(node.target, str) else getattr(_packet(node), "__name__", "")


def _counted_as(name: str) -> Any:
    return getattr(torch.ops.aten, _FLOPS_AS[name]) if name in _FLOPS_AS else None


def _shape_of_node(node: torch.fx.Node) -> Any:
    return _shape_of(node.meta.get("val"))


def _shape_of(value: Any) -> Any:
    """What a flop formula wants: tensors without data, and plain numbers."""
    if isinstance(value, torch.Tensor):
        return torch.empty([hint(size) for size in value.shape], device="meta", dtype=value.dtype)
    if isinstance(value, (tuple, list)):
        return tuple(_shape_of(item) for item in value)
    return hint(value) if isinstance(value, torch.SymInt) else value


def _rates_file(device: torch.device) -> Path:
    """One file for each device name, thread count, torch version and float32 precision."""
    precision = torch.get_float32_matmul_precision()
    name = benchmark.device_name(device)
    parts: tuple[object, ...] = (name, torch.get_num_threads(), torch.__version__, precision)
    if device.type == "cuda":
        parts += ("link",)  # files from before the link was measured have no rate of it
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    return cache_folder() / f"rates-{device.type}-{digest}.json"


def _load(path: Path) -> Rates | None:
    try:
        return Rates.from_json(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None


def _store(path: Path, rates: Rates) -> Rates:
    """Keep ``rates`` for later processes; a folder that cannot be written is no error."""
    with contextlib.suppress(OSError):
        replace_text(path, rates.to_json())
    return rates


def _two_digits(figure: float) -> float:
    return float(f"{figure:.1e}")

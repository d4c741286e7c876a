"""Bytes a library op allocates inside itself, measured once a shape.

Inductor's schedule knows the buffers between kernels, not what an attention or a
convolution allocates within. Each such op is run once on real tensors of its own
sizes while compiling, and the answer is kept on disk.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from typing import Any

import torch
from torch import fx

from memcompile import _torch
from memcompile.analysis.ops import op_name
from memcompile.folders import cache_folder, replace_text
from memcompile.measure import measure_peak, tensor_bytes
from memcompile.step import hint


def of(kernel: Any) -> int:
    """Scratch bytes of one lowered library op; 0 when it is unknown."""
    if type(kernel).__name__ != "FallbackKernel":
        return 0
    op = getattr(kernel, "op_overload", None)
    if not isinstance(op, _torch.OpOverload) or op.namespace != "aten":
        return 0
    try:
        args, kwargs = _torch.fallback_arguments(kernel)
        return _measured(_Call(op, args, kwargs))
    except Exception:  # a calibration that fails must not fail the compilation
        return 0


#: Ops that Inductor calls as they are and that allocate within themselves.
LIBRARY = frozenset(
    """
    convolution_backward _scaled_dot_product_flash_attention_for_cpu
    _scaled_dot_product_flash_attention_for_cpu_backward
    """.split()  # noqa: SIM905
)


def of_node(node: fx.Node) -> int:
    """Scratch bytes of a node that will be such an op; 0 for any other, or when it is unknown."""
    op = node.target
    if not isinstance(op, _torch.OpOverload) or op_name(node) not in LIBRARY:
        return 0
    try:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), _shape_of)
        return _measured(_Call(op, args, kwargs))
    except Exception:  # as above; a draft without it is corrected by the lowering
        return 0


def _shape_of(node: fx.Node) -> Any:
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        return hint(value)
    size, stride = (tuple(hint(n) for n in ns) for ns in (value.shape, value.stride()))
    return _torch.TensorShape(size, stride, value.dtype, value.device)


class _Call:
    """An op with its arguments as plain data, so that equal calls are measured once."""

    def __init__(self, op: Any, args: Any, kwargs: Any) -> None:
        self.op, self.args, self.kwargs = op, args, kwargs
        described = json.dumps([str(op), _describe(args), _describe(kwargs)], default=str)
        salt = f"{torch.__version__}:{torch.get_num_threads()}"
        self.key = hashlib.sha256((salt + described).encode()).hexdigest()[:32]

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Call) and other.key == self.key


def _describe(value: Any) -> Any:
    if isinstance(value, _torch.TensorShape):
        return [str(value.dtype), value.size, value.stride, str(value.device)]
    if isinstance(value, (list, tuple)):
        return [_describe(v) for v in value]
    if isinstance(value, dict):
        return {k: _describe(v) for k, v in value.items()}
    return repr(value)


@functools.lru_cache(maxsize=4096)
def _measured(call: _Call) -> int:
    path = cache_folder() / "scratch" / f"{call.key}.json"
    if path.exists():
        return int(json.loads(path.read_text()))
    extra = _measure(call)
    with contextlib.suppress(OSError):  # a folder that cannot be written is no error
        replace_text(path, json.dumps(extra))
    return extra


def _measure(call: _Call) -> int:
    with _torch.real_tensors():
        args = _realise(call.args)
        kwargs = _realise(call.kwargs)
        device = next((t.device for t in _leaves((args, kwargs))), torch.device("cpu"))
        outputs = tensor_bytes(call.op(*args, **kwargs))
        peak = measure_peak(lambda: call.op(*args, **kwargs), warmup=0, device=device).bytes
    return max(0, peak - outputs)


def _realise(value: Any) -> Any:
    if isinstance(value, _torch.TensorShape):
        made = torch.empty_strided(value.size, value.stride, dtype=value.dtype, device=value.device)
        return made.zero_()
    if isinstance(value, (list, tuple)):
        return type(value)(_realise(v) for v in value)
    if isinstance(value, dict):
        return {k: _realise(v) for k, v in value.items()}
    return value


def _leaves(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in _torch.tree_leaves(value) if isinstance(leaf, torch.Tensor)]

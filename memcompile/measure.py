"""Real peaks, read from the allocator.

:func:`measure_peak` runs a function and says how many bytes it needed on top of what was
alive when it started: the *step peak*. On the CPU the figure is exact to the byte, from the
allocation events of ``torch.profiler``; on CUDA it comes from the caching allocator's
statistics, which count whole blocks of 512 bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from memcompile import _torch

_ONE_AT_A_TIME = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Peak:
    """What one call needed. All figures are bytes."""

    bytes: int  #: the step peak: most bytes alive at once, less those alive at the start
    device: str  #: "cpu", "cuda:0", ...
    reserved: int | None = None  #: CUDA: most bytes the caching allocator held from the driver
    total: int | None = None  #: CUDA: ``max_memory_allocated``, what lived before included


@dataclasses.dataclass(frozen=True)
class Event:
    """One call of the allocator: ``size`` bytes taken at ``address``, or given back if < 0."""

    address: int
    size: int


def measure_peak(
    fn: Callable[..., Any],
    *args: Any,
    warmup: int = 1,
    device: torch.device | str | None = None,
    **kwargs: Any,
) -> Peak:
    """Call ``fn(*args, **kwargs)`` and return the bytes it needed above what already lived.

    ``fn`` is called ``warmup`` times first, so that compilation does not count; then once
    under measurement. What it returns counts while it runs, and is dropped afterwards. For
    a training step ``fn`` must run the backward too.

    The device measured is ``device`` if given; else that of the first CUDA tensor or
    parameter among ``fn`` (if a module), ``args`` and ``kwargs``; else the current CUDA
    device if this process holds memory there after the warm-up; else the CPU.

    On the CPU, memory from before the call that ``fn`` frees is not subtracted, as on
    CUDA it is; and threads that ``fn`` starts itself are not seen (autograd's are).

    Raises ``RuntimeError`` when called from within itself or while ``torch.profiler`` is
    active, or when ``fn`` runs a profiler of its own (CPU): torch has room for one.
    """
    if warmup < 0:
        raise ValueError(f"warmup={warmup!r}: expected 0 or more calls")
    if not _ONE_AT_A_TIME.acquire(blocking=False):
        raise RuntimeError("measure_peak is already running in this process; it cannot be nested")
    try:
        for _ in range(warmup):
            fn(*args, **kwargs)
        where = _device(device, fn, args, kwargs)
        if where.type == "cuda":
            return _cuda_peak(where, fn, args, kwargs)
        if where.type == "cpu":
            return _cpu_peak(fn, args, kwargs)
        raise ValueError(f"device={str(where)!r}: peaks are measured on cpu and cuda")
    finally:
        _ONE_AT_A_TIME.release()


def tensor_bytes(tensors: Any) -> int:
    """Bytes behind a tensor, a module, or any nest of lists, dicts and dataclasses of them.

    Each storage counts once and in full, however many views of it there are; sparse
    tensors count their indices and values, wrapper subclasses the tensors they hold.
    """
    tree = list(tensors) if isinstance(tensors, Iterator) else tensors
    storages: dict[int, torch.UntypedStorage] = {}  # holding them keeps the ids unique
    for leaf in _leaves(tree):
        for part in _dense_parts(leaf):
            storage = part.untyped_storage()
            storages[id(storage)] = storage
    return sum(storage.nbytes() for storage in storages.values())


def peak_of(events: Iterable[Event]) -> int:
    """Most bytes alive at once over ``events`` in order of time.

    Frees of addresses not allocated within ``events`` are ignored.
    """
    sizes: dict[int, int] = {}
    live = peak = 0
    for event in events:
        if event.size > 0:
            live += event.size - sizes.get(event.address, 0)
            sizes[event.address] = event.size
            peak = max(peak, live)
        else:
            live -= sizes.pop(event.address, 0)
    return peak


def _device(
    asked: torch.device | str | None, fn: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> torch.device:
    """The device to measure, by the rule in :func:`measure_peak`."""
    if asked is not None:
        found = torch.device(asked)
    else:
        owner = getattr(fn, "__self__", fn)
        held = owner if isinstance(owner, torch.nn.Module) else None
        on_cuda = (leaf.device for leaf in _leaves([held, args, kwargs]) if leaf.is_cuda)
        found = next(on_cuda, torch.device("cuda" if _cuda_in_use() else "cpu"))
    if found.type == "cuda" and found.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return found


def _cuda_in_use() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.memory_allocated() > 0


def _cuda_peak(
    device: torch.device, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Peak:
    """The caching allocator's statistics around one call of ``fn``."""
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()  # so that `reserved` is what this call needs, not its past
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = fn(*args, **kwargs)
    torch.cuda.synchronize(device)
    total = torch.cuda.max_memory_allocated(device)
    reserved = torch.cuda.max_memory_reserved(device)
    del result
    return Peak(total - before, str(device), reserved, total)


TWO_PROFILERS = "fn used torch.profiler while measure_peak did; it cannot do both"


def _cpu_peak(fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Peak:
    """The allocation events of one call of ``fn``, replayed."""
    if _torch.profiler_enabled():
        raise RuntimeError("measure_peak needs torch.profiler, which is active; stop it first")
    if gc.isenabled():  # else nothing is collected while fn runs either
        gc.collect()
    cpu = [ProfilerActivity.CPU]
    try:
        with (
            _quiet_kineto(),
            profile(activities=cpu, profile_memory=True, acc_events=True) as prof,
        ):
            result = fn(*args, **kwargs)
            marker = torch.empty(1)  # seen last, unless another profiler took this one's place
    except RuntimeError as error:
        if "Kineto profiler when it's not running" in str(error):  # so says torch 2.11
            raise RuntimeError(TWO_PROFILERS) from error
        raise
    end = marker.data_ptr()
    del result
    events = _events(prof)
    last = next((i for i in reversed(range(len(events))) if events[i].address == end), None)
    if last is None:
        raise RuntimeError(TWO_PROFILERS)
    return Peak(peak_of(events[:last]), "cpu")


def _events(prof: profile) -> list[Event]:
    """The CPU allocation events of a finished profile, all threads, in order of time."""
    found: list[tuple[int, Event]] = []
    stack = _torch.profiled_tree(prof)[::-1]
    while stack:
        node = stack.pop()
        stack.extend(reversed(node.children))
        if node.tag.name == "Allocation" and node.extra_fields.device.type == "cpu":
            fields = node.extra_fields
            found.append((node.start_time_ns, Event(fields.ptr, fields.alloc_size)))
    return [event for _, event in sorted(found, key=lambda pair: pair[0])]


@contextlib.contextmanager
def _quiet_kineto() -> Iterator[None]:
    """Keep the profiler's own log off the terminal, unless the user set its level."""
    name = "KINETO_LOG_LEVEL"
    if name in os.environ:
        yield
        return
    os.environ[name] = "6"
    try:
        yield
    finally:
        os.environ.pop(name, None)


def _leaves(tree: Any) -> Iterator[torch.Tensor]:
    """Every tensor in a nest of modules, containers and dataclasses."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, torch.nn.Module):
        yield from tree.parameters()
        yield from tree.buffers()
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _leaves(value)
    elif isinstance(tree, (list, tuple, set, frozenset)):
        for value in tree:
            yield from _leaves(value)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for field in dataclasses.fields(tree):
            yield from _leaves(getattr(tree, field.name))


def _dense_parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors with a storage that ``tensor`` is made of."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        for name in flatten()[0]:
            yield from _dense_parts(getattr(tensor, name))
    elif tensor.layout == torch.strided:
        yield tensor
    elif tensor.layout == torch.sparse_coo:
        yield from _torch.sparse_parts(tensor)
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield from (tensor.ccol_indices(), tensor.row_indices(), tensor.values())

"""Ops that take a tensor to the host and back, beside what the device computes.

``offload`` and ``reload`` begin a copy on the device's own stream of copies and return at once;
``wait`` makes the device's work from there on wait for one. torch 2.12 and 2.13 have ops of this
kind (``ao::offload``), which docs/design.md says why we do not use. What is kept safe, and how:

- What is copied is alive until the copy is over: ``wait`` reads it. Nobody frees storage by hand,
  so a value that has other readers, a retained backward and Inductor's reuse of buffers are as
  safe as with any other op.
- A copy that nobody waited for (an exception in between) may still write to memory that is freed.
  The death of its target makes the stream that memory belongs to wait for it.
- Pinned memory is torch's, whose allocator keeps freed blocks, and gives none away before the
  copies that read or write it are over.

On the CPU a copy is a copy, made at once: graphs that were rewritten can be run without a device.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from typing import Any

import torch

__all__ = ["LANDED", "copies_under_way", "is_transfer", "offload", "reload", "wait"]

_library = torch.library.Library("memcompile", "FRAGMENT")
_library.define("offload(Tensor value) -> Tensor")
_library.define("reload(Tensor host, Device device) -> Tensor")
_library.define("wait(Tensor(a) moved, Tensor? source=None) -> Tensor(a)")

#: Begins to copy ``value`` to the host: a tensor of its shape and strides in pinned memory.
offload = torch.ops.memcompile.offload.default
#: Begins to copy ``host`` to ``device``: a tensor of its shape and strides there.
reload = torch.ops.memcompile.reload.default
#: ``moved``, which is whole for what runs after; ``source`` is alive until then.
wait = torch.ops.memcompile.wait.default

#: Names of what has landed on the host begin with this.
LANDED = "host_"


def is_transfer(target: Any) -> bool:
    """Whether a node's target, or a lowered op's, is one of the three."""
    return target in (offload, reload, wait)


@dataclasses.dataclass
class _Copy:
    """One that nobody has waited for yet."""

    done: torch.cuda.Event
    device: torch.device
    owner: torch.cuda.Stream  #: whose memory it reads or writes


_streams: dict[torch.device, torch.cuda.Stream] = {}
_under_way: dict[int, _Copy] = {}  #: by the address of what is written
_lock = threading.RLock()  # autograd runs backwards in threads of its own; a death may interrupt


def copies_under_way() -> int:
    """How many copies nobody has waited for."""
    return len(_under_way)


def _stream(device: torch.device) -> torch.cuda.Stream:
    """The device's stream of copies, in both directions: they run one after the other."""
    with _lock:
        if device not in _streams:
            _streams[device] = torch.cuda.Stream(device)
        return _streams[device]


def _begin(source: torch.Tensor, target: torch.Tensor, device: torch.device) -> torch.Tensor:
    if not source.numel():
        return target
    owner, stream = torch.cuda.current_stream(device), _stream(device)
    stream.wait_stream(owner)  # what is read is made, and what is written to is free, by then
    with torch.cuda.stream(stream):
        target.copy_(source, non_blocking=True)
    _note(target, _Copy(stream.record_event(), device, owner))
    return target


def _note(target: torch.Tensor, copy: _Copy) -> None:
    place = target.data_ptr()
    with _lock:
        _under_way[place] = copy
    weakref.finalize(target, _abandon, place, copy).atexit = False


def _abandon(place: int, copy: _Copy) -> None:
    """The target of a copy is gone: if nobody has waited, its memory does."""
    with _lock:
        if _under_way.get(place) is not copy:
            return
        del _under_way[place]
    copy.owner.wait_event(copy.done)


def _offload(value: torch.Tensor) -> torch.Tensor:
    pinned = value.device.type != "cpu"
    target = torch.empty_strided(
        value.shape, value.stride(), dtype=value.dtype, device="cpu", pin_memory=pinned
    )
    return _begin(value, target, value.device) if pinned else target.copy_(value)


def _reload(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    target = torch.empty_strided(host.shape, host.stride(), dtype=host.dtype, device=device)
    return _begin(host, target, target.device) if device.type != "cpu" else target.copy_(host)


def _wait(moved: torch.Tensor, source: torch.Tensor | None = None) -> torch.Tensor:
    with _lock:
        copy = _under_way.pop(moved.data_ptr(), None)
    if copy is not None:
        torch.cuda.current_stream(copy.device).wait_event(copy.done)
    elif moved.numel() and (moved.is_cuda or (source is not None and source.is_cuda)):
        raise RuntimeError("memcompile::wait: no copy to this tensor is under way")
    return moved


_library.impl("offload", _offload, "CompositeExplicitAutograd")
_library.impl("reload", _reload, "CompositeExplicitAutograd")
_library.impl("wait", _wait, "CompositeExplicitAutograd")


@torch.library.register_fake(offload, lib=_library)
def _offload_fake(value: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")


@torch.library.register_fake(reload, lib=_library)
def _reload_fake(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty_strided(host.shape, host.stride(), dtype=host.dtype, device=device)


@torch.library.register_fake(wait, lib=_library)
def _wait_fake(moved: torch.Tensor, source: torch.Tensor | None = None) -> torch.Tensor:
    return moved

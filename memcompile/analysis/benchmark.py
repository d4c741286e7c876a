"""How fast the device at hand does one thing: short benchmarks, about a second in all."""

from __future__ import annotations

import contextlib
import functools
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

_MATMUL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@functools.cache
def device_name(device: torch.device) -> str:
    """What the device calls itself, such as a processor's model name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text("utf-8", errors="replace")
        match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
        if match and device.type == "cpu":
            return match[1].strip()
    return f"{device.type} {platform.processor() or platform.machine()}"


@contextlib.contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Compute on the CPU with one thread within the block."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def matmul_rates(device: torch.device) -> dict[str, float]:
    """Flop/s of a square product in each dtype the device multiplies."""
    size = 2048 if device.type == "cuda" else 384
    rates: dict[str, float] = {}
    for dtype in _MATMUL_DTYPES:
        with contextlib.suppress(RuntimeError):  # no kernel for this dtype here
            left = torch.ones(size, size, dtype=dtype, device=device)
            seconds = _seconds(functools.partial(torch.mm, left, left), device, repeats=200)
            rates[str(dtype).removeprefix("torch.")] = 2 * size**3 / seconds
    return rates


def memory_rate(device: torch.device) -> float:
    """Bytes/s of a copy that fits in no cache."""
    count = 2**28 if device.type == "cuda" else 2**26
    source = torch.ones(count // 4, device=device)
    target = torch.empty_like(source)
    seconds = _seconds(lambda: target.copy_(source), device, repeats=20)
    return 2 * source.nbytes / seconds


def element_rate(device: torch.device, ops: list[Callable[..., Any]]) -> float:
    """Elements/s of ``ops`` on data in cache, the launch taken off: the median op's."""
    small, large = (2**18, 2**22) if device.type == "cuda" else (2**13, 2**16)
    found = []
    for op in ops:
        short, long = (_seconds(_elementwise(op, device, n), device, 200) for n in (small, large))
        found.append((large - small) / max(long - short, long / 10))
    return statistics.median(found)


def launch_seconds(device: torch.device) -> float:
    """Seconds to add two single numbers: what starting a kernel takes."""
    one, out = torch.ones(1, device=device), torch.empty(1, device=device)
    return _seconds(lambda: torch.add(one, one, out=out), device, repeats=200)


def link_rates(device: torch.device) -> tuple[float, float]:
    """Bytes/s of copies to pinned memory of the host, and from there; zeros on the host itself."""
    if device.type != "cuda":
        return 0.0, 0.0
    here = torch.ones(2**26, dtype=torch.uint8, device=device)
    there = torch.empty(here.shape, dtype=here.dtype, pin_memory=True)
    away = _seconds(lambda: there.copy_(here, non_blocking=True), device, repeats=20)
    back = _seconds(lambda: here.copy_(there, non_blocking=True), device, repeats=20)
    return here.nbytes / away, here.nbytes / back


def _elementwise(op: Callable[..., Any], device: torch.device, count: int) -> Callable[[], Any]:
    values = torch.full((count,), 0.5, device=device)
    out = torch.empty_like(values)
    binary = op in (torch.add, torch.mul)
    return lambda: op(*([values, values] if binary else [values]), out=out)


def _seconds(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Seconds of the fastest of ``repeats`` calls, queued work included; at most 80 ms of calls.

    The fastest, because other processes only ever slow a call down.
    """
    _wait(device)
    run()
    _wait(device)
    begin = time.perf_counter()
    times: list[float] = []
    while len(times) < repeats and (len(times) < 3 or time.perf_counter() - begin < 0.08):
        batch = 10 if device.type == "cuda" else 1  # hides the wait behind queued work
        start = time.perf_counter()
        for _ in range(batch):
            run()
        _wait(device)
        times.append((time.perf_counter() - start) / batch)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

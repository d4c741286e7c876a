"""Where memcompile keeps files between processes."""

from __future__ import annotations

import os
from pathlib import Path

from memcompile import _torch


def cache_folder() -> Path:
    """``MEMCOMPILE_CACHE`` if set, else ``memcompile`` in Inductor's cache. Not created."""
    own = os.environ.get("MEMCOMPILE_CACHE")
    if own:
        return Path(own)
    return Path(
        os.environ.get("TORCHINDUCTOR_CACHE_DIR") or _torch.default_cache_dir(), "memcompile"
    )


def reports_folder() -> Path:
    """Where reports are kept, one JSON file each."""
    return cache_folder() / "reports"


def calibrations_folder() -> Path:
    """Where the decisions of calibration are kept, one JSON file a graph."""
    return cache_folder() / "calibrations"


def replace_text(path: Path, text: str) -> None:
    """Write a file in one step, so that no reader sees half of it. Raises ``OSError``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)

"""Private torch that runs eager code otherwise than it is written: modes below autograd.

Checked by running on torch 2.13.0 (CPU).
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

__all__ = ["TorchDispatchMode", "copy_marks", "tree_flatten", "tree_map_only", "tree_unflatten"]


def copy_marks(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """``new``, with what the user told Dynamo of ``old`` (``mark_dynamic`` and its like)."""
    for name, value in old.__dict__.items():
        if name.startswith("_dynamo"):
            setattr(new, name, value)
    return new

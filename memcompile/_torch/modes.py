"""Private torch that runs eager code otherwise than it is written, and draws as compiled code.

Checked by running on torch 2.13.0 (CPU). Compiled code draws a dropout's mask from uniform
numbers (``extra_random_decomps``), eager code on a CPU by ``bernoulli_``. With
``fallback_random`` Inductor takes eager's ops instead, and then graphs and their nodes' names
are others. What is compared must be the graph that is trained, so here it is eager code that
draws as compiled code does: by the same table, whose ``rand`` both then draw alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._decomp.decompositions_for_rng import extra_random_decomps
from torch._dispatch.python import enable_python_dispatcher
from torch._inductor import config as inductor_config
from torch._inductor.decomposition import select_decomp_table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

__all__ = [
    "TorchDispatchMode",
    "copy_marks",
    "enable_python_dispatcher",
    "extra_random_decomps",
    "tree_flatten",
    "tree_map_only",
    "tree_unflatten",
    "usual_decompositions",
]


def usual_decompositions() -> dict[Any, Any]:
    """Inductor's table as it is without ``fallback_random``."""
    with inductor_config.patch(fallback_random=False):
        return select_decomp_table()


def copy_marks(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """``new``, with what the user told Dynamo of ``old`` (``mark_dynamic`` and its like)."""
    for name, value in old.__dict__.items():
        if name.startswith("_dynamo"):
            setattr(new, name, value)
    return new

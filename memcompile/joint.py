"""The joint graph as torch hands it over: made ready, and where stock torch would get it wrong."""

from __future__ import annotations

from torch import fx

from memcompile import _torch
from memcompile.analysis.ops import is_random
from memcompile.split import Split
from memcompile.step import Step


def prepare(module: fx.GraphModule) -> None:
    """What torch's own partitioner does to a joint graph before it decides anything."""
    module.graph.eliminate_dead_code()
    if _torch.functorch_config.cse:
        module.graph = _torch.fx_graph_cse(module.graph)
    module.recompile()
    if _torch.has_recomputable_ops(module):
        _torch.cleanup_recompute_tags(module, is_default_partition=False)
    _torch.force_save_collectives(module)
    _torch.force_save_effectful_ops(module)
    _torch.force_save_bw_mutation_src(module)


def redraws(module: fx.GraphModule) -> bool:
    """Whether a checkpoint region holds random draws, which stock torch draws again."""
    return any(is_random(n) and _tagged(n) for n in module.graph.nodes)


def reads_stale(step: Step, own: Split) -> bool:
    """Whether Inductor's own backward reads an input that its forward has written to."""
    assert own.backward is not None
    names = {node.name for node in step.overwritten}
    return any(n.name in names for n in own.backward.graph.find_nodes(op="placeholder"))


def _tagged(node: fx.Node) -> bool:
    return node.meta.get("recompute") in (
        _torch.CheckpointPolicy.MUST_RECOMPUTE,
        _torch.CheckpointPolicy.PREFER_RECOMPUTE,
    )

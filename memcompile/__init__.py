"""memcompile: a ``torch.compile`` backend that makes a training step fit a memory budget."""

from memcompile.analysis.ops import runs_twice
from memcompile.contract import (
    Codec,
    Coding,
    Context,
    Host,
    Loop,
    Pass,
    Proposal,
    Proposer,
    Rebuild,
    Rewrite,
    on_host,
    rebuild,
)
from memcompile.errors import BudgetError, FidelityError, MemcompileError, PassError
from memcompile.fidelity import Calibration, Compared, Fidelity, NodeError, calibrate, check
from memcompile.marks import full_precision, is_full_precision
from memcompile.measure import Peak, measure_peak
from memcompile.options import Options, OptionsError
from memcompile.registry import available
from memcompile.report import Report
from memcompile.sizes import max_size
from memcompile.step import Step
from memcompile.store import reports
from memcompile.version import __version__

__all__ = [
    "BudgetError",
    "Calibration",
    "Codec",
    "Coding",
    "Compared",
    "Context",
    "Fidelity",
    "FidelityError",
    "Host",
    "Loop",
    "MemcompileError",
    "NodeError",
    "Options",
    "OptionsError",
    "Pass",
    "PassError",
    "Peak",
    "Proposal",
    "Proposer",
    "Rebuild",
    "Report",
    "Rewrite",
    "Step",
    "__version__",
    "available",
    "calibrate",
    "check",
    "full_precision",
    "is_full_precision",
    "max_size",
    "measure_peak",
    "on_host",
    "rebuild",
    "reports",
    "runs_twice",
]

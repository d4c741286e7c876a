"""Hold a pass to its contract: for the authors of passes, and for their tests.

``check_pass(Mine(), model, x)`` captures the steps of ``model(x)``, runs the pass on them
and runs them op by op (as ``lower="eager"`` does), with the pass and without. Nothing is
compiled to kernels, so a small model takes seconds.
"""

from memcompile.testing.check import Checked, check_pass
from memcompile.testing.running import Captured, capture

__all__ = ["Captured", "Checked", "capture", "check_pass"]

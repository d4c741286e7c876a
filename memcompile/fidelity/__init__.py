"""Fidelity: what a step's numbers are worth, measured; and held to a bound."""

from memcompile.fidelity.calibrating import calibrate
from memcompile.fidelity.checking import check
from memcompile.fidelity.data import Calibration, Compared, Fidelity, NodeError

__all__ = ["Calibration", "Compared", "Fidelity", "NodeError", "calibrate", "check"]

"""What is found of a step's numbers, as data; ``print`` shows it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Compared:
    """One tensor that the step computes, under each way to run it.

    Errors are relative to float64: the norm of the difference over that of the tensor; of a
    gradient over 1e-4 of the largest gradient's norm where that is more.
    """

    group: str  #: "loss", "output" or "gradient"
    name: str  #: the parameter's, ``"input 0"``, ``"output 0"``
    norm: float  #: in float64
    eager: float
    inductor: float  #: under ``lower="eager"``: Inductor's graphs, run op by op
    memopt: float
    below: bool = False  #: zero, or under the floor: told, and counted nowhere


@dataclasses.dataclass(frozen=True)
class NodeError:
    """One node of the step as it is run, and the error that comes in at it.

    ``local`` is the relative error of its value where it is given what it should be given in the
    dtypes that it reads; ``total`` that of its value in the step, what it inherits included;
    ``error`` and ``grad_error`` what it alone brings to the loss, outputs and gradients of its
    graph, and to gradients.
    """

    node: str
    op: str
    source: str  #: ``"model.py:41 in forward"``
    dtype: str
    local: float
    total: float
    error: float
    grad_error: float
    names: tuple[str, ...] = ()  #: nodes before the passes that it stands for: what to keep exact
    by: str = ""  #: the pass that changed it; "" where none did
    fed_by: str = ""  #: the cast to fewer bits that it reads, with its source line
    amplified: str = ""  #: where its error grows most, with the factor and the source line
    bytes: int = 0  #: gained by the inexact pass there, predicted
    seconds: float = 0.0
    graph: int = 0  #: which of the step's graphs, in order


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """What :func:`memcompile.check` found."""

    tensors: tuple[Compared, ...]
    nodes: tuple[NodeError, ...]  #: those that bring most error, worst first
    loss: str  #: how it was made
    passes: tuple[str, ...]  #: those that may change numbers, as a pipeline spells them
    lower: str
    graphs: int
    exact: tuple[str, ...] = ()  #: nodes that calibration keeps exact
    notes: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        """Largest error of memopt's loss, outputs and gradients, those under the floor aside."""
        return max((t.memopt for t in self.tensors if not t.below), default=0.0)

    @property
    def grad_error(self) -> float:
        """Largest error of its gradients."""
        gradients = [t for t in self.tensors if t.group == "gradient" and not t.below]
        return max((t.memopt for t in gradients), default=0.0)

    @property
    def eager(self) -> float:
        """Largest error of eager's loss, outputs and gradients."""
        return max((t.eager for t in self.tensors if not t.below), default=0.0)

    @property
    def inductor(self) -> float:
        """Largest error of Inductor's."""
        return max((t.inductor for t in self.tensors if not t.below), default=0.0)

    @property
    def worst(self) -> NodeError | None:
        """The node that brings most error."""
        return self.nodes[0] if self.nodes else None

    def __str__(self) -> str:
        from memcompile.fidelity.show import fidelity

        return fidelity(self)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What :func:`memcompile.calibrate` decided, and what it measured.

    Errors are relative to the same step without the passes that may change numbers.
    """

    error: float  #: largest of the loss, an output or a gradient
    grad_error: float  #: largest of a gradient
    max_error: float | None
    max_grad_error: float | None
    exact: tuple[NodeError, ...]  #: moved back, in order
    before: tuple[float, float]  #: error and gradient error before anything was moved back
    loss: str
    passes: tuple[str, ...]
    lower: str
    steps: int  #: training steps that were compiled and run
    graphs: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        from memcompile.fidelity.show import calibration

        return calibration(self)

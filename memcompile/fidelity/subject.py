"""One training step, run several ways from one state, which it leaves as it was."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from memcompile import _torch
from memcompile._torch.modes import copy_marks, tree_flatten, tree_unflatten
from memcompile.errors import FidelityError
from memcompile.fidelity.reference import Draws, Dropouts, Recorded, Widened
from memcompile.testing.numbers import Result, norms, wide

#: How a loss is made where none is given.
OUTPUT = "the output itself"
PROJECTION = "the sum of all outputs, each element with a sign drawn from seed 0"


@dataclasses.dataclass
class Ran:
    """What one run of the step gave, on the host."""

    results: list[Result]  #: in groups: "loss", "output", "gradient"

    def scale(self, result: Result) -> float:
        """What a tensor's floor is a share of: the largest gradient. Others have no floor."""
        if result.group != "gradient":
            return 0.0
        return norms(r for r in self.results if r.group == "gradient")["gradient"]


class Subject:
    """A model, its inputs and its loss.

    Args:
        model: a module, or a function. Each run works on a deep copy of a module. Of a
            function, the modules it refers to are found, and are put back as they were.
        inputs: what it is called with: tensors, and nests of them.
        loss: the loss of the model's output; ``None``: see :func:`scalar`.
    """

    def __init__(self, model: Any, inputs: tuple[Any, ...], loss: Any = None) -> None:
        self.model = getattr(model, "_orig_mod", model)  # what torch.compile was given
        self.inputs, self.loss = inputs, loss
        self.made = "as given" if loss is not None else ""
        self.draws = Draws()

    # -- ways to run ----------------------------------------------------------------------

    def eager(self, table: Mapping[Any, Any]) -> Ran:
        """In the model's own precision; its draws are kept for :meth:`reference`.

        ``table`` says how compiled code draws.
        """
        self.draws = Draws()
        return self.run(lambda call: call, Recorded(self.draws, table))

    def reference(self) -> Ran:
        """In float64, with the draws of :meth:`eager`."""
        self.draws.place = self.draws.missed = 0
        kept = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            return self.run(lambda call: call, Widened(self.draws), double=True)
        except (RuntimeError, TypeError, NotImplementedError) as error:
            text = f"the step does not run in float64, which is the reference: {error}"
            raise FidelityError(text) from error
        finally:
            torch.set_default_dtype(kept)

    def compiled(self, backend: Any, **how: Any) -> Ran:
        """Compiled anew by ``torch.compile``; what was compiled before is forgotten."""
        torch.compiler.reset()
        try:
            return self.run(lambda call: torch.compile(call, backend=backend, **how))
        finally:
            torch.compiler.reset()

    def run(
        self,
        wrap: Callable[[Any], Any],
        mode: contextlib.AbstractContextManager[Any] | None = None,
        double: bool = False,
    ) -> Ran:
        """One step of ``wrap(model)`` from seed 0, under a mode."""
        with torch.random.fork_rng(), torch.enable_grad(), self._apart(double) as (call, modules):
            inputs = self._fresh(double)
            leaves = dict(_named(modules))
            leaves |= _tensors(inputs)
            wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
            torch.manual_seed(0)
            gradients: tuple[Any, ...] = ()
            modes = contextlib.ExitStack()
            if mode is not None:
                modes.enter_context(Dropouts())
                modes.enter_context(mode)
            with modes:
                outputs = wrap(call)(*inputs)
                loss = self._scalar(outputs)
                if loss is not None and loss.requires_grad and wanted:
                    gradients = torch.autograd.grad(loss, [*wanted.values()], allow_unused=True)
            return Ran(_results(loss, outputs, wanted, gradients))

    # -- its parts ------------------------------------------------------------------------

    @contextlib.contextmanager
    def _apart(self, double: bool) -> Iterator[tuple[Any, dict[str, nn.Module]]]:
        """The model to call, and the modules in it by name; put back afterwards."""
        if isinstance(self.model, nn.Module):
            copied = copy.deepcopy(self.model)
            yield (widened(copied) if double else copied), {"": copied}
            return
        modules = _referred(self.model)
        with contextlib.ExitStack() as stack:
            for module in modules.values():
                stack.enter_context(_restored(module))
                if double:
                    widened(module)
            yield self.model, modules

    def _fresh(self, double: bool) -> list[Any]:
        """Copies of the inputs: same strides, same aliases of each other, leaves."""
        leaves, tree = tree_flatten(list(self.inputs))
        plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in leaves]
        made = []
        for old, new in zip(leaves, copy.deepcopy(plain), strict=True):
            if isinstance(old, torch.Tensor):
                new = wide(new) if double else new
                new = copy_marks(old, new.requires_grad_(old.requires_grad))
            made.append(new)
        return list(tree_unflatten(made, tree))

    def _scalar(self, outputs: Any) -> torch.Tensor | None:
        """The loss: as the user says; a scalar output itself; else a projection of outputs.

        The projection is :data:`PROJECTION`: its signs are exact in every precision, and no
        gradient of it is zero by symmetry, as that of a plain sum over a softmax is.
        """
        if self.loss is not None:
            return self.loss(outputs)
        if isinstance(outputs, torch.Tensor) and outputs.numel() == 1:
            self.made = OUTPUT
            return outputs.sum()
        self.made = PROJECTION
        generator = torch.Generator().manual_seed(0)
        total = None
        for tensor in _tensors(outputs).values():
            if not (tensor.is_floating_point() or tensor.is_complex()):
                continue
            drawn = torch.randint(2, tensor.shape, generator=generator)
            signs = (2 * drawn - 1).to(tensor.device, wide(tensor.real.dtype))
            if tensor.requires_grad:
                term = (tensor.real.to(signs.dtype) * signs).sum()
                total = term if total is None else total + term.to(total.device)
        return total


def widened(module: nn.Module) -> nn.Module:
    """The module with its parameters and buffers in double precision, in place."""
    for tensor in {*module.parameters(), *module.buffers()}:
        tensor.data = wide(tensor.data)
    return module


@contextlib.contextmanager
def _restored(module: nn.Module) -> Iterator[None]:
    """Afterwards the module's parameters, their gradients and its buffers are as they were."""
    kept = [(t, t.data, t.grad, t.data.clone()) for t in (*module.parameters(), *module.buffers())]
    try:
        yield
    finally:
        for tensor, data, gradient, value in kept:
            tensor.data, tensor.grad = data, gradient
            data.copy_(value)


def _referred(function: Any) -> dict[str, nn.Module]:
    """The modules that a function refers to, by the names it has for them."""
    owner = getattr(function, "__self__", None)
    if isinstance(owner, nn.Module):
        return {"": owner}
    try:
        names = inspect.getclosurevars(inspect.unwrap(function))
    except TypeError:  # an object that is called
        return {}
    found = {**names.globals, **names.nonlocals}
    return {name: value for name, value in found.items() if isinstance(value, nn.Module)}


def _named(modules: dict[str, nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters by name, tied ones once."""
    for prefix, module in modules.items():
        for name, parameter in module.named_parameters():
            yield (f"{prefix}.{name}" if prefix else name), parameter


def _tensors(tree: Any) -> dict[str, torch.Tensor]:
    """The tensors of a nest, by their place in it."""
    leaves = [leaf for leaf in _torch.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return {f"input {place}": leaf for place, leaf in enumerate(leaves)}


def _results(
    loss: Any, outputs: Any, wanted: dict[str, torch.Tensor], gradients: tuple[Any, ...]
) -> list[Result]:
    """All that the step computed; an unused parameter's gradient is zero."""
    results = [] if loss is None else [Result("loss", "loss", _host(loss))]
    for place, tensor in enumerate(_tensors(outputs).values()):
        results.append(Result("output", f"output {place}", _host(tensor)))
    for (name, leaf), gradient in zip(wanted.items(), gradients, strict=False):
        value = torch.zeros_like(leaf) if gradient is None else gradient
        results.append(Result("gradient", name, _host(value)))
    return results


def _host(tensor: torch.Tensor) -> torch.Tensor:
    dense = tensor.detach()
    dense = dense if dense.layout == torch.strided else dense.to_dense()
    return dense.to("cpu", copy=True)

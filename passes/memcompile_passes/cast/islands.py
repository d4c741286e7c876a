"""Which contractions stay in fp32: those whose errors a scientific model does not stand.

Four kinds. Geometry: rotations and coordinates, known by three components, and what is made
into points. Danger: what reads differences of positions before an op has bounded it; it is
carried downstream (cf. the "infer" and "clear" propagation of TensorFlow's grappler,
``auto_mixed_precision.cc``). Means: a contraction over n terms divided by n, the outer product
mean of Jumper et al. 2021 (algorithm 10), which OpenFold runs in fp32 under autocast too. Long
sums: products of two computed values whose sum a norm has to bring back to size, the triangle
multiplications of algorithms 11 and 12, which leave fp16's range. The backward of a contraction
shares its autograd number (``seq_nr``) and its fate.
"""

from __future__ import annotations

import math

import torch
from memcompile_passes.cast.rules import (
    BOUNDING,
    CLEAR,
    CONTRACTIONS,
    DISTANCES,
    FRAME,
    GEOMETRY,
    NORMS,
    POINT,
    SPLITS,
)
from torch import fx

from memcompile.analysis.ops import classify, op_name
from memcompile.analysis.timeline import Kind
from memcompile.step import hint

#: Matrix products, whose sizes say what they are about.
PRODUCTS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}


def find_islands(graph: fx.Graph) -> dict[fx.Node, str]:
    """The contractions that stay in fp32, and why."""
    nodes = [n for n in graph.nodes if n.op == "call_function"]
    contractions = [n for n in nodes if op_name(n) in CONTRACTIONS]
    found: dict[fx.Node, str] = {}
    dangerous = _danger(nodes)
    for node in contractions:
        if "autograd_backward" in node.meta:
            continue  # decided with its forward
        if _is_geometry(node):
            found[node] = "geometry"
        elif _is_mean(node):
            found[node] = "a mean of products"
        elif _is_long_sum(node):
            found[node] = "a sum of products that a norm reads"
        elif any(argument in dangerous for argument in node.all_input_nodes):
            found[node] = "reads a difference of positions"
    _upstream(nodes, found)
    return paired(contractions, found)


def paired(contractions: list[fx.Node], found: dict[fx.Node, str]) -> dict[fx.Node, str]:
    """What was found, and those that share a forward or backward with it."""
    whys = {node.meta["seq_nr"]: why for node, why in found.items() if "seq_nr" in node.meta}
    alike = {n: whys[n.meta["seq_nr"]] for n in contractions if n.meta.get("seq_nr") in whys}
    return alike | found


def tensor(value: object) -> torch.Tensor | None:
    """The (fake) tensor of a node, if it has one."""
    found = value.meta.get("val") if isinstance(value, fx.Node) else None
    return found if isinstance(found, torch.Tensor) else None


def is_clear(node: fx.Node) -> bool:
    """Whether the node's numbers are those of what it reads."""
    if node.op != "call_function":
        return False
    if op_name(node) == "getitem":
        return isinstance(node.args[0], fx.Node) and op_name(node.args[0]) in SPLITS
    return op_name(node) in CLEAR


def _sizes(node: fx.Node) -> tuple[int, int, int] | None:
    """Rows, terms and columns of a matrix product."""
    places = PRODUCTS.get(op_name(node))
    if places is None:
        return None
    left, right = (tensor(node.args[place]) for place in places)
    if left is None or right is None:
        return None
    return hint(left.shape[-2]), hint(left.shape[-1]), hint(right.shape[-1])


def _is_geometry(node: fx.Node) -> bool:
    sizes = _sizes(node)
    if sizes is None:
        return False
    rows, terms, columns = sizes
    return POINT in (terms, columns) or (terms <= FRAME and max(rows, columns) <= FRAME)


def _is_mean(node: fx.Node) -> bool:
    """Whether a factor or the result is divided by the number of terms, or by a sum of masks."""
    sizes = _sizes(node)
    if sizes is None:
        return False
    terms = sizes[1]
    factors = [_through_clear(node.args[place]) for place in PRODUCTS[op_name(node)]]
    if any(terms > 1 and _divides_by(factor, terms) for factor in factors):
        return True
    return any(_divides_by(user, terms) or _divides_by_sum(user) for user in clear_users(node))


def _is_long_sum(node: fx.Node) -> bool:
    """Whether a norm reads the product of two computed values, neither of them probabilities."""
    if op_name(node) not in PRODUCTS:
        return False
    factors = [_through_clear(node.args[place]) for place in PRODUCTS[op_name(node)]]
    if any(not isinstance(f, fx.Node) or f.op == "placeholder" for f in factors):
        return False
    if any(_is_probabilities(factor) for factor in factors):
        return False
    readers = clear_users(node)
    squared = [
        user for reader in readers if op_name(reader) == "pow" for user in clear_users(reader)
    ]
    return any(op_name(reader) in NORMS for reader in readers + squared)


def _is_probabilities(node: object) -> bool:
    """Whether the value is a softmax's, dropped out or not."""
    node = _through_clear(node)
    if not isinstance(node, fx.Node):
        return False
    if op_name(node) == "mul":
        return any(_is_probabilities(argument) for argument in node.all_input_nodes)
    below = _through_clear(node.args[1]) if op_name(node) == "div" else None
    return op_name(node) == "_softmax" or (isinstance(below, fx.Node) and op_name(below) == "sum")


def _divides_by(node: object, count: int) -> bool:
    """Whether the node is its first argument over ``count``."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or len(node.args) < 2:
        return False
    number = node.args[1]
    if not isinstance(number, (int, float)) or not number:
        return False
    if op_name(node) == "div":
        return math.isclose(number, count)
    return op_name(node) == "mul" and math.isclose(1 / number, count)


def _divides_by_sum(node: fx.Node) -> bool:
    """Whether the node divides by how many terms masks leave: a product, or a sum, of inputs."""
    if op_name(node) != "div" or not isinstance(node.args[1], fx.Node):
        return False
    below = _through_clear(node.args[1])
    if isinstance(below, fx.Node) and op_name(below) in ("add", "clamp_min", "maximum"):
        below = _through_clear(below.args[0])
    return isinstance(below, fx.Node) and op_name(below) in PRODUCTS


def _through_clear(node: object) -> object:
    while isinstance(node, fx.Node) and is_clear(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def clear_users(node: fx.Node) -> list[fx.Node]:
    """What reads the node's numbers, unmoved or moved about."""
    found: list[fx.Node] = []
    for user in node.users:
        found += clear_users(user) if is_clear(user) else [user]
    return found


def _danger(nodes: list[fx.Node]) -> set[fx.Node]:
    """Values that hang on a difference of positions, up to where an op bounds them."""
    found: set[fx.Node] = set()
    for node in nodes:
        name = op_name(node)
        if name in SPLITS and any(argument in found for argument in node.all_input_nodes):
            found.add(node)  # a list of tensors, each as dangerous
        if name in BOUNDING or name in CONTRACTIONS or tensor(node) is None:
            continue
        carries = classify(node) in (Kind.POINTWISE, Kind.REDUCTION) or is_clear(node)
        carried = carries and any(argument in found for argument in node.all_input_nodes)
        if carried or _is_difference(node) or name in DISTANCES:
            found.add(node)
    return found


def _is_difference(node: fx.Node) -> bool:
    """Whether two sets of points, taken from one or set against each other, are subtracted."""
    if op_name(node) != "sub" or len(node.args) < 2:
        return False
    one, two = tensor(node.args[0]), tensor(node.args[1])
    whole = tensor(node)
    if one is None or two is None or whole is None or not whole.is_floating_point():
        return False
    if not whole.dim() or hint(whole.shape[-1]) != POINT:
        return False
    if hint(one.shape[-1]) != hint(two.shape[-1]):
        return False
    return _through_clear(node.args[0]) is _through_clear(node.args[1]) or (
        one.numel() != whole.numel() and two.numel() != whole.numel()
    )


def _upstream(nodes: list[fx.Node], found: dict[fx.Node, str]) -> None:
    """Add contractions of which points are made: all between is elementwise or clear."""
    makes: set[fx.Node] = set()  #: nodes of whose value points are made
    for node in reversed(nodes):
        name = op_name(node)
        sink = name in GEOMETRY or found.get(node) == "geometry" or _is_difference(node)
        if node in makes and name in CONTRACTIONS and not sink:
            found.setdefault(node, "makes points")
            continue
        if sink or (node in makes and (is_clear(node) or classify(node) == Kind.POINTWISE)):
            if "autograd_backward" in node.meta or name in BOUNDING:
                continue
            for argument in node.all_input_nodes:
                if op_name(argument) in SPLITS:
                    argument = argument.all_input_nodes[0]
                value = tensor(argument)
                if value is None or hint(value.numel()) % POINT:
                    continue
                if not sink or any(hint(size) == POINT for size in value.shape):
                    makes.add(argument)

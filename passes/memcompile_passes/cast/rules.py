"""What is cast and what is not, by the names of aten ops: data, and nothing else.

Torch keeps its own lists for autocast in C++ (``ATen/autocast_mode.h``: the macros
``AT_FORALL_LOWER_PRECISION_FP`` and ``AT_FORALL_FP32``), where Python cannot read them. They
name ops that users call; a joint graph has what those decompose into. The tables below are
theirs, in the words of the joint graph; ``tests/test_cast.py`` asks torch op by op whether they
still agree. The four classes follow TensorFlow's ``auto_mixed_precision`` (grappler,
``auto_mixed_precision_lists.h``): allow, infer, deny, clear.
"""

from __future__ import annotations

#: Cast: sums of products, which the kernels accumulate in fp32 (``AT_FORALL_LOWER_PRECISION_FP``).
CONTRACTIONS = frozenset(
    [
        "addbmm",
        "addmm",
        "addmv",
        "baddbmm",
        "bmm",
        "convolution",
        "convolution_backward",
        "mm",
        "mv",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_efficient_attention_backward",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    ]
)

#: Arguments of contractions that their kernels want in fp32.
STATISTICS = frozenset(["logsumexp"])

#: Clear: the numbers of their inputs, moved about. They run in whatever dtype those have.
CLEAR = frozenset(
    [
        "_unsafe_index",
        "_unsafe_view",
        "alias",
        "cat",
        "clone",
        "constant_pad_nd",
        "detach",
        "expand",
        "flip",
        "gather",
        "index",
        "index_select",
        "neg",
        "permute",
        "relu",
        "repeat",
        "roll",
        "select",
        "slice",
        "squeeze",
        "t",
        "transpose",
        "tril",
        "triu",
        "unsqueeze",
        "view",
    ]
)

#: Of these, what has all numbers of what it reads, or with its like has.
MOVED = CLEAR - {"_unsafe_index", "flip", "gather", "index", "index_select", "relu", "tril", "triu"}

#: What gives no more than its input again, in another order or another form.
COPIES = MOVED | {"_conj", "conj_physical", "contiguous", "view_as_complex", "view_as_real"}

#: Ops with a list of views; their items are clear.
SPLITS = frozenset(["split", "split_with_sizes", "unbind"])

#: What the statistics of a norm are taken by.
NORMS = frozenset(["mean", "native_layer_norm", "var", "var_mean"])

#: Infer: an error of what they read stays one of the same size, relative to what they give.
GENTLE = CLEAR | frozenset(
    [
        "abs",
        "add",
        "convert_element_type",
        "erf",
        "fma",
        "mul",
        "native_dropout",
        "sigmoid",
        "tanh",
        "where",
    ]
)

#: Deny: what they read must be exact, or a small error becomes a large one. (``div`` is here for
#: what it divides by.)
SHARP = frozenset(
    [
        "acos",
        "acosh",
        "asin",
        "atan",
        "atan2",
        "atanh",
        "cos",
        "cosh",
        "erfinv",
        "exp",
        "exp2",
        "expm1",
        "log",
        "log10",
        "log1p",
        "log2",
        "logsumexp",
        "pow",
        "reciprocal",
        "rsqrt",
        "rsub",
        "sin",
        "sinh",
        "sqrt",
        "sub",
        "tan",
    ]
)

#: Powers that are as gentle as a product.
GENTLE_POWERS = (1, 2)

#: What they give is of order one whatever they read: danger ends there.
BOUNDING = frozenset(["cos", "erf", "exp", "rsqrt", "sigmoid", "sin", "tanh"])

#: Components of a point. Contractions over or to so many are rotations and coordinates.
POINT = 3
#: A contraction of matrices no larger than this each way is a frame's.
FRAME = 4

#: Ops on points, spectra and matrices that decide by differences; what feeds them stays in fp32.
GEOMETRY = frozenset(
    [
        "_cdist_backward",
        "_cdist_forward",
        "_euclidean_dist",
        "_fft_c2c",
        "_fft_c2r",
        "_fft_r2c",
        "_linalg_det",
        "_linalg_eigh",
        "_linalg_svd",
        "_pdist_forward",
        "linalg_cross",
        "linalg_inv_ex",
        "linalg_qr",
    ]
)

#: Of these, what gives distances.
DISTANCES = frozenset(["_cdist_forward", "_euclidean_dist", "_pdist_forward"])

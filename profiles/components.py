"""Which named component of the step a kernel or operation belongs to, and its ideal work. Pure.

Letters: N tokens, D width, F MLP width, M, K, N' sizes of a matrix product.
"""

import math
from dataclasses import dataclass

from trainer.config import ModelConfig

IDLE = "CPU gap"
UNATTRIBUTED = "unattributed"
OPTIMIZER_PHASES = ("optimizer", "average")
GEMM_OPS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_mm")
ATTENTION_WORDS = ("scaled_dot_product", "fmha", "flash_fprop", "flash_bprop", "flash_attention")
MLP_OPS = ("fairway::up_", "fairway::activation", "fairway::dpre")
EPILOGUE_OPS = (
    "fairway::linear_add",
    "fairway::linear_mix",
    "fairway::norm_gradient",
    "fairway::exclude_self_gradient",
    "fairway::project_heads",
)
"""Products of a block that take over passes beside them; their second argument is the weight."""
RESIDUAL_OPS = ("fairway::mix_norm", "fairway::mix_factor", "fairway::add_norm")
HEAD_OPS = ("fairway::split_heads", "fairway::joined_heads", "fairway::exclude_self")
GEMM_WORDS = ("nvjet", "gemm", "cublas", "xmma")
COPY_KERNELS = ("memcpy", "memset")
"""A copy or fill that a matrix product makes for itself counts as the product's."""
COPY_OPS = ("aten::copy_", "aten::_to_copy", "aten::clone", "aten::contiguous")


@dataclass(frozen=True)
class Event:
    """One GPU kernel or copy; on a CPU, the own time of one operation.

    Attributes:
        name: of the kernel or operation.
        ops: operations around it on the host, outermost first; the operation itself last.
        dims: input shapes of the operation around it that tells most.
        phase: part of the step: data, forward, backward, optimizer, average, or "".
        ms: its time; where GPU work overlaps, only what no earlier work covers.
        on_gpu: a GPU kernel or copy.
        first_of_op: no earlier event has its `dims` from the same call.
        op: the operation that `dims` belong to; the innermost if empty.
    """

    name: str
    ops: tuple[str, ...]
    dims: tuple[tuple[int, ...], ...]
    phase: str
    ms: float
    on_gpu: bool
    first_of_op: bool = True
    op: str = ""


@dataclass(frozen=True)
class Work:
    """Least work of an event: floating-point operations, and elements read and written."""

    flops: float = 0.0
    elements: float = 0.0


@dataclass(frozen=True)
class Sizes:
    """What a matrix product's role is told by: the model's shape, and N."""

    model: ModelConfig
    tokens: int


def component(event: Event, sizes: Sizes) -> str:
    """Name of the component; UNATTRIBUTED for a kernel of which nothing is known."""
    name = event.name.lower()
    around = " ".join(event.ops).lower()
    backward = event.phase == "backward" or "backward" in around or "bprop" in name
    side = "backward" if backward else "forward"
    if "nccl" in name or "c10d" in around or "gloo" in name:
        return "communication"
    if event.phase in OPTIMIZER_PHASES:
        return "optimizer" if event.phase == "optimizer" else "weight average"
    if event.phase == "data":
        return "copies"
    if any(word in name or word in around for word in ATTENTION_WORDS):
        return f"attention {side}"
    if any(op in around for op in RESIDUAL_OPS):
        return f"residual passes {side}"
    if any(op in around for op in EPILOGUE_OPS):
        return f"GEMM {gemm_role(event, sizes)}"
    if any(op in around for op in HEAD_OPS):
        return f"head passes {side}"
    if any(op in around for op in MLP_OPS):
        return f"fused MLP {side}"
    if any(op in GEMM_OPS for op in event.ops) or any(word in name for word in GEMM_WORDS):
        return f"GEMM {gemm_role(event, sizes)}"
    if "_fusedmlp" in around:
        return f"fused MLP {side}"
    if name.startswith("triton_"):
        return f"Inductor fusions {side}"
    if name.startswith(COPY_KERNELS) or any(op in COPY_OPS for op in event.ops):
        return "copies"
    if not event.phase or not event.ops:
        return UNATTRIBUTED
    return "eager elementwise"


def operands(event: Event) -> tuple[tuple[int, ...], ...]:
    """Shapes of a matrix product's two factors; empty if they are not known."""
    # A sum's first argument comes before the factors, a given result after them.
    first = 1 if _op(event) in ("aten::addmm", "aten::baddbmm") else 0
    factors = event.dims[first : first + 2]
    return factors if len(factors) == 2 and all(len(d) >= 2 for d in factors) else ()


def _op(event: Event) -> str:
    return event.op or (event.ops[-1] if event.ops else "")


def gemm_role(event: Event, sizes: Sizes) -> str:
    """What a matrix product is for, from its sizes; forward, input and weight gradient alike."""
    c = sizes.model
    if _op(event).startswith(EPILOGUE_OPS):
        mkn = list(event.dims[1])
    else:
        factors = operands(event)
        if not factors:
            return "other"
        a, b = factors
        mkn = [a[-2], a[-1], b[-1]]
        if sizes.tokens not in mkn:
            return "other"
        mkn.remove(sizes.tokens)
    roles = (
        ((c.width, c.mlp_width), "MLP"),
        ((c.width, c.width + 2 * c.kv_width), "queries, keys, values"),
        ((c.width, c.vocab_size), "head"),
        ((c.width, c.bigram_dim), "embedding projections"),
        ((c.kv_width, c.value_embed_dim), "embedding projections"),
        ((c.width, c.width), "attention out"),
    )
    # In the record's model the head is as large as a joint projection: nothing tells them apart.
    return ", ".join(role for pair, role in roles if sorted(pair) == sorted(mkn)) or "other"


def work(event: Event) -> Work:
    """Least work of matrix products, attention and the fused MLP; nothing is claimed of others."""
    if not event.first_of_op or not event.dims:
        return Work()
    op = _op(event)
    matrices = [d for d in event.dims if len(d) >= 2]
    factors = operands(event)
    if op in GEMM_OPS and factors:
        a, b = factors
        batch, m, k, n = math.prod(a[:-2]), a[-2], a[-1], b[-1]
        return Work(2.0 * batch * m * k * n, float(batch * (m * k + k * n + m * n)))
    if "scaled_dot_product" in op:
        return _attention_work(op, event.dims)
    if op.startswith("fairway::project_heads") and len(matrices) >= 2:
        m, k = matrices[0]
        n = matrices[1][0]
        return Work(2.0 * m * k * n, float(m * k + k * n + m * n))
    if op.startswith(EPILOGUE_OPS) and len(matrices) >= 2:
        m, k = matrices[0]
        n = math.prod(matrices[1]) // k
        # Those that come in beside the factors, and the result. `exclude_self_gradient` reads and
        # writes half a stream of values, too: one of the heads' width stands for both; two numbers
        # a row and head are not counted. Of `linear_mix`, which has two results, the channels'
        # factors stand for the second.
        streams = sum(len(d) == 2 for d in matrices) - 1
        return Work(2.0 * m * k * n, float(m * k + k * n + streams * m * n))
    if op.startswith(RESIDUAL_OPS + HEAD_OPS):
        return Work(0.0, _pass_elements(op, event.dims))
    if op.startswith(MLP_OPS) and len(matrices) >= 2:
        m, width = matrices[0]
        hidden = math.prod(matrices[1]) // width
        # act_grad is stored, or read, as post is in its place; of `up_scaled`'s only the signs are.
        wide = 1 if op.startswith(("fairway::activation", "fairway::up_scaled")) else 2
        elements = m * width + width * hidden + wide * m * hidden
        return Work(2.0 * m * width * hidden, float(elements))
    return Work()


def _attention_work(op: str, dims: tuple[tuple[int, ...], ...]) -> Work:
    """Causal attention from q [B, H, T, K] and k [B, G, T, K]: half of every T x T product."""
    four = [d for d in dims if len(d) == 4]
    if len(four) < 3:
        return Work()
    backward = "backward" in op
    q, k = (four[1], four[2]) if backward else (four[0], four[1])
    batch, heads, length, size = q
    forward_flops = 2.0 * batch * heads * length * length * size  # two products, half of each
    elements = 2.0 * math.prod(q) + 2.0 * math.prod(k)
    return Work(2.5 * forward_flops, 2 * elements) if backward else Work(forward_flops, elements)


def _pass_elements(op: str, dims: tuple[tuple[int, ...], ...]) -> float:
    """Elements a fused pass must read and write, from the shapes of its arguments.

    Every argument of the size of activations is read once; what is written follows from them.
    """
    sizes = [math.prod(d) for d in dims]
    stream = max(sizes)
    activations = [n for n in sizes if 4 * n >= stream]  # values have a fourth of qkv's width
    name = op.removeprefix("fairway::")
    has_skip = any(len(d) == 1 for d in dims)
    summed = len(activations) > 2
    if name == "split_heads" and not any(4 * n == stream for n in sizes):
        return 1.5 * stream  # without a value embedding the values, a fourth, stay where they are
    written = {
        "mix_norm": 3.0 if summed else 2.0,
        "mix_norm_backward": 3.0 if has_skip else 2.0,
        "add_norm": 2.0,
        "exclude_self_backward": 1.5,
        "exclude_self_backward_numbers": 1.5,
    }
    wide = sizes[0] if name == "joined_heads_backward" else 0  # the queries' sums are float32
    return sum(activations) + wide + stream * written.get(name, 1.0)

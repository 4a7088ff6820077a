"""The fused passes as torch operators: checked, opaque to the compiler, with shapes known to it.

Letters: M rows (tokens), D model width, B windows, T positions, H query heads, G key/value heads,
K head size, W joint width of queries, keys and values, P programs.
"""

import torch
from torch import Tensor

from kernels import flash4, heads_triton, residual_triton
from kernels.checks import (
    check_cuda_tensors,
    check_float32,
    check_power_of_two,
    check_rows,
    check_shape,
)
from kernels.tiles import HEADS_SUMMING_BLOCK


@torch.library.custom_op("fairway::mix_norm", mutates_args=())
def mix_norm(
    x: Tensor,
    branch: Tensor | None,
    skip: Tensor | None,
    skip_weight_D: Tensor | None,
    x0: Tensor,
    mix_2D: Tensor,
    damp: float,
) -> list[Tensor]:
    """u and n, and t unless it is x itself; arguments of `kernels.reference.mix_norm`, [M, D].

    Raises:
        ValueError: an argument is not on one CUDA device with the others or not contiguous, its
            shape or type does not fit, a skip lacks its weight or the reverse, or D is no power of
            two; the message names the argument.
    """
    _check_entry(mix_2D, skip_weight_D, x=x, branch=branch, skip=skip, x0=x0)
    return residual_triton.mix_norm(x, branch, skip, skip_weight_D, x0, mix_2D, damp)


@mix_norm.register_fake
def _(
    x: Tensor,
    branch: Tensor | None,
    skip: Tensor | None,
    skip_weight_D: Tensor | None,
    x0: Tensor,
    mix_2D: Tensor,
    damp: float,
) -> list[Tensor]:
    outputs = 2 if branch is None and skip is None else 3
    return [torch.empty_like(x) for _ in range(outputs)]


@torch.library.custom_op("fairway::mix_factor", mutates_args=())
def mix_factor(
    x: Tensor,
    skip: Tensor | None,
    skip_weight_D: Tensor | None,
    x0: Tensor,
    mix_2D: Tensor,
    damp: float,
) -> tuple[Tensor, Tensor]:
    """u [M, D] and its factors [M], float32; arguments of `kernels.reference.mix_factor`.

    Raises:
        ValueError: as `mix_norm`.
    """
    _check_entry(mix_2D, skip_weight_D, x=x, skip=skip, x0=x0)
    return residual_triton.mix_factor(x, skip, skip_weight_D, x0, mix_2D, damp)


@mix_factor.register_fake
def _(
    x: Tensor,
    skip: Tensor | None,
    skip_weight_D: Tensor | None,
    x0: Tensor,
    mix_2D: Tensor,
    damp: float,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0], dtype=torch.float32)


@torch.library.custom_op("fairway::mix_norm_backward", mutates_args=())
def mix_norm_backward(
    du: Tensor,
    dn: Tensor,
    dt: Tensor | None,
    t: Tensor,
    x0: Tensor,
    skip: Tensor | None,
    skip_weight_D: Tensor | None,
    mix_2D: Tensor,
    damp: float | None,
) -> list[Tensor]:
    """Gradients at x and x0, partial sums [P, 3, D] of those at a, b and w; dskip if any.

    The sums are float32, all else [M, D]. Without `damp`: those of `mix_factor`. Arguments:
    `kernels.residual_triton.mix_norm_backward`.

    Raises:
        ValueError: as `mix_norm`.
    """
    _check_entry(mix_2D, skip_weight_D, t=t, du=du, dn=dn, dt=dt, x0=x0, skip=skip)
    return residual_triton.mix_norm_backward(du, dn, dt, t, x0, skip, skip_weight_D, mix_2D, damp)


@mix_norm_backward.register_fake
def _(
    du: Tensor,
    dn: Tensor,
    dt: Tensor | None,
    t: Tensor,
    x0: Tensor,
    skip: Tensor | None,
    skip_weight_D: Tensor | None,
    mix_2D: Tensor,
    damp: float | None,
) -> list[Tensor]:
    programs = residual_triton.entry_block(skip is not None).count(t.shape[0])
    sums = t.new_empty((programs, 3, t.shape[1]), dtype=torch.float32)
    gradients = [torch.empty_like(t), torch.empty_like(t), sums]
    return gradients if skip is None else [*gradients, torch.empty_like(t)]


@torch.library.custom_op("fairway::add_norm", mutates_args=())
def add_norm(x: Tensor, branch: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """x + branch and damp times its norm, [M, D]; meaning: `kernels.reference.add_norm`.

    Raises:
        ValueError: as `mix_norm`.
    """
    _check_stream(x=x, branch=branch)
    return residual_triton.add_norm(x, branch, damp)


@add_norm.register_fake
def _(x: Tensor, branch: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@torch.library.custom_op("fairway::add_norm_backward", mutates_args=())
def add_norm_backward(dt: Tensor | None, dn: Tensor, t: Tensor, damp: float) -> Tensor:
    """Gradient at x and at branch, [M, D]; so are the gradients dt, if any, and dn, and the sum t.

    Raises:
        ValueError: as `mix_norm`.
    """
    _check_stream(t=t, dt=dt, dn=dn)
    return residual_triton.add_norm_backward(dt, dn, t, damp)


@add_norm_backward.register_fake
def _(dt: Tensor | None, dn: Tensor, t: Tensor, damp: float) -> Tensor:
    return torch.empty_like(t)


@torch.library.custom_op("fairway::split_heads", mutates_args=())
def split_heads(
    qkv: Tensor,
    value_embed: Tensor | None,
    gain_H: Tensor,
    kv_heads: int,
    cos: Tensor,
    sin: Tensor,
    scale_BT: Tensor | None,
) -> list[Tensor]:
    """q [B, T, H, K], k and, with a value embedding or a scale, v [B, T, G, K].

    v is else part of `qkv`. Meaning: `kernels.reference.split_heads`.

    Raises:
        ValueError: an argument is not on one CUDA device with the others or not contiguous, its
            shape or type does not fit, or a number of heads or the head size is no power of two.
    """
    check_cuda_tensors(
        qkv=qkv, value_embed=value_embed, gain=gain_H, cos=cos, sin=sin, scale=scale_BT
    )
    _check_scale(scale_BT, qkv)
    _check_tables(cos, sin, qkv)
    B, T, W = qkv.shape
    size, rest = divmod(W, len(gain_H) + 2 * kv_heads)
    if rest:
        raise ValueError(f"qkv's width {W} does not hold {len(gain_H)} + 2 * {kv_heads} heads")
    check_power_of_two(query_heads=len(gain_H), kv_heads=kv_heads, head_size=size)
    if value_embed is not None:
        check_shape("value_embed [B, T, G K]", value_embed, B, T, kv_heads * size)
    return heads_triton.split_heads(qkv, value_embed, gain_H, kv_heads, cos, sin, scale_BT=scale_BT)


@split_heads.register_fake
def _(
    qkv: Tensor,
    value_embed: Tensor | None,
    gain_H: Tensor,
    kv_heads: int,
    cos: Tensor,
    sin: Tensor,
    scale_BT: Tensor | None,
) -> list[Tensor]:
    (B, T, W), H = qkv.shape, len(gain_H)
    K = W // (H + 2 * kv_heads)
    in_place = value_embed is None and scale_BT is None
    heads = (H, kv_heads) if in_place else (H, kv_heads, kv_heads)
    return [qkv.new_empty((B, T, count, K)) for count in heads]


@torch.library.custom_op("fairway::split_heads_backward", mutates_args=())
def split_heads_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dv_more: Tensor,
    qkv: Tensor,
    gain_H: Tensor,
    cos: Tensor,
    sin: Tensor,
    scale_BT: Tensor | None,
    embed_apart: bool,
    dq_factor: float | None,
) -> list[Tensor]:
    """Gradient at qkv, [B, T, W], and partial sums [P, H] of that at the gains.

    `dq` is [B, T, H, K] or, with a `dq_factor` by which they are to be multiplied, the float32 sums
    of `kernels.flash4.flash_attention_backward_sums`.

    `dk` and `dv` are [B, T, G, K], or as many of them to be added, [parts, B, T, G, K]. With
    `embed_apart` the gradient at the value embedding, [B, T, G K], comes third; without a scale it
    is the last columns of the first.

    Raises:
        ValueError: an argument is not on one CUDA device with the others or not contiguous, or its
            shape or type does not fit; the message names it.
    """
    check_cuda_tensors(
        dq=dq,
        dk=dk,
        dv=dv,
        dv_more=dv_more,
        qkv=qkv,
        gain=gain_H,
        cos=cos,
        sin=sin,
        scale=scale_BT,
    )
    _check_scale(scale_BT, qkv)
    _check_tables(cos, sin, qkv)
    if dk.shape != dv.shape:
        raise ValueError(f"dk {tuple(dk.shape)} and dv {tuple(dv.shape)} must be of one shape")
    (B, T, _), H, (G, K) = qkv.shape, len(gain_H), dk.shape[-2:]
    check_shape("dv_more [B, T, G, K]", dv_more, B, T, G, K)
    check_shape("dk [..., B, T, G, K]", dk, *dk.shape[:-4], B, T, G, K)
    check_shape("qkv [B, T, (H + 2 G) K]", qkv, B, T, (H + 2 * G) * K)
    if dq_factor is None:
        check_shape("dq [B, T, H, K]", dq, B, T, H, K)
    else:
        check_dq_sums(dq, (B, T, H, K))
    return heads_triton.split_heads_backward(
        dq,
        dk,
        dv,
        dv_more,
        qkv,
        gain_H,
        cos,
        sin,
        scale_BT=scale_BT,
        embed_apart=embed_apart,
        dq_factor=dq_factor,
    )


@split_heads_backward.register_fake
def _(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dv_more: Tensor,
    qkv: Tensor,
    gain_H: Tensor,
    cos: Tensor,
    sin: Tensor,
    scale_BT: Tensor | None,
    embed_apart: bool,
    dq_factor: float | None,
) -> list[Tensor]:
    programs = HEADS_SUMMING_BLOCK.count(qkv.shape[0] * qkv.shape[1])
    sums = qkv.new_empty((programs, len(gain_H)), dtype=torch.float32)
    gradients = [torch.empty_like(qkv), sums]
    d_embed = qkv.new_empty((*qkv.shape[:2], dv.shape[-2] * dv.shape[-1]))
    return [*gradients, d_embed] if embed_apart else gradients


@torch.library.custom_op("fairway::exclude_self", mutates_args=())
def exclude_self(y_BTHK: Tensor, v_BTGK: Tensor) -> Tensor:
    """Attention's output without its own values; meaning: `kernels.reference.exclude_self`.

    Args:
        y_BTHK: contiguous.
        v_BTGK: values; rows at any distance, each contiguous.

    Raises:
        ValueError: an argument is not on one CUDA device with the others, its layout or shape does
            not fit, or a number of heads or the head size is no power of two.
    """
    _check_self(v_BTGK, y=y_BTHK)
    return heads_triton.exclude_self(y_BTHK, v_BTGK)


@exclude_self.register_fake
def _(y_BTHK: Tensor, v_BTGK: Tensor) -> Tensor:
    return torch.empty_like(y_BTHK)


@torch.library.custom_op("fairway::exclude_self_backward", mutates_args=())
def exclude_self_backward(
    grad_BTHK: Tensor, y_BTHK: Tensor, v_BTGK: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients at y, [B, T, H, K], and v, [B, T, G, K], both contiguous.

    Args:
        grad_BTHK: gradient at the result of `exclude_self`, contiguous.
        y_BTHK, v_BTGK: its arguments.

    Raises:
        ValueError: as `exclude_self`.
    """
    _check_self(v_BTGK, y=y_BTHK, grad=grad_BTHK)
    return heads_triton.exclude_self_backward(grad_BTHK, y_BTHK, v_BTGK)


@exclude_self_backward.register_fake
def _(grad_BTHK: Tensor, y_BTHK: Tensor, v_BTGK: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(y_BTHK), v_BTGK.new_empty(v_BTGK.shape)


@torch.library.custom_op("fairway::exclude_self_backward_numbers", mutates_args=())
def exclude_self_backward_numbers(
    grad_BTHK: Tensor, y_BTHK: Tensor, v_BTGK: Tensor, lse_BHT: Tensor, padded: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients at y and v, and what flash4's backward pass asks of every row.

    The latter are two float32 [B, H, padded], and `lse_BHT` is float32; see
    `kernels.heads_triton.exclude_self_backward_numbers`.

    Raises:
        ValueError: as `exclude_self`, or `padded` rows are fewer than T.
    """
    _check_self(v_BTGK, y=y_BTHK, grad=grad_BTHK)
    check_cuda_tensors(y=y_BTHK, lse=lse_BHT)
    B, T, H, _ = y_BTHK.shape
    check_float32("lse [B, H, T]", lse_BHT, B, H, T)
    if padded < T:
        raise ValueError(f"padded {padded} must be at least the {T} positions of a window")
    return heads_triton.exclude_self_backward_numbers(grad_BTHK, y_BTHK, v_BTGK, lse_BHT, padded)


@exclude_self_backward_numbers.register_fake
def _(
    grad_BTHK: Tensor, y_BTHK: Tensor, v_BTGK: Tensor, lse_BHT: Tensor, padded: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, _, H, _ = y_BTHK.shape
    row_sums, lse2 = (lse_BHT.new_empty((B, H, padded)) for _ in range(2))
    return torch.empty_like(y_BTHK), v_BTGK.new_empty(v_BTGK.shape), row_sums, lse2


def check_dq_sums(sums: Tensor, shape: tuple[int, int, int, int]) -> None:
    """flash4's sums of a dQ whose shape [B, T, H, K] is given. Raises ValueError."""
    B, T, H, K = shape
    check_float32("dq as sums [B, H, L K]", sums, B, H, flash4.padded(T) * K)


def _check_scale(scale_BT: Tensor | None, qkv: Tensor) -> None:
    """A factor for each row of the projection. Raises ValueError."""
    if scale_BT is None:
        return
    if scale_BT.dtype != torch.float32 or scale_BT.shape != qkv.shape[:2]:
        raise ValueError(
            f"scale {tuple(scale_BT.shape)} {scale_BT.dtype} must be float32 [B, T] = "
            f"{tuple(qkv.shape[:2])}"
        )


def _check_tables(cos: Tensor, sin: Tensor, qkv: Tensor) -> None:
    """A row of cosines and one of sines for every position. Raises ValueError."""
    if cos.shape != sin.shape or len(cos) != qkv.shape[1]:
        raise ValueError(
            f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must have a row for each of "
            f"{qkv.shape[1]} positions"
        )


def _check_self(v_BTGK: Tensor, **heads_BTHK: Tensor) -> None:
    """Values of attention, and tensors like its output, one of which is y. Raises ValueError."""
    check_cuda_tensors(**heads_BTHK)
    check_rows(v=v_BTGK)
    y = heads_BTHK["y"]
    (B, T, H, K), G = y.shape, v_BTGK.shape[2]
    check_shape("v [B, T, G, K]", v_BTGK, B, T, G, K)
    for name, tensor in heads_BTHK.items():
        check_shape(f"{name} [B, T, H, K]", tensor, B, T, H, K)
    check_power_of_two(query_heads=H, kv_heads=G, head_size=K)
    if G > H:
        raise ValueError(f"v has {G} heads, more than the {H} of y")
    if v_BTGK.device != y.device:
        raise ValueError(f"v is on {v_BTGK.device}, y on {y.device}")


def _check_entry(mix_2D: Tensor, skip_weight_D: Tensor | None, **stream: Tensor | None) -> None:
    """Weights per channel, and tensors [M, D] over the residual stream. Raises ValueError."""
    if (stream["skip"] is None) != (skip_weight_D is None):
        missing = "skip" if stream["skip"] is None else "skip_weight"
        raise ValueError(f"{missing} is missing: a skip and its weight come together")
    check_cuda_tensors(**stream, mix=mix_2D, skip_weight=skip_weight_D)
    width = _width(**stream)
    check_float32("mix [2, D]", mix_2D, 2, width)
    if skip_weight_D is not None:
        check_float32("skip_weight [D]", skip_weight_D, width)


def _check_stream(**tensors: Tensor | None) -> None:
    """Tensors [M, D] over the residual stream, the first of which is given. Raises ValueError."""
    check_cuda_tensors(**tensors)
    _width(**tensors)


def _width(**tensors: Tensor | None) -> int:
    """D of tensors that must all be [M, D]. Raises ValueError."""
    first, *others = tensors
    given = tensors[first]
    assert given is not None
    if given.ndim != 2:
        raise ValueError(f"{first} must have 2 dims, [M, D], not {given.ndim}")
    for name in others:
        tensor = tensors[name]
        if tensor is not None:
            check_shape(f"{name}, like {first},", tensor, *given.shape)
    check_power_of_two(width=given.shape[1])
    return given.shape[1]

"""Passes over the residual stream and the heads as differentiable functions, chosen by name.

`reference` is plain PyTorch, which torch.compile fuses as it sees fit. `triton` reads and writes
every tensor once, forward and backward (kernels/residual_triton.py, kernels/heads_triton.py); the
sums over rows that per-channel gradients need end in the compiler's hands. `epilogue` is `triton`
in the functions here; the model has the rest of it from kernels/epilogue.py.

Letters: D model width, B windows, T positions, H query heads, G key/value heads, K head size.
"""

from typing import Any

import torch
from torch import Tensor

from kernels import reference
from kernels.checks import check_power_of_two

BACKENDS = ("reference", "triton", "epilogue")


def require_passes(name: str, device: str, **sizes: int) -> None:
    """Check that `name` can run on `device` ("cpu" or "cuda") before any work is done.

    Args:
        name: the backend.
        device: where it is to run.
        sizes: of the model, such as width=512: those that the fused passes are compiled for.

    Raises:
        ValueError: unknown backend, one that needs a GPU on a CPU, or sizes it cannot take.
    """
    _require_known(name)
    if name != "reference" and device != "cuda":
        raise ValueError(f"backend {name!r} needs a CUDA device; on a CPU choose 'reference'")
    if name != "reference":
        check_power_of_two(**sizes)


def mix_norm(
    x: Tensor,
    x0: Tensor,
    mix_2D: Tensor,
    damp: float,
    *,
    branch: Tensor | None = None,
    skip: Tensor | None = None,
    skip_weight_D: Tensor | None = None,
    keep_sum: bool = False,
    backend: str = "reference",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """u, n and, with `keep_sum`, t of `kernels.reference.mix_norm`; [..., D].

    Args:
        x, x0, branch, skip: [..., D] of one type.
        mix_2D, skip_weight_D: float32.
        damp: factor on the normalised output.
        keep_sum: t is wanted too, as the skip of a later block; there must be a branch or a skip.
        backend: one of BACKENDS.

    Raises:
        ValueError: another backend, or tensors that the fused pass cannot take.
    """
    _require_known(backend)
    if backend == "reference":
        u, n, t = reference.mix_norm(x, branch, skip, skip_weight_D, x0, mix_2D, damp)
        return u, n, (t if keep_sum else None)
    rows = [None if t is None else _rows(t) for t in (x, branch, skip, x0)]
    outputs = _MixNorm.apply(*rows, skip_weight_D, mix_2D, damp, keep_sum)
    u, n, *more = (t.view_as(x) for t in outputs)
    return u, n, (more[0] if more else None)


def add_norm(
    x: Tensor, branch: Tensor, damp: float, *, keep_sum: bool = True, backend: str = "reference"
) -> tuple[Tensor, Tensor | None]:
    """damp norm(x + branch) and, with `keep_sum`, the sum itself; [..., D].

    Raises:
        ValueError: as `mix_norm`.
    """
    _require_known(backend)
    if backend == "reference":
        total, n = reference.add_norm(x, branch, damp)
        return n, (total if keep_sum else None)
    n, *more = _AddNorm.apply(_rows(x), _rows(branch), damp, keep_sum)
    return n.view_as(x), (more[0].view_as(x) if more else None)


def split_heads(
    qkv: Tensor,
    value_embed: Tensor | None,
    gain_H: Tensor,
    kv_heads: int,
    cos: Tensor,
    sin: Tensor,
    scale_BT: Tensor | None = None,
    *,
    backend: str = "reference",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v of `kernels.reference.split_heads`, and v once more for XSA.

    Each reader of the values sends its own gradient back; the fused pass adds the two on the way.
    The scale, the factor of an RMS norm of the projection's input, gets no gradient: its own is
    the norm's business.

    Raises:
        ValueError: as `mix_norm`.
    """
    _require_known(backend)
    if backend == "reference":
        q, k, v = reference.split_heads(qkv, value_embed, gain_H, kv_heads, cos, sin, scale_BT)
        return q, k, v, v
    value_embed = None if value_embed is None else value_embed.contiguous()
    return _SplitHeads.apply(qkv.contiguous(), value_embed, gain_H, kv_heads, cos, sin, scale_BT)


def exclude_self(y_BTHK: Tensor, v_BTGK: Tensor, *, backend: str = "reference") -> Tensor:
    """XSA; meaning: `kernels.reference.exclude_self`.

    Raises:
        ValueError: as `mix_norm`.
    """
    _require_known(backend)
    if backend == "reference":
        return reference.exclude_self(y_BTHK, v_BTGK)
    return _ExcludeSelf.apply(y_BTHK.contiguous(), v_BTGK)


def fused_heads(
    qkv: Tensor,
    value_embed: Tensor | None,
    gain_H: Tensor,
    kv_heads: int,
    cos: Tensor,
    sin: Tensor,
    scale_BT: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v by the fused pass; v is a view of `qkv` unless it is scaled or added to."""
    from kernels import pass_ops

    q, k, *more = pass_ops.split_heads(qkv, value_embed, gain_H, kv_heads, cos, sin, scale_BT)
    return q, k, more[0] if more else qkv[..., -k.shape[2] * k.shape[3] :].view_as(k)


def fused_heads_backward(
    grads: tuple[Tensor, Tensor, Tensor, Tensor],
    saved: tuple[Any, ...],
    has_embed: bool,
    dq_factor: float | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients at the arguments of `fused_heads`.

    Args:
        grads: dq, dk, dv and another dv, as `pass_ops.split_heads_backward` takes them.
        saved: qkv, gain_H, cos, sin and the scale, or None.
        has_embed: whether there was an embedding of the values.
        dq_factor: of flash4's sums, where dq is that.
    """
    from kernels import pass_ops

    apart = has_embed and saved[4] is not None
    dqkv, sums_PH, *more = pass_ops.split_heads_backward(*grads, *saved, apart, dq_factor)
    dv = grads[2]
    columns = more[0] if apart else dqkv[..., -dv.shape[-2] * dv.shape[-1] :]
    d_embed = columns if has_embed else None
    return dqkv, d_embed, sums_PH.sum(dim=0), None, None, None, None


def _require_known(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}")


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


class _MixNorm(torch.autograd.Function):
    """Forward and backward pass of the entry of a block, one kernel each."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor | None,
        skip: Tensor | None,
        x0: Tensor,
        skip_weight_D: Tensor | None,
        mix_2D: Tensor,
        damp: float,
        keep_sum: bool,
    ) -> tuple[Tensor, ...]:
        from kernels import pass_ops

        outputs = pass_ops.mix_norm(x, branch, skip, skip_weight_D, x0, mix_2D, damp)
        t = outputs[2] if len(outputs) == 3 else x
        ctx.save_for_backward(t, skip, skip_weight_D, x0, mix_2D)
        ctx.damp, ctx.has_branch, ctx.keep_sum = damp, branch is not None, keep_sum
        return tuple(outputs) if keep_sum else tuple(outputs[:2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from kernels import pass_ops

        t, skip, skip_weight_D, x0, mix_2D = ctx.saved_tensors
        dt = grads[2].contiguous() if ctx.keep_sum else None
        dx, dx0, sums_P3D, *more = pass_ops.mix_norm_backward(
            grads[0].contiguous(),
            grads[1].contiguous(),
            dt,
            t,
            x0,
            skip,
            skip_weight_D,
            mix_2D,
            ctx.damp,
        )
        sums_3D = sums_P3D.sum(dim=0)
        d_weight = sums_3D[2] if more else None
        d_skip = more[0] if more else None
        d_branch = dx if ctx.has_branch else None
        return dx, d_branch, d_skip, dx0, d_weight, sums_3D[:2], None, None


class _AddNorm(torch.autograd.Function):
    """Forward and backward pass between attention and MLP, one kernel each."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor, damp: float, keep_sum: bool
    ) -> tuple[Tensor, ...]:
        from kernels import pass_ops

        total, n = pass_ops.add_norm(x, branch, damp)
        ctx.save_for_backward(total)
        ctx.damp, ctx.keep_sum = damp, keep_sum
        return (n, total) if keep_sum else (n,)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from kernels import pass_ops

        (total,) = ctx.saved_tensors
        d_total = grads[1].contiguous() if ctx.keep_sum else None
        dx = pass_ops.add_norm_backward(d_total, grads[0].contiguous(), total, ctx.damp)
        return dx, dx, None, None


class _SplitHeads(torch.autograd.Function):
    """Norm, rotary and gain; one joint gradient back."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        value_embed: Tensor | None,
        gain_H: Tensor,
        kv_heads: int,
        cos: Tensor,
        sin: Tensor,
        scale_BT: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.save_for_backward(qkv, gain_H, cos, sin, scale_BT)
        ctx.has_embed = value_embed is not None
        q, k, v = fused_heads(qkv, value_embed, gain_H, kv_heads, cos, sin, scale_BT)
        return q, k, v, v.view_as(v)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dq, dk, dv, dv_more = (g.contiguous() for g in grads)
        return fused_heads_backward((dq, dk, dv, dv_more), ctx.saved_tensors, ctx.has_embed)


class _ExcludeSelf(torch.autograd.Function):
    """XSA, one kernel each way."""

    @staticmethod
    def forward(ctx: Any, y_BTHK: Tensor, v_BTGK: Tensor) -> Tensor:
        from kernels import pass_ops

        ctx.save_for_backward(y_BTHK, v_BTGK)
        return pass_ops.exclude_self(y_BTHK, v_BTGK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        from kernels import pass_ops

        return pass_ops.exclude_self_backward(grads[0].contiguous(), *ctx.saved_tensors)

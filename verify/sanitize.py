"""Every fused kernel but flash4's once, on small ragged shapes, for compute-sanitizer.

compute-sanitizer --tool memcheck  python -m verify.sanitize
compute-sanitizer --tool racecheck python -m verify.sanitize
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kernels import (
    backward_triton,
    cutlass,
    entry_cutlass,
    exclude_self_cutlass,
    flash4,
    forward_triton,
    heads_cutlass,
    joined_attention,
    muon_triton,
    pass_ops,
    reference,
)
from kernels.tiles import BACKWARD, FORWARD
from kernels.variants import UP_SCALED_PLAN, VARIANTS, Plan

SHAPES = ((1, 8, 8), (200, 72, 136), (300, 128, 520), (2100, 72, 1544))
"""M, D, F: a single row, sizes that are no multiple of any tile, and more tiles than a GPU has
multiprocessors, so that shared memory is used again."""
LENGTH = 5
"""Positions of a window: no multiple of a block of rows."""


def main() -> None:
    """Run everything and wait for it."""
    for m, d, f in SHAPES:
        run_mlp(m, d, f)
        runs = cutlass_runs(m, d, f, "cuda")
        for name, variant in VARIANTS.items():
            runs[variant.op](plan=Plan(name))
        torch.cuda.synchronize()
        print(f"M {m}, D {d}, F {f}: {len(VARIANTS)} CUTLASS variants and the MLP's Triton kernels")
    for windows in (1, 7):
        run_passes(windows, "cuda")
        torch.cuda.synchronize()
        print(f"{windows} windows of {LENGTH}: the passes' Triton kernels")


def run_mlp(m: int, d: int, f: int) -> None:
    """The MLP's Triton kernels, on a GPU."""
    x, go, w_up, w_down = (_normal("cuda", *s) for s in ((m, d), (m, d), (f, d), (d, f)))
    act_grad, _ = forward_triton.up_activation(x, w_up, FORWARD)
    forward_triton.activation(x, w_up, FORWARD)
    backward_triton.dpre(go, w_down, act_grad, BACKWARD)


def cutlass_runs(m: int, d: int, f: int, device: str) -> dict[str, Callable[..., object]]:
    """For the `op` of every variant, what runs it on random arguments, given a `plan`."""
    x, go, w_up, w_down = (_normal(device, *s) for s in ((m, d), (m, d), (f, d), (d, f)))
    act_grad, post = reference.up_activation(x, w_up)
    factor = torch.ones(m, device=device)
    query_heads, kv_heads, size = 3, 1, heads_cutlass.HEAD_SIZE  # half a tile's columns are left
    w_qkv = _normal(device, (query_heads + 2 * kv_heads) * size, d)
    embed, gain = _normal(device, m, kv_heads * size), torch.ones(query_heads, device=device)
    tables = (torch.ones(LENGTH, heads_cutlass.HALF, device=device) for _ in range(2))

    channels = torch.ones(2, d, device=device)
    ended = (post, w_down, go, x, channels)
    members, window = exclude_self_cutlass.MEMBERS, math.gcd(m, LENGTH)
    w_out, rest = _normal(device, d, members * size), _normal(device, m, members * size)
    joint, padded = _normal(device, m, (members + 2) * size), flash4.padded(window)
    own = torch.ones(m // window, members, padded, device=device)

    def dpre_scaled(plan: Plan) -> object:
        signed = cutlass.run_up_scaled(x, w_up, factor, UP_SCALED_PLAN)
        return cutlass.run_dpre_scaled(go, w_down, *signed, factor, plan, UP_SCALED_PLAN)

    return {
        "up": partial(cutlass.run_up_activation, x, w_up),
        "activation": partial(cutlass.run_activation, x, w_up),
        "dpre": partial(cutlass.run_dpre, go, w_down, act_grad),
        "linear_add": partial(cutlass.run_linear_add, post, w_down, go),
        "up_scaled": partial(cutlass.run_up_scaled, x, w_up, factor),
        "dpre_scaled": dpre_scaled,
        "norm_gradient": partial(cutlass.run_norm_gradient, post, w_up, go, x, factor),
        "heads": partial(
            heads_cutlass.run_project_heads, x, w_qkv, factor, embed, gain, kv_heads, *tables
        ),
        "linear_mix": partial(entry_cutlass.run_linear_mix, *ended, None, None),
        "linear_mix_skip": partial(entry_cutlass.run_linear_mix, *ended, x, channels[0]),
        "exclude_self": partial(
            exclude_self_cutlass.run_exclude_self_gradient,
            *(x, w_out, rest, own, joint),
        ),
    }


def run_passes(windows: int, device: str) -> None:
    """The Triton kernels over residual stream, heads and banks, with every tensor they may have."""
    (query_heads, kv_heads, size, half), m = (4, 2, 16, 4), windows * LENGTH
    normal = partial(_normal, device)
    lead, width = (windows, LENGTH), (query_heads + 2 * kv_heads) * size
    gain, factor = (torch.ones(n, device=device) for n in (query_heads, m))
    cos, sin = (torch.ones(LENGTH, half, device=device) for _ in range(2))

    x, branch, skip, x0 = (normal(m, 64) for _ in range(4))
    mix, weight = (torch.ones(s, device=device) for s in ((2, 64), (64,)))
    mixed = (skip, weight, x0, mix)
    u, n, t = pass_ops.mix_norm(x, branch, *mixed, 0.5)
    pass_ops.mix_factor(x, *mixed, 0.5)
    for damp in (0.5, None):  # the backward pass of either
        pass_ops.mix_norm_backward(u, n, t, t, x0, skip, weight, mix, damp)
    total, n = pass_ops.add_norm(x, branch, 0.5)
    pass_ops.add_norm_backward(x0, n, total, 0.5)

    qkv, embed, scale = normal(*lead, width), normal(*lead, kv_heads * size), factor.view(lead)
    q, k, v = pass_ops.split_heads(qkv, embed, gain, kv_heads, cos, sin, scale)
    y = pass_ops.exclude_self(q, v)
    pass_ops.exclude_self_backward(y, q, v)
    lse, whole = torch.ones(windows, query_heads, LENGTH, device=device), flash4.padded(LENGTH)
    pass_ops.exclude_self_backward_numbers(y, q, v, lse, whole)
    tables = (gain, cos, sin)
    pass_ops.split_heads_backward(q, k, v, v, qkv, *tables, scale, True, None)
    sums = torch.ones(windows, query_heads, whole * size, device=device)
    parts = torch.stack((k, v))
    pass_ops.split_heads_backward(sums, parts, parts, v, qkv, *tables, scale, True, 0.25)
    inverse = torch.ones(query_heads + kv_heads, m, device=device)
    finished = (qkv.flatten(0, 1), inverse, factor, *tables)
    joined_attention.joined_heads_backward(sums, parts, parts, v, *finished, True)

    momentum = torch.zeros(windows, 33, 65, device=device)
    clip = torch.ones((), device=device)
    update = muon_triton.nesterov(normal(windows, 33, 65), momentum, clip, 0.9, torch.bfloat16)
    muon_triton.apply_update(momentum, update.mT.contiguous().mT, 0.98, 0.3)


def _normal(device: str, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device).bfloat16()


if __name__ == "__main__":
    main()

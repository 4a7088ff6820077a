"""Every fused kernel once, on small ragged shapes, for compute-sanitizer.

compute-sanitizer --tool memcheck  python -m verify.sanitize
compute-sanitizer --tool racecheck python -m verify.sanitize
"""

from collections.abc import Callable
from functools import partial

import torch

from kernels import backward_triton, cutlass, forward_triton, reference
from kernels.tiles import BACKWARD, FORWARD
from kernels.variants import UP_SCALED_PLAN, VARIANTS, Plan

SHAPES = ((1, 8, 8), (200, 72, 136), (300, 128, 520), (2100, 72, 1544))
"""M, D, F: a single row, sizes that are no multiple of any tile, and more tiles than a GPU has
multiprocessors, so that shared memory is used again."""


def main() -> None:
    """Run everything and wait for it."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=generator).bfloat16()

    for m, d, f in SHAPES:
        x, go, w_up, w_down = normal(m, d), normal(m, d), normal(f, d), normal(d, f)
        act_grad, _ = reference.up_activation(x, w_up)
        factor = torch.ones(m, device="cuda")
        post, signs = cutlass.run_up_scaled(x, w_up, factor, UP_SCALED_PLAN)
        forward_triton.up_activation(x, w_up, FORWARD)
        forward_triton.activation(x, w_up, FORWARD)
        backward_triton.dpre(go, w_down, act_grad, BACKWARD)
        runs: dict[str, Callable[..., object]] = {
            "up": partial(cutlass.run_up_activation, x, w_up),
            "activation": partial(cutlass.run_activation, x, w_up),
            "dpre": partial(cutlass.run_dpre, go, w_down, act_grad),
            "linear_add": partial(cutlass.run_linear_add, post, w_down, go),
            "up_scaled": partial(cutlass.run_up_scaled, x, w_up, factor),
            "dpre_scaled": partial(
                cutlass.run_dpre_scaled,
                *(go, w_down, post, signs, factor),
                signs_plan=UP_SCALED_PLAN,
            ),
            "norm_gradient": partial(cutlass.run_norm_gradient, post, w_up, go, x, factor),
        }
        for name, variant in VARIANTS.items():
            runs[variant.op](plan=Plan(name))
        torch.cuda.synchronize()
        print(f"M {m}, D {d}, F {f}: {len(VARIANTS)} CUTLASS variants and 3 Triton kernels ran")


if __name__ == "__main__":
    main()

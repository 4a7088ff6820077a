"""What lies around the two fused kernels of the MLP, and what fusing it would save.

    python -m bench.mlp_fusions --out bench/mlp_fusions_h100.json

Pairs and single passes at the record's shape, interleaved in one process on random data, medians:

norm          the RMSNorm in front of the up-projection, compiled, a pass of its own; the most that
              fusing it into the kernel could save.
recompute     post computed again from act_grad in the backward, so that it need not be kept.
down          down-projection, then scale and residual: two passes, against one product that adds
              the residual in its epilogue with the scale folded into the weights.

Letters: M rows (tokens), D model width, F MLP width.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

from bench.stopwatch import Subject, time_interleaved
from kernels import reference
from trainer import environment, files
from trainer.config import ModelConfig
from verify.tolerance import relative_error

ROWS = 98_304
"""M: tokens of a micro-step."""


@dataclass(frozen=True)
class Arguments:
    """Options of `python -m bench.mlp_fusions`."""

    out: Path
    """JSON file for the results."""
    rounds: int = 60
    """Measured rounds."""


def norm(x_MD: Tensor) -> Tensor:
    """RMSNorm without gain."""
    return torch.nn.functional.rms_norm(x_MD, (x_MD.shape[-1],))


def recomputed_post(act_grad_MF: Tensor) -> Tensor:
    """post from act_grad: act_grad / 2 times pre, and pre is act_grad / 2 or 2 act_grad."""
    a = act_grad_MF.float()
    return torch.where(a > 0, 0.25 * a * a, a * a).to(act_grad_MF.dtype)


def down_in_two(post_MF: Tensor, w_DF: Tensor, scale_D: Tensor, x_MD: Tensor) -> Tensor:
    """x + scale * (post @ w^T), as the compiler sees it."""
    return x_MD + scale_D * torch.nn.functional.linear(post_MF, w_DF)


def down_in_one(post_MF: Tensor, w_DF: Tensor, scale_D: Tensor, x_MD: Tensor) -> Tensor:
    """The same with the scale on the weights and the residual in the product's epilogue."""
    return torch.addmm(x_MD, post_MF, (w_DF * scale_D[:, None]).T)


def main() -> int:
    """Measure, print and store; exit status 2 without a GPU."""
    arguments = tyro.cli(Arguments, description=__doc__)
    if not torch.cuda.is_available():
        print("error: needs a CUDA GPU; torch.cuda.is_available() is False", file=sys.stderr)
        return 2
    c = ModelConfig()
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=generator).bfloat16()

    x, w_up, w_down = (
        normal(ROWS, c.width),
        normal(c.mlp_width, c.width),
        normal(c.width, c.mlp_width),
    )
    scale = normal(c.width)
    w_up *= c.width**-0.5
    w_down *= c.mlp_width**-0.5
    act_grad, post = reference.up_activation(x, w_up)
    compiled_norm = torch.compile(norm)
    compiled_post = torch.compile(recomputed_post)
    compiled_two = torch.compile(down_in_two)
    subjects: dict[str, Subject] = {
        "norm": lambda i: compiled_norm(x),
        "recompute": lambda i: compiled_post(act_grad),
        "down: product alone": lambda i: torch.nn.functional.linear(post, w_down),
        "down: two passes": lambda i: compiled_two(post, w_down, scale, x),
        "down: one product": lambda i: down_in_one(post, w_down, scale, x),
    }
    times = time_interleaved(subjects, rounds=arguments.rounds, warm_up_rounds=5, device="cuda")
    exact = down_in_two(*(t.float() for t in (post, w_down, scale, x)))
    errors = {
        "recompute": relative_error(recomputed_post(act_grad), post.float()),
        "down: two passes": relative_error(compiled_two(post, w_down, scale, x), exact),
        "down: one product": relative_error(down_in_one(post, w_down, scale, x), exact),
    }
    results = {
        "environment": environment.describe(),
        "shape": {"M": ROWS, "D": c.width, "F": c.mlp_width},
        "ms": {name: t.as_json() for name, t in times.items()},
        "relative_error": errors,
        "bytes": {"post": post.nbytes},
    }
    files.write_json(arguments.out, results)
    for name, t in times.items():
        print(f"{name:24} {t.median_ms:.4f} ms  {errors.get(name, 0):.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

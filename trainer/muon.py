"""Muon's orthogonalisation of a bank of gradients: Newton-Schulz, and Turbo-Muon.

Letters: N matrices of a bank, R rows, C columns.
"""

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Quintic whose iteration drives singular values into about 0.68..1.14 (Jordan et al. 2024)."""

POLAR_EXPRESS = (
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""Steps 2 to 5 of Polar Express (Amsel et al. 2025, arXiv 2505.16932); Turbo-Muon's
preconditioner stands in for the first."""

EPS = 1e-7
"""Keeps an all-zero matrix (an unused, padded slice) at zero."""


def newton_schulz(g_NRC: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Nearest semi-orthogonal matrix of each gradient, roughly; [N, R, C] in `dtype`.

    Five steps of the quintic from the Frobenius-normalised gradient, on the smaller side.
    Source: Jordan et al. 2024 (Muon), coefficients as in the published record.
    """
    x, transposed = _wide(g_NRC.to(dtype))
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + EPS)
    for _ in range(steps):
        x = _quintic(x, x @ x.mT, *NEWTON_SCHULZ)
    return x.mT if transposed else x


def turbo_muon(g_NRC: Tensor, dtype: torch.dtype) -> Tensor:
    """Turbo-Muon (Boissin et al. 2025, arXiv 2512.04632): four steps instead of five.

    Rows are first divided by the square root of their Gershgorin radius in X X^T ("almost
    orthogonal" scaling), which bounds every singular value by 1 far more tightly than the
    Frobenius norm does and lets Polar Express skip its first step. The Gram matrix of that first
    step is rescaled rather than recomputed. Published as a negative result for the record.
    """
    x, transposed = _wide(g_NRC.to(dtype))
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + EPS)
    gram = x @ x.mT
    scale = gram.abs().sum(dim=-1, keepdim=True).clamp_min(EPS**2).rsqrt()
    x, gram = x * scale, gram * scale * scale.mT
    for step, coefficients in enumerate(POLAR_EXPRESS):
        x = _quintic(x, gram if step == 0 else x @ x.mT, *coefficients)
    return x.mT if transposed else x


def _wide(g_NRC: Tensor) -> tuple[Tensor, bool]:
    """The gradients with rows <= columns, and whether they were transposed for it."""
    transposed = g_NRC.shape[-2] > g_NRC.shape[-1]
    return (g_NRC.mT if transposed else g_NRC), transposed


def _quintic(x: Tensor, gram: Tensor, a: float, b: float, c: float) -> Tensor:
    """a x + b (x x^T) x + c (x x^T)^2 x, given gram = x x^T."""
    polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    return torch.baddbmm(x, polynomial, x, beta=a)

"""What the device can do at best, measured: a large matrix product and a large copy."""

import torch

from bench.stopwatch import Subject, time_interleaved
from profiles.profile import Ceilings


def measure(device: str) -> Ceilings:
    """Ceilings of this device, in the dtype used there (bfloat16 on a GPU, float32 on a CPU)."""
    size, words = (8192, 1 << 28) if device == "cuda" else (768, 1 << 23)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn(words, device=device, dtype=dtype)
    target = torch.empty_like(source)
    subjects: dict[str, Subject] = {
        "gemm": lambda i: torch.mm(a, b),
        "copy": lambda i: target.copy_(source),
    }
    times = time_interleaved(subjects, rounds=10, warm_up_rounds=3, device=device)
    return Ceilings(
        tflops=2 * size**3 / times["gemm"].median_ms / 1e9,
        gbytes=2 * source.nbytes / times["copy"].median_ms / 1e6,
    )

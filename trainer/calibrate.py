"""Calibration: the model writes its own text, and every matrix's input statistics are collected.

No training or validation data is touched after training.

Letters: B sequences, T positions, C columns of a matrix, V vocabulary.
"""

import torch
from torch import Tensor

from trainer.model import GPT
from trainer.progress import progress
from trainer.sampling import Sampler

HESSIAN_BATCH = 8
"""Sequences in one forward pass of Hessian collection."""


def generate(model: GPT, sequences: int, length: int, temperature: float, seed: int) -> Tensor:
    """Sample `sequences` texts of `length` tokens: int64 [B, T] on the model's device.

    The first token is uniform over the vocabulary, the others are drawn at `temperature`
    through the KV cache, all sequences at once; on CUDA one captured step is replayed.

    Raises:
        ValueError: length outside 1..seq_len, or a temperature that is not above 0.
    """
    generator = torch.Generator().manual_seed(seed)
    sampler = Sampler(model, sequences, length, temperature)
    # Drawn on the host: the same numbers on every device.
    first = torch.randint(model.config.vocab_size, (sequences,), generator=generator)
    uniform_TB = torch.rand(length, sequences, generator=generator)
    with progress("calibration text", length) as advance:
        advance()
        return sampler.extend(first.view(-1, 1), uniform_TB[1:], advance)


@torch.no_grad()
def collect_hessians(model: GPT, ids_BT: Tensor) -> dict[str, Tensor]:
    """H = sum over positions of x x^T per matrix, averaged over sequences; float32 [C, C].

    The product is formed once for matrices that read the same input (q, k and v of a layer).

    Args:
        model: on its device.
        ids_BT: calibration text.
    """
    sums: dict[tuple[str, ...], Tensor] = {}

    def observe(names: tuple[str, ...], x_BTC: Tensor) -> None:
        x = x_BTC.flatten(0, 1).float()
        product = x.T @ x
        sums[names] = product if names not in sums else sums[names].add_(product)

    sequences = len(ids_BT)
    with progress("Hessians", sequences) as advance:
        for batch in ids_BT.split(HESSIAN_BATCH):
            model.hidden(batch, observe=observe)
            advance(len(batch))
    hessians: dict[str, Tensor] = {}
    for names, total in sums.items():
        mean = total / sequences
        hessians.update({name: mean.clone() for name in names})
    return hessians

"""SLOT: an offset on the last hidden state, fitted at test time (selective logit offset tuning).

One vector delta [D] is added to the hidden state before the head. It starts at zero and takes a
few AdamW steps on the cross-entropy; then the window is scored with it.

`shared`   the published form: one delta for the whole batch of windows, fitted on every position
           but each window's last. The scored targets are among those it is fitted on, so a
           prediction sees its own target and later ones: not causal, withdrawn by its authors.
           (The published code padded short tail windows with zeros and fitted on the padding;
           here every window is full, so there is none.)
`context`  one delta a window, fitted only on targets that earlier windows have scored. Causal.

Letters: B windows, T positions, D width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.config import EvalConfig
from trainer.model import GPT


def fit_shared(model: GPT, hidden_BTD: Tensor, targets_BT: Tensor, config: EvalConfig) -> Tensor:
    """One offset for all windows, float32 [1, 1, D]; not causal."""
    fit_on_BT = torch.ones_like(targets_BT, dtype=torch.bool)
    fit_on_BT[:, -1] = False
    weights_BT = fit_on_BT / fit_on_BT.sum().clamp_min(1)
    return _fit(model, hidden_BTD, targets_BT, weights_BT, 1, config)


def fit_context(
    model: GPT, hidden_BTD: Tensor, targets_BT: Tensor, scored_BT: Tensor, config: EvalConfig
) -> Tensor:
    """One offset a window, float32 [B, 1, D], from the positions before the scored ones.

    Args:
        model: whose head is used.
        hidden_BTD: last hidden states.
        targets_BT: next tokens, int64.
        scored_BT: bool, the positions this window scores: the last ones of each row.
        config: SLOT's settings.
    """
    fit_on_BT = ~scored_BT
    weights_BT = fit_on_BT / fit_on_BT.sum(dim=1, keepdim=True).clamp_min(1)
    return _fit(model, hidden_BTD, targets_BT, weights_BT, len(hidden_BTD), config)


@torch.enable_grad()
def _fit(
    model: GPT,
    hidden_BTD: Tensor,
    targets_BT: Tensor,
    weights_BT: Tensor,
    offsets: int,
    config: EvalConfig,
) -> Tensor:
    """AdamW on the weighted cross-entropy. A sum over windows keeps their gradients apart."""
    delta = torch.zeros(
        (offsets, 1, hidden_BTD.shape[-1]), device=hidden_BTD.device, requires_grad=True
    )
    optimizer = torch.optim.AdamW(
        [delta],
        lr=config.slot_lr,
        eps=config.slot_eps,
        weight_decay=config.slot_weight_decay,
    )
    hidden_BTD = hidden_BTD.detach()
    for _ in range(config.slot_steps):
        logits = model.logits(shift(hidden_BTD, delta))
        nats = F.cross_entropy(logits.flatten(0, 1), targets_BT.flatten(), reduction="none")
        loss = (nats * weights_BT.flatten()).sum()
        (delta.grad,) = torch.autograd.grad(loss, delta)
        optimizer.step()
    return delta.detach()


def shift(hidden: Tensor, delta: Tensor) -> Tensor:
    """Hidden states plus offset, in the type of the hidden states."""
    return (hidden + delta).to(hidden.dtype)

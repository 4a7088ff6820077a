"""SLOT: an offset on the last hidden state, fitted at test time (selective logit offset tuning).

One vector delta [D] is added to the hidden state before the head. It starts at zero and takes a
few AdamW steps on the cross-entropy; then the window is scored with it.

`shared`   the published form: one delta for the whole batch of windows, fitted on every position
           but each window's last. The scored targets are among those it is fitted on, so a
           prediction sees its own target and later ones: not causal, withdrawn by its authors.
           (The published code padded short tail windows with zeros and fitted on the padding;
           here every window is full, so there is none.)
`context`  one delta a window, fitted only on targets that earlier windows have scored. Causal.

The gradient is written out: the offset is the same for all positions of a sum, so the product with
the head's weights can wait until the positions are summed, and no second large product is needed.

Letters: B windows, T positions, D width, V vocabulary, O offsets (1 or B).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.config import EvalConfig
from trainer.model import GPT

Gradient = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]
"""`offset_gradient`, or the same compiled."""


def fit_shared(
    model: GPT,
    hidden_BTD: Tensor,
    targets_BT: Tensor,
    scored_BT: Tensor,
    config: EvalConfig,
    gradient: Gradient,
) -> Tensor:
    """One offset for all windows, float32 [1, 1, D]; not causal. Arguments as of `fit_context`."""
    fit_on_BT = torch.ones_like(scored_BT)
    fit_on_BT[:, -1] = False
    weights_BT = fit_on_BT / fit_on_BT.sum().clamp_min(1)
    return _fit(model, hidden_BTD, targets_BT, weights_BT, 1, config, gradient)


def fit_context(
    model: GPT,
    hidden_BTD: Tensor,
    targets_BT: Tensor,
    scored_BT: Tensor,
    config: EvalConfig,
    gradient: Gradient,
) -> Tensor:
    """One offset a window, float32 [B, 1, D], from the positions before the scored ones.

    Args:
        model: whose head is used.
        hidden_BTD: last hidden states.
        targets_BT: next tokens, int64.
        scored_BT: bool, the positions this window scores: the last ones of each row.
        config: SLOT's settings.
        gradient: `offset_gradient`, or the same compiled.
    """
    fit_on_BT = ~scored_BT
    weights_BT = fit_on_BT / fit_on_BT.sum(dim=1, keepdim=True).clamp_min(1)
    return _fit(model, hidden_BTD, targets_BT, weights_BT, len(hidden_BTD), config, gradient)


def _fit(
    model: GPT,
    hidden_BTD: Tensor,
    targets_BT: Tensor,
    weights_BT: Tensor,
    offsets: int,
    config: EvalConfig,
    gradient: Gradient,
) -> Tensor:
    """AdamW on the weighted cross-entropy. A sum over windows keeps their gradients apart."""
    delta = torch.zeros((offsets, 1, hidden_BTD.shape[-1]), device=hidden_BTD.device)
    optimizer = torch.optim.AdamW(
        [delta],
        lr=config.slot_lr,
        eps=config.slot_eps,
        weight_decay=config.slot_weight_decay,
    )
    head_VD = model.tok_emb.weight.detach().to(hidden_BTD.dtype)
    cap = model.config.logit_softcap
    for _ in range(config.slot_steps):
        delta.grad = gradient(head_VD, hidden_BTD, delta, targets_BT, weights_BT, cap)
        optimizer.step()
    return delta


def offset_gradient(
    head_VD: Tensor,
    hidden_BTD: Tensor,
    delta_O1D: Tensor,
    targets_BT: Tensor,
    weights_BT: Tensor,
    softcap: float,
) -> Tensor:
    """Gradient of the weighted cross-entropy in the offset, float32 [O, 1, D].

    With z = head (h + delta), s = c tanh(z / c) and p = softmax(s), the gradient in z is
    w (p - onehot) (1 - (s / c)^2), and that in delta its sum over positions times the head.

    Args:
        head_VD: the head in the hidden states' type.
        hidden_BTD: last hidden states.
        delta_O1D: offset, float32; one for all windows or one each.
        targets_BT: next tokens, int64.
        weights_BT: float32 weight of every position.
        softcap: c.
    """
    squashed = torch.tanh(F.linear(shift(hidden_BTD, delta_O1D), head_VD).float() / softcap)
    surplus = torch.softmax(softcap * squashed, dim=-1)
    vocabulary_V = torch.arange(len(head_VD), device=head_VD.device)
    surplus = surplus - (targets_BT.unsqueeze(-1) == vocabulary_V).float()
    d_logits_BTV = weights_BT.unsqueeze(-1) * surplus * (1 - squashed.square())
    summed_OV = d_logits_BTV.sum(dim=1)
    if len(delta_O1D) == 1:
        summed_OV = summed_OV.sum(dim=0, keepdim=True)
    return (summed_OV @ head_VD.float()).unsqueeze(1)


def shift(hidden: Tensor, delta: Tensor) -> Tensor:
    """Hidden states plus offset, in the type of the hidden states."""
    return (hidden + delta).to(hidden.dtype)

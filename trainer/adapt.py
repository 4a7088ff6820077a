"""SLOT: an offset on the last hidden state, fitted at test time (selective logit offset tuning).

One vector delta [D] is added to the hidden state before the head. It starts at zero and takes a
few AdamW steps on the cross-entropy; then the window is scored with it.

`shared`   the published form: one delta for the whole batch of windows, fitted on every position
           but each window's last. The scored targets are among those it is fitted on, so a
           prediction sees its own target and later ones: not causal, withdrawn by its authors.
           (The published code padded short tail windows with zeros and fitted on the padding;
           here every window is full, so there is none.)
`context`  one delta a window, fitted only on targets that earlier windows have scored. Causal.

A whole fit is one function of tensors, so that one compiled program does all its steps. Nearly
all its time is traffic of [B, T, V] arrays, 134 MB each in bfloat16 at the record's shapes:

* The head is linear: head (h + delta) = head h + head delta. The first term is made once, the
  second is a row a window. A step needs no large product, and reads one array.
* The gradient in the logits is written in the hidden states' type in the same pass. Powers are
  taken without their row's maximum, for the softcap bounds them: one reduction instead of two.
  (torch.softmax after a factor becomes, in Inductor, a kernel that stores its float32 powers.)
* Its sum over positions is a product with the 0s and 1s that say which positions count: read
  once, added up in float32. A plain sum down columns does not fuse with a softmax along rows.
* The offset is the same for all positions, so the product with the head waits until after that.

Three passes a step, 0.4 GB; logits made anew with a float32 gradient took 1.0 GB.

Letters: B windows, T positions, D width, V vocabulary, O offsets (1 or B).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.config import EvalConfig
from trainer.errors import ConfigError

Fit = Callable[[Tensor, Tensor, Tensor, Tensor, float, EvalConfig], Tensor]
"""`fit_shared` or `fit_context`, or one of them compiled."""
BETAS = (0.9, 0.999)
"""Decay rates of AdamW's two means, PyTorch's defaults as in the published code."""

LARGEST_EXPONENT = 87
"""e to this and to minus this are both normal float32 numbers."""


def fit_shared(
    head_VD: Tensor,
    hidden_BTD: Tensor,
    targets_BT: Tensor,
    scored_BT: Tensor,
    softcap: float,
    config: EvalConfig,
) -> Tensor:
    """One offset for all windows, float32 [1, 1, D]; not causal. Arguments as of `fit_context`."""
    steps_T = torch.arange(scored_BT.shape[1], device=scored_BT.device)
    fit_on_BT = (steps_T < len(steps_T) - 1).expand_as(scored_BT)
    return _fit(head_VD, hidden_BTD, targets_BT, fit_on_BT, 1, softcap, config)


def fit_context(
    head_VD: Tensor,
    hidden_BTD: Tensor,
    targets_BT: Tensor,
    scored_BT: Tensor,
    softcap: float,
    config: EvalConfig,
) -> Tensor:
    """One offset a window, float32 [B, 1, D], from the positions before the scored ones.

    Args:
        head_VD: weights of the head, rounded to the hidden states' type before use.
        hidden_BTD: last hidden states.
        targets_BT: next tokens, int64.
        scored_BT: bool, the positions this window scores: the last ones of each row.
        softcap: c of the logits c tanh(z / c).
        config: SLOT's settings.

    Raises:
        ConfigError: a softcap so large that a row's sum of powers may leave float32.
    """
    return _fit(head_VD, hidden_BTD, targets_BT, ~scored_BT, len(hidden_BTD), softcap, config)


def _fit(
    head_VD: Tensor,
    hidden_BTD: Tensor,
    targets_BT: Tensor,
    fit_on_BT: Tensor,
    offsets: int,
    softcap: float,
    config: EvalConfig,
) -> Tensor:
    """AdamW from zero on the mean cross-entropy of the positions in `fit_on_BT`.

    Raises:
        ConfigError: a softcap so large that a row's sum of powers may leave float32.
    """
    if softcap + math.log(len(head_VD)) > LARGEST_EXPONENT:
        raise ConfigError(
            f"SLOT needs model.logit-softcap + ln(vocabulary) <= {LARGEST_EXPONENT}, to sum powers"
            f" in float32; here the softcap is {softcap} and the vocabulary {len(head_VD)}"
        )
    rounded_VD = head_VD.to(hidden_BTD.dtype)
    raw_BTV, head_VD = F.linear(hidden_BTD, rounded_VD), rounded_VD.float()
    delta_OD = hidden_BTD.new_zeros((offsets, hidden_BTD.shape[-1]), dtype=torch.float32)
    mean_OD, square_OD = torch.zeros_like(delta_OD), torch.zeros_like(delta_OD)
    for step in range(1, config.slot_steps + 1):
        gradient_OD = offset_gradient(head_VD, raw_BTV, delta_OD, targets_BT, fit_on_BT, softcap)
        delta_OD, mean_OD, square_OD = adamw_step(
            delta_OD, gradient_OD, mean_OD, square_OD, step, config
        )
    return delta_OD.unsqueeze(1)


def offset_gradient(
    head_VD: Tensor,
    raw_BTV: Tensor,
    delta_OD: Tensor,
    targets_BT: Tensor,
    fit_on_BT: Tensor,
    softcap: float,
) -> Tensor:
    """Gradient of the mean cross-entropy in the offset, float32 [O, D].

    With z = raw + head delta, s = c tanh(z / c) and p = softmax(s), a position's gradient in z is
    (p - onehot) (1 - (s / c)^2), and that in delta the mean of these over positions times the
    head. The mean is over a window for one offset each, over all windows for a single one.

    Args:
        head_VD: weights of the head, float32.
        raw_BTV: their product with the hidden states, in the hidden states' type.
        delta_OD: offset, float32; one for all windows or one each.
        targets_BT: next tokens, int64.
        fit_on_BT: bool, the positions that count. None at all: a gradient of zero.
        softcap: c.
    """
    shift_O1V = F.linear(delta_OD, head_VD).unsqueeze(1)
    squashed_BTV = torch.tanh((raw_BTV.float() + shift_O1V) / softcap)
    powers_BTV = torch.exp(softcap * squashed_BTV)
    surplus_BTV = powers_BTV / powers_BTV.sum(dim=-1, keepdim=True)
    vocabulary_V = torch.arange(len(head_VD), device=head_VD.device)
    surplus_BTV = surplus_BTV - (targets_BT.unsqueeze(-1) == vocabulary_V).float()
    d_raw_BTV = (surplus_BTV * (1 - squashed_BTV.square())).to(raw_BTV.dtype)
    counts_B1T = fit_on_BT.unsqueeze(1).to(raw_BTV.dtype)
    summed_OV = torch.bmm(counts_B1T, d_raw_BTV).squeeze(1).float()
    positions_O1 = fit_on_BT.sum(dim=1, keepdim=True)
    if len(delta_OD) == 1:
        summed_OV = summed_OV.sum(dim=0, keepdim=True)
        positions_O1 = positions_O1.sum(dim=0, keepdim=True)
    return (summed_OV / positions_O1.clamp_min(1)) @ head_VD


def adamw_step(
    delta: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    step: int,
    config: EvalConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """AdamW's step number `step` >= 1: the new offset, mean of gradients, mean of their squares.

    What torch.optim.AdamW does, as a function (Loshchilov and Hutter 2019, algorithm 2). All
    tensors are float32 of one shape.
    """
    beta_1, beta_2 = BETAS
    mean = torch.lerp(mean, gradient, 1 - beta_1)
    square = beta_2 * square + (1 - beta_2) * gradient.square()
    size = (square / (1 - beta_2**step)).sqrt() + config.slot_eps
    delta = delta * (1 - config.slot_lr * config.slot_weight_decay)
    return delta - config.slot_lr / (1 - beta_1**step) * mean / size, mean, square


def shift(hidden: Tensor, delta: Tensor) -> Tensor:
    """Hidden states plus offset, in the type of the hidden states."""
    return (hidden + delta).to(hidden.dtype)

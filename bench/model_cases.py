"""Cases of the training step: MLP, attention, block, micro-step, optimizer.

On a GPU everything but the bare MLP backends is compiled, as in training.

Letters: B windows, T positions, N tokens, D width, F MLP width.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.measure import Case
from bench.scale import Scale, gemm_reference, one_layer
from bench.stopwatch import Subject
from kernels.mlp import load_backend, mlp
from trainer.average import Averages
from trainer.compiling import compiled
from trainer.config import MlpBackend
from trainer.model import GPT
from trainer.muon import newton_schulz
from trainer.optim import Optimizer
from trainer.parallel import NEWTON_SCHULZ_STEPS
from trainer.states import Stream

SETS = 2
"""Input sets rotated by the bench; at the record's shapes one set alone exceeds the L2 cache."""


def _case(scale: Scale, subject: Subject, gemms: int = 1) -> Case:
    name, reference = gemm_reference(scale, gemms)
    return Case(subject, reference, name, scale.device.type)


def _compiled(scale: Scale, function: Callable[..., Any]) -> Callable[..., Any]:
    if not scale.cuda:
        return function
    return compiled(function)


def _mlp_inputs(scale: Scale) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """x [N, D], grad of y [N, D], w_up [F, D], w_down [D, F]; several sets."""
    c = scale.config.model
    rows = scale.windows * c.seq_len
    return [
        (
            scale.normal(rows, c.width),
            scale.normal(rows, c.width),
            scale.normal(c.mlp_width, c.width, scale=c.width**-0.5),
            scale.normal(c.width, c.mlp_width, scale=c.mlp_width**-0.5),
        )
        for _ in range(SETS)
    ]


def mlp_forward(scale: Scale, backend: MlpBackend) -> Case:
    """Up-projection with its activation: act_grad and post."""
    sets = _mlp_inputs(scale)
    up_activation = load_backend(backend).up_activation

    def run(i: int) -> None:
        x, _, w_up, _ = sets[i % SETS]
        up_activation(x, w_up)

    return _case(scale, run)


def mlp_dpre(scale: Scale, backend: MlpBackend) -> Case:
    """The backward product dpre = (go @ w_down) * act_grad."""
    sets = _mlp_inputs(scale)
    loaded = load_backend(backend)
    act_grads = [loaded.up_activation(x, w_up)[0] for x, _, w_up, _ in sets]

    def run(i: int) -> None:
        _, go, _, w_down = sets[i % SETS]
        loaded.dpre(go, w_down, act_grads[i % SETS])

    return _case(scale, run)


def mlp_both(scale: Scale, backend: MlpBackend) -> Case:
    """The whole MLP forward and backward, all gradients."""
    sets = [
        tuple(t.requires_grad_(n != 1) for n, t in enumerate(inputs))
        for inputs in _mlp_inputs(scale)
    ]

    def run(i: int) -> None:
        x, go, w_up, w_down = sets[i % SETS]
        y, _ = mlp(x, w_up, w_down, backend=backend)
        torch.autograd.grad(y, (x, w_up, w_down), go)

    return _case(scale, run, gemms=4)


def attention(scale: Scale) -> Case:
    """Projections, normalisation, rotary, attention and XSA of a layer, forward and backward."""
    model = scale.model(shape=one_layer(scale.config.model))
    x_BTD = _hidden(scale)
    weights = model.cast_weights()
    context = _context(model, scale)

    def forward(x: Tensor, qkv: Tensor, out: Tensor) -> Tensor:
        chosen = replace(weights, qkv=qkv, out=out)
        return model._attention(0, x, chosen, *context, None, None, None)

    return _forward_backward(scale, forward, (x_BTD, weights.qkv, weights.out))


def block(scale: Scale, backend: MlpBackend) -> Case:
    """A whole block and the norm behind it, forward and backward."""
    # The last of three: it has a branch to add at its entry, and no skip.
    model = scale.model(backend, replace(one_layer(scale.config.model), layers=3))
    x_BTD, branch_BTD, x0_BTD = _hidden(scale), _hidden(scale), _hidden(scale)
    weights = model.cast_weights()
    context = _context(model, scale)

    def forward(
        x: Tensor, branch: Tensor, x0: Tensor, qkv: Tensor, out: Tensor, up: Tensor, down: Tensor
    ) -> Tensor:
        chosen = replace(weights, qkv=qkv, out=out, up=up, down=down)
        stream = Stream(x, branch, ())
        return model._leave(model._block(2, stream, x0, chosen, *context, None, None, None))

    leaves = (x_BTD, branch_BTD, x0_BTD, weights.qkv, weights.out, weights.up, weights.down)
    return _forward_backward(scale, forward, leaves)


def _hidden(scale: Scale) -> Tensor:
    return scale.normal(scale.windows, scale.config.model.seq_len, scale.config.model.width)


def _context(model: GPT, scale: Scale) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Rotary tables and positions of a whole window."""
    positions_T = torch.arange(scale.config.model.seq_len, device=scale.device)
    return (model.cos[positions_T], model.sin[positions_T]), positions_T


def _forward_backward(
    scale: Scale, forward: Callable[..., Tensor], inputs: tuple[Tensor, ...]
) -> Case:
    leaves = tuple(t.detach().requires_grad_() for t in inputs)
    grad = torch.randn_like(leaves[0])
    function = _compiled(scale, forward)

    def run(i: int) -> None:
        torch.autograd.grad(function(*leaves), leaves, grad)

    return _case(scale, run, gemms=4)


def micro_step(scale: Scale, backend: MlpBackend) -> Case:
    """Loss and gradients of one micro-batch of the whole model."""
    model = scale.model(backend)
    loss = _compiled(scale, model.loss)
    batches = [(scale.ids(scale.windows), scale.ids(scale.windows)) for _ in range(SETS)]

    def run(i: int) -> None:
        model.zero_grad(set_to_none=True)
        loss(*batches[i % SETS]).backward()

    return _case(scale, run, gemms=20)


def _with_gradients(scale: Scale) -> tuple[GPT, Optimizer]:
    model = scale.model()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return model, Optimizer(model, scale.config.optim, scale.dtype)


def optimizer_step(scale: Scale) -> Case:
    """Clip, Muon and AdamW. Learning rates are scaled by 0: weights stay, work does not change."""
    _, optimizer = _with_gradients(scale)
    return _case(scale, lambda i: optimizer.step(0.0, 0.95), gemms=10)


def muon(scale: Scale) -> Case:
    """Newton-Schulz of all four banks."""
    model, _ = _with_gradients(scale)
    banks = (model.qo_bank, model.kv_bank, model.mlp_up_bank, model.mlp_down_bank)
    gradients = [torch.randn_like(bank) for bank in banks]

    def run(i: int) -> None:
        with torch.no_grad():
            for gradient in gradients:
                newton_schulz(gradient, NEWTON_SCHULZ_STEPS, scale.dtype)

    return _case(scale, run, gemms=10)


def adamw(scale: Scale) -> Case:
    """AdamW of every parameter outside the banks."""
    _, optimizer = _with_gradients(scale)
    return _case(scale, lambda i: optimizer.adamw.step())


def clip(scale: Scale) -> Case:
    """Global gradient norm and clipping, as in the optimizer's step."""
    _, optimizer = _with_gradients(scale)
    small = [p.grad for p in optimizer.adam_named.values() if p.grad is not None]
    shards = [bank.parameter.grad for bank in optimizer.banks if bank.parameter.grad is not None]

    def run(i: int) -> None:
        norm = optimizer.communicator.total_norm(shards, small)
        torch.nn.utils.clip_grads_with_norm_(optimizer.adam_named.values(), 0.3, norm)

    return _case(scale, run)


def ema(scale: Scale) -> Case:
    """One update of the exponential moving average of all weights."""
    averages = Averages(scale.model(), scale.config.train)
    return _case(scale, lambda i: averages.update_ema(scale.config.train.ema_decay))

"""The optimizer of the record: Muon for the banks, AdamW for everything else.

`Optimizer.step` expects in every `param.grad` the mean gradient of this rank's micro-batches; it
averages over ranks itself.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_

from trainer.config import OptimConfig
from trainer.errors import ConfigError
from trainer.parallel import Bank, Communicator

BANKS = ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank")
EMBEDDINGS = ("tok_emb.weight", "bigram.embed.weight", "ve_shared.embed.weight")
SMALL = (
    "bigram.proj.weight",
    "bigram.scale",
    "smear.gate",
    "skip_weights",
    "ve_shared.proj.weight",
    "ve_shared.scale",
)
SMALL_ENDINGS = (".q_gain", ".attn_scale", ".mlp_scale", ".resid_mix")
CLIP_EPS = 1e-6
"""As in torch.nn.utils.clip_grads_with_norm_, which clips the small parameters."""


def group_of(name: str) -> str:
    """Which optimizer a parameter belongs to: `muon`, `embedding` or `small`.

    Raises:
        ConfigError: the name is none of the model's.
    """
    if name in BANKS:
        return "muon"
    if name in EMBEDDINGS:
        return "embedding"
    if name in SMALL or name.startswith("ve_layer_scales.") or name.endswith(SMALL_ENDINGS):
        return "small"
    raise ConfigError(f"parameter {name} has no optimizer group; add it to trainer/optim.py")


class Optimizer:
    """Parallel Muon and AdamW behind one step.

    Args:
        model: its named parameters are those of `GPT`.
        config: learning rates and the rest.
        dtype: type in which bank gradients travel and are orthogonalised.
    """

    def __init__(self, model: nn.Module, config: OptimConfig, dtype: torch.dtype) -> None:
        self.config = config
        named = dict(model.named_parameters())
        groups: dict[str, dict[str, nn.Parameter]] = {"muon": {}, "embedding": {}, "small": {}}
        for name, p in named.items():
            groups[group_of(name)][name] = p
        self.communicator = Communicator()
        # Largest first: its communication has the most other work to hide behind.
        largest_first = sorted(groups["muon"].items(), key=lambda item: -item[1].numel())
        self.banks = [Bank(name, p, dtype, self.communicator) for name, p in largest_first]
        self.adam_named = {**groups["embedding"], **groups["small"]}
        rates = {"embedding": config.embed_lr, "small": config.scalar_lr}
        self.base_rates = list(rates.values())
        self.adamw = torch.optim.AdamW(
            [{"params": list(groups[g].values()), "lr": rate} for g, rate in rates.items()],
            betas=config.adam_betas,
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
            fused=next(iter(named.values())).is_cuda,
        )

    @torch.no_grad()
    def step(self, lr_scale: float, momentum: float) -> Tensor:
        """One update of every parameter.

        The clip factor needs the norm of the whole averaged gradient, so every reduce-scatter
        ends before the first Newton-Schulz; the gathers overlap with the next bank's work.

        Args:
            lr_scale: factor on all learning rates.
            momentum: Muon's momentum.

        Returns:
            The norm of the averaged gradient before clipping: 0-dim float32, on the device.
        """
        for bank in self.banks:
            bank.start_reduce()
        small = [p.grad for p in self.adam_named.values() if p.grad is not None]
        self.communicator.average(small)
        shards = [bank.finish_reduce() for bank in self.banks]
        norm = self.communicator.total_norm(shards, small)
        clip = torch.clamp(self.config.clip_norm / (norm + CLIP_EPS), max=1.0)
        clip_grads_with_norm_(self.adam_named.values(), self.config.clip_norm, norm)
        self._step_adamw(lr_scale)
        lr = self.config.muon_lr * lr_scale
        waiting: Bank | None = None
        for bank in self.banks:
            bank.start_update(clip, momentum, self.config)
            if waiting is not None:
                waiting.finish_update(lr, self.config.weight_decay)
            waiting = bank
        if waiting is not None:
            waiting.finish_update(lr, self.config.weight_decay)
        return norm

    def _step_adamw(self, lr_scale: float) -> None:
        for group, rate in zip(self.adamw.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * lr_scale
        self.adamw.step()

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for p in self._parameters():
            p.grad = None

    def _parameters(self) -> Iterable[nn.Parameter]:
        yield from (bank.parameter for bank in self.banks)
        yield from self.adam_named.values()

    def state_dict(self) -> dict[str, Tensor]:
        """Whole state by flat name, the same for every world size. Every rank must call it."""
        state = {f"muon.{bank.name}": bank.gather_momentum() for bank in self.banks}
        for name, p in self.adam_named.items():
            for key, value in self.adamw.state.get(p, {}).items():
                state[f"adamw.{name}.{key}"] = value
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict`'s result, at any world size."""
        for bank in self.banks:
            bank.load_momentum(state[f"muon.{bank.name}"])
        for name, p in self.adam_named.items():
            prefix = f"adamw.{name}."
            found = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            if found:
                # `step` stays where AdamW keeps it: on the host, or with fused on the device.
                self.adamw.state[p] = {
                    key: value.to(p.device) if key != "step" or p.is_cuda else value.clone()
                    for key, value in found.items()
                }

"""Averages of the weights over training: EMA at every step, SWA over late snapshots."""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from trainer.config import TrainConfig
from trainer.errors import RunError


class Averages:
    """Float32 averages of a model's parameters; only those that are selected are kept.

    EMA: a <- decay a + (1 - decay) w, started at the initial weights. SWA: the plain mean of all
    snapshots (Izmailov et al. 2018). `both` is the mean of the two.
    """

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        self.config = config
        self.parameters = dict(model.named_parameters())
        copies = [p.detach().clone() for p in self.parameters.values()]
        self.ema = copies if config.average in ("ema", "both") else []
        keep_swa = config.average in ("swa", "both")
        self.swa = [torch.zeros_like(c) for c in copies] if keep_swa else []
        self.snapshots = 0

    def _weights(self) -> list[Tensor]:
        return [p.detach() for p in self.parameters.values()]

    def update_ema(self, decay: float) -> None:
        """Take in the weights after a step."""
        if self.ema:
            get_ema_multi_avg_fn(decay)(self.ema, self._weights(), 0)

    def take_snapshot(self) -> None:
        """Take the present weights into the SWA mean."""
        if self.swa:
            get_swa_multi_avg_fn()(self.swa, self._weights(), self.snapshots)
            self.snapshots += 1

    @torch.no_grad()
    def apply(self) -> None:
        """Replace the model's weights by the selected average.

        Raises:
            RunError: SWA is selected and no snapshot was taken.
        """
        if self.swa and self.snapshots == 0:
            raise RunError(
                f"average {self.config.average} needs SWA snapshots, and none was taken: the "
                f"learning-rate scale never was under {self.config.swa_below} at a snapshot step. "
                "Train longer, raise --train.swa-below, or use --train.average ema."
            )
        if self.ema and self.swa:
            chosen = [(a + b) / 2 for a, b in zip(self.ema, self.swa, strict=True)]
        else:
            chosen = self.ema or self.swa
        for p, average in zip(self.parameters.values(), chosen, strict=True):
            p.copy_(average)

    def state_dict(self) -> dict[str, Tensor]:
        """Averages by name, and the number of snapshots."""
        state = {"snapshots": torch.tensor(self.snapshots)}
        for kind, tensors in (("ema", self.ema), ("swa", self.swa)):
            if tensors:
                names = (f"{kind}.{name}" for name in self.parameters)
                state.update(zip(names, tensors, strict=True))
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict`'s result. Raises RunError when it is of another selection."""
        mine = self.state_dict()
        if mine.keys() != state.keys():
            raise RunError(
                "the checkpoint's weight averages do not fit --train.average "
                f"{self.config.average}; resume with the settings the run was started with"
            )
        self.snapshots = int(state["snapshots"])
        for name, tensor in mine.items():
            if name != "snapshots":
                tensor.copy_(state[name])

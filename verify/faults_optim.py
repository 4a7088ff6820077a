"""Faults in optimizer, schedule, averages, late QAT and ranks."""

from verify.fault import Fault

_OPTIM = ("verify/test_optim.py",)
_PARALLEL = ("verify/test_parallel.py::test_any_world_size_gives_the_single_rank_weights",)

FAULTS = [
    Fault(
        "trainer/muon.py",
        "a wrong Newton-Schulz coefficient",
        "(3.4445, -4.7750, 2.0315)",
        "(3.4445, -4.7750, 2.1315)",
        _OPTIM,
    ),
    Fault(
        "trainer/muon.py",
        "tall gradients not transposed back",
        "    for _ in range(steps):\n        x = _quintic(x, x @ x.mT, *NEWTON_SCHULZ)\n"
        "    return x.mT if transposed else x",
        "    for _ in range(steps):\n        x = _quintic(x, x @ x.mT, *NEWTON_SCHULZ)\n"
        "    return x.mT.reshape(g_NRC.shape) if not transposed else x.reshape(g_NRC.shape)",
        _OPTIM,
    ),
    Fault(
        "trainer/muon.py",
        "Turbo-Muon scales rows by the radius, not its root",
        ".clamp_min(EPS**2).rsqrt()",
        ".clamp_min(EPS**2).reciprocal()",
        _OPTIM,
    ),
    Fault(
        "kernels/reference.py",
        "plain momentum instead of Nesterov",
        "return grad.add_(momentum_NRC, alpha=coefficient).to(dtype)",
        "return momentum_NRC.clone().to(dtype)",
        _OPTIM,
    ),
    Fault(
        "kernels/muon_triton.py",
        "old momentum in the direction",
        "tl.store(out + at, (g + coefficient * m)",
        "tl.store(out + at, (g + coefficient * g)",
        ("verify/test_optim.py", "-k", "fused_muon"),
    ),
    Fault(
        "kernels/muon_triton.py",
        "strides of the update ignored",
        "r * update_row + c * update_column",
        "r * C + c",
        ("verify/test_optim.py", "-k", "fused_muon"),
    ),
    Fault(
        "trainer/parallel.py",
        "update not scaled by the shape",
        "self.scale = math.sqrt(max(1.0, rows / columns))",
        "self.scale = 1.0",
        _OPTIM,
    ),
    Fault(
        "trainer/parallel.py",
        "weight decay left out of Muon",
        "self.parameter, update, 1 - lr * weight_decay,",
        "self.parameter, update, 1 - lr * 0 * weight_decay,",
        _OPTIM,
    ),
    Fault(
        "trainer/parallel.py",
        "gradients summed over ranks instead of averaged",
        "padded[: len(grad)] = grad / self.communicator.world_size",
        "padded[: len(grad)] = grad",
        _PARALLEL,
    ),
    Fault(
        "trainer/parallel.py",
        "each rank clips by its own norm",
        "            dist.all_reduce(squares)\n",
        "            squares = squares * 1.0\n",
        _PARALLEL,
    ),
    Fault(
        "trainer/parallel.py",
        "small gradients not averaged",
        "        flat /= self.world_size\n",
        "",
        _PARALLEL,
    ),
    Fault(
        "trainer/parallel.py",
        "momentum of another rank's shard loaded",
        "mine = whole_NRC[self.first : self.first + self.shard_size]",
        "mine = whole_NRC[: self.shard_size]",
        ("verify/test_parallel.py", "-k", "moves_between or any_world"),
    ),
    Fault(
        "trainer/optim.py",
        "banks not clipped",
        "bank.start_update(clip, momentum, self.config)",
        "bank.start_update(torch.ones_like(clip), momentum, self.config)",
        _OPTIM,
    ),
    Fault(
        "trainer/optim.py",
        "learning-rate scale ignored by AdamW",
        'group["lr"] = rate * lr_scale',
        'group["lr"] = rate',
        _OPTIM,
    ),
    Fault(
        "trainer/optim.py",
        "token embedding at the small learning rate",
        'EMBEDDINGS = ("tok_emb.weight", ',
        'EMBEDDINGS = ("tok_emb.bias", ',
        _OPTIM,
    ),
    Fault(
        "trainer/schedule.py",
        "warmdown ignores the floor",
        "return self.train.lr_floor + (1 - self.train.lr_floor) * left",
        "return left",
        _OPTIM,
    ),
    Fault(
        "trainer/schedule.py",
        "step counts not scaled in short runs",
        "return min(1.0, self.expected_steps / RECORD_STEPS)",
        "return 1.0",
        _OPTIM,
    ),
    Fault(
        "trainer/schedule.py",
        "clock counts time gone instead of time left",
        "max(0.0, limits.max_seconds - elapsed_s) * step / elapsed_s",
        "max(0.0, limits.max_seconds) * step / elapsed_s",
        _OPTIM,
    ),
    Fault(
        "trainer/schedule.py",
        "momentum warm-up reversed",
        "return start + (end - start) * share",
        "return end + (start - end) * share",
        _OPTIM,
    ),
    Fault(
        "trainer/average.py",
        "EMA with the complementary decay",
        "get_ema_multi_avg_fn(decay)",
        "get_ema_multi_avg_fn(1 - decay)",
        _OPTIM,
    ),
    Fault(
        "trainer/average.py",
        "SWA counts a snapshot too many",
        "(self.swa, self._weights(), self.snapshots)",
        "(self.swa, self._weights(), self.snapshots + 1)",
        _OPTIM,
    ),
    Fault(
        "trainer/qat.py",
        "one scale for the whole matrix",
        "amax(dim=-1, keepdim=True)",
        "amax(dim=(-2, -1), keepdim=True)",
        _OPTIM,
    ),
    Fault(
        "trainer/qat.py",
        "gradient blocked by the rounding",
        "return rounded + (w - w.detach())",
        "return rounded + 0 * w",
        _OPTIM,
    ),
    Fault(
        "trainer/qat.py",
        "grid one step too wide",
        "top = 2 ** (bits - 1) - 1",
        "top = 2 ** (bits - 1)",
        _OPTIM,
    ),
]

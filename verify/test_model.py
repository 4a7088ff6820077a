"""Claims about the model: it computes the record's formulas, and nothing sees the future."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from kernels import reference
from trainer import layers
from trainer.config import ModelConfig
from trainer.errors import ConfigError
from trainer.model import GPT
from verify import oracle_model
from verify.models import TINY, random_model
from verify.tolerance import check, relative_error, rounding_budget

FLOAT = torch.float32
CHAIN = TINY.layers * (4 * TINY.width + TINY.mlp_width + TINY.seq_len + TINY.head_size)
"""Roundings along the longest chain of dot products through TINY."""

token_lists = st.lists(st.integers(0, TINY.vocab_size - 1), min_size=1, max_size=TINY.seq_len)


def _logits(model: GPT, ids: list[int]) -> torch.Tensor:
    return model.logits(model.hidden(torch.tensor([ids])))[0]


def test_record_parameter_count() -> None:
    """The record's model has exactly 29,951,068 parameters."""
    with torch.device("meta"):
        model = GPT(ModelConfig())
    assert sum(p.numel() for p in model.parameters()) == 29_951_068


def test_state_dict_names_load_published_checkpoints() -> None:
    """The state dict has the published names and shapes, and nothing else."""
    with torch.device("meta"):
        state = GPT(ModelConfig()).state_dict()
    expected = {
        "tok_emb.weight": (1024, 512),
        "bigram.embed.weight": (3072, 112),
        "bigram.proj.weight": (512, 112),
        "bigram.scale": (),
        "smear.gate": (512,),
        "skip_weights": (5, 512),
        "qo_bank": (22, 512, 512),
        "kv_bank": (22, 256, 512),
        "mlp_up_bank": (11, 1792, 512),
        "mlp_down_bank": (11, 512, 1792),
        "ve_shared.embed.weight": (1024, 128),
        "ve_shared.proj.weight": (256, 128),
        "ve_shared.scale": (),
        "ve_layer_scales.0": (1,),
        "ve_layer_scales.1": (1,),
    }
    for n in range(11):
        expected[f"blocks.{n}.attn.q_gain"] = (8,)
        expected[f"blocks.{n}.attn_scale"] = (512,)
        expected[f"blocks.{n}.mlp_scale"] = (512,)
        expected[f"blocks.{n}.resid_mix"] = (2, 512)
    assert {name: tuple(t.shape) for name, t in state.items()} == expected


@given(ids=token_lists, seed=st.integers(0, 5))
def test_forward_equals_the_numpy_oracle(ids: list[int], seed: int) -> None:
    """The forward pass equals an independent float64 program written from the formulas."""
    model = random_model(seed=seed)
    weights = {name: t.double().numpy() for name, t in model.state_dict().items()}
    expected = torch.from_numpy(oracle_model.logits(ids, weights, TINY))
    error = relative_error(_logits(model, ids), expected)
    check("logits against the numpy oracle", error, rounding_budget(CHAIN, FLOAT))


def test_initial_state_matches_the_record() -> None:
    """Q, K, V, up and the projections start orthogonal; out, down and the bigram table at zero."""
    model = GPT(TINY)
    for name, matrix in model.matrices().items():
        kind = name.rsplit(".", 1)[1]
        if kind in ("out", "down"):
            assert not matrix.any(), name
            continue
        small = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        error = relative_error(small @ small.T, torch.eye(small.shape[0]))
        check(f"{kind} orthogonality", error, rounding_budget(8 * TINY.mlp_width, FLOAT))
    assert not model.bigram.embed.weight.any()
    assert not model.smear.gate.any()
    for projection in (model.bigram.proj.weight, model.ve_shared.proj.weight):
        small = projection if projection.shape[0] <= projection.shape[1] else projection.T
        error = relative_error(small @ small.T, torch.eye(small.shape[0]))
        check("projection orthogonality", error, rounding_budget(8 * TINY.mlp_width, FLOAT))
    assert model.bigram.scale.item() == pytest.approx(0.05)
    assert model.ve_shared.scale.item() == pytest.approx(0.1)
    for block in map(model.block, range(TINY.layers)):
        assert torch.equal(block.attn.q_gain, torch.full_like(block.attn.q_gain, 1.5))
        assert (block.resid_mix[0] == 1).all()
        assert (block.resid_mix[1] == 0).all()


def test_initial_embedding_spreads() -> None:
    """Initial tables have the record's standard deviations, 0.005 and 0.01."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(layers=2, value_embed_layers=(0,)))
    for table, std in ((model.tok_emb.weight, 0.005), (model.ve_shared.embed.weight, 0.01)):
        # Five standard errors of a standard deviation: std / sqrt(2 n).
        error = abs(table.std().item() - std) / std
        check("standard deviation", error, 5 / math.sqrt(2 * table.numel()))


@given(ids=token_lists, data=st.data())
def test_later_tokens_never_move_earlier_logits(ids: list[int], data: st.DataObject) -> None:
    """Changing any later tokens leaves every earlier logit the same to the bit."""
    t = data.draw(st.integers(0, len(ids) - 1))
    tail = st.lists(
        st.integers(0, TINY.vocab_size - 1), min_size=len(ids) - 1 - t, max_size=len(ids) - 1 - t
    )
    other = ids[: t + 1] + data.draw(tail)
    model = random_model()
    assert torch.equal(_logits(model, ids)[: t + 1], _logits(model, other)[: t + 1])


@given(ids=token_lists, data=st.data())
def test_cached_generation_equals_full_forward(ids: list[int], data: st.DataObject) -> None:
    """Hidden states through the KV cache, in chunks of any size, equal the full forward's."""
    model = random_model()
    full = model.hidden(torch.tensor([ids, ids[::-1]]))
    cache = model.new_cache(2, TINY.seq_len)
    batch = torch.tensor([ids, ids[::-1]])
    pieces, at = [], 0
    while at < len(ids):
        size = data.draw(st.integers(1, len(ids) - at))
        pieces.append(model.hidden(batch[:, at : at + size], cache=cache))
        at += size
    error = relative_error(torch.cat(pieces, dim=1), full)
    check("cached against full hidden state", error, rounding_budget(CHAIN, FLOAT))
    assert cache.position.item() == len(ids)


@given(seed=st.integers(0, 99), last=st.integers(1, TINY.seq_len))
def test_the_last_states_alone_equal_those_of_the_whole_window(seed: int, last: int) -> None:
    """Asked for the last states only, the forward pass gives those of the whole window."""
    generator = torch.Generator().manual_seed(seed)
    model, ids = random_model(), torch.randint(0, 64, (2, TINY.seq_len), generator=generator)
    tail, whole = model.hidden(ids, last=last), model.hidden(ids)
    assert tail.shape == (2, last, TINY.width)
    error = relative_error(tail, whole[:, -last:])
    check("last states", error, rounding_budget(CHAIN, FLOAT))


def test_last_states_are_not_for_cached_generation() -> None:
    """A cache together with `last` is refused."""
    model = random_model()
    with pytest.raises(ValueError, match="leave out `cache`"):
        model.hidden(torch.zeros(1, 2).long(), cache=model.new_cache(1, 8), last=1)


def test_cache_reset_forgets_everything() -> None:
    """A reset cache gives the same hidden states as a new one."""
    model = random_model()
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    cache = model.new_cache(1, 8)
    first = model.hidden(ids, cache=cache)
    cache.reset()
    assert torch.equal(model.hidden(ids, cache=cache), first)


@given(
    ids=st.lists(st.integers(0, 65_535), min_size=1, max_size=40),
    buckets=st.integers(2, 5000),
    split=st.integers(0, 40),
)
def test_bigram_hash_equals_big_integers(ids: list[int], buckets: int, split: int) -> None:
    """Bigram buckets equal those of unbounded Python integers wrapped to 32 bits."""
    expected = [oracle_model.bigram_bucket(ids, t, buckets) for t in range(len(ids))]
    at = min(split, len(ids) - 1)
    before = torch.tensor([[ids[at - 1] if at else 0]])
    positions = torch.arange(at, len(ids))
    actual = layers.bigram_buckets(torch.tensor([ids[at:]]), before, positions, buckets)
    assert actual[0].tolist() == expected[at:]


@given(seed=st.integers(0, 1000), shift=st.integers(0, 8))
def test_rotary_keeps_norms_and_sees_relative_positions(seed: int, shift: int) -> None:
    """Rotary keeps norms and the dims past the first R; scores depend on distance alone."""
    generator = torch.Generator().manual_seed(seed)
    cos, sin = layers.rotary_tables(TINY)
    x = torch.randn(1, TINY.seq_len, 2, 12, generator=generator)
    turned = reference.rotate(x, cos, sin)
    assert torch.equal(turned[..., TINY.rotary_dims :], x[..., TINY.rotary_dims :])
    error = relative_error(turned.norm(dim=-1), x.norm(dim=-1))
    check("norm after rotation", error, rounding_budget(16, FLOAT))
    same = x[:, :1].expand(-1, TINY.seq_len, -1, -1)
    key = x[:, 1:2].expand(-1, TINY.seq_len, -1, -1)
    q, k = reference.rotate(same, cos, sin), reference.rotate(key, cos, sin)
    scores = torch.einsum("bthk,bshk->bhts", q, k)
    span = TINY.seq_len - shift
    moved = scores[..., shift:, shift:]
    error = relative_error(moved, scores[..., :span, :span])
    # Angles come rounded to float32, so a score is uncertain by |q||k| whatever its own size.
    scale = (q.norm(dim=-1).max() * k.norm(dim=-1).max()).item()
    typical = scores.abs().pow(2).mean().sqrt().item()
    check("score after a shift", error * typical / scale, rounding_budget(32, FLOAT))


def test_rotary_base_is_stretched_for_the_record() -> None:
    """At 2048 positions the base is 10000 * 2^(16/14), and angles follow it."""
    cos, sin = layers.rotary_tables(ModelConfig())
    base = 10_000 * 2 ** (16 / 14)
    for position in (0, 1, 1023, 2047):
        for j in range(8):
            angle = position / base ** (2 * j / 16)
            assert cos[position, j].item() == np.float32(math.cos(angle))
            assert sin[position, j].item() == np.float32(math.sin(angle))


@given(seed=st.integers(0, 1000), groups=st.sampled_from([1, 2, 4]), length=st.integers(1, 17))
def test_grouped_queries_equal_explicit_repetition(seed: int, groups: int, length: int) -> None:
    """Grouped-query attention equals ordinary attention with each key and value head repeated."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, length, 4, 8, generator=generator)
    k, v = torch.randn(2, 2, length, groups, 8, generator=generator)
    actual = layers.causal_attention(q, k, v, "sdpa")
    k_all, v_all = (x[:, :, [h * groups // 4 for h in range(4)]].double() for x in (k, v))
    scores = torch.einsum("bthk,bshk->bhts", q.double(), k_all) / math.sqrt(8)
    future = torch.ones(length, length).triu(1).bool()
    weights = scores.masked_fill(future, -math.inf).softmax(-1)
    expected = torch.einsum("bhts,bshk->bthk", weights, v_all)
    error = relative_error(actual, expected)
    check("grouped-query attention", error, rounding_budget(8 + 2 * length, FLOAT))


@given(seed=st.integers(0, 1000), magnitude=st.sampled_from([1e-3, 1.0, 1e3]))
def test_xsa_output_is_orthogonal_to_own_value(seed: int, magnitude: float) -> None:
    """XSA removes exactly the component along the position's own value vector of the group."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(2, 5, 4, 8, generator=generator)
    v = magnitude * torch.randn(2, 5, 2, 8, generator=generator)
    rest = reference.exclude_self(y, v)
    own = v[:, :, [0, 0, 1, 1]].double()
    unit = own / own.norm(dim=-1, keepdim=True)
    leak = (rest.double() * unit).sum(-1).norm() / y.norm()
    check("component along own value", leak.item(), rounding_budget(32, FLOAT))
    removed = y.double() - rest.double()
    across = removed - (removed * unit).sum(-1, keepdim=True) * unit
    check("removed across own value", (across.norm() / y.norm()).item(), rounding_budget(32, FLOAT))


@given(seed=st.integers(0, 1000), gate=st.floats(-20, 20))
def test_smear_gate_mixes_with_the_previous_position(seed: int, gate: float) -> None:
    """SmearGate gives (1-g) x_t + g x_{t-1}, with zero before the first position."""
    x = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(seed))
    smear = layers.SmearGate(4)
    with torch.no_grad():
        smear.gate.fill_(gate)
        actual = smear(x, torch.zeros(1, 1, 4))
    g = 1 / (1 + math.exp(-gate))
    for t in range(6):
        before = x[0, t - 1].double() if t else torch.zeros(4).double()
        expected = (1 - g) * x[0, t].double() + g * before
        # 1-g cancels for large gates: the absolute error stays below a few roundings of |x|.
        error = (actual[0, t].double() - expected).norm() / x.double().norm()
        check("smeared position", error.item(), rounding_budget(8, FLOAT))


@given(seed=st.integers(0, 1000), magnitude=st.sampled_from([0.1, 10.0, 1e4]))
def test_softcap_bounds_and_formula(seed: int, magnitude: float) -> None:
    """Logits equal 30 tanh(raw / 30) and never pass the cap."""
    model = random_model()
    hidden = magnitude * torch.randn(
        1, 3, TINY.width, generator=torch.Generator().manual_seed(seed)
    )
    logits = model.logits(hidden)
    assert logits.dtype == torch.float32
    assert logits.abs().max() <= TINY.logit_softcap
    head = model.tok_emb.weight.double()
    raw, capped = hidden.double() @ head.T, lambda z: 30 * torch.tanh(z / 30)
    # The product's error grows with its terms, which may cancel; the cap squeezes it.
    off = rounding_budget(TINY.width, FLOAT) * (hidden.double().abs() @ head.abs().T)
    squeezed = (capped(raw + off) - capped(raw - off)).norm() / capped(raw).norm()
    error = relative_error(logits, capped(raw))
    check("softcapped logits", error, squeezed.item() + rounding_budget(8, FLOAT))


def test_loss_is_mean_cross_entropy() -> None:
    """The loss equals the mean over targets of -log softmax, computed target by target."""
    model = random_model()
    x, y = torch.randint(0, 64, (2, 2, 9))
    total = 0.0
    for b in range(2):
        logits = _logits(model, x[b].tolist()).double()
        for t in range(9):
            total -= (logits[t, y[b, t]] - logits[t].logsumexp(0)).item()
    error = abs(model.loss(x, y).item() - total / 18) / (total / 18)
    check("mean cross-entropy", error, rounding_budget(64 + 18, FLOAT))


def test_initial_loss_is_near_uniform() -> None:
    """A fresh model predicts nearly uniformly: its loss is log V to within its small logits."""
    model = GPT(TINY)
    x, y = torch.randint(0, 64, (2, 4, 24))
    logits = model.logits(model.hidden(x))
    spread = (logits.max() - logits.min()).item()
    check("loss minus log V", abs(model.loss(x, y).item() - math.log(64)), spread)


def test_observer_sees_every_matrix_once() -> None:
    """An observer gets the true input of each of the 6 L matrices, each exactly once."""
    model = random_model()
    seen: dict[str, torch.Tensor] = {}

    def observe(names: tuple[str, ...], x: torch.Tensor) -> None:
        for name in names:
            assert name not in seen
            seen[name] = x

    model.hidden(torch.randint(0, 64, (2, 7)), observe=observe)
    matrices = model.matrices()
    assert seen.keys() == matrices.keys()
    for name, x in seen.items():
        assert x.shape == (2, 7, matrices[name].shape[1])
    pre = F.linear(seen["blocks.2.up"], matrices["blocks.2.up"])
    error = relative_error(seen["blocks.2.down"], F.leaky_relu(pre, 0.5) ** 2)
    check("input of the down matrix", error, rounding_budget(TINY.width + 4, FLOAT))


def test_matrices_are_views_of_the_banks() -> None:
    """Writing to a named matrix changes the weight that the forward pass uses."""
    model = random_model()
    ids = [1, 2, 3, 4]
    for name, matrix in model.matrices().items():
        before = _logits(model, ids)
        kept = matrix.clone()
        matrix.mul_(1.5)
        moved = not torch.equal(_logits(model, ids), before)
        matrix.copy_(kept)
        # Scaling q or k is undone by their normalisation.
        assert moved or name.endswith((".q", ".k")), name


@pytest.mark.parametrize(
    "settings",
    [
        {"query_heads": 3},
        {"kv_heads": 3},
        {"width": 36, "query_heads": 4, "kv_heads": 2},
        {"rotary_dims": 5},
        {"rotary_dims": 128},
        {"value_embed_layers": (11,)},
    ],
)
def test_impossible_shapes_are_refused(settings: dict[str, object]) -> None:
    """A model shape that cannot work is refused with a reason, before anything is built."""
    with pytest.raises(ConfigError):
        ModelConfig(**settings)  # pyright: ignore[reportArgumentType]

"""GPT: tokens -> hidden -> logits. The one forward pass of the project.

Training loss, Hessian collection, evaluation, generation and SLOT all call `hidden` and `logits`.

Letters: B batch, T positions, V vocabulary, D width, L layers, H query heads, G key/value heads,
K head size, F MLP width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import heads_flash4, passes, reference
from kernels.mlp import mlp
from kernels.reference import rms_norm
from trainer import layers
from trainer.config import AttentionBackend, MlpBackend, ModelConfig, PassesBackend
from trainer.layers import ProjectedEmbedding, SmearGate
from trainer.qat import fake_quantize_rows
from trainer.states import CastWeights, KVCache, Stream

Observer = Callable[[tuple[str, ...], Tensor], None]
"""Called with the names of the matrices an input feeds, and that input [B, T, columns]."""


class Attention(nn.Module):
    """Holds the query gains; the matrices live in the banks."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.q_gain = nn.Parameter(torch.full((config.query_heads,), config.q_gain))


class Block(nn.Module):
    """Scalars of one block; the matrices live in the banks."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attn = Attention(config)
        self.attn_scale = nn.Parameter(torch.ones(config.width))
        self.mlp_scale = nn.Parameter(torch.ones(config.width))
        mix = torch.stack((torch.ones(config.width), torch.zeros(config.width)))
        self.resid_mix = nn.Parameter(mix)


class GPT(nn.Module):
    """The record's GPT. Parameters are float32 masters; products run in `compute_dtype`.

    Args:
        config: shape of the model.
        compute_dtype: torch.bfloat16 or torch.float32.
        mlp: implementation of the fused MLP, by name.
        attention: implementation of attention, by name.
        passes: implementation of what lies between the products, by name; `epilogue` lives in the
            products of MLP `cutlass`.

    Raises:
        ValueError: `epilogue` with another MLP.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        config: ModelConfig,
        *,
        compute_dtype: torch.dtype = torch.float32,
        mlp: MlpBackend = "reference",
        attention: AttentionBackend = "sdpa",
        passes: PassesBackend = "reference",
    ) -> None:
        super().__init__()
        if passes == "epilogue" and mlp != "cutlass":
            raise ValueError(f"passes 'epilogue' need mlp 'cutlass', not {mlp!r}")
        self.config, self.compute_dtype = config, compute_dtype
        self.mlp_backend: MlpBackend = mlp
        self.attention_backend: AttentionBackend = attention
        self.passes_backend: PassesBackend = passes
        self.late_qat = "off"
        L, D, F_ = config.layers, config.width, config.mlp_width
        self.tok_emb = nn.Embedding(config.vocab_size, D)
        self.bigram = ProjectedEmbedding(
            config.bigram_buckets, config.bigram_dim, D, config.bigram_scale
        )
        self.smear = SmearGate(D)
        self.encoder_layers = L // 2
        self.skip_weights = nn.Parameter(torch.ones(self.encoder_layers, D))
        self.qo_bank = nn.Parameter(torch.zeros(2 * L, D, D))
        self.kv_bank = nn.Parameter(torch.zeros(2 * L, config.kv_width, D))
        self.mlp_up_bank = nn.Parameter(torch.zeros(L, F_, D))
        self.mlp_down_bank = nn.Parameter(torch.zeros(L, D, F_))
        self.blocks = nn.ModuleList(Block(config) for _ in range(L))
        self.ve_shared = ProjectedEmbedding(
            config.vocab_size, config.value_embed_dim, config.kv_width, config.value_embed_scale
        )
        self.ve_layer_scales = nn.ParameterList(
            nn.Parameter(torch.ones(1)) for _ in config.value_embed_layers
        )
        self._initialise()
        cos, sin = layers.rotary_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @torch.no_grad()
    def _initialise(self) -> None:
        """Orthogonal Q, K, V and up; out and down stay zero, so every block starts as identity."""
        nn.init.normal_(self.tok_emb.weight, std=self.config.embed_std)
        nn.init.zeros_(self.bigram.embed.weight)
        nn.init.normal_(self.ve_shared.embed.weight, std=self.config.value_embed_std)
        for name, matrix in self.matrices().items():
            if name.rsplit(".", 1)[1] in ("q", "k", "v", "up"):
                nn.init.orthogonal_(matrix)

    def block(self, i: int) -> Block:
        """The scalars of block `i`."""
        block = self.blocks[i]
        assert isinstance(block, Block)
        return block

    def matrices(self) -> dict[str, Tensor]:
        """The quantized matrices as views [rows, columns] of their banks, by name.

        Names are `blocks.{i}.{q|k|v|out|up|down}`; 66 of them at the record's settings.
        """
        L = self.config.layers
        views: dict[str, Tensor] = {}
        for i in range(L):
            views[f"blocks.{i}.q"] = self.qo_bank.detach()[i]
            views[f"blocks.{i}.k"] = self.kv_bank.detach()[i]
            views[f"blocks.{i}.v"] = self.kv_bank.detach()[L + i]
            views[f"blocks.{i}.out"] = self.qo_bank.detach()[L + i]
            views[f"blocks.{i}.up"] = self.mlp_up_bank.detach()[i]
            views[f"blocks.{i}.down"] = self.mlp_down_bank.detach()[i]
        return views

    def new_cache(self, batch: int, length: int) -> KVCache:
        """Empty cache for `batch` sequences of at most `length` <= seq_len tokens."""
        c = self.config
        if not 1 <= length <= c.seq_len:
            raise ValueError(f"cache length {length} is outside 1..{c.seq_len} (seq_len)")
        device = self.qo_bank.device
        shape = (c.layers, batch, length, c.kv_heads, c.head_size)
        return KVCache(
            k_LBTGK=torch.zeros(shape, dtype=self.compute_dtype, device=device),
            v_LBTGK=torch.zeros(shape, dtype=self.compute_dtype, device=device),
            position=torch.zeros((), dtype=torch.int64, device=device),
            last_ids_B1=torch.zeros(batch, 1, dtype=torch.int64, device=device),
            last_x_B1D=torch.zeros(batch, 1, c.width, dtype=self.compute_dtype, device=device),
            span=length,
        )

    def hidden(
        self,
        ids_BT: Tensor,
        *,
        cache: KVCache | None = None,
        observe: Observer | None = None,
        last: int | None = None,
        weights: CastWeights | None = None,
    ) -> Tensor:
        """Last hidden state after the final RMSNorm, [B, T, D] in the compute dtype.

        Args:
            ids_BT: int64 token ids, T <= seq_len.
            cache: continue the cached sequences; the cache is advanced in place.
            observe: called with every input of a quantized matrix.
            last: only the states of this many last positions are wanted, [B, last, D]; the last
                layer is spared the rest. Not together with `cache`.
            weights: `cast_weights`' result, when weights that stay as they are serve many calls.
        """
        if cache is not None and last is not None:
            raise ValueError("`last` picks positions of a whole window: leave out `cache`")
        weights = weights or self.cast_weights()
        positions_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        if cache is not None:
            positions_T = positions_T + cache.position
        x0 = self._embed(ids_BT, positions_T, cache, weights)
        if not torch.is_grad_enabled():
            # Where nothing is kept for a backward pass, Inductor would compute x0 anew for every
            # kernel that takes it as rows; this view of itself makes it a tensor in memory.
            x0 = x0.as_strided(x0.shape, x0.stride())
        value_embeds = self._value_embeds(ids_BT, weights)
        rotary = (self.cos[positions_T], self.sin[positions_T])
        stream, done = Stream(x0), self._joined(cache, observe, last)
        if done:
            from trainer import joined_blocks  # here: they need Triton, a CPU does not

            stream = joined_blocks.run(self, done, x0, weights, rotary, value_embeds)
        for i in range(done, self.config.layers):
            wanted = last if i == self.config.layers - 1 else None
            stream = self._block(
                i, stream, x0, weights, rotary, positions_T, value_embeds.get(i), cache, observe,
                wanted,
            )  # fmt: skip
        if cache is not None:
            cache.position.add_(ids_BT.shape[1])
        return self._leave(stream)

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Softcapped next-token logits, float32 [..., V], from hidden states [..., D]."""
        raw = F.linear(hidden_BTD, self.tok_emb.weight.to(hidden_BTD.dtype)).float()
        cap = self.config.logit_softcap
        return cap * torch.tanh(raw / cap)

    def loss(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean cross-entropy in nats per token, scalar float32."""
        logits = self.logits(self.hidden(ids_BT))
        return F.cross_entropy(logits.flatten(0, 1), targets_BT.flatten())

    def cast_weights(self) -> CastWeights:
        """Banks and small projections in the compute dtype, rounded to int6 in late QAT."""
        banks = [self.qo_bank, self.kv_bank, self.mlp_up_bank, self.mlp_down_bank]
        linears = [self.bigram.proj.weight, self.ve_shared.proj.weight]
        if self.late_qat == "banks":
            banks = [fake_quantize_rows(bank) for bank in banks]
        if self.late_qat in ("banks", "linears"):
            linears = [fake_quantize_rows(linear) for linear in linears]
        qo, kv, up, down = banks
        (q, out), (k, v) = qo.chunk(2), kv.chunk(2)
        blocks = [self.block(i) for i in range(self.config.layers)]
        out = torch.stack([b.attn_scale for b in blocks]).unsqueeze(-1) * out
        down = torch.stack([b.mlp_scale for b in blocks]).unsqueeze(-1) * down
        matrices = (torch.cat((q, k, v), dim=1), out, up, down, *linears)
        return CastWeights(*(w.to(self.compute_dtype) for w in matrices))

    def _embed(
        self, ids_BT: Tensor, positions_T: Tensor, cache: KVCache | None, weights: CastWeights
    ) -> Tensor:
        """Token plus bigram embedding, normalised and smeared: the x0 of every block."""
        if cache is None:
            before_ids = torch.zeros_like(ids_BT[:, :1])
        else:
            before_ids = cache.last_ids_B1.clone()
            cache.last_ids_B1.copy_(ids_BT[:, -1:])
        buckets = layers.bigram_buckets(ids_BT, before_ids, positions_T, self.config.bigram_buckets)
        bigram = self.bigram(buckets, weights.bigram_proj, self.compute_dtype)
        x = rms_norm(self.tok_emb(ids_BT).to(self.compute_dtype) + bigram)
        if cache is None:
            before_x = torch.zeros_like(x[:, :1])
        else:
            before_x = cache.last_x_B1D.clone()
            cache.last_x_B1D.copy_(x[:, -1:])
        return self.smear(x, before_x)

    def _value_embeds(self, ids_BT: Tensor, weights: CastWeights) -> dict[int, Tensor]:
        """Value embedding [B, T, G*K] of every layer that has one."""
        if not self.config.value_embed_layers:
            return {}
        shared = self.ve_shared(ids_BT, weights.ve_proj, self.compute_dtype)
        scales = zip(self.config.value_embed_layers, self.ve_layer_scales, strict=True)
        return {i: shared * scale.to(shared.dtype) for i, scale in scales}

    def _joined(self, cache: KVCache | None, observe: Observer | None, last: int | None) -> int:
        """How many of the first blocks are joined: with `epilogue`, all that take whole windows."""
        if self.passes_backend != "epilogue" or cache is not None or observe is not None:
            return 0
        return self.config.layers if last is None else self.config.layers - 1

    def _block(
        self,
        i: int,
        stream: Stream,
        x0: Tensor,
        weights: CastWeights,
        rotary: tuple[Tensor, Tensor],
        positions_T: Tensor,
        value_embed: Tensor | None,
        cache: KVCache | None,
        observe: Observer | None,
        last: int | None = None,
    ) -> Stream:
        """Block i: mix in x0, attend, then the MLP.

        With `last`, only that many last positions attend and pass on.
        """
        damp = layers.damp(i)
        u, normed, skips = self._enter(i, stream, x0, damp)
        attended = self._attention(
            i, normed, weights, rotary, positions_T, value_embed, cache, observe, last
        )
        if last is not None:
            u = u[:, -last:]
        normed, x = passes.add_norm(u, attended, damp, backend=self.passes_backend)
        assert x is not None
        y, post = mlp(normed, weights.up[i], weights.down[i], backend=self.mlp_backend)
        if observe is not None:
            observe((f"blocks.{i}.up",), normed)
            observe((f"blocks.{i}.down",), post)
        return Stream(x, y, skips)

    def _enter(
        self, i: int, stream: Stream, x0: Tensor, damp: float
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """The mix a block starts from, its norm, and the skips that wait for later blocks.

        What a block of the first half gives out is summed up at the entry of the next one, and is
        its skip. The innermost skip joins at once.
        """
        x, branch, skips = stream.x, stream.branch, stream.skips
        joins = i - self.encoder_layers
        if joins == 0 and i > 0:
            if branch is not None:
                x, branch = x + branch, None
            skips = (*skips, x)
        skip = skips[-1] if joins >= 0 and skips else None
        u, normed, total = passes.mix_norm(
            x,
            x0,
            self.block(i).resid_mix,
            damp,
            branch=branch,
            skip=skip,
            skip_weight_D=None if skip is None else self.skip_weights[joins],
            keep_sum=0 < i < self.encoder_layers,
            backend=self.passes_backend,
        )
        if total is not None:
            return u, normed, (*skips, total)
        return u, normed, skips if skip is None else skips[:-1]

    def _leave(self, stream: Stream) -> Tensor:
        """Final RMSNorm of the stream with the last block's branch."""
        if stream.branch is None:
            return rms_norm(stream.x)
        return passes.add_norm(
            stream.x, stream.branch, 1.0, keep_sum=False, backend=self.passes_backend
        )[0]

    def _attention(
        self,
        i: int,
        x: Tensor,
        weights: CastWeights,
        rotary: tuple[Tensor, Tensor],
        positions_T: Tensor,
        value_embed: Tensor | None,
        cache: KVCache | None,
        observe: Observer | None,
        last: int | None = None,
    ) -> Tensor:
        """Grouped-query attention with normalised q and k, partial rotary and XSA."""
        if cache is None and last is None:
            y = self._attend(i, F.linear(x, weights.qkv[i]), rotary, value_embed)
        else:
            y = self._attend_partly(
                i, x, weights.qkv[i], rotary, positions_T, value_embed, cache, last
            )
        y = y.flatten(2)
        if observe is not None:
            observe(tuple(f"blocks.{i}.{m}" for m in "qkv"), x)
            observe((f"blocks.{i}.out",), y)
        return F.linear(y, weights.out[i])

    def _attend(
        self,
        i: int,
        qkv: Tensor,
        rotary: tuple[Tensor, Tensor],
        value_embed: Tensor | None,
    ) -> Tensor:
        """Attention [B, T, H, K] between the heads of a joint projection, XSA included."""
        gain_H, kv_heads = self.block(i).attn.q_gain, self.config.kv_heads
        heads = (qkv, value_embed, gain_H, kv_heads, *rotary)
        if self.attention_backend == "flash4" and self.passes_backend != "reference":
            return heads_flash4.attend(*heads)
        return layers.attend_heads(
            *heads, attention=self.attention_backend, backend=self.passes_backend
        )

    def _attend_partly(
        self,
        i: int,
        x: Tensor,
        w_qkv: Tensor,
        rotary: tuple[Tensor, Tensor],
        positions_T: Tensor,
        value_embed: Tensor | None,
        cache: KVCache | None,
        last: int | None,
    ) -> Tensor:
        """Attention [B, T, H, K] of few queries: to a cache, or of the `last` positions alone."""
        c = self.config
        tail = slice(None) if last is None else slice(-last, None)
        q = F.linear(x[:, tail], w_qkv[: c.width]).unflatten(-1, (c.query_heads, c.head_size))
        k, v = F.linear(x, w_qkv[c.width :]).chunk(2, dim=-1)
        if value_embed is not None:
            v = v + value_embed
        k, v = (t.unflatten(-1, (c.kv_heads, c.head_size)) for t in (k, v))
        gain_H = self.block(i).attn.q_gain
        q = reference.query_heads(q, gain_H, *(table[tail] for table in rotary))
        k = reference.key_heads(k, *rotary)
        keys, values = k, v
        if cache is not None:
            cache.k_LBTGK[i].index_copy_(1, positions_T, k)
            cache.v_LBTGK[i].index_copy_(1, positions_T, v)
            keys, values = (kv[i][:, : cache.span] for kv in (cache.k_LBTGK, cache.v_LBTGK))
        y = layers.cached_attention(q, keys, values, positions_T[tail])
        return reference.exclude_self(y, v[:, tail])

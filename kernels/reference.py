"""Plain PyTorch meaning of every kernel, in any floating dtype on any device.

With pre = x @ w_up^T, the MLP's activation is LeakyReLU(0.5)(pre)^2. Kernels store

    act_grad = 2 pre   where pre > 0, else 0.5 pre     (the activation's derivative)
    post     = 0.5 * act_grad * pre                    (the activation itself, for both signs)

so the backward pass, dpre = (go @ w_down) * act_grad, needs neither `pre` nor a branch. Where no
gradient is wanted, `activation` gives post alone.

Around the products lie passes over the residual stream and over the heads; their plain meaning is
here too.

Letters: M rows (tokens), D model width, F MLP width, B windows, T positions, H query heads,
G key/value heads, K head size, R rotary dims, W joint width of all heads, P heads with a norm.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = torch.finfo(torch.float32).eps
"""Added to the mean square under every RMS norm, whatever the type of its input."""

SMALLEST_NORM = 1e-12
"""Value vectors shorter than this are divided by it instead of by their length."""


def up_activation(x_MD: Tensor, w_up_FD: Tensor) -> tuple[Tensor, Tensor]:
    """act_grad and post, both [M, F], of inputs [M, D] and weights [F, D]."""
    pre = F.linear(x_MD, w_up_FD)
    act_grad = torch.where(pre > 0, 2 * pre, 0.5 * pre)
    return act_grad, 0.5 * act_grad * pre


def activation(x_MD: Tensor, w_up_FD: Tensor) -> Tensor:
    """post [M, F] alone, of inputs [M, D] and weights [F, D].

    To the bit what `up_activation` gives: powers of two scale without rounding.
    """
    pre = F.linear(x_MD, w_up_FD)
    return torch.where(pre > 0, pre, 0.25 * pre) * pre


def dpre(go_MD: Tensor, w_down_DF: Tensor, act_grad_MF: Tensor) -> Tensor:
    """Gradient at the pre-activation, [M, F], of output gradients [M, D]."""
    return (go_MD @ w_down_DF) * act_grad_MF


def mlp(x: Tensor, w_up_FD: Tensor, w_down_DF: Tensor) -> Tensor:
    """The MLP [..., D] -> [..., D] as its formula reads, differentiated by autograd."""
    return F.linear(F.leaky_relu(F.linear(x, w_up_FD), 0.5).square(), w_down_DF)


# Products of a block whose epilogues take over passes beside them (kernels/cutlass.py). A row's
# factor stands for its norm: with scale = damp / rms(t), norm(t) damp is scale t, so t itself is
# multiplied and never the normalised rows.


def linear_add(x_MK: Tensor, w_NK: Tensor, residual_MN: Tensor) -> tuple[Tensor, Tensor]:
    """residual + x @ w^T, [M, N], and the sum of the squares of each of its rows, [M, 1]."""
    out = residual_MN + F.linear(x_MK, w_NK)
    return out, _row_sums(out.square())


def linear_mix(
    y_MK: Tensor,
    w_NK: Tensor,
    residual_MN: Tensor,
    x0_MN: Tensor,
    mix_2N: Tensor,
    skip_MN: Tensor | None,
    skip_weight_N: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The end of a block and the next one's entry.

    Args:
        y_MK, w_NK, residual_MN: those of `linear_add`.
        x0_MN, mix_2N, skip_MN, skip_weight_N: those of `mix_factor`.

    Returns:
        x = residual + y @ w^T; u = a (x + w skip) + b x0; and the sum of the squares of each row
        of u, [M, 1].
    """
    x = residual_MN + F.linear(y_MK, w_NK)
    u, _, _ = mix_norm(x, None, skip_MN, skip_weight_N, x0_MN, mix_2N, 1.0)
    return x, u, _row_sums(u.square())


def up_scaled(x_MD: Tensor, w_up_FD: Tensor, scale_M: Tensor) -> tuple[Tensor, Tensor]:
    """post and the signs pre > 0, both [M, F], of pre = scale (x @ w_up^T); scale [M] positive."""
    pre = (scale_M[:, None] * F.linear(x_MD, w_up_FD)).type_as(x_MD)
    return torch.where(pre > 0, pre, 0.25 * pre) * pre, pre > 0


def dpre_scaled(
    go_MD: Tensor, w_down_DF: Tensor, post_MF: Tensor, signs: Tensor, scale_M: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient at x @ w_up^T of `up_scaled`, [M, F], and along each row that at pre times pre.

    The derivative of post at pre is 2 sqrt(post) where pre is positive, else -sqrt(post); and
    post is homogeneous of degree two, so derivative times pre is 2 post. The sums [M, 1] divided
    by scale are scale's own gradient.
    """
    acc = go_MD @ w_down_DF
    root = post_MF.sqrt()
    act = torch.where(signs, 2 * root, -root)
    return (scale_M[:, None] * acc * act).type_as(go_MD), _row_sums(2 * acc * post_MF)


def norm_gradient(
    dpre_MF: Tensor, w_up_FD: Tensor, go_MD: Tensor, t_MD: Tensor, factor_M: Tensor
) -> Tensor:
    """go + dpre @ w_up - factor t, [M, D]: gradient at t of t + mlp(scale t).

    With scale = damp / rms(t), factor is the sums of `dpre_scaled` times (scale / damp)^2 / D.
    """
    return (go_MD + dpre_MF @ w_up_FD - factor_M[:, None] * t_MD).type_as(go_MD)


def _row_sums(terms: Tensor) -> Tensor:
    """Sums along the rows, [M, 1], in float32 or better."""
    kind = torch.promote_types(terms.dtype, torch.float32)
    return terms.sum(dim=1, keepdim=True, dtype=kind)


def rms_norm(x: Tensor) -> Tensor:
    """Divide the last dim by its root mean square; no weight (Zhang & Sennrich 2019)."""
    return F.rms_norm(x, (x.shape[-1],), eps=EPS)


def mix_norm(
    x: Tensor,
    branch: Tensor | None,
    skip: Tensor | None,
    skip_weight_D: Tensor | None,
    x0: Tensor,
    mix_2D: Tensor,
    damp: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Entry of a block: t = x + branch + w skip, u = a t + b x0, n = damp norm(u).

    Args:
        x: residual stream [..., D].
        branch: what the block before adds to it, or None.
        skip: U-Net skip, or None.
        skip_weight_D: its weight w.
        x0: the embedding.
        mix_2D: a and b, per channel.
        damp: factor on the normalised output.

    Returns:
        u, n and t, all [..., D] in the type of x.
    """
    t = x if branch is None else x + branch
    if skip is not None:
        assert skip_weight_D is not None, "a skip comes with its weight"
        t = t + skip_weight_D.to(x.dtype) * skip
    mix = mix_2D.to(x.dtype)
    u = mix[0] * t + mix[1] * x0
    return u, rms_norm(u) * damp, t


def mix_factor(
    x: Tensor,
    skip: Tensor | None,
    skip_weight_D: Tensor | None,
    x0: Tensor,
    mix_2D: Tensor,
    damp: float,
) -> tuple[Tensor, Tensor]:
    """Entry of a block with its norm as a factor of every row: n = factor u.

    Args: those of `mix_norm`, whose sum has been made before.

    Returns:
        u [..., D] and its factor damp / rms(u), [...].
    """
    u, _, _ = mix_norm(x, None, skip, skip_weight_D, x0, mix_2D, damp)
    return u, norm_factor(u.square().sum(-1), u.shape[-1], damp)


def norm_factor(squares: Tensor, width: int, damp: float) -> Tensor:
    """damp / rms of rows of `width` channels, given the sums of their squares."""
    return damp * torch.rsqrt(squares / width + EPS)


def add_norm(x: Tensor, branch: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """x + branch, and damp times its norm; both [..., D]."""
    total = x + branch
    return total, rms_norm(total) * damp


def rotate(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first R dims of every head, first half against second (RoFormer, partial).

    Args:
        x_BTHK: queries or keys.
        cos: float32 [T, R/2], cosine of every position's angles.
        sin: likewise.
    """
    half = cos.shape[-1]
    turned, kept = x_BTHK[..., : 2 * half], x_BTHK[..., 2 * half :]
    first, second = turned.float().split(half, dim=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    turned = torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)
    return torch.cat((turned.type_as(x_BTHK), kept), dim=-1)


def split_heads(
    qkv: Tensor,
    value_embed: Tensor | None,
    gain_H: Tensor,
    kv_heads: int,
    cos: Tensor,
    sin: Tensor,
    scale_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of the joint projection, ready for attention.

    q = gain rotate(norm(q)), k = rotate(norm(k)), v = v + value_embed, per head; q, k and v are
    first multiplied by the scale of their row, if there is one.

    Args:
        qkv: [B, T, (H + 2 G) K].
        value_embed: [B, T, G K], or None.
        gain_H: float32, one a query head.
        kv_heads: G.
        cos: float32 [T, R/2].
        sin: likewise.
        scale_BT: float32, the factor of an RMS norm of the projection's input, where `qkv` was
            projected from rows that still lack it. It gets no gradient: that is the norm's
            business, which made the factor.

    Returns:
        q [B, T, H, K], k and v [B, T, G, K].
    """
    if scale_BT is not None:
        qkv = (qkv * scale_BT.detach().unsqueeze(-1)).type_as(qkv)
    heads = len(gain_H)
    size = qkv.shape[-1] // (heads + 2 * kv_heads)
    q, k, v = qkv.split((heads * size, kv_heads * size, kv_heads * size), dim=-1)
    if value_embed is not None:
        v = v + value_embed
    q = query_heads(q.unflatten(-1, (heads, size)), gain_H, cos, sin)
    k = key_heads(k.unflatten(-1, (kv_heads, size)), cos, sin)
    return q, k, v.unflatten(-1, (kv_heads, size))


def query_heads(q_BTHK: Tensor, gain_H: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Normalise, turn and scale projected queries."""
    return rotate(rms_norm(q_BTHK), cos, sin) * gain_H.to(q_BTHK.dtype)[:, None]


def key_heads(k_BTGK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Normalise and turn projected keys."""
    return rotate(rms_norm(k_BTGK), cos, sin)


def project_heads(
    rows_MD: Tensor,
    w_WD: Tensor,
    factor_M: Tensor,
    value_embed_MV: Tensor | None,
    gain_H: Tensor,
    kv_heads: int,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor]:
    """The heads of `split_heads` of a projection, side by side, and the factors of their norms.

    Args:
        rows_MD: what is projected, before its own norm.
        w_WD: weights, W = (H + 2 G) K: query heads, key heads, value heads.
        factor_M: of the rows' norm, float32. It gets no gradient, as the scale of `split_heads`.
        value_embed_MV: added to the values, V = G K, or None.
        gain_H: float32, one a query head.
        kv_heads: G.
        cos: float32 [T, R/2]; row m is at position m % T.
        sin: likewise.

    Returns:
        Heads [M, W], and 1 / rms of each query and key head before its norm, [H + G, M].
    """
    normed_heads = len(gain_H) + kv_heads
    x_MW = factor_M.detach().unsqueeze(-1) * F.linear(rows_MD, w_WD)
    x = x_MW.unflatten(1, (normed_heads + kv_heads, -1))
    normed, v = x[:, :normed_heads], x[:, normed_heads:]
    inverse = torch.rsqrt(normed.square().mean(-1) + EPS)
    position = torch.arange(len(x), device=x.device) % len(cos)
    turned = rotate((inverse.unsqueeze(-1) * normed)[None], cos[position], sin[position])[0]
    gains = torch.cat((gain_H, gain_H.new_ones(kv_heads)))
    if value_embed_MV is not None:
        v = v + value_embed_MV.view_as(v)
    heads = torch.cat((gains.unsqueeze(-1) * turned, v), dim=1)
    return heads.flatten(1).type_as(rows_MD), inverse.t().contiguous()


def project_heads_backward(
    grad_MW: Tensor,
    heads_MW: Tensor,
    inverse_PM: Tensor,
    factor_M: Tensor,
    gain_H: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradient at rows @ w^T of `project_heads`, [M, W], and at the gains, [H].

    Of a head's direction n = y / gain, turned, and the gradient g at y: at the gain g . n, and
    before norm and rotary inverse rotate^T(gain (g - n (g . n) / K)). A gain of exactly 0 leaves
    no direction: n counts as 0 there, and with it the gain's gradient.

    Args:
        grad_MW: gradient at the heads.
        heads_MW, inverse_PM: `project_heads`' results.
        factor_M, gain_H, cos, sin: its arguments.
    """
    normed_heads, kv_heads = len(inverse_PM), len(inverse_PM) - len(gain_H)
    grad, y = (t.unflatten(1, (normed_heads + kv_heads, -1)) for t in (grad_MW, heads_MW))
    g, y = (t[:, :normed_heads].to(inverse_PM.dtype) for t in (grad, y))
    gains = torch.cat((gain_H, gain_H.new_ones(kv_heads))).unsqueeze(-1)
    n = torch.where(gains == 0, 0, y / gains)
    along = (g * n).sum(-1, keepdim=True)
    z = inverse_PM.t().unsqueeze(-1) * gains * (g - n * along / n.shape[-1])
    position = torch.arange(len(z), device=z.device) % len(cos)
    dx = rotate(z[None], cos[position], -sin[position])[0]  # the transpose turns back
    d_heads = torch.cat((dx, grad[:, normed_heads:].type_as(dx)), dim=1)
    d_joint = factor_M.view(-1, 1, 1) * d_heads
    return d_joint.flatten(1).type_as(grad_MW), along[:, : len(gain_H), 0].sum(0)


def exclude_self(y_BTHK: Tensor, v_BTGK: Tensor) -> Tensor:
    """XSA: take from each head's output its projection on its own position's value vector."""
    return exclude_self_parts(y_BTHK, v_BTGK)[0]


def exclude_self_parts(y_BTHK: Tensor, v_BTGK: Tensor) -> tuple[Tensor, Tensor]:
    """XSA's result and what it takes: y = rest + own v.

    Args:
        y_BTHK: attention's output.
        v_BTGK: values.

    Returns:
        rest [B, T, H, K] in the type of y, and own = (y . v) / max(|v|, SMALLEST_NORM)^2,
        [B, H, T], contiguous, in float32, or float64 where y is.
    """
    exact = torch.promote_types(y_BTHK.dtype, torch.float32)
    heads = y_BTHK.unflatten(2, (v_BTGK.shape[2], -1)).to(exact)
    v = v_BTGK.to(exact).unsqueeze(3)
    length = v.norm(dim=-1, keepdim=True).clamp_min(SMALLEST_NORM)
    direction = v / length
    along = (heads * direction).sum(-1, keepdim=True)
    rest = (heads - along * direction).flatten(2, 3).type_as(y_BTHK)
    own_BTH = (along / length).squeeze(-1).flatten(2)
    return rest, own_BTH.transpose(1, 2).contiguous()


def exclude_self_gradient(
    go_MD: Tensor,
    w_DN: Tensor,
    rest_MN: Tensor,
    own_BHL: Tensor,
    heads_MW: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `exclude_self` where a projection reads its result.

    With g = go @ w at one head's result, v its value and c = (g . v) / |v|^2: at attention's output
    y, dy = g - c v; at v, -(own dy + c rest), summed over the heads of a group. A v shorter than
    SMALLEST_NORM is divided by a constant: at it, -(own dy + c rest + 2 c own v).

    Args:
        go_MD: gradient at the projection's result.
        w_DN: its weights, N = H K.
        rest_MN: XSA's result, what the projection read.
        own_BHL: as `exclude_self_parts` gives it, with L >= T positions, M = B T; y = rest + own v.
        heads_MW: query, key and value heads side by side, of which the values are read.

    Returns:
        Gradients at y, [M, N], and at the values, [M, G K]; and of every row and head the sum of y
        times its gradient, [B, H, L], 0 past T, which flash attention's backward pass asks for.
    """
    exact = torch.promote_types(go_MD.dtype, torch.float32)
    windows, query_heads, padded = own_BHL.shape
    window, size = len(go_MD) // windows, rest_MN.shape[1] // query_heads
    kv_heads = (heads_MW.shape[1] // size - query_heads) // 2
    g, rest = (t.to(exact).unflatten(1, (kv_heads, -1, size)) for t in (go_MD @ w_DN, rest_MN))
    own_MH = own_BHL[..., :window].transpose(1, 2).flatten(0, 1)
    own = own_MH.to(exact).unflatten(1, (kv_heads, -1)).unsqueeze(-1)
    v = heads_MW[:, -kv_heads * size :].to(exact).unflatten(1, (kv_heads, 1, size))
    length = v.norm(dim=-1, keepdim=True)
    c = (g * v).sum(-1, keepdim=True) / length.clamp_min(SMALLEST_NORM).square()
    dy = g - c * v
    slack = torch.where(length > SMALLEST_NORM, 0, 2 * c * own)
    dv = -(own * dy + c * rest + slack * v).sum(2)
    dy = dy.to(go_MD.dtype)
    row_sums = ((rest + own * v) * dy).sum(-1).unflatten(0, (-1, window))
    row_sums = F.pad(row_sums.flatten(2).transpose(1, 2), (0, padded - window))
    return dy.flatten(1), dv.flatten(1).to(go_MD.dtype), row_sums


def nesterov(
    grad_NRC: Tensor, momentum_NRC: Tensor, clip: Tensor, coefficient: float, dtype: torch.dtype
) -> Tensor:
    """Muon's momentum m <- c m + g of g = clip grad, in place, and its direction g + c m.

    Args:
        grad_NRC: a bank's gradient.
        momentum_NRC: m, float32.
        clip: factor on the gradient, 0-dim float32.
        coefficient: c.
        dtype: type of the direction.
    """
    grad = grad_NRC.float() * clip
    momentum_NRC.mul_(coefficient).add_(grad)
    return grad.add_(momentum_NRC, alpha=coefficient).to(dtype)


def apply_update(weight_NRC: Tensor, update_NRC: Tensor, keep: float, rate: float) -> None:
    """weight <- keep weight - rate update, in place."""
    weight_NRC.mul_(keep).add_(update_NRC, alpha=-rate)

"""A window-only, hash-routed layer of DeepSeek-V4 as another project might write it: its own names, layouts, style.

Nothing of dsv4 is used to compute. `load` takes the weights from a checkpoint and lays them out for einsum.
"""

import jax
import jax.numpy as jnp


def load(read, cfg, i):
    """Our parameters of layer `i`, from `read(name)`, which gives float32 matrices as [in, out]."""
    h, c, g = cfg.num_attention_heads, cfg.head_dim, cfg.o_groups
    at = f"layers.{i}."

    def hyper(half):
        return {part: read(f"{at}hc_{half}_{part}") for part in ("fn", "base", "scale")}

    def expert(stem):
        return {"gate": read(f"{stem}.w1"), "up": read(f"{stem}.w3"), "down": read(f"{stem}.w2")}

    return {
        "hyper_attn": hyper("attn"),
        "hyper_mlp": hyper("ffn"),
        "pre_attn_norm": read(f"{at}attn_norm"),
        "pre_mlp_norm": read(f"{at}ffn_norm"),
        "q_down": read(f"{at}attn.wq_a"),  # [D, R]
        "q_norm": read(f"{at}attn.q_norm"),
        "q_up": read(f"{at}attn.wq_b").reshape(-1, h, c),  # [R, H, C]
        "kv": read(f"{at}attn.wkv"),  # [D, C]
        "kv_norm": read(f"{at}attn.kv_norm"),
        "sink": read(f"{at}attn.attn_sink"),  # [H]
        "o_down": read(f"{at}attn.wo_a").reshape(g, h // g, c, -1),  # [G, H/G, C, O]
        "o_up": read(f"{at}attn.wo_b").reshape(g, -1, cfg.hidden_size),  # [G, O, D]
        "router": read(f"{at}ffn.gate.weight"),  # [D, E]
        "expert_of_token": read(f"{at}ffn.gate.tid2eid"),  # [V, K]
        "experts": expert(f"{at}ffn.experts"),  # [E, D, F], [E, F, D]
        "shared": expert(f"{at}ffn.shared_experts"),
    }


def rms(x, eps):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps)


def rope(x, positions, theta, dim, sign=1):
    """Turn the last `dim` channels; neighbours are one complex number."""
    still, turned = x[..., :-dim], x[..., -dim:]
    freqs = 1.0 / theta ** (jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    angle = positions[..., None] * freqs * sign
    angle = angle.reshape(*angle.shape[:2], *(1,) * (x.ndim - 3), -1)
    a, b = turned[..., 0::2], turned[..., 1::2]
    a, b = a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)
    turned = jnp.stack([a, b], -1).reshape(turned.shape)
    return jnp.concatenate([still, turned], -1)


def hyper(p, streams, cfg):
    """One stream out of N, and the weights that bring the result back into them."""
    n = cfg.hc_mult
    mixed = rms(streams.reshape(*streams.shape[:2], -1), cfg.rms_norm_eps) @ p["fn"].T
    pre, post, comb = jnp.split(mixed, [n, 2 * n], -1)
    pre = jax.nn.sigmoid(pre * p["scale"][0] + p["base"][:n]) + cfg.hc_eps
    post = 2 * jax.nn.sigmoid(post * p["scale"][1] + p["base"][n : 2 * n])
    comb = (comb * p["scale"][2] + p["base"][2 * n :]).reshape(*comb.shape[:2], n, n)
    comb = jax.nn.softmax(comb, -1) + cfg.hc_eps
    comb /= comb.sum(-2, keepdims=True) + cfg.hc_eps

    def sinkhorn(_, c):
        c = c / (c.sum(-1, keepdims=True) + cfg.hc_eps)
        return c / (c.sum(-2, keepdims=True) + cfg.hc_eps)

    comb = jax.lax.fori_loop(0, cfg.hc_sinkhorn_iters - 1, sinkhorn, comb)
    return jnp.einsum("bsn,bsnd->bsd", pre, streams), post, comb


def back(x, streams, post, comb):
    return post[..., None] * x[..., None, :] + jnp.einsum("bsjk,bsjd->bskd", comb, streams)


def attention(p, x, positions, cfg, sow):
    dim, theta, eps = cfg.qk_rope_head_dim, cfg.rope_theta, cfg.rms_norm_eps
    q = sow("q_norm", rms(x @ p["q_down"], eps) * p["q_norm"])
    q = sow("q_head_norm", rms(jnp.einsum("bsr,rhc->bshc", q, p["q_up"]), eps))
    q = sow("q_rope", rope(q, positions, theta, dim))
    kv = sow("kv_norm", rms(x @ p["kv"], eps) * p["kv_norm"])
    kv = sow("kv_rope", rope(kv, positions, theta, dim))
    scores = jnp.einsum("bqhc,bkc->bhqk", q, kv) / jnp.sqrt(cfg.head_dim)
    ago = positions[:, :, None] - positions[:, None, :]
    seen = (ago >= 0) & (ago < cfg.sliding_window)
    scores = jnp.where(seen[:, None], scores, -jnp.inf)
    sink = jnp.broadcast_to(p["sink"][:, None, None], (*scores.shape[:3], 1))
    probs = jax.nn.softmax(jnp.concatenate([scores, sink], -1), -1)[..., :-1]
    out = sow("context", jnp.einsum("bhqk,bkc->bqhc", probs, kv))
    out = sow("context_unrope", rope(out, positions, theta, dim, sign=-1))
    out = out.reshape(*x.shape[:2], cfg.o_groups, -1, cfg.head_dim)
    out = sow("o_down", jnp.einsum("bsghc,ghco->bsgo", out, p["o_down"]))
    return sow("o_up", jnp.einsum("bsgo,god->bsd", out, p["o_up"]))


def mlp(p, x, limit):
    gate, up = jnp.minimum(x @ p["gate"], limit), jnp.clip(x @ p["up"], -limit, limit)
    return (jax.nn.silu(gate) * up) @ p["down"]


def moe(p, x, tokens, cfg, sow):
    affinity = jnp.sqrt(jax.nn.softplus(sow("router", x @ p["router"])))
    chosen = sow("chosen", p["expert_of_token"][tokens])
    weights = jnp.take_along_axis(affinity, chosen, -1)
    weights = sow("weights", weights / weights.sum(-1, keepdims=True) * cfg.routed_scaling_factor)
    share = (jax.nn.one_hot(chosen, cfg.n_routed_experts) * weights[..., None]).sum(-2)  # every expert computes all
    every = jax.vmap(lambda expert: mlp(expert, x, cfg.swiglu_limit))(p["experts"])
    routed = sow("routed", jnp.einsum("bse,ebsd->bsd", share, every))
    return routed + sow("shared", mlp(p["shared"], x, cfg.swiglu_limit))


def layer(p, streams, tokens, positions, cfg):
    """The streams after the layer, and everything that was computed on the way, by our own names."""
    seen = {}

    def sow(name, value):
        seen[name] = value
        return value

    x, post, comb = hyper(p["hyper_attn"], streams, cfg)
    sow("comb_attn", comb)
    x = sow("pre_attn_norm", rms(x, cfg.rms_norm_eps) * p["pre_attn_norm"])
    streams = sow("after_attn", back(attention(p, x, positions, cfg, sow), streams, post, comb))
    x, post, comb = hyper(p["hyper_mlp"], streams, cfg)
    x = sow("pre_mlp_norm", rms(x, cfg.rms_norm_eps) * p["pre_mlp_norm"])
    return sow("out", back(moe(p, x, tokens, cfg, sow), streams, post, comb)), seen

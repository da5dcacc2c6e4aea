"""The stand-in of `release_code` in the shape that `inference/model.py` has since V4-Flash-0731.

`hc_head` is a method of every block, the head only multiplies, blocks choose their attention by a class attribute, the
model draws the next token itself, and DSpark's stages draft blocks of tokens.
"""

from pathlib import Path

_BEFORE = Path(__file__).parents[1] / "release_code" / "model.py"
exec(compile(_BEFORE.read_text(encoding="utf-8"), _BEFORE, "exec"), globals())

_Args, _Attention, _Block, _Model = ModelArgs, Attention, Block, Transformer
del MTPBlock


@dataclass
class ModelArgs(_Args):
    """With the fields of sampling and of DSpark."""

    temperature: float = 1.0
    dspark_block_size: int = 0
    dspark_noise_token_id: int = 0
    dspark_target_layer_ids: Sequence[int] = ()
    dspark_markov_rank: int = 256


class Block(_Block):
    """A layer that can also collapse the streams for the head."""

    attention_cls = _Attention

    def __init__(self, layer_id, args):
        super().__init__(layer_id, args)
        if self.attention_cls is not _Attention:
            self.attn = self.attention_cls(layer_id, args)

    def forward(self, x, start_pos, input_ids, *attn_args):
        if not attn_args:
            return super().forward(x, start_pos, input_ids)
        y, post, comb = self.hc_pre(x, self.hc_attn_fn, self.hc_attn_scale, self.hc_attn_base)
        x = self.hc_post(self.attn(self.attn_norm(y), start_pos, *attn_args), x, post, comb)
        y, post, comb = self.hc_pre(x, self.hc_ffn_fn, self.hc_ffn_scale, self.hc_ffn_base)
        return self.hc_post(self.ffn(self.ffn_norm(y), input_ids), x, post, comb)

    def hc_head(self, x, hc_fn, hc_scale, hc_base):
        pre = torch.sigmoid(_stream_mixes(x, hc_fn, self.norm_eps) * hc_scale + hc_base) + self.hc_eps
        return _weighted_streams(x, pre)


class ParallelHead(nn.Module):
    """One stream to logits, in float32; of the last position unless all are asked for."""

    def __init__(self, vocab_size, dim, norm_eps=1e-6, hc_eps=1e-6):
        super().__init__()
        self.weight = _parameter(vocab_size, dim, dtype=torch.float32)

    def forward(self, x, full_logits=False):
        return F.linear((x if full_logits else x[:, -1]).float(), self.weight)


def sample(logits, temperature=1.0):
    """The most likely token; of a temperature above 0, a random one."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    return torch.distributions.Categorical(logits=logits / temperature).sample()


def _draft_indices(batch, known, window, block):
    """The places of a block's keys: the ring's places that are taken, and behind the ring the block itself."""
    places = torch.cat([torch.arange(min(known, window)), window + torch.arange(block)])
    return places.int().expand(batch, block, -1).contiguous()


class DSparkAttention(_Attention):
    """Attention of a block over itself and over a ring of keys of the known tokens, made of `main_x` [b, s, D]."""

    def _rotated_keys(self, x, start):
        keys = self.kv_norm(self.wkv(x))
        apply_rotary_emb(keys[..., -self.rope_head_dim :], self.freqs_cis[start : start + x.size(1)])
        act_quant(keys[..., : -self.rope_head_dim], KV_GROUP, scale_fmt, scale_dtype, True)
        return keys

    def forward(self, x, start_pos, main_x):
        batch, known = main_x.size(0), start_pos + main_x.size(1)
        window, rd = self.window_size, self.rope_head_dim
        keys = self._rotated_keys(main_x, start_pos)
        last = torch.arange(max(start_pos, known - window), known)
        self.kv_cache[:batch, last % window] = keys[:, last - start_pos]
        if start_pos == 0:
            return x

        block = x.size(1)
        q = self.wq_b(self.q_norm(self.wq_a(x))).unflatten(-1, (self.n_heads, self.head_dim))
        q *= torch.rsqrt(q.square().mean(-1, keepdim=True) + self.eps)
        freqs = self.freqs_cis[known : known + block]
        apply_rotary_emb(q[..., -rd:], freqs)
        kv = torch.cat([self.kv_cache[:batch], self._rotated_keys(x, known)], dim=1)
        o = sparse_attn(q, kv, self.attn_sink, _draft_indices(batch, known, window, block), self.softmax_scale)
        apply_rotary_emb(o[..., -rd:], freqs, True)
        o = o.reshape(batch, block, self.o_groups, -1)
        o = torch.einsum("bsgd,grd->bsgr", o, self.wo_a.weight.view(self.o_groups, self.o_lora_rank, -1))
        return self.wo_b(o.flatten(2))


class DSparkMarkovHead(nn.Module):
    """Logits that depend on the token before alone."""

    def __init__(self, vocab_size, rank):
        super().__init__()
        self.markov_w1 = ParallelEmbedding(vocab_size, rank)
        self.markov_w2 = ParallelHead(vocab_size, rank)

    def forward(self, token_ids):
        row = self.markov_w1(token_ids)
        return self.markov_w2(row, full_logits=True), row


class DSparkConfidenceHead(nn.Module):
    """The logit of a draft being accepted, in float32."""

    def __init__(self, width):
        super().__init__()
        self.proj = Linear(width, 1, dtype=torch.float32)

    def forward(self, hidden, row):
        return self.proj(torch.cat([hidden, row], dim=-1).float())[..., 0]


class DSparkBlock(Block):
    """A draft stage. The first one also makes what all of them know; the last one also chooses the tokens."""

    attention_cls = DSparkAttention

    def __init__(self, layer_id, args):
        super().__init__(layer_id, args)
        self.block_size = args.dspark_block_size
        self.noise_token_id = args.dspark_noise_token_id
        self.temperature = args.temperature
        if layer_id == args.n_layers:
            self.main_proj = Linear(args.dim * len(args.dspark_target_layer_ids), args.dim)
            self.main_norm = RMSNorm(args.dim, args.norm_eps)
        if layer_id == args.n_layers + args.n_mtp_layers - 1:
            self.norm = RMSNorm(args.dim, args.norm_eps)
            self.hc_head_fn = _parameter(args.hc_mult, args.hc_mult * args.dim, dtype=torch.float32)
            self.hc_head_base = _parameter(args.hc_mult, dtype=torch.float32)
            self.hc_head_scale = _parameter(1, dtype=torch.float32)
            self.markov_head = DSparkMarkovHead(args.vocab_size, args.dspark_markov_rank)
            self.confidence_head = DSparkConfidenceHead(args.dim + args.dspark_markov_rank)
        self.embed = None
        self.head = None

    def forward(self, x, start_pos, input_ids, main_x):
        if start_pos == 0:
            return self.attn(x, start_pos, main_x)
        return super().forward(x, start_pos, input_ids, main_x)

    def forward_embed(self, main_hidden, input_ids):
        """The streams of the block, which begins with `input_ids` [b]; and what is known of the tokens before."""
        ids = torch.full((input_ids.size(0), self.block_size), self.noise_token_id)
        ids[:, 0] = input_ids
        x = self.embed(ids).unsqueeze(2).repeat(1, 1, self.hc_mult, 1)
        return x, self.main_norm(self.main_proj(main_hidden))

    def forward_head(self, x, input_ids):
        """The ids with which the block began and those that it drafts, their logits, and its confidence."""
        hidden = self.hc_head(x, self.hc_head_fn, self.hc_head_scale, self.hc_head_base)
        logits = self.head(self.norm(hidden), full_logits=True)
        drafted, rows = [input_ids], []
        for at in range(self.block_size):
            bias, row = self.markov_head(drafted[-1])
            logits[:, at] += bias
            rows.append(row)
            drafted.append(sample(logits[:, at], self.temperature))
        return torch.stack(drafted, dim=1), logits, self.confidence_head(hidden, torch.stack(rows, dim=1))


class Transformer(_Model):
    """The model; gives the next token, the logits behind it, and what the draft stages read."""

    def __init__(self, args):
        super().__init__(args)
        self.targets = args.dspark_target_layer_ids
        if args.dspark_block_size:
            self.mtp = nn.ModuleList(DSparkBlock(args.n_layers + stage, args) for stage in range(args.n_mtp_layers))
            for block in self.mtp:
                block.embed, block.head = self.embed, self.head

    @torch.inference_mode()
    def forward(self, input_ids, start_pos=0):
        h = self.embed(input_ids).unsqueeze(2).repeat(1, 1, self.hc_mult, 1)
        read = []
        for number, layer in enumerate(self.layers):
            h = layer(h, start_pos, input_ids)
            if number in self.targets:
                read.append(h.mean(dim=2))
        h = self.layers[-1].hc_head(h, self.hc_head_fn, self.hc_head_scale, self.hc_head_base)
        logits = self.head(self.norm(h))
        return logits.argmax(dim=-1), logits, torch.cat(read, dim=-1) if read else None

    @torch.inference_mode()
    def forward_spec(self, input_ids, main_hidden, start_pos=0):
        """A draft after `input_ids` [b], which follow the tokens of `main_hidden`; none in the first call."""
        h, main_x = self.mtp[0].forward_embed(main_hidden, input_ids)
        for block in self.mtp:
            h = block(h, start_pos, input_ids, main_x)
        return None if start_pos == 0 else self.mtp[-1].forward_head(h, input_ids)

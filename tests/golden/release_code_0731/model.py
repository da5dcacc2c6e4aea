"""The stand-in of `release_code` in the shape that `inference/model.py` has since V4-Flash-0731.

`hc_head` is a method of every block, the head only multiplies, blocks choose their attention by a class attribute, and
the model draws the next token itself.
"""

from pathlib import Path

_BEFORE = Path(__file__).parents[1] / "release_code" / "model.py"
exec(compile(_BEFORE.read_text(encoding="utf-8"), _BEFORE, "exec"), globals())

_Attention, _Block, _Model = Attention, Block, Transformer


class Block(_Block):
    """A layer that can also collapse the streams for the head."""

    attention_cls = _Attention

    def forward(self, x, start_pos, input_ids, *attn_args):
        assert not attn_args
        return super().forward(x, start_pos, input_ids)

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


class Transformer(_Model):
    """The model; gives the next token, the logits behind it, and nothing for a draft."""

    @torch.inference_mode()
    def forward(self, input_ids, start_pos=0):
        h = self.embed(input_ids).unsqueeze(2).repeat(1, 1, self.hc_mult, 1)
        for layer in self.layers:
            h = layer(h, start_pos, input_ids)
        h = self.layers[-1].hc_head(h, self.hc_head_fn, self.hc_head_scale, self.hc_head_base)
        logits = self.head(self.norm(h))
        return logits.argmax(dim=-1), logits, None

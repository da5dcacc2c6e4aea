"""The architecture of DeepSeek-V4.1: a text backbone, draft stages and a vision encoder, in one nested config."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

from dsv4_convert.show.units import ranges
from dsv4_convert.spec.config import Config, Count, short
from dsv4_convert.spec.fields import FIXED, REALS, SIZES, Fields
from dsv4_convert.spec.v41.kinds import Candidates, LayerKind
from dsv4_convert.spec.v41.names import FP8_TILE, NAMES
from dsv4_convert.spec.v41.ngrams import EngramConfig, misstated_rows
from dsv4_convert.spec.v41.taps import STATE, TAPS
from dsv4_convert.spec.vision import VisionConfig

#: Entries of ``compress_ratios``: window only, one entry for two tokens, one for each token.
_RATIOS = (0, 1, 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class V41Config(Config):
    """Every architecture number of a DeepSeek-V4.1.

    ``compress_ratios`` has one entry per layer of the backbone. Layers whose ratio is not 0 attend to the compressed
    keys of the latest layer in ``kv_source_layer_ids``, of which the latest layer in ``index_source_layer_ids`` chose.
    """

    model_type = "deepseek_v41"
    title = "DeepSeek-V4.1"
    fp8_tile = FP8_TILE
    names = NAMES
    taps = TAPS
    state = STATE
    fp4_taps = ("attn.compressor.entries", "attn.indexer.q_rope", "attn.indexer.keys")

    compress_ratios: tuple[Count, ...]
    kv_source_layer_ids: tuple[Count, ...]
    index_source_layer_ids: tuple[Count, ...]
    candidate_source_layer_id: Count | None
    candidate_topk_blocks: Count
    candidate_block_size: Count
    engram: EngramConfig | None
    #: Experts of a draft stage, and how many of them a token takes; 0 without stages.
    dspark_n_routed_experts: Count
    dspark_num_experts_per_tok: Count
    vision: VisionConfig | None

    def ratio_of(self, layer: int) -> int:
        """Tokens per compressed entry that a layer attends to; 0 if it attends to its window only."""
        return self.compress_ratios[layer] if layer < self.num_hidden_layers else 0

    def kv_source(self, layer: int) -> int | None:
        """The layer whose compressed keys a layer attends to; None for a layer with its window only."""
        return max(each for each in self.kv_source_layer_ids if each <= layer) if self.ratio_of(layer) else None

    def index_source(self, layer: int) -> int | None:
        """The layer that chooses a layer's compressed keys; None for a layer with its window only."""
        return max(each for each in self.index_source_layer_ids if each <= layer) if self.ratio_of(layer) else None

    def compresses(self, layer: int) -> bool:
        """Whether a layer makes compressed keys and index keys."""
        return layer in self.kv_source_layer_ids

    def compressor_width(self, layer: int) -> int:
        """Values per token that the compressor of a layer pools."""
        return self.head_dim

    def chooses(self, layer: int) -> bool:
        """Whether a layer attends to compressed keys, of which some layer always chooses."""
        return self.ratio_of(layer) > 0

    def indexes(self, layer: int) -> bool:
        """Whether a layer chooses among compressed keys."""
        return layer in self.index_source_layer_ids

    def table_of(self, layer: int) -> str | None:
        """The path of the n-gram table of a layer with an engram."""
        return f"{self.prefix(layer)}engram.embed" if self.has_engram(layer) else super().table_of(layer)

    @property
    def entries_per_candidate(self) -> int:
        """Entries in a candidate block."""
        return self.candidate_block_size

    def tap_sizes(self, entries: int) -> Mapping[str, int]:
        """Table rows that a token looks up, and candidate blocks of a query."""
        blocks = 0 if self.candidate_source_layer_id is None else -(-entries // self.candidate_block_size)
        return {
            "J": 0 if self.engram is None else self.engram.columns,
            "c": min(self.candidate_topk_blocks, blocks),
        }

    def has_engram(self, layer: int) -> bool:
        """Whether a layer looks up n-grams."""
        return self.engram is not None and layer in self.engram.layer_ids

    def layer_kind(self, layer: int) -> LayerKind:
        """All that decides the operations of a layer."""
        source = self.candidate_source_layer_id
        candidates = None
        if source is not None and self.indexes(layer) and layer >= source:
            candidates = Candidates.SOURCE if layer == source else Candidates.USER
        engram = self.engram.layer_ids.index(layer) if self.engram is not None and self.has_engram(layer) else None
        return LayerKind(self.ratio_of(layer), self.compresses(layer), self.indexes(layer), candidates, engram)

    def abbreviate(self, layer: int) -> str:
        """SWA, or the ratio, with a letter for each thing that the layer makes for others: K keys, I a choice."""
        kind = self.layer_kind(layer)
        return f"R{kind.ratio}{'K' * kind.compresses}{'I' * kind.indexes}" if kind.ratio else "SWA"

    def describe(self, layer: int) -> str:
        """The kind of a layer in words."""
        kind = self.layer_kind(layer)
        words = ["window only" if not kind.ratio else f"ratio {kind.ratio}"]
        words += ["KV source"] if kind.compresses else []
        words += ["index source"] if kind.indexes else []
        words += ["candidate source"] if kind.candidates is Candidates.SOURCE else []
        words += [] if kind.engram is None else ["engram"]
        return ", ".join(words)

    def own_numbers(self) -> Iterator[tuple[str, str]]:
        """The numbers of the candidates and of the n-gram tables."""
        if self.candidate_source_layer_id is not None:
            blocks = f"{self.candidate_topk_blocks:,} blocks of {self.candidate_block_size} entries"
            yield "candidates", f"layer {self.candidate_source_layer_id} chooses {blocks} for itself and later layers"
        if self.engram is not None:
            rows = " and ".join(f"{rows:,}" for rows in self.engram.num_embeddings)
            lengths = f"n-grams of 2 to {self.engram.max_ngram_size} tokens"
            yield "engram", f"{self.engram.columns} rows of {self.engram.head_dim} for a token, of {rows}; {lengths}"

    @property
    def of_stages(self) -> Self:
        """With the routed experts of a draft stage, which has fewer."""
        return dataclasses.replace(
            self, n_routed_experts=self.dspark_n_routed_experts, num_experts_per_tok=self.dspark_num_experts_per_tok
        )

    def draft_tap(self, layer: int) -> str:
        """Those that enter its attention half, after an engram."""
        return "engram.streams" if self.has_engram(layer) else "input"

    @property
    def maps_tokens(self) -> bool:
        """Whether there are engrams, which make n-grams of mapped tokens."""
        return self.engram is not None

    @property
    def num_vision_blocks(self) -> int:
        """Number of blocks of the vision encoder."""
        return 0 if self.vision is None else self.vision.num_hidden_layers

    def of_layers(self, layers: Sequence[int]) -> Self:
        """The architecture with some of its layers only, in this order, and without stages after the backbone.

        Every layer stays of its kind. What it reads of a layer that is not among them has to come from elsewhere.
        """
        places = {layer: place for place, layer in enumerate(layers)}

        def mapped(ids: Sequence[int]) -> tuple[int, ...]:
            return tuple(places[layer] for layer in ids if layer in places)

        engram = self.engram
        if engram is not None:
            kept = [at for at, layer in enumerate(engram.layer_ids) if layer in places]
            rows = tuple(engram.num_embeddings[at] for at in kept)
            tables = tuple(engram.tables[at] for at in kept)
            engram = dataclasses.replace(engram, layer_ids=mapped(engram.layer_ids), num_embeddings=rows, tables=tables)
        candidates = self.candidate_source_layer_id
        uses = any(self.layer_kind(layer).candidates is Candidates.USER for layer in layers)
        return dataclasses.replace(
            self,
            num_hidden_layers=len(layers),
            num_mtp_stages=0,
            dspark=None,
            compress_ratios=tuple(self.compress_ratios[layer] for layer in layers),
            kv_source_layer_ids=mapped(self.kv_source_layer_ids),
            index_source_layer_ids=mapped(self.index_source_layer_ids),
            candidate_source_layer_id=None if candidates is None else places.get(candidates, -1 if uses else None),
            engram=engram if engram is not None and engram.layer_ids else None,
        )

    def inconsistent(self) -> list[str]:
        """Layers that are not there, and sharing that no layer could follow, each as a problem of a field."""
        return [*super().inconsistent(), *_schedule_problems(self), *_parts_problems(self)]

    @classmethod
    def read(cls, raw: Mapping[str, Any], *, where: str) -> Self:
        """Build from the JSON of a ``config.json`` of DeepSeek-V4.1. Raises :class:`BadInput` with all problems."""
        whole = Fields(raw, where)
        whole.fixed({"model_type": cls.model_type, "tie_word_embeddings": False})
        text = whole.inner("text_config")
        text.fixed(FIXED | {"model_type": "deepseek_v41_text"})
        values: dict[str, Any] = {name: text.size(name) for name in SIZES}
        values |= {name: text.real(name) for name in REALS}
        values |= text.rope(values)
        values["num_mtp_stages"] = text.count("num_nextn_predict_layers")
        values |= _schedule(text, values["num_hidden_layers"], values["num_mtp_stages"])
        values["engram"] = _engram(text)
        values |= _drafts(text, values)
        values["vision"] = _vision(whole)
        values |= whole.quantization(cls.fp8_tile)
        whole.finish()
        text.finish()
        text.relations(values)
        if not whole.problems:
            config = cls(**values)
            for problem in config.inconsistent():
                text.bad(problem)
        whole.refuse(cls.title)
        return config


def _schedule(text: Fields, layers: int, stages: int) -> dict[str, Any]:
    """The layers' ratios, and who shares what with whom."""
    ratios = text.entries(
        "compress_ratios", text.left.pop("compress_ratios", None), {ratio: ratio for ratio in _RATIOS}, at_least=layers
    )
    after = () if ratios is None else ratios[layers:]
    if any(after) or len(after) not in (0, stages):
        text.bad(
            f"compress_ratios: expected 0 for each of {stages} draft stages (num_nextn_predict_layers) after layer "
            f"{layers - 1}, found {short(list(after))}"
        )
    candidate = text.left.pop("candidate_source_layer_id", None)
    if isinstance(candidate, bool) or not (candidate is None or isinstance(candidate, int)):
        text.bad(f"candidate_source_layer_id: expected a layer, found {short(candidate)}")
    has_candidates = type(candidate) is int and candidate >= 0
    return {
        "compress_ratios": () if ratios is None else ratios[:layers],
        "kv_source_layer_ids": text.numbers("kv_source_layer_ids"),
        "index_source_layer_ids": text.numbers("index_source_layer_ids"),
        "candidate_source_layer_id": candidate if has_candidates else None,
        **{
            name: text.size(name) if has_candidates else text.count(name)
            for name in ("candidate_topk_blocks", "candidate_block_size")
        },
    }


def _engram(text: Fields) -> EngramConfig | None:
    layers = text.numbers("engram_layer_ids")
    rows = text.numbers("engram_num_embeddings")
    sizes = ("max_ngram_size", "vocab_size", "n_heads", "head_dim", "compressed_vocab_size")
    if not layers and not rows:
        for name in (*sizes, "pad_token_id"):  # nothing has them
            text.left.pop(f"engram_{name}", None)
        return None
    return EngramConfig(
        layer_ids=layers,
        num_embeddings=rows,
        tables=tuple(range(len(layers))),
        published_layer_ids=layers,
        pad_token_id=text.count("engram_pad_token_id"),
        **{name: text.size(f"engram_{name}") for name in sizes},
    )


def _drafts(text: Fields, values: Mapping[str, Any]) -> dict[str, Any]:
    """The draft stages."""
    found: dict[str, Any] = {"dspark": text.dspark(values["vocab_size"], values["num_hidden_layers"])}
    read = text.count if found["dspark"] is None else text.size
    return found | {name: read(name) for name in ("dspark_n_routed_experts", "dspark_num_experts_per_tok")}


def _vision(whole: Fields) -> VisionConfig | None:
    image_token = whole.count("image_token_id")
    if whole.left.get("vision_config") is None:
        whole.left.pop("vision_config", None)
        return None
    fields = whole.inner("vision_config")
    fields.fixed({"model_type": "deepseek_v41_vision"})
    sizes = (
        *("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "patch_size"),
        *("downsample_ratio", "max_image_tokens", "min_pixels"),
    )
    ratio = None if fields.left.get("max_wh_ratio") is None else fields.real("max_wh_ratio")
    found = VisionConfig(
        rope_theta=fields.real("rope_theta"),
        max_wh_ratio=ratio,
        image_token_id=image_token,
        **{name: fields.size(name) for name in sizes},
    )
    fields.left.pop("max_wh_ratio", None)
    fields.finish()
    return found


def _schedule_problems(config: V41Config) -> list[str]:
    """Problems of the layers' ratios and of what they share."""
    layers = config.num_hidden_layers
    problems = []
    if len(config.compress_ratios) != layers:
        problems.append(f"compress_ratios: expected {layers} entries, found {len(config.compress_ratios)}")
    sources = {
        "kv_source_layer_ids": config.kv_source_layer_ids,
        "index_source_layer_ids": config.index_source_layer_ids,
    }
    problems += [problem for name, ids in sources.items() for problem in _order_problems(config, name, ids)]
    if problems:
        return problems
    for name, ids in sources.items():
        if windows := [layer for layer in ids if not config.compress_ratios[layer]]:
            problems.append(f"{name}: layer {ranges(windows)} has compress_ratios 0, so there is nothing to share")
    if silent := [layer for layer in config.kv_source_layer_ids if not config.indexes(layer)]:
        problems.append(f"index_source_layer_ids: lacks layer {ranges(silent)}, a KV source, which makes index keys")
    for layer, ratio in enumerate(config.compress_ratios):
        before = [each for each in config.kv_source_layer_ids if each <= layer]
        if ratio and (not before or config.compress_ratios[before[-1]] != ratio):
            found = f"layer {before[-1]} has {config.compress_ratios[before[-1]]}" if before else "there is none"
            problems.append(f"compress_ratios: layer {layer} has {ratio}, of the KV source before it {found}")
    candidate = config.candidate_source_layer_id
    if candidate is not None:
        if not config.indexes(candidate):
            problems.append(f"candidate_source_layer_id: layer {candidate} is no index source")
        if later := [layer for layer in config.kv_source_layer_ids if layer > candidate]:
            problems.append(
                f"candidate_source_layer_id: layer {ranges(later)} makes other keys than those that layer {candidate} "
                "chose blocks of"
            )
    return problems


def _order_problems(config: Config, name: str, ids: Sequence[int]) -> list[str]:
    if config.unordered(ids):
        return [f"{name}: expected ascending backbone layers, found {short(list(ids))}"]
    return []


def _parts_problems(config: V41Config) -> list[str]:
    """Problems of the n-gram tables, the draft stages and the vision encoder."""
    problems = []
    engram, vision = config.engram, config.vision
    if engram is not None:
        problems += _order_problems(config, "engram_layer_ids", engram.layer_ids)
        if engram.max_ngram_size < 2:
            problems.append("engram_max_ngram_size: an n-gram has at least 2 tokens")
        elif not len(engram.layer_ids) == len(engram.num_embeddings) == len(engram.tables):
            found = f"{len(engram.layer_ids)} and {short(list(engram.num_embeddings))}"
            problems.append(f"engram_layer_ids and engram_num_embeddings: expected a table per layer, found {found}")
        elif max(engram.tables) >= len(engram.published_layer_ids):
            problems.append(f"engram tables: expected some of {len(engram.published_layer_ids)}, found {engram.tables}")
        else:
            problems += misstated_rows(engram)
        if engram.pad_token_id >= config.vocab_size:
            problems.append(f"engram_pad_token_id: {engram.pad_token_id} is beyond vocab_size {config.vocab_size}")
    if (config.dspark is None) != (config.num_mtp_stages == 0):
        problems.append("num_nextn_predict_layers and the dspark fields contradict each other")
    for name in ("num_experts_per_tok", "dspark_num_experts_per_tok"):
        if getattr(config, name) == 1:
            problems.append(f"{name}: the published code leaves the weight of a single expert as it is, dsv4 not")
    if config.dspark_num_experts_per_tok > config.dspark_n_routed_experts:
        problems.append("dspark_num_experts_per_tok must not exceed dspark_n_routed_experts")
    if vision is not None and vision.hidden_size % vision.num_attention_heads:
        problems.append("vision_config.hidden_size must be a multiple of vision_config.num_attention_heads")
    return problems

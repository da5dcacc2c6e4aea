"""Taps: the named intermediate activations that model, golden, tolerances and report speak of.

One row per tap, in the order of execution, so that "the first diverging tap" is the first diverging row. Names follow
the parameters: ``attn.wq_a`` is the output of the projection ``attn.wq_a``, ``attn.q_norm`` the output of that norm.
A full name is ``layers.12.attn.wq_a``, ``mtp.0.attn.wq_a`` for a stage after the backbone, or, for the model level,
``embed``. A stage has rows of its own, the rows of a layer, and those of both ends of the model: it embeds the tokens
after those of the layers, and it has a head.

Shape letters: ``B`` batch, ``S`` query tokens, ``T`` compressed entries, ``N`` streams, ``D`` model width, ``R`` query
rank, ``H`` heads, ``C`` head width, ``W`` compressor width (2C in CSA layers, whose entries overlap), ``Hi`` and ``Ci``
heads and head width of the indexer, ``k`` chosen entries, ``G`` output groups, ``O`` output rank per group,
``E`` experts, ``K`` experts per token, ``V`` vocabulary. The state after a prompt has three more: ``w`` keys that the
next token's window reaches, ``p`` tokens of the incomplete block, ``r`` tokens of the last complete block.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Iterator
from enum import StrEnum

from dsv4_convert.errors import UsageError
from dsv4_convert.spec.config import AttentionKind, Config, prefix_of


class Values(StrEnum):
    """How a tap is compared."""

    #: Real numbers, under a tolerance.
    REAL = "real"
    #: Chosen indices, compared as a set per token; stored ascending, -1 (none) last.
    CHOICE = "choice"


class Where(StrEnum):
    """The layers that have the tap."""

    LAYER = "every layer"
    COMPRESSED = "CSA and HCA layers"
    CSA = "CSA layers"
    LEARNED = "layers with learned routing"
    STAGE = "mtp stages"
    BEFORE = "model, before the layers"
    AFTER = "model, after the layers"

    def holds(self, config: Config, layer: int | None) -> bool:
        """Whether ``layer``, a layer or a stage (None: the model level), has the tap."""
        if layer is None:
            return self in (Where.BEFORE, Where.AFTER)
        match self:
            case Where.BEFORE | Where.AFTER | Where.STAGE:
                return layer in config.stage_layers
            case Where.LAYER:
                return True
            case Where.COMPRESSED:
                return config.kind(layer) is not AttentionKind.SLIDING
            case Where.CSA:
                return config.kind(layer) is AttentionKind.CSA
            case Where.LEARNED:
                return not config.hashed(layer)


@dataclasses.dataclass(frozen=True, eq=False)
class Tap:
    """One row: name within its layer, shape letters, meaning. There is one object per row, so identity is equality."""

    name: str
    shape: str
    meaning: str
    where: Where = Where.LAYER
    values: Values = Values.REAL
    #: For a choice: the tap that holds the scores it was chosen by.
    scores: str | None = None
    #: Parameters that its operation uses itself, named as in its layer; those that a layer lacks do not count.
    weights: tuple[str, ...] = ()

    @property
    def is_state(self) -> bool:
        """Whether it is one of :data:`STATE`."""
        return is_state(self.name)


@dataclasses.dataclass(frozen=True)
class TapKey:
    """A tap of one layer or stage, or of the model level (``layer`` None). ``str`` gives its full name.

    ``stage``: the number of the stage, whose ``layer`` is the one that :class:`Config` gives it.
    """

    layer: int | None
    tap: Tap
    stage: int | None = None

    @classmethod
    def of(cls, config: Config, layer: int | None, tap: Tap | str) -> TapKey:
        """The key of a tap, given by itself or by its name within ``layer``, which may be that of a stage."""
        stage = layer - config.num_hidden_layers if layer is not None and layer in config.stage_layers else None
        return cls(layer, _BY_NAME[tap] if isinstance(tap, str) else tap, stage)

    @classmethod
    def parse(cls, name: str, config: Config | None = None) -> TapKey:
        """The key of a full name such as ``layers.12.attn.wq_a``. The layer of a stage is known with a ``config`` only.

        Raises:
            UsageError: there is no such tap.
        """
        prefix, number, rest = _split(name)
        tap = _BY_NAME.get(rest)
        places = {"": _ENDS, "layers.": _LAYERS, "mtp.": _STAGES}[prefix]
        if tap is None or tap.where not in places:
            raise UsageError(f"{name}: unknown tap; close ones: {', '.join(_close(rest))}")
        if prefix != "mtp.":
            return cls(number, tap)
        return cls(None if config is None or number is None else config.num_hidden_layers + number, tap, number)

    @property
    def prefix(self) -> str:
        """The beginning of its full name: ``layers.12.``, ``mtp.0.`` or nothing."""
        return prefix_of(self.layer, self.stage)

    @property
    def label(self) -> str:
        """Its layer, stage or level in tables: ``12``, ``mtp.0`` or ``model``."""
        return self.prefix.removeprefix("layers.").rstrip(".") or "model"

    @property
    def where(self) -> str:
        """Its layer, stage or level in sentences: ``layer 12``, ``stage mtp.0`` or ``model level``."""
        return "model level" if not self.prefix else f"{'layer' if self.stage is None else 'stage'} {self.label}"

    def __str__(self) -> str:
        return self.prefix + self.tap.name


#: The rows that full names without a prefix, of layers, and of stages may have.
_ENDS = (Where.BEFORE, Where.AFTER)
_LAYERS = (Where.LAYER, Where.COMPRESSED, Where.CSA, Where.LEARNED)
_STAGES = (*_ENDS, Where.LAYER, Where.LEARNED, Where.STAGE)


def _split(name: str) -> tuple[str, int | None, str]:
    """A full name as prefix (``layers.``, ``mtp.`` or nothing), number, and name within the layer."""
    parts = name.split(".", 2)
    if len(parts) == 3 and parts[0] in ("layers", "mtp") and parts[1].isascii() and parts[1].isdecimal():
        return f"{parts[0]}.", int(parts[1]), parts[2]
    return "", None, name


def _compressor(path: str, width: str, entry: str, where: Where) -> tuple[Tap, ...]:
    entries = "compressed entries, rotated to the first position of their block"
    return (
        Tap(f"{path}.wkv", f"B S {width}", "values to pool", where, weights=(f"{path}.wkv",)),
        Tap(f"{path}.wgate", f"B S {width}", "gate logits, before the position bias (ape)", where,
            weights=(f"{path}.wgate",)),
        Tap(f"{path}.pooled", f"B T {entry}", "gated sum of each block", where, weights=(f"{path}.ape",)),
        Tap(f"{path}.norm", f"B T {entry}", "pooled entries after their norm", where, weights=(f"{path}.norm",)),
        Tap(f"{path}.entries", f"B T {entry}", entries, where),
    )  # fmt: skip


def _hyper_connection(path: str) -> tuple[Tap, ...]:
    weights = (f"{path}_fn", f"{path}_base", f"{path}_scale")
    return (
        Tap(f"{path}.pre", "B S N", "weights that collapse the streams, hc_eps included", weights=weights),
        Tap(f"{path}.post", "B S N", "weights that spread the output over the streams", weights=weights),
        Tap(f"{path}.comb", "B S N N", "doubly stochastic mixing of the streams, [from, to]", weights=weights),
        Tap(f"{path}.collapsed", "B S D", "the collapsed stream"),
    )


def _own(name: str, shape: str, meaning: str, where: Where = Where.LAYER) -> Tap:
    """A tap whose operation has one parameter, of the same name."""
    return Tap(name, shape, meaning, where, weights=(name,))


def _expert(path: str) -> tuple[str, ...]:
    return (f"{path}.w1", f"{path}.w2", f"{path}.w3")


TAPS: tuple[Tap, ...] = (
    Tap("streams", "B S N D", "streams that leave the last layer, or the stage before", Where.STAGE),
    _own("embed", "B S D", "token embedding; in a stage, of the token after", Where.BEFORE),
    _own("enorm", "B S D", "embedding after its norm", Where.STAGE),
    _own("hnorm", "B S N D", "streams after their norm", Where.STAGE),
    _own("e_proj", "B S D", "embedding's part of the stage's streams", Where.STAGE),
    _own("h_proj", "B S N D", "streams' part of the stage's streams", Where.STAGE),
    Tap("input", "B S N D", "streams entering the layer"),
    *_hyper_connection("hc_attn"),
    _own("attn_norm", "B S D", "input of the attention"),
    _own("attn.wq_a", "B S R", "low-rank query"),
    _own("attn.q_norm", "B S R", "low-rank query after its norm; feeds the indexer too"),
    _own("attn.wq_b", "B S H C", "queries"),
    Tap("attn.q", "B S H C", "queries after the weightless norm per head"),
    Tap("attn.q_rope", "B S H C", "rotated queries"),
    _own("attn.wkv", "B S C", "the shared key = value"),
    _own("attn.kv_norm", "B S C", "key = value after its norm"),
    Tap("attn.kv_rope", "B S C", "rotated key = value"),
    *_compressor("attn.compressor", "W", "C", Where.COMPRESSED),
    *_compressor("attn.indexer.compressor", "2Ci", "Ci", Where.CSA),
    Tap("attn.indexer.q_rope", "B S Hi Ci", "rotated indexer queries", Where.CSA, weights=("attn.indexer.wq_b",)),
    _own("attn.indexer.weights_proj", "B S Hi", "weight of each indexer head, before scaling", Where.CSA),
    Tap("attn.indexer.scores", "B S T", "index scores, before the causal mask", Where.CSA),
    Tap("attn.indexer.chosen", "B S k", "entries that each query attends to", Where.CSA, Values.CHOICE,
        scores="attn.indexer.scores"),
    Tap("attn.context", "B S H C", "attention output per head, still rotated", weights=("attn.attn_sink",)),
    Tap("attn.context_unrotated", "B S H C", "attention output after the inverse rotation"),
    _own("attn.wo_a", "B S G O", "grouped low-rank output"),
    _own("attn.wo_b", "B S D", "output of the attention"),
    Tap("hc_attn.streams", "B S N D", "streams after the attention half"),
    *_hyper_connection("hc_ffn"),
    _own("ffn_norm", "B S D", "input of the experts"),
    Tap("ffn.gate.logits", "B S E", "router logits", weights=("ffn.gate.weight",)),
    Tap("ffn.gate.scores", "B S E", "scores that experts are chosen by, correction bias included", Where.LEARNED,
        weights=("ffn.gate.bias",)),
    Tap("ffn.gate.experts", "B S K", "chosen experts", Where.LAYER, Values.CHOICE, scores="ffn.gate.scores",
        weights=("ffn.gate.tid2eid",)),
    Tap("ffn.gate.weights", "B S K", "routing weights, in the order of ffn.gate.experts"),
    Tap("ffn.experts", "B S D", "weighted sum of the routed experts", weights=_expert("ffn.experts")),
    Tap("ffn.shared_experts", "B S D", "output of the shared expert", weights=_expert("ffn.shared_experts")),
    Tap("ffn", "B S D", "routed plus shared"),
    Tap("hc_ffn.streams", "B S N D", "streams leaving the layer"),
    Tap("hc_head.pre", "B S N", "weights of the head's collapse", Where.AFTER,
        weights=("hc_head_fn", "hc_head_base", "hc_head_scale")),
    Tap("hc_head", "B S D", "collapsed streams", Where.AFTER),
    _own("norm", "B S D", "input of the output head", Where.AFTER),
    Tap("logits", "B S V", "logits", Where.AFTER, weights=("head",)),
)  # fmt: skip


def _pending(path: str, width: str, where: Where) -> tuple[Tap, ...]:
    return (
        Tap(f"{path}.values", f"B p {width}", "values of the block that is not complete", where),
        Tap(f"{path}.gates", f"B p {width}", "its gate logits, before the position bias (ape)", where),
    )


def _overlap(path: str, entry: str) -> tuple[Tap, ...]:
    return (
        Tap(f"{path}.overlap_values", f"B r {entry}", "what the last complete block has for the next one", Where.CSA),
        Tap(f"{path}.overlap_gates", f"B r {entry}", "its gate logits, position bias included", Where.CSA),
    )


#: The cache that a layer keeps for decoding. The compressed entries, part of it too, are taps already.
STATE: tuple[Tap, ...] = (
    Tap("cache.window", "B w C", "rotated key = value of the last tokens"),
    *_pending("cache.compressor", "W", Where.COMPRESSED),
    *_overlap("cache.compressor", "C"),
    *_pending("cache.indexer", "2Ci", Where.CSA),
    *_overlap("cache.indexer", "Ci"),
)

_BY_NAME = {tap.name: tap for tap in (*TAPS, *STATE)}


def taps_of(config: Config, layer: int | None) -> tuple[Tap, ...]:
    """The taps of one layer or stage, or of the model level (None), in order of execution."""
    return tuple(tap for tap in TAPS if tap.where.holds(config, layer))


def state_of(config: Config, layer: int) -> tuple[Tap, ...]:
    """The taps of the state that a layer or stage keeps between calls."""
    return tuple(tap for tap in STATE if tap.where.holds(config, layer))


def is_state(name: str) -> bool:
    """Whether a tap, by its name within its layer, is one of :data:`STATE`."""
    return name.startswith("cache.")


def tap_named(name: str) -> Tap:
    """The tap with this name within its layer. Raises :class:`KeyError` for an unknown one."""
    return _BY_NAME[name]


def shape_of(name: str) -> tuple[str, ...] | None:
    """The shape letters of a tap by its full name; None for what is no tap."""
    tap = _BY_NAME.get(_split(name)[2])
    return None if tap is None else tuple(tap.shape.split())


def select(keys: Iterable[TapKey], patterns: Iterable[str]) -> Iterator[TapKey]:
    """The taps that match any pattern, by shell rules, against the full name or the name within the layer.

    Raises:
        UsageError: a pattern that matches nothing, with close names.
    """
    keys = list(keys)
    matched = {pattern: {key for key in keys if _matches(key, pattern)} for pattern in patterns}
    for pattern, found in matched.items():
        if not found:
            known = ", a tap of other layers or of the model level" if pattern in _BY_NAME else ""
            close = _close(pattern, dict.fromkeys(key.tap.name for key in keys))
            raise UsageError(f"{pattern}{known}: matches no tap of this run; close ones: {', '.join(close)}")
    chosen = set().union(*matched.values())
    yield from (key for key in keys if key in chosen)


def _matches(key: TapKey, pattern: str) -> bool:
    return fnmatch.fnmatchcase(str(key), pattern) or fnmatch.fnmatchcase(key.tap.name, pattern)


def _close(name: str, names: Iterable[str] = _BY_NAME) -> list[str]:
    import difflib

    return difflib.get_close_matches(name, list(names), n=4, cutoff=0.0)

"""Planting a fault: one small, named change in one layer of a healthy model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from inspect import unwrap
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np

import dsv4_convert.parity.forward as forward_module
import dsv4_convert.parity.run as run_module
import dsv4_convert.weights.experts as streamed_experts
from dsv4_convert.checkpoint import Checkpoint
from dsv4_convert.formats.weight import StoredMatrix
from dsv4_convert.golden.archive import Golden
from dsv4_convert.golden.compact import Compact
from dsv4_convert.golden.noise import Mode
from dsv4_convert.golden.recorder import RecordingOptions, record
from dsv4_convert.golden.shrink import shrink
from dsv4_convert.golden.synthetic import dspark_config, tiny_config, tiny_v41_config, write_checkpoint
from dsv4_convert.model import experts
from dsv4_convert.parity.forward import Activations, Entering, Forward
from dsv4_convert.parity.metrics import Verdict
from dsv4_convert.parity.report.data import ParityReport
from dsv4_convert.parity.report.words import verdict
from dsv4_convert.parity.run import ParityOptions, ParityRun
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.names import located, parameters
from dsv4_convert.spec.taps import TapKey
from dsv4_convert.spec.v4.kinds import AttentionKind
from dsv4_convert.weights.published import PublishedWeights

Array = np.ndarray[Any, Any]
Arrays = dict[str, Array]

#: Sliding and hash, CSA and hash, HCA and learned, CSA and learned; matrices are square where they can be, so that a
#: transpose fits, and the Sinkhorn iterations are few enough that one less shows.
_SQUARE = {
    "hidden_size": 64,
    "moe_intermediate_size": 64,
    "num_attention_heads": 4,
    "q_lora_rank": 64,
    "o_lora_rank": 16,
    "index_head_dim": 16,
    "hc_sinkhorn_iters": 3,
}
MAIN = tiny_config(**_SQUARE)
#: More experts than bfloat16 can number.
MANY = tiny_config(n_routed_experts=300, num_hidden_layers=1, num_hash_layers=1, compress_ratios=[0, 0])
#: As the release has it: a clamp that hardly bites, matrices wider than a head, and a vocabulary whose tokens seldom
#: come twice. Faults that are smaller than rounding show in what many different tokens have in common, or many entries:
#: so HCA has short blocks, and the config says so in transformers' words.
WIDE = tiny_config(
    vocab_size=4096,
    hidden_size=64,
    moe_intermediate_size=64,
    num_attention_heads=4,
    head_dim=32,
    q_lora_rank=64,
    o_lora_rank=32,
    index_head_dim=16,
    swiglu_limit=10.0,
    layer_types=[AttentionKind.SLIDING, AttentionKind.CSA, AttentionKind.HCA, AttentionKind.CSA],
    compress_rates={AttentionKind.CSA: 4, AttentionKind.HCA: 16},
)
del WIDE["compress_ratios"]
#: A layer and an mtp stage, and a prompt far into a text, where wrong frequencies turn far.
STAGED = MAIN | {
    "num_hidden_layers": 1,
    "num_hash_layers": 0,
    "compress_ratios": [0, 0],
    "max_position_embeddings": 4096,
}
STAGE = 1
#: Two layers, both of which DSpark's three stages read. In bfloat16 a key and a sink show among few keys, and the token
#: before in a confidence that has as many numbers of it as of the streams.
DRAFTING = dspark_config(
    **_SQUARE,
    sliding_window=6,
    num_hidden_layers=2,
    num_hash_layers=0,
    compress_ratios=[0, 0, 0, 0, 0],
    dspark_target_layer_ids=[0, 1],
    dspark_markov_rank=64,
)
DRAFTS = (2, 3, 4)
#: Every kind of layer of V4.1: one of the architectures of which Automodel's activations are recorded.
V41_MODEL = tiny_v41_config(index_n_heads=64, sliding_window=6, engram_pad_token_id=10)
#: Two layers of V4.1, of both of which three stages read what enters the attention; in the second, after its engram.
V41_DRAFTING = tiny_v41_config(
    sliding_window=6,
    num_hidden_layers=2,
    compress_ratios=[0, 0, 0, 0, 0],
    kv_source_layer_ids=[],
    index_source_layer_ids=[],
    candidate_source_layer_id=None,
    engram_layer_ids=[1],
    engram_pad_token_id=10,
    hc_sinkhorn_iters=3,
    dspark_noise_token_id=95,
    dspark_target_layer_ids=[0, 1],
    dspark_markov_rank=64,
)


class Prompted(NamedTuple):
    """A model by its raw config, the positions of its prompts, and how many prompts there are."""

    raw: Mapping[str, Any]
    positions: range
    prompts: int = 1


#: By name. A draft is of five tokens, so those that draft have several.
MODELS: dict[str, Prompted] = {
    "main": Prompted(MAIN, range(300)),
    "many": Prompted(MANY, range(60)),
    "wide": Prompted(WIDE, range(600)),
    "staged": Prompted(STAGED, range(4000, 4060)),
    "drafting": Prompted(DRAFTING, range(60), prompts=4),
    "v4.1": Prompted(V41_MODEL, range(40)),
    "v4.1 drafting": Prompted(V41_DRAFTING, range(40), prompts=4),
}
#: A stand-in for V4.1's inference code.
V41_CODE = Path(__file__).parents[2] / "golden" / "release_code_v41"
SLIDING, CSA, HCA, LEARNED_CSA = range(4)
#: Other taps that code computes, beside the one that its faults are planted for: Sinkhorn's iterations, the projection
#: of a hyper-connection, the activation of experts, and every norm of a CSA layer.
MIXED = ("hc_ffn.comb",)
PROJECTED = ("hc_attn.post", "hc_attn.comb", "hc_ffn.pre", "hc_ffn.post", "hc_ffn.comb")
CLAMPED = ("ffn.shared_experts",)
NORMED = (
    "attn_norm", "attn.q_norm", "attn.q", "attn.kv_norm", "attn.compressor.norm", "attn.indexer.compressor.norm",
    "ffn_norm",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault. ``tap`` is the operation, by name within ``layer`` (None: the model level), that must be named.

    Exactly one of these says what is wrong: ``arrays`` changes parameters as the model has them, ``tensor`` changes
    tensors as they are read from the source, ``table`` changes the names table (a context), ``config`` replaces fields
    of the configuration, ``code`` replaces functions: (owner, attribute) -> replacement.

    ``also`` are other layers that the fault is in. ``or_taps`` are other operations of the layer that the same wrong
    parameter or code computes. They may be named instead, and each of them must be wrong by itself in float32.
    ``legal``: why the change is one that rounding to bfloat16 may make, so that it must pass there. ``runs``: the layer
    in which code of this fault runs (-1: the embedding), if what it hands on is wrong and so the tap is one of a later
    layer; it shows in a run from the tokens only.
    """

    name: str
    layer: int | None
    tap: str
    arrays: Callable[[Arrays], object] | None = None
    tensor: Callable[[str, Array], Array] | None = None
    table: Callable[[], Any] | None = None
    config: Mapping[str, Any] | None = None
    code: Mapping[tuple[Any, str], Any] | None = None
    also: tuple[int, ...] = ()
    or_taps: tuple[str, ...] = ()
    legal: str = ""
    model: str = "main"
    runs: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The options of a run that shows the fault; a fault in what is handed on needs all layers from the tokens."""
        return {} if self.runs is None else {"modes": (Mode.CUMULATIVE,)}

    @property
    def kind(self) -> str:
        """Where the fault is."""
        kinds = ("arrays", "tensor", "table", "config", "code")
        (kind,) = (kind for kind in kinds if getattr(self, kind) is not None)
        return {"arrays": "weights", "tensor": "decoding", "table": "names table"}.get(kind, kind)

    @property
    def full_tap(self) -> str:
        """The full name of the tap that must be named."""
        return str(TapKey.of(Config.from_hf(MODELS[self.model].raw), self.layer, self.tap))

    def alters(self, report: ParityReport) -> bool:
        """Whether all operations that may be named are wrong by themselves, in a report with a localization."""
        wrong = {result.short for localization in report.localizations for result in localization.wrong}
        return wrong >= {self.tap, *self.or_taps}

    def named_by(self, report: ParityReport) -> bool:
        """Whether divergence, localization and verdict name the operation, and other layers are clean."""
        return names(report, self.layer, (self.tap, *self.or_taps), also=self.also)


def names(report: ParityReport, layer: int | None, taps: Iterable[str], *, also: Iterable[int | None] = ()) -> bool:
    """Whether divergence, localization and verdict name one of some taps, and layers but its own and ``also`` pass."""
    first, wrong = report.first_diverging, report.first_wrong
    isolated = Mode.CUMULATIVE not in report.modes  # otherwise the layers after it inherit the error
    failing = {tap.layer for tap in report.taps if tap.verdict is Verdict.FAIL}
    return (
        first is not None
        and wrong is not None
        and first.name == wrong.name
        and first.layer == layer
        and first.short in taps
        and (failing <= {layer, *also} or not isolated)
        and first.name in verdict(report)
    )


class Held:
    """All parameters of a small model in memory, as :class:`dsv4_convert.weights.parameters.Parameters`."""

    def __init__(self, config: Config, arrays: Arrays, mapped: Array | None = None) -> None:
        self.config = config
        self.arrays = arrays
        self.mapped = mapped
        self.metadata = {"source": "memory", "storage": "float32"}
        self.layers = tuple(range(config.stage_layers.stop))

    @classmethod
    def read_from(cls, weights: PublishedWeights) -> Held:
        """Everything that ``weights`` has."""
        arrays = {path: weights.read(path) for path, _, _ in parameters(weights.config)}
        tables = map(weights.config.table_of, range(weights.config.num_hidden_layers))
        return cls(weights.config, arrays, weights.token_map() if any(tables) else None)

    def check_layers(self, wanted: tuple[int, ...]) -> None:
        """All are there."""

    def read(self, path: str, dtype: Any = np.float32) -> Array:
        """One parameter."""
        return self.arrays[path]

    def read_expert(self, path: str, expert: int, dtype: Any = np.float32) -> Array:
        """One expert of a stack."""
        return self.arrays[path][expert]

    def read_rows(self, path: str, rows: Array, dtype: Any = np.float32) -> Array:
        """Some rows."""
        return self.arrays[path][rows]

    def matrix(self, path: str, at: int | None) -> StoredMatrix:
        """A matrix, or entry of a stack, which is stored as the model has it."""
        array = self.arrays[path] if at is None else self.arrays[path][at]
        return StoredMatrix(read=lambda rows, columns: array[rows, columns], dtype=array.dtype)

    def token_map(self) -> Array:
        """The token map of a model that has engrams."""
        assert self.mapped is not None
        return self.mapped

    def damaged(self, path: str) -> bool:
        """Nothing is stored."""
        return False

    def read_region(self, path: str, region: tuple[slice, ...], dtype: Any = np.float32) -> Array:
        """A part of one."""
        return self.arrays[path][region]


@dataclasses.dataclass(frozen=True)
class Patient:
    """A healthy model: its published checkpoint, its golden, its parameters."""

    folder: Path
    golden: Golden
    held: Held

    def source(self) -> PublishedWeights:
        """The published checkpoint."""
        return PublishedWeights.open(self.folder / "hf")

    def compacted(self) -> Patient:
        """The same with a compact golden, which keeps the last token exactly."""
        form = Compact.of([-1], self.golden.tokens.shape[1])
        return dataclasses.replace(self, golden=shrink(self.golden, self.folder / "compact", form))


def patient(folder: Path, model: str, *, noise: Iterable[str] = ("float32",)) -> Patient:
    """Make one of the healthy models in ``folder`` and record it, with the noise floors of some dtypes."""
    raw, positions, prompts = MODELS[model]
    write_checkpoint(folder / "hf", raw, seed=0)
    if model == "v4.1":
        from ..v41 import automodel, recorded

        held, (config, known) = Held.read_from(PublishedWeights.open(folder / "hf")), automodel("every kind of layer")
        assert config == raw
        return Patient(folder, recorded(held, folder / "golden", known.pop("tokens"), known=known), held)
    architecture = Config.from_hf(raw)
    ids = np.random.default_rng(6).integers(0, architecture.vocab_size, (prompts, len(positions))).astype(np.int32)
    stages = model in ("staged", "drafting", "v4.1 drafting")
    options = RecordingOptions(tokens=ids, first_position=positions.start, noise=noise, stages=stages)
    if architecture.maps_tokens:
        options = dataclasses.replace(options, release_code=V41_CODE, numerics="plain")
    golden = record(folder / "hf", folder / "golden", options)
    return Patient(folder, golden, Held.read_from(PublishedWeights.open(folder / "hf")))


def examine(patient: Patient, fault: Fault, *, against: PublishedWeights | None = None, **options: Any) -> ParityReport:
    """The isolated parity report of the faulty model, or what :class:`ParityOptions` ask for.

    Raises:
        AssertionError: the fault changes nothing, or a layer that it is not in.
    """
    with _planted(patient, fault) as held, patch.object(run_module, "Forward", partial(_FaultyForward, fault)):
        return ParityRun(held, patient.golden, ParityOptions(**options), against=against).run()


@contextmanager
def _planted(patient: Patient, fault: Fault) -> Iterator[Held]:
    """The parameters with the fault in them; faults of config and code are planted while their layer runs."""
    healthy = patient.held
    arrays = dict(healthy.arrays)
    if fault.arrays is not None:
        fault.arrays(arrays)
    if fault.tensor is not None:
        source = PublishedWeights.open(patient.folder / "hf")
        source._checkpoint = _Tampered(source._checkpoint, fault.tensor)  # type: ignore[assignment]
        arrays = Held.read_from(source).arrays
    if fault.table is not None:
        with fault.table():
            arrays = Held.read_from(patient.source()).arrays
    if fault.kind not in ("config", "code"):
        changed = [path for path, array in arrays.items() if not np.array_equal(array, healthy.arrays[path])]
        assert changed, "the fault changes nothing"
        owners = {located(healthy.config, path)[1] for path in changed}
        assert owners <= {fault.layer, *fault.also}, "other layers are as they were"
        assert all(arrays[path].shape == healthy.arrays[path].shape for path in changed)
    yield Held(healthy.config, arrays, healthy.mapped)


class _Tampered:
    """A checkpoint whose tensors are changed as they are read."""

    def __init__(self, checkpoint: Checkpoint, change: Callable[[str, Array], Array]) -> None:
        self._checkpoint = checkpoint
        self._change = change

    def read(self, name: str) -> Array:
        return self._change(name, self._checkpoint.read(name))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoint, name)


class _FaultyForward(Forward):
    """The model, with a fault of config or code in one layer."""

    def __init__(self, fault: Fault, weights: Held, tokens: Array, dtype: Any, **options: Any) -> None:
        super().__init__(weights, tokens, dtype, **options)
        self._fault = fault
        self._held = weights

    def embed(self) -> tuple[Activations, Entering]:
        with self._active(None if self._fault.runs is None else -1):
            return super().embed()

    def layer(self, layer: int, entering: Any, overrides: Any = None) -> tuple[Activations, Entering]:
        with self._active(layer):
            return super().layer(layer, entering, overrides)

    def head(self, streams: Any, overrides: Any = None, *, stage: int | None = None) -> Activations:
        with self._active(stage):
            return super().head(streams, overrides, stage=stage)

    def _active(self, layer: int | None) -> Any:
        fault = self._fault
        runs = fault.layer if fault.runs is None else fault.runs
        if layer != runs or fault.kind not in ("config", "code"):
            return nullcontext()
        stack = ExitStack()
        if fault.config is not None:
            stack.enter_context(
                patch.object(self._held, "config", dataclasses.replace(self._held.config, **fault.config))
            )
        for (owner, name), replacement in (fault.code or {}).items():
            stack.enter_context(patch.object(owner, name, replacement))
        stack.enter_context(uncompiled())
        # The healthy model's shapes are checked. Here the checks take as long as the arithmetic.
        stack.enter_context(patch.object(jaxtyping.config, "jaxtyping_disable", True))
        return stack


@contextmanager
def uncompiled() -> Iterator[None]:
    """The model without programs of its own: those from before do not have a fault, and new ones take seconds each.

    JAX's functions stay programs. Uncompiled, they would be many times as many, of one operation each.
    """
    with ExitStack() as stack:
        for name in ("_to_experts", "_from_experts", "_wanted_rows", "_choose"):
            stack.enter_context(patch.object(forward_module, name, unwrap(getattr(forward_module, name))))
        for name in ("fori_loop", "scan", "cond"):
            stack.enter_context(patch.object(jax.lax, name, _step_by_step(getattr(jax.lax, name))))
        # Runs side by side, since a loop that is not compiled takes every run's operations one by one.
        stack.enter_context(patch.object(jax.lax, "map", lambda function, runs: jax.vmap(function)(runs)))
        stack.enter_context(patch.object(streamed_experts, "_expert", lambda: _uncompiled_expert))
        yield


def _step_by_step(loop: Callable[..., Any]) -> Callable[..., Any]:
    def run(*operands: Any, **options: Any) -> Any:
        with jax.disable_jit():
            return loop(*operands, **options)

    return run


def _uncompiled_expert(*operands: Any) -> jax.Array:
    *arrays, limit, rule = operands
    x, share, w1, w2, w3 = map(jnp.asarray, arrays)
    return experts.weighted(x, share, w1, w2, w3, limit, rule)

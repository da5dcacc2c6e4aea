"""A parity run: the checkpoint's layers against a golden, tap by tap."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsv4_convert.config import Attention, Config
from dsv4_convert.errors import BadInput, UsageError, listed
from dsv4_convert.names import check_layers
from dsv4_convert.restore import Weights
from dsv4_convert.taps import Tap, Values, by_name, full_name, select, taps_of
from golden.archive import Golden, open_golden
from parity.choices import compare_choices
from parity.forward import Forward, Taken
from parity.metrics import Verdict, compare
from parity.report import Report, TapResult
from parity.tolerances import Mode, Tolerance, tolerance

Array = np.ndarray[Any, Any]

#: Called with the layer that is about to run (None: the model level).
Progress = Callable[[int | None], None]

#: Taps that link one layer to the next: what leaves it, and what enters it.
_STREAMS, _INPUT = "hc_ffn.streams", "input"


def run(
    checkpoint: Path,
    golden: Path,
    *,
    layers: Iterable[int] | None = None,
    taps: Iterable[str] = (),
    mode: Mode = Mode.ISOLATED,
    progress: Progress = lambda _: None,
) -> Report:
    """Compare a converted checkpoint with a golden.

    Args:
        checkpoint: Orbax checkpoint that dsv4 wrote.
        golden: recorded golden.
        layers: layers to compare; None for all of them and the model level: embedding, head, logits.
        taps: patterns of the taps to compare; none for all.
        mode: isolated or cumulative.
        progress: called before each layer.

    Raises:
        UsageError: a layer or tap that neither side has.
        BadInput: a damaged file, or a golden of another architecture.
    """
    weights, recorded = Weights.open(checkpoint), open_golden(golden)
    config = weights.config
    _same_architecture(config, recorded.config, golden)
    chosen = check_layers(config, layers)
    allowed = tolerance(mode, config)
    names = _names(config, chosen, model_level=layers is None)
    comparison = _Comparison(recorded, config, allowed, list(select(names, taps)) if taps else names)
    last = config.num_hidden_layers - 1
    with_head = comparison.wants(None, before=False)
    if mode is Mode.ISOLATED:
        needed = tuple(layer for layer in chosen if comparison.wants(layer))
    else:
        needed = tuple(range((last if with_head else max(chosen)) + 1))
    weights.check_layers(needed)
    _check_recorded(recorded, (*chosen, last) if with_head else chosen, golden)

    forward = Forward(weights, recorded.tokens)
    streams: Any = None
    if mode is Mode.CUMULATIVE or comparison.wants(None, before=True):
        progress(None)
        taken, streams = forward.embed()
        comparison.add(taken)
    for layer in needed:
        progress(layer)
        entering = recorded.read(f"layers.{layer}.{_INPUT}") if mode is Mode.ISOLATED else streams
        taken, streams = forward.layer(layer, entering)
        results = comparison.judge(taken)
        if forced := comparison.ties(taken, layer):
            # Follow the golden's choice, so that everything after the tie is compared on equal terms.
            followed, streams = forward.layer(layer, entering, forced)
            results = comparison.judge(followed, instead=results)
        comparison.results += results
    if with_head:
        progress(None)
        if mode is Mode.ISOLATED:
            streams = recorded.read(f"layers.{last}.{_STREAMS}")
        comparison.add(forward.head(streams))
    return Report(
        mode=mode,
        tolerance=allowed,
        layers=chosen,
        taps=tuple(comparison.results),
        checkpoint={"path": str(checkpoint), **{key: weights.metadata[key] for key in ("source", "storage")}},
        golden={
            "path": str(golden),
            "reference": dataclasses.asdict(recorded.manifest.request.reference),
            "source": dataclasses.asdict(recorded.manifest.request.source),
        },
        platform=_platform(),
    )


class _Comparison:
    """Judges taps against the golden as they come, in order of execution."""

    def __init__(self, golden: Golden, config: Config, tolerance: Tolerance, wanted: Sequence[str]) -> None:
        self._golden = golden
        self._config = config
        self._tolerance = tolerance
        self._order = {name: position for position, name in enumerate(wanted)}
        self.results: list[TapResult] = []

    def wants(self, layer: int | None, *, before: bool | None = None) -> bool:
        """Whether any tap of the layer, or of the model level before or after the layers, is to be compared."""
        at = [tap for tap in taps_of(self._config, layer) if before is None or (tap.name == "embed") is before]
        return any(full_name(tap, layer) in self._order for tap in at)

    def add(self, taken: Taken) -> None:
        """Judge and keep."""
        self.results += self.judge(taken)

    def judge(self, taken: Taken, instead: Iterable[TapResult] = ()) -> list[TapResult]:
        """Results of the wanted taps in order of execution; a tie in ``instead`` stays what it is."""
        ties = {result.name: result for result in instead if result.verdict is Verdict.TIE}
        # Whatever passed through a compiled program comes back in alphabetical order.
        ordered = sorted(taken.keys() & self._order.keys(), key=self._order.__getitem__)
        return [ties[name] if name in ties else self._one(name, taken[name]) for name in ordered]

    def ties(self, taken: Taken, layer: int) -> dict[str, Array]:
        """The golden's choices where ours is tied with them, by tap name within the layer, whatever is compared."""
        if layer not in self._golden.layers:
            return {}
        choices = [tap for tap in taps_of(self._config, layer) if tap.values is Values.CHOICE]
        return {
            tap.name: self._golden.read(full_name(tap, layer))
            for tap in choices
            if self._one(full_name(tap, layer), taken[full_name(tap, layer)]).verdict is Verdict.TIE
        }

    def _one(self, name: str, found: Array) -> TapResult:
        tap, layer = by_name(name)
        golden = self._golden.read(name)
        if tap.values is Values.REAL:
            verdict, distance, reason = compare(found, golden, self._tolerance)
            return TapResult(name=name, verdict=verdict, reason=reason, shape=found.shape, distance=distance)
        scores = self._scores(tap, layer)
        visible = _visible(self._config, tap, layer, found.shape)
        verdict, flips, reason = compare_choices(found, golden, scores, visible, self._tolerance)
        return TapResult(name=name, verdict=verdict, reason=reason, shape=found.shape, flips=flips)

    def _scores(self, tap: Tap, layer: int | None) -> Array | None:
        scores = next((other for other in taps_of(self._config, layer) if other.name == tap.scores), None)
        return None if scores is None else self._golden.read(full_name(scores, layer))


def _visible(config: Config, tap: Tap, layer: int | None, shape: tuple[int, ...]) -> Array | None:
    """Number of compressed entries that each query may choose from; None for a choice of experts."""
    if layer is None or not tap.where.holds(config, layer) or tap.scores != "attn.indexer.scores":
        return None
    assert config.attention[layer] is Attention.CSA
    return np.broadcast_to((np.arange(shape[1]) + 1) // config.csa_ratio, shape[:2])


def _names(config: Config, layers: Iterable[int], *, model_level: bool) -> list[str]:
    """Full names of every tap of the chosen layers, in order of execution."""
    outer = [full_name(tap, None) for tap in taps_of(config, None)] if model_level else []
    inner = [full_name(tap, layer) for layer in layers for tap in taps_of(config, layer)]
    return outer[:1] + inner + outer[1:]


def _check_recorded(golden: Golden, layers: Iterable[int], path: Path) -> None:
    absent = sorted(set(layers) - set(golden.layers))
    if absent:
        raise UsageError(f"{path}: recorded the layers {list(golden.layers)}, not {absent}; record these too")


def _same_architecture(ours: Config, theirs: Config, golden: Path) -> None:
    """Raises :class:`BadInput` unless both describe the same mathematics; how weights are stored does not matter."""
    storage = {"expert_dtype", "weight_block_size", "num_mtp_stages"}
    pairs = [
        (field.name, getattr(ours, field.name), getattr(theirs, field.name))
        for field in dataclasses.fields(Config)
        if field.name not in storage
    ]
    problems = [f"{name}: checkpoint {mine!r}, golden {its!r}" for name, mine, its in pairs if mine != its]
    if problems:
        raise BadInput(
            f"{golden}: recorded from another architecture:\n{listed(problems)}\n"
            "Record a golden of this checkpoint's source with `dsv4 golden record`."
        )


def _platform() -> Mapping[str, Any]:
    device = jax.devices()[0]
    versions = {name: importlib.metadata.version(name) for name in ("dsv4", "jax", "jaxlib", "flax")}
    return {"backend": jax.default_backend(), "device": device.device_kind, "dtype": "float32", "versions": versions}

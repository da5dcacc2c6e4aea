"""A parity run: the model's layers against a golden, tap by tap."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_convert.config import Config
from dsv4_convert.converted import Weights
from dsv4_convert.errors import BadInput, UsageError, did_you_mean, listed
from dsv4_convert.golden.archive import Golden, open_golden
from dsv4_convert.golden.layout import INPUT, STREAMS
from dsv4_convert.golden.noise import MODES, Mode
from dsv4_convert.golden.reach import reach
from dsv4_convert.model import PLAIN, Numerics
from dsv4_convert.model.mesh import parse_mesh
from dsv4_convert.names import check_layers
from dsv4_convert.parameters import Parameters
from dsv4_convert.parity.baseline import check_writable, open_baseline
from dsv4_convert.parity.comparison import Comparison, Phase
from dsv4_convert.parity.descent import blame_first, descend
from dsv4_convert.parity.detail import Detail
from dsv4_convert.parity.devices import Devices
from dsv4_convert.parity.forward import Forward, Taken
from dsv4_convert.parity.gate import Request, gated
from dsv4_convert.parity.logits import LogitsComparison, every_position, summary
from dsv4_convert.parity.metrics import Verdict, noise_multiple
from dsv4_convert.parity.report import Descent, Growth, Report, TapResult
from dsv4_convert.parity.tolerances import LIMITS, UNIT
from dsv4_convert.published import PublishedWeights
from dsv4_convert.store import ALONE, Processes
from dsv4_convert.taps import full_name, select, taps_of

Array = np.ndarray[Any, Any]

#: Of float32 products, as JAX names them.
Precision: TypeAlias = Literal["highest", "high", "default"]

#: Called with the layer that is about to run (None: the model level).
Progress = Callable[[int | None], None]


def run(
    checkpoint: Path | None,
    golden: Path | str,
    *,
    source: Path | None = None,
    layers: Iterable[int] | None = None,
    taps: Iterable[str] = (),
    modes: Sequence[Mode] | None = None,
    phase: Phase | None = None,
    dtype: str | None = None,
    against: Path | None = None,
    require_reach: bool = False,
    mesh: str | None = None,
    processes: Processes = ALONE,
    precision: Precision = "highest",
    baseline: Request | None = None,
    progress: Progress = lambda _: None,
    detail: bool = False,
) -> Report:
    """Compare a converted checkpoint, or a published one before it is converted, with a golden.

    Args:
        checkpoint: Orbax checkpoint that dsv4 wrote; None with ``source``.
        golden: folder or URL of a recorded golden.
        source: folder of a published checkpoint, whose weights are decoded as they are needed.
        layers: layers to compare; None for all of them and the model level: embedding, head, logits.
        taps: patterns of the taps to compare; none for all.
        modes: isolated, cumulative, or both; None for isolated, or cumulative where the golden is compact and holds no
            inputs of layers.
        phase: of a golden whose last tokens came one by one, the tokens to compare; None for all.
        dtype: of weights and activations, float32 or bfloat16; None for float32, or bfloat16 where the golden is one of
            the release's own code.
        against: the published checkpoint; the weights of wrong operations are compared with it.
        require_reach: whether a golden that leaves an operation or an expert unchecked is a failure.
        mesh: how all devices share the dense parts of a layer, as :func:`~dsv4_convert.model.mesh.parse_mesh` reads
            it; None for one that divides everything.
        processes: those of ``jax.distributed`` that call this with the same arguments. They share the experts, too, and
            all of them get the report.
        precision: of float32 products. The limits are for ``highest``; accelerators use fewer bits for the others.
        baseline: the errors that are recorded of this golden; what has grown beyond them fails.
        progress: called before each layer.
        detail: whether the report gets what pictures need, in ``Report.detail``. Takes time, and some numbers of memory
            for every token and layer.

    Raises:
        UsageError: a layer or tap that neither side has, a dtype whose noise floor the golden does not carry, a
            mode that a compact golden does not allow, or a baseline to be updated with another precision than highest.
        BadInput: a damaged file, a golden of another architecture, or a baseline of another golden.
        ResourceError: the golden is remote and cannot be reached, another process is gone, or the baseline cannot be
            written.

    Examples:
        >>> run_parity(Path("orbax"), "golden/data/tiny", layers=[0]).passed
        True
    """
    sizes = None if mesh is None else parse_mesh(mesh)
    recorded = open_golden(golden)
    wanted = None if layers is None else check_layers(recorded.config, layers)
    weights: Parameters
    if checkpoint is not None and source is None:
        weights, place = Weights.open(checkpoint), checkpoint
    elif source is not None and checkpoint is None:
        up_to = _up_to(wanted, _modes(recorded, modes))
        weights, place = PublishedWeights.open(source, layers=up_to), source
    else:
        raise UsageError("expected a converted CHECKPOINT, or --source and a published one")
    _same_architecture(weights.config, recorded.config, recorded.path)
    published = None if against is None else PublishedWeights.open(against, layers=wanted)
    if baseline is not None:  # what is wrong with it is said before anything runs
        if baseline.update and precision != "highest":
            raise UsageError(
                f"--update-baseline: expected --precision highest, found {precision}; a baseline has one record for "
                "all precisions, and errors of fewer bits are no measure for runs with all of them"
            )
        open_baseline(baseline.path, recorded, create=baseline.update)
        if baseline.update and processes.first:
            check_writable(baseline.path)
    report = compare_model(
        weights,
        recorded,
        layers=wanted,
        taps=taps,
        modes=modes,
        phase=phase,
        dtype=dtype,
        against=published,
        require_reach=require_reach,
        devices=Devices.all(weights.config, processes, sizes),
        precision=precision,
        progress=progress,
        name=str(place),
        detail=detail,
    )
    if baseline is None:
        return report
    with processes.step("baseline"):
        return gated(report, recorded, baseline, partial=wanted is not None or bool(taps), write=processes.first)


def compare_model(
    weights: Parameters,
    golden: Golden,
    *,
    layers: Iterable[int] | None = None,
    taps: Iterable[str] = (),
    modes: Sequence[Mode] | None = None,
    phase: Phase | None = None,
    dtype: str | None = None,
    against: PublishedWeights | None = None,
    require_reach: bool = False,
    devices: Devices | None = None,
    precision: Precision = "highest",
    progress: Progress = lambda _: None,
    name: str = "weights",
    detail: bool = False,
) -> Report:
    """:func:`run` for weights and a golden that are open already; ``name`` is what the report calls the weights."""
    release = golden.numerics == "release"
    dtype = dtype or ("bfloat16" if release else "float32")
    if dtype not in UNIT:
        raise UsageError(f"--dtype {dtype}: expected one of {', '.join(UNIT)}{did_you_mean(dtype, UNIT)}")
    if release and dtype != "bfloat16":
        raise UsageError(f"--dtype {dtype}: {golden.path} is of the release's own code, which runs in bfloat16")
    if phase is Phase.DECODE and not golden.decode:
        raise UsageError(f"{golden.path}: all tokens at once; record one with `dsv4 golden record --decode N`")
    ordered = _modes(golden, modes)
    config = golden.config
    chosen = check_layers(config, layers)
    _check_recorded(golden, chosen)
    names = _names(golden, chosen, model_level=layers is None)
    devices = devices or Devices()
    wanted = list(select(names, taps)) if taps else names
    collected = Detail(golden) if detail else None
    running = _Run(weights, golden, dtype, wanted, against, progress, phase, devices, collected)
    needed = {mode: running.needed(mode, chosen) for mode in ordered}
    weights.check_layers(tuple(sorted({layer for layers in needed.values() for layer in layers})))
    with jax.default_matmul_precision(precision):
        running.forward(needed)
    return Report(
        modes=ordered,
        decode=golden.decode,
        phase=None if phase is None else phase.value,
        dtype=dtype,
        limits=LIMITS,
        layers=chosen,
        taps=tuple(result for mode in ordered for result in running.results[mode]),
        descents=tuple(running.descents),
        growth=tuple(running.growth),
        reach=tuple(reach(golden, layer) for layer in chosen),
        require_reach=require_reach,
        logits=running.logits,
        checkpoint={"path": name, **{key: weights.metadata[key] for key in ("source", "storage")}},
        golden={
            "path": str(golden.path),
            "digest": golden.manifest.digest,
            "reference": dataclasses.asdict(golden.manifest.request.reference),
            "source": dataclasses.asdict(golden.manifest.request.source),
        },
        platform=_platform(dtype, precision) | devices.describe(),
        detail=collected,
    )


class _Run:
    """The state of one run: what was found so far, and the streams that go from layer to layer."""

    def __init__(
        self,
        weights: Parameters,
        golden: Golden,
        dtype: str,
        wanted: Sequence[str],
        against: PublishedWeights | None,
        progress: Progress,
        phase: Phase | None,
        devices: Devices,
        detail: Detail | None,
    ) -> None:
        self._detail = detail
        self._weights = weights
        self._golden = golden
        self._config = golden.config
        self._wanted = wanted
        self._against = against
        self._progress = progress
        self._comparison = Comparison(golden, dtype, phase)
        # Where activations are quantised, one rounding grows to the size of a fault within a layer: isolate operations.
        self._fed = golden.numerics == "release"
        self._model = Forward(
            weights,
            golden.tokens,
            jnp.dtype(dtype),
            first_position=golden.manifest.request.first_position,
            decode=golden.decode,
            numerics=Numerics.of_release(golden.config) if self._fed else PLAIN,
            devices=devices,
        )
        self._streams: Any = None
        self.results: dict[Mode, list[TapResult]] = {mode: [] for mode in MODES}
        self.descents: list[Descent] = []
        self.growth: list[Growth] = []
        self.logits: LogitsComparison | None = None

    def needed(self, mode: Mode, chosen: Sequence[int]) -> tuple[int, ...]:
        """The layers that have to run for what is wanted."""
        if mode is Mode.ISOLATED:
            return tuple(layer for layer in chosen if self._wants(layer))
        last = self._config.num_hidden_layers - 1 if self._wants_head() else max(chosen)
        return tuple(range(last + 1))

    def forward(self, needed: Mapping[Mode, Sequence[int]]) -> None:
        """Run everything, layer by layer."""
        if Mode.CUMULATIVE in needed or self._wants(None):
            self._embed(needed)
        for layer in sorted({layer for layers in needed.values() for layer in layers}):
            self._progress(layer)
            self._layer(layer, [mode for mode, layers in needed.items() if layer in layers])
        if self._wants_head():
            self._progress(None)
            self._head(list(needed))

    def _wants(self, layer: int | None) -> bool:
        return any(name in self._wanted for name in self._golden.taps(layer))

    def _wants_head(self) -> bool:
        return any(full_name(tap, None) in self._wanted for tap in taps_of(self._config, None) if tap.name != "embed")

    def _embed(self, needed: Mapping[Mode, Sequence[int]]) -> None:
        self._progress(None)
        taken, self._streams = self._model.embed()
        for mode in needed:
            self._judge(taken, mode)

    def _layer(self, layer: int, modes: Sequence[Mode]) -> None:
        """One layer in every mode that needs it."""
        leaving: dict[Mode, Array] = {}
        failed = False
        for mode in modes:
            taken, streams = self._run_layer(layer, mode)
            failed |= self._judge(taken, mode)
            leaving[mode] = np.asarray(streams, np.float32)
            if mode is Mode.CUMULATIVE:
                self._streams = streams
        if failed:
            self._descend(layer, taken, modes[-1])
        if len(leaving) == len(MODES) and not self._fed:
            self.growth.append(self._grown(layer, leaving))

    def _run_layer(self, layer: int, mode: Mode) -> tuple[Taken, Any]:
        """A layer with the golden's choices, because a tie must not change what follows it.

        In cumulative mode a choice that fails is the model's own instead, so that its consequences show.
        """
        choices = self._comparison.choices(layer)
        if mode is Mode.ISOLATED:
            given = self._comparison.everything(layer) if self._fed else choices
            return self._model.layer(layer, self._golden.read(f"layers.{layer}.{INPUT}"), given)
        taken, streams = self._model.layer(layer, self._streams, choices)
        names = [f"layers.{layer}.{tap}" for tap in choices]
        results = self._comparison.judge(taken, mode, names)
        failing = {result.short for result in results if result.verdict is Verdict.FAIL}
        if not failing:
            return taken, streams
        followed = {tap: choice for tap, choice in choices.items() if tap not in failing}
        return self._model.layer(layer, self._streams, followed)

    def _head(self, modes: Sequence[Mode]) -> None:
        last = self._config.num_hidden_layers - 1
        failed = False
        for mode in modes:
            isolated = mode is Mode.ISOLATED
            given = self._comparison.everything(None) if isolated and self._fed else None
            streams = self._golden.read(f"layers.{last}.{STREAMS}") if isolated else self._streams
            taken = self._model.head(streams, given)
            failed |= self._judge(taken, mode)
            view = self._golden.views("logits")[-1]
            _, view = self._comparison.within_phase("logits", view.of(taken["logits"]), view)
            if (compared := every_position(taken["logits"], view, self._golden.tokens)) is not None:
                self.logits = summary(*compared)
                if self._detail is not None:
                    self._detail.positions[mode] = compared[0]
        if failed or any(
            result.verdict is Verdict.FAIL and result.name == "embed" for result in self.results[modes[0]]
        ):
            self._descend(None, taken, modes[-1])

    def _judge(self, taken: Taken, mode: Mode) -> bool:
        """Judge what is wanted; whether anything fails."""
        fed = self._fed and mode is Mode.ISOLATED
        results = self._comparison.judge(taken, mode, self._wanted, fed=fed, detail=self._detail)
        self.results[mode] += results
        return any(result.verdict is Verdict.FAIL for result in results)

    def _descend(self, layer: int | None, taken: Taken, mode: Mode) -> None:
        """Look for the operation that is wrong. ``taken``: the taps of the layer's last run, which was in ``mode``."""
        sides = (self._comparison, self._weights, self._against)
        if self._golden.compact is None:
            fed = taken if self._fed and layer is not None and mode is Mode.ISOLATED else None
            self.descents.append(descend(layer, self._model, *sides, fed))
        elif not self.descents:
            results = self.results[Mode.CUMULATIVE]
            first = next(result for result in results if result.verdict is Verdict.FAIL)
            self.descents.append(blame_first(first, taken, *sides))

    def _grown(self, layer: int, leaving: Mapping[Mode, Array]) -> Growth:
        """Split the error of the streams that leave a layer."""
        name = f"layers.{layer}.{STREAMS}"
        views = self._golden.views(name)
        golden = views[0].values.astype(np.float64)
        floors = {mode: self._comparison.floor(name, views, mode) for mode in MODES}
        size = float(np.sqrt(np.mean(np.square(golden)))) or 1.0

        def relative(difference: Array) -> float:
            return float(np.sqrt(np.mean(np.square(difference)))) / size

        isolated, cumulative = (leaving[mode].astype(np.float64) for mode in MODES)
        return Growth(
            layer=layer,
            inherited=relative(cumulative - isolated),
            added=relative(isolated - golden),
            total=relative(cumulative - golden),
            added_noise=noise_multiple(isolated - golden, floors[Mode.ISOLATED]),
            total_noise=noise_multiple(cumulative - golden, floors[Mode.CUMULATIVE]),
        )


def _names(golden: Golden, layers: Iterable[int], *, model_level: bool) -> list[str]:
    """Full names of every tap of the chosen layers, in order of execution."""
    outer = golden.taps(None) if model_level else ()
    return [*outer[:1], *(name for layer in layers for name in golden.taps(layer)), *outer[1:]]


def _modes(golden: Golden, modes: Sequence[Mode] | None) -> tuple[Mode, ...]:
    """The modes to run, isolated first. Raises :class:`UsageError`."""
    if modes is None:
        return (Mode.ISOLATED if golden.compact is None else Mode.CUMULATIVE,)
    if not modes:
        raise UsageError("no mode: expected isolated, cumulative or both")
    if golden.compact is not None and Mode.ISOLATED in modes:
        raise UsageError(
            f"{golden.path}: a compact golden, which does not hold the inputs of layers; compare with --mode cumulative"
        )
    return tuple(mode for mode in MODES if mode in modes)


def _up_to(layers: Sequence[int] | None, modes: Sequence[Mode]) -> tuple[int, ...] | None:
    """The layers that run: those that are wanted, and in cumulative mode those before them; None for all."""
    if layers is None:
        return None
    return tuple(range(max(layers) + 1)) if Mode.CUMULATIVE in modes else tuple(layers)


def _check_recorded(golden: Golden, layers: Iterable[int]) -> None:
    absent = sorted(set(layers) - set(golden.layers))
    if absent:
        raise UsageError(f"{golden.path}: recorded the layers {list(golden.layers)}, not {absent}; record these too")


def _same_architecture(ours: Config, theirs: Config, golden: Path | str) -> None:
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


def _platform(dtype: str, precision: Precision) -> dict[str, Any]:
    device = jax.devices()[0]
    packages = {"dsv4": "dsv4-convert", "jax": "jax", "jaxlib": "jaxlib", "flax": "flax"}
    versions = {name: importlib.metadata.version(package) for name, package in packages.items()}
    return {
        "backend": jax.default_backend(),
        "device": device.device_kind,
        "dtype": dtype,
        "precision": precision,
        "versions": versions,
    }

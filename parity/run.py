"""A parity run: the model's layers against a golden, tap by tap."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_convert.checkpoint.locate import open_source
from dsv4_convert.errors import BadInput, ResourceError, UsageError, did_you_mean, listed
from dsv4_convert.golden.archive import Golden, open_golden
from dsv4_convert.golden.layout import INPUT, STREAMS, TOKENS, entering, is_fed, known_tokens, origin_of, parts
from dsv4_convert.golden.noise import MODES, Mode
from dsv4_convert.golden.prompt_coverage import LayerCoverage, prompt_coverage
from dsv4_convert.model import PLAIN
from dsv4_convert.model.architectures import release_numerics
from dsv4_convert.model.mesh import parse_mesh
from dsv4_convert.parity.baseline import check_writable, open_baseline
from dsv4_convert.parity.blame import differing_weights
from dsv4_convert.parity.comparison import Comparison, Phase
from dsv4_convert.parity.compiled import CompiledForward
from dsv4_convert.parity.detail import Detail
from dsv4_convert.parity.devices import Devices
from dsv4_convert.parity.finished import Findings, FinishedSteps
from dsv4_convert.parity.forward import Activations, Entering, Forward
from dsv4_convert.parity.gate import BaselineRequest, gated
from dsv4_convert.parity.localization import Localizer
from dsv4_convert.parity.logits import LogitsComparison, compare_logits
from dsv4_convert.parity.metrics import Verdict, noise_multiple
from dsv4_convert.parity.programs import ModelOptions, Program, planned, streamed_facts
from dsv4_convert.parity.report.data import ErrorSplit, Localization, ParityReport, TapResult, plain
from dsv4_convert.parity.tolerances import UNIT
from dsv4_convert.parity.unchecked import Unchecked, unchecked
from dsv4_convert.show.units import ranges
from dsv4_convert.show.urls import without_secrets
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.names import check_layers
from dsv4_convert.spec.taps import TapKey, select, tap_named
from dsv4_convert.store import ALONE, Processes
from dsv4_convert.weights.converted import Weights
from dsv4_convert.weights.parameters import Parameters
from dsv4_convert.weights.published import PublishedWeights
from dsv4_convert.weights.values import differing_values

Array = np.ndarray[Any, Any]

#: float32 matmul precision, as JAX names it.
Precision: TypeAlias = Literal["highest", "high", "default"]

#: Called before each step: finished steps, all steps, the next one in words.
Progress = Callable[[int, int, str], None]

#: Names of what a step leaves for the next one, and of what a target layer leaves.
_TARGETS_OF_STAGE = "targets"
_TARGETS = f"{_TARGETS_OF_STAGE}."

_EMBED, _LOGITS = (TapKey(None, tap_named(name)) for name in ("embed", "logits"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParityOptions:
    """The scope of a parity run, and how it computes.

    Attributes:
        layers: layers to compare; None for all that golden and checkpoint both hold, their draft stages, and the model
            level: embedding, head, logits. A stage is ``"mtp.0"``, or has the number after those of the layers.
        taps: patterns of the taps to compare; none for all.
        modes: isolated, cumulative, or both; None for isolated, or cumulative with a compact golden, which holds no
            inputs of layers.
        phase: for a golden whose last tokens came one by one, the tokens to compare; None for all.
        dtype: float32 or bfloat16, for weights and activations; None for float32, or bfloat16 with a golden of the
            release's own code.
        precision: float32 matmul precision. The limits assume ``highest``; accelerators use fewer bits otherwise.
        mesh: how all devices share the dense parts of a layer, as :func:`~dsv4_convert.model.mesh.parse_mesh` reads
            it; None for a mesh that divides everything.
        require_coverage: whether a golden that leaves an operation or an expert unchecked is a failure, and so are
            weights of a conversion that it does not use, unless ``against`` has the same.
        programs: the programs to prove, in :data:`~dsv4_convert.parity.programs.Program`'s order; None for both, where
            memory allows the compiled layers.
        model: how the compiled layers run.
        state: where finished layers are kept, so that a run with the same arguments goes on after an interruption.
            For one process.
        detail: whether the report gets the numbers that figures need, in ``ParityReport.detail``. This takes time, and
            memory for a few numbers per token and layer.

    Examples:
        >>> options = ParityOptions(layers=[0], taps=["attn.*"])
        >>> run_parity(Path("orbax"), "golden/data/tiny", options).passed
        True
    """

    layers: Sequence[int | str] | None = None
    taps: Sequence[str] = ()
    modes: Sequence[Mode] | None = None
    phase: Phase | None = None
    dtype: str | None = None
    precision: Precision = "highest"
    mesh: str | None = None
    require_coverage: bool = False
    state: FinishedSteps | None = None
    detail: bool = False
    programs: Sequence[Program] | None = None
    model: ModelOptions = dataclasses.field(default_factory=ModelOptions)


_DEFAULTS = ParityOptions()


def run_parity(
    checkpoint: Path | str | None,
    golden: Path | str,
    options: ParityOptions = _DEFAULTS,
    *,
    source: Path | str | None = None,
    against: Path | str | None = None,
    baseline: BaselineRequest | None = None,
    processes: Processes = ALONE,
    progress: Progress = lambda done, total, what: None,
) -> ParityReport:
    """Compare a converted checkpoint, or a published one before its conversion, with a golden.

    Args:
        checkpoint: Orbax checkpoint that dsv4 wrote; None with ``source``.
        golden: folder or URL of a recorded golden.
        options: what to compare, and how to compute.
        source: a published checkpoint, as :func:`~dsv4_convert.checkpoint.locate.open_source` opens it; its weights
            are decoded on demand.
        against: the published checkpoint, likewise, with which the weights of wrong operations are compared.
        baseline: recorded errors of a healthy implementation for this golden; an error that exceeds them fails.
        processes: the processes of ``jax.distributed``, which all call this with the same arguments. They share the
            experts, too, and all of them get the report.
        progress: called before each step.

    Raises:
        UsageError: a layer or tap that neither side has, a dtype whose noise floor the golden does not carry, a mode
            that a compact golden does not allow, a baseline to be updated with another precision than highest, or
            finished layers of a run with other settings.
        BadInput: a damaged file, a golden of another architecture, or a baseline of another golden.
        ResourceError: the golden is remote and cannot be reached, another process is gone, or the baseline cannot be
            written.

    Examples:
        >>> run_parity("orbax", "golden/data/tiny", ParityOptions(layers=[0])).passed
        True
    """
    if options.state is not None and processes.count > 1:
        raise UsageError("--state keeps the layers of one process, and several share this run; leave it out")
    mesh = None if options.mesh is None else parse_mesh(options.mesh)
    recorded = open_golden(golden)
    layers = None if options.layers is None else check_layers(recorded.config, options.layers, stages=True)
    # A published checkpoint is opened as far as it is needed, and all of it for stages.
    config, wanted = recorded.config, layers or recorded.layers
    all_of_them = len(wanted) == config.num_hidden_layers or bool(set(wanted) & set(config.stage_layers))
    opened = None if all_of_them else wanted
    with ExitStack() as held:

        def published(where: Path | str, wanted: tuple[int, ...] | None) -> PublishedWeights:
            return PublishedWeights(held.enter_context(open_source(where, layers=wanted)), layers=wanted)

        weights: Weights | PublishedWeights
        if checkpoint is not None and source is None:
            weights = Weights.open(checkpoint)
        elif source is not None and checkpoint is None:
            weights = published(source, _layers_up_to(opened, _modes(recorded, options.modes)))
            weights.prefetch()
        else:
            raise UsageError("expected a converted CHECKPOINT, or --source and a published one")
        _check_architecture(weights.config, recorded)
        if baseline is not None:
            _check_baseline(baseline, recorded, options, write=processes.first)
        other = None if against is None else published(against, opened)
        prepare = partial(
            ParityRun,
            weights,
            recorded,
            options,
            against=other,
            devices=Devices.all(weights.config, processes, mesh),
            progress=progress,
            name=str(checkpoint or source),
        )
        sides = {
            "golden": recorded.manifest.digest,
            "checkpoint": {"path": without_secrets(str(checkpoint or source)), **weights.identity},
            "against": None if other is None else other.identity,
        }
        report = _run(prepare, options, sides)
    if baseline is None:
        return report
    with processes.step("baseline"):
        some = layers is not None or bool(options.taps) or report.layers != recorded.layers
        return gated(report, recorded, baseline, partial=some, write=processes.first)


def _run(prepare: Callable[..., ParityRun], options: ParityOptions, sides: Mapping[str, Any]) -> ParityReport:
    """The report of every program; both are prepared before the first one runs. ``sides`` are JSON."""
    programs = tuple(Program) if options.programs is None else options.programs
    streamed = prepare() if Program.STREAMED in programs else None
    compiled, unproven = None, None
    if Program.MODEL in programs:
        try:
            compiled = prepare(model=options.model)
        except ResourceError as error:
            if options.programs is not None:
                raise
            unproven = str(error)
    if options.state is not None:
        runs = [run for run in (streamed, compiled) if run is not None]
        programs_now = {run.program: plain(run.model) for run in runs}
        options.state.begin({**sides, **runs[0].settings(), "programs": programs_now})
    if streamed is None:
        assert compiled is not None
        return compiled.run()
    report = streamed.run()
    return dataclasses.replace(report, model=None if compiled is None else compiled.run(), unproven=unproven)


class ParityRun:
    """Runs the model layer by layer and compares every wanted tap with a golden.

    Everything that can be refused is refused when it is made; :meth:`run` then computes.

    Attributes:
        model: how the compiled layers run; None for the streamed ones.
    """

    def __init__(
        self,
        weights: Parameters,
        golden: Golden,
        options: ParityOptions = _DEFAULTS,
        *,
        against: PublishedWeights | None = None,
        devices: Devices | None = None,
        progress: Progress = lambda done, total, what: None,
        name: str = "weights",
        model: ModelOptions | None = None,
    ) -> None:
        """``name`` is what the report calls the weights. ``model``: run the compiled layers; None: the streamed ones.

        Raises as :func:`run_parity`.
        """
        self._weights, self._golden, self._options = weights, golden, options
        self._against, self._progress, self._name = against, progress, name
        self._devices = devices or Devices()
        self._dtype = _dtype(golden, options.dtype)
        if options.phase is Phase.DECODE and not golden.decode:
            raise UsageError(f"{golden.path}: all tokens at once; record one with `dsv4 golden record --decode N`")
        self._modes = _modes(golden, options.modes)
        self._layers = _layers(golden, weights, options.layers)
        keys = _keys(golden, self._layers, model_level=options.layers is None)
        self._wanted = list(select(keys, options.taps)) if options.taps else keys
        self._wanted_layers = {key.layer for key in self._wanted}
        self._wants_head = any(key.layer is None and key != _EMBED for key in self._wanted)
        # With quantised activations one rounding grows to the size of a fault within a layer, so every operation gets
        # the golden's own inputs.
        self._teacher_forced = golden.numerics == "release"
        # In bfloat16 rounding is as large as a fault, and a layer's errors are many roundings after one another. What
        # those of one operation have in common shows only on its own.
        self._measures_operations = (
            self._dtype == "bfloat16"
            and golden.compact is None
            and not self._teacher_forced
            and Mode.ISOLATED in self._modes
        )
        self._numerics = release_numerics(golden.config) if self._teacher_forced else PLAIN
        self._comparison = Comparison(golden, self._dtype, options.phase, weights=weights)
        #: The layers that each mode has to run.
        self._needed = {mode: self._layers_of(mode) for mode in self._modes}
        self._running = tuple(sorted({layer for layers in self._needed.values() for layer in layers}))
        weights.check_layers(self._running)
        self.model = model if model is None else self._planned(model)
        self._check_something_is_compared()
        make = Forward if self.model is None else partial(CompiledForward, model=self.model)
        self._forward = make(
            weights,
            golden.tokens,
            jnp.dtype(self._dtype),
            first_position=golden.manifest.request.first_position,
            decode=golden.decode,
            numerics=self._numerics,
            devices=self._devices,
        )
        #: The values that the layer before left, in cumulative mode.
        self._left: Entering = {}
        #: Streams that leave the target layers of DSpark's stages, where these run too.
        self._targets: dict[int, Array] = {}
        self._detail = Detail(golden, self._comparison.limits) if options.detail and model is None else None
        self._results: dict[Mode, list[TapResult]] = {mode: [] for mode in MODES}
        self._localizations: list[Localization] = []
        self._error_splits: list[ErrorSplit] = []
        self._logits: LogitsComparison | None = None

    @property
    def program(self) -> str:
        """The name of the program that runs."""
        return (Program.STREAMED if self.model is None else Program.MODEL).value

    def settings(self) -> dict[str, Any]:
        """All that decides the report besides the two sides and the programs, as JSON: options, and what computes."""
        options = {
            field.name: plain(getattr(self._options, field.name))
            for field in dataclasses.fields(self._options)
            if field.name not in ("state", "model", "programs")
        }
        return options | _platform(self._dtype, self._options.precision) | self._devices.describe()

    def run(self) -> ParityReport:
        """Compare everything. Raises :class:`BadInput` if golden or weights are damaged."""
        golden, options = self._golden, self._options
        recorded = golden.manifest.request.source.values
        other_weights = differing_values(self._weights, recorded, self._layers) if recorded else None
        with jax.default_matmul_precision(options.precision):
            self._run_all()
        coverage = tuple(prompt_coverage(golden, layer) for layer in self._layers)
        return ParityReport(
            modes=self._modes,
            decode=golden.decode,
            phase=None if options.phase is None else options.phase.value,
            dtype=self._dtype,
            limits=self._comparison.limits,
            layers=self._layers,
            stages=golden.config.stage_layers,
            layers_left_out=self._layers_left_out(),
            taps=tuple(result for mode in self._modes for result in self._results[mode]),
            localizations=tuple(self._localizations),
            error_splits=tuple(self._error_splits),
            prompt_coverage=coverage,
            unchecked=self._unchecked(coverage),
            require_coverage=options.require_coverage,
            logits=self._logits,
            checkpoint={"path": self._name, **{key: self._weights.metadata[key] for key in ("source", "storage")}},
            golden=_described(golden),
            other_weights=other_weights,
            platform=_platform(self._dtype, options.precision) | self._devices.describe(),
            detail=self._detail,
            program=streamed_facts(self._running) if self.model is None else self.model.facts(self._running),
        )

    def _layers_left_out(self) -> tuple[int, ...]:
        """The layers that were wanted, since all were, and that golden or checkpoint do not hold."""
        if self._options.layers is not None:
            return ()
        return tuple(sorted(set(range(self._golden.config.num_hidden_layers)) - set(self._layers)))

    def _planned(self, model: ModelOptions) -> ModelOptions:
        width = np.dtype(self._numerics.weight_dtype(jnp.dtype(self._dtype)))
        return planned(self._weights, self._golden, self._running, width, model, self._devices)

    def _check_something_is_compared(self) -> None:
        """Raise :class:`UsageError` if no wanted tap could tell a right model from a wrong one."""
        if any(self._comparison.compares(key, mode) for mode in self._modes for key in self._wanted):
            return
        names = ", ".join(dict.fromkeys(key.tap.name for key in self._wanted))
        raise UsageError(
            f"nothing would be compared of {names}: a layer's input is the golden's own in isolated mode, and other "
            "taps have no elements in these tokens; name other taps, use --mode cumulative, or record more tokens"
        )

    def _unchecked(self, coverage: tuple[LayerCoverage, ...]) -> Unchecked:
        """The parts of the model that the run does not check. If all is required, unused weights are compared."""
        left = unchecked(
            self._golden,
            self._weights.config,
            wanted=self._wanted,
            coverage=coverage,
            decoded=bool(self._golden.decode) and self._options.phase is not Phase.PREFILL,
            converted=not isinstance(self._weights, PublishedWeights),
        )
        if self._against is None or not (self._options.require_coverage and left.converted):
            return left
        differing = tuple(differing_weights(self._weights, self._against, left.weights))
        return dataclasses.replace(left, compared=True, differing=differing)

    def _layers_of(self, mode: Mode) -> tuple[int, ...]:
        if mode is Mode.ISOLATED:
            return tuple(layer for layer in self._layers if layer in self._wanted_layers)
        wanted = [layer for layer in self._layers if layer in self._wanted_layers]
        ahead = [self._golden.config.num_hidden_layers - 1] * self._wants_head
        return tuple(range(max([*wanted, *ahead], default=-1) + 1))

    def _run_all(self) -> None:
        """The embedding, and then the layers, the head, and the stages."""
        config = self._golden.config
        embeds = Mode.CUMULATIVE in self._needed or None in self._wanted_layers
        finished = self._take_up()
        if embeds and not finished:
            self._progress(0, 0, "embedding")
            with self._kept(0, None):
                self._run_embedding()
        steps = [step for step in parts(config, self._running) if step is not None or self._wants_head]
        for number, layer in enumerate(steps):
            if number + embeds < finished:
                continue
            self._progress(number, len(steps), "head" if layer is None else config.step(layer))
            with self._kept(number + embeds, layer):
                if layer is None:
                    self._run_head()
                else:
                    self._run_layer(layer, [mode for mode, layers in self._needed.items() if layer in layers])

    def _take_up(self) -> int:
        """Add what an earlier run has found; the number of steps that it finished: embedding, layers, head."""
        state = self._options.state
        if state is None:
            return 0
        finished, kept = state.last(self.program)
        self._take_up_left(kept)
        for step in range(finished):
            found = state.read(self.program, step)
            for result in found.taps:
                self._results[result.mode].append(result)
            self._localizations += found.localizations
            self._error_splits += found.error_splits
            self._logits = found.logits
            if self._detail is not None and found.detail is not None:
                self._detail.add_part(found.detail)
        return finished

    @contextmanager
    def _kept(self, step: int, layer: int | None) -> Iterator[None]:
        """Keep what a step finds that the block runs."""
        taps = {mode: len(results) for mode, results in self._results.items()}
        localizations, splits = len(self._localizations), len(self._error_splits)
        samples = 0 if self._detail is None else len(self._detail.samples)
        yield
        if self._options.state is None:
            return
        found = Findings(
            taps=tuple(result for mode, count in taps.items() for result in self._results[mode][count:]),
            localizations=tuple(self._localizations[localizations:]),
            error_splits=tuple(self._error_splits[splits:]),
            logits=self._logits,
            detail=None if self._detail is None else self._detail.part(layer, samples),
        )
        targets = {f"{_TARGETS}{layer}": streams for layer, streams in self._targets.items()}
        self._options.state.write(self.program, step, found, {**self._left, **targets})

    def _take_up_left(self, kept: Mapping[str, Array]) -> None:
        """The kept values that the next steps start from."""
        self._left = {name: value for name, value in kept.items() if not name.startswith(_TARGETS)}
        self._targets = {int(name.removeprefix(_TARGETS)): kept[name] for name in kept.keys() - self._left.keys()}

    def _run_embedding(self) -> None:
        activations, self._left = self._forward.embed()
        for mode in self._modes:
            self._judge(activations, mode)

    def _run_layer(self, layer: int, modes: Sequence[Mode]) -> None:
        """One layer in every mode that needs it."""
        config = self._golden.config
        leaving: dict[Mode, Array] = {}
        failed = False
        for mode in modes:
            activations, left = self._run_mode(layer, mode)
            failed |= self._judge(activations, mode)
            if layer < config.num_hidden_layers:  # a stage hands its streams to no layer
                leaving[mode] = np.asarray(left[STREAMS.name], np.float32)
            if mode is Mode.CUMULATIVE:
                self._left = left
                if config.dspark is not None and layer in config.draft_sources:
                    self._targets[layer] = activations[TapKey.of(config, layer, config.draft_tap(layer))]
        self._localize(layer, activations, modes[-1], failed=failed)
        if len(leaving) == len(MODES) and not self._teacher_forced:
            self._error_splits.append(self._split(layer, leaving))

    def _run_mode(self, layer: int, mode: Mode) -> tuple[Activations, Entering]:
        """A layer with the golden's choices, because a tie must not change what follows it.

        In cumulative mode a choice that fails is the model's own instead, so that its consequences show.
        """
        choices = self._comparison.choices(layer)
        if mode is Mode.ISOLATED:
            overrides = self._comparison.everything(layer) if self._teacher_forced else choices
            return self._forward.layer(layer, self._comparison.entering(layer), overrides)
        entering = self._entering(layer)
        activations, leaving = self._forward.layer(layer, entering, choices)
        results = self._comparison.judge(activations, mode, choices)
        # A drafted token changes the taps of the tokens after it, earlier ones too. So the golden's are followed.
        results = [result for result in results if result.key.tap is not TOKENS]
        failing = {result.key for result in results if result.verdict is Verdict.FAIL}
        if not failing:
            return activations, leaving
        followed = {key: choice for key, choice in choices.items() if key not in failing}
        return self._forward.layer(layer, entering, followed)

    def _entering(self, layer: int) -> Entering:
        """The values that enter a layer or stage in cumulative mode."""
        config = self._golden.config
        if not (config.drafts_blocks(layer) and config.embeds(layer)):
            return self._left
        targets = np.stack([self._targets[target] for target in config.draft_sources], axis=2)
        return {_TARGETS_OF_STAGE: targets[:, : known_tokens(targets.shape[1])]}

    def _run_head(self) -> None:
        failed = any(
            result.verdict is Verdict.FAIL and result.key == _EMBED for result in self._results[self._modes[0]]
        )
        for mode in self._modes:
            isolated = mode is Mode.ISOLATED
            overrides = self._comparison.everything(None) if isolated and self._teacher_forced else None
            entering = self._comparison.entering(None) if isolated else self._left
            activations = self._forward.head(entering, overrides)
            failed |= self._judge(activations, mode)
            self._compare_logits(activations[_LOGITS], mode)
        self._localize(None, activations, self._modes[-1], failed=failed)

    def _compare_logits(self, logits: Array, mode: Mode) -> None:
        """Compare the next-token distributions. The last mode's are reported."""
        view = self._golden.views(_LOGITS)[-1]
        _, view = self._comparison.within_phase(_LOGITS, view.of(logits), view)
        if (compared := compare_logits(logits, view, self._golden.tokens)) is not None:
            self._logits, positions = compared
            if self._detail is not None:
                self._detail.positions[mode] = positions

    def _judge(self, activations: Activations, mode: Mode) -> bool:
        """Judge the wanted taps; whether any fails."""
        # The embedding's own input is the tokens.
        teacher_forced = (self._teacher_forced or _EMBED in activations) and mode is Mode.ISOLATED
        compared = [key for key in self._wanted if not is_fed(key, mode)]
        results = self._comparison.judge(
            activations, mode, compared, teacher_forced=teacher_forced, detail=self._detail
        )
        self._results[mode] += results
        return any(result.verdict is Verdict.FAIL for result in results)

    def _localize(self, layer: int | None, activations: Activations, mode: Mode, *, failed: bool) -> None:
        """Look for the operation that is wrong: in a layer that failed, and wherever rounding may hide one.

        ``activations`` are those of the layer's last run, in ``mode``.
        """
        localizer = Localizer(self._forward, self._comparison, self._weights, self._against)
        if self._golden.compact is not None:
            if failed and not self._localizations:
                results = self._results[Mode.CUMULATIVE]
                first = next(result for result in results if result.verdict is Verdict.FAIL)
                self._localizations.append(localizer.localize_first(first, activations))
            return
        if not (failed or self._measures_operations):
            return
        if not (self._teacher_forced and layer is not None and mode is Mode.ISOLATED):
            activations = localizer.run(layer)
        if self._measures_operations:
            failed |= self._judge_operations(activations)
        if layer is not None and (handed_on := self._wrongly_handed_on(layer)):
            self._localizations.append(localizer.blame_hand_over(layer, handed_on))
        if failed:
            self._localizations.append(localizer.localize(layer, activations))

    def _wrongly_handed_on(self, layer: int) -> list[TapResult]:
        """Inputs that fail in cumulative mode, although the earlier taps whose values they should have agree."""
        results = {result.key: result for result in self._results[Mode.CUMULATIVE]}
        found = []
        for key in entering(self._golden.config, layer):
            result, made = results.get(key), results.get(origin_of(self._golden.config, key))
            stacked = key.tap.origin is not None and key.tap.origin.stacked
            if stacked or result is None or result.verdict is not Verdict.FAIL:
                continue
            if (layer == 0 and key.tap.name != INPUT.name) or (made is not None and made.verdict is not Verdict.FAIL):
                found.append(result)
        return found

    def _judge_operations(self, activations: Activations) -> bool:
        """Add to the isolated results what every operation does on the golden's own inputs; whether any fails so."""
        judged = self._comparison.judge(activations, Mode.ISOLATED, self._wanted, teacher_forced=True)
        alone = {result.key: result for result in judged if result.systematic is not None}
        results = self._results[Mode.ISOLATED]
        for at, result in enumerate(results):
            if (own := alone.get(result.key)) is None:
                continue
            fails = result.verdict is Verdict.PASS and own.verdict is Verdict.FAIL
            verdict, reason = (own.verdict, own.reason) if fails else (result.verdict, result.reason)
            results[at] = dataclasses.replace(result, systematic=own.systematic, verdict=verdict, reason=reason)
        return any(own.verdict is Verdict.FAIL for own in alone.values())

    def _split(self, layer: int, leaving: Mapping[Mode, Array]) -> ErrorSplit:
        """Split the error of the streams that leave a layer."""
        key = TapKey(layer, STREAMS)
        views = self._golden.views(key)
        golden = views[0].values.astype(np.float64)
        floors = {mode: self._comparison.floor(key, views, mode) for mode in MODES}
        size = float(np.sqrt(np.mean(np.square(golden)))) or 1.0

        def relative(difference: Array) -> float:
            return float(np.sqrt(np.mean(np.square(difference)))) / size

        isolated, cumulative = (leaving[mode].astype(np.float64) for mode in MODES)
        return ErrorSplit(
            layer=layer,
            inherited=relative(cumulative - isolated),
            added=relative(isolated - golden),
            total=relative(cumulative - golden),
            added_noise=noise_multiple(isolated - golden, floors[Mode.ISOLATED]),
            total_noise=noise_multiple(cumulative - golden, floors[Mode.CUMULATIVE]),
        )


def _keys(golden: Golden, layers: Sequence[int], *, model_level: bool) -> list[TapKey]:
    """Every tap of the chosen layers and stages, in order of execution."""
    chosen = {*layers, None} if model_level else {*layers}
    return [key for key in golden.keys if key.layer in chosen]


def _dtype(golden: Golden, dtype: str | None) -> str:
    """The dtype to compute in. Raises :class:`UsageError`."""
    release = golden.numerics == "release"
    dtype = dtype or ("bfloat16" if release else "float32")
    if dtype not in UNIT:
        raise UsageError(f"--dtype {dtype}: expected one of {', '.join(UNIT)}{did_you_mean(dtype, UNIT)}")
    if release and dtype != "bfloat16":
        raise UsageError(f"--dtype {dtype}: {golden.path} is of the release's own code, which runs in bfloat16")
    return dtype


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


def _check_baseline(baseline: BaselineRequest, golden: Golden, options: ParityOptions, *, write: bool) -> None:
    """Raise before the run for a baseline that could not be compared with, or not be written."""
    if options.programs is not None and Program.STREAMED not in options.programs:
        raise UsageError("--baseline records the errors of the streamed layers, which --program model leaves out")
    if baseline.update and options.precision != "highest":
        raise UsageError(
            f"--update-baseline: expected --precision highest, found {options.precision}; a baseline has one record "
            "for all precisions, and errors of fewer bits are no measure for runs with all of them"
        )
    open_baseline(baseline.path, golden, create=baseline.update)
    if baseline.update and write:
        check_writable(baseline.path)


def _layers_up_to(layers: Sequence[int] | None, modes: Sequence[Mode]) -> tuple[int, ...] | None:
    """The layers that run: the wanted ones, and in cumulative mode all before them; None for all."""
    if layers is None:
        return None
    return tuple(range(max(layers) + 1)) if Mode.CUMULATIVE in modes else tuple(layers)


def _layers(golden: Golden, weights: Parameters, wanted: Sequence[int | str] | None) -> tuple[int, ...]:
    """The wanted layers, or all that both sides hold. Raises :class:`UsageError`."""
    if wanted is None:
        both = tuple(layer for layer in golden.layers if layer in weights.layers)
        if not both:
            raise UsageError(
                f"{golden.path}: recorded the layers {ranges(golden.layers)}, and the checkpoint holds "
                f"{ranges(weights.layers)}: none is in both; record, or convert, layers that the other has"
            )
        return both
    layers = check_layers(golden.config, wanted, stages=True)
    if absent := sorted(set(layers) - set(golden.layers)):
        raise UsageError(f"{golden.path}: recorded the layers {list(golden.layers)}, not {absent}; record these too")
    return layers


def _check_architecture(ours: Config, golden: Golden) -> None:
    """Raise :class:`BadInput` unless both describe the same mathematics; how weights are stored does not matter."""
    storage = {"expert_dtype", "weight_block_size"}
    backbones = ours.without_stages(), golden.config.without_stages()
    if type(ours) is not type(golden.config):
        raise BadInput(f"{golden.path}: recorded from {golden.config.title}, and the checkpoint is {ours.title}")
    pairs = [
        (field.name, *(getattr(each, field.name) for each in backbones))
        for field in dataclasses.fields(ours)
        if field.name not in storage
    ]
    problems = [f"{name}: checkpoint {mine!r}, golden {its!r}" for name, mine, its in pairs if mine != its]
    if problems:
        raise BadInput(
            f"{golden.path}: recorded from another architecture:\n{listed(problems)}\n"
            "Record a golden of this checkpoint's source with `dsv4 golden record`."
        )


def _described(golden: Golden) -> dict[str, Any]:
    """The golden in the report, without the digests of its weights."""
    request = golden.manifest.request
    return {
        "path": str(golden.path),
        "digest": golden.manifest.digest,
        "reference": dataclasses.asdict(request.reference),
        "source": dataclasses.replace(request.source, values={}).to_json(),
    }


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

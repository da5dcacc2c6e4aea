"""Recording a golden: the reference runs layer by layer, and every tap of the wanted layers is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from packaging.specifiers import SpecifierSet

from dsv4_convert.checkpoint import Checkpoint
from dsv4_convert.checkpoint.header import stored_forms
from dsv4_convert.checkpoint.locate import open_source
from dsv4_convert.errors import UsageError, did_you_mean
from dsv4_convert.folders import PathLike
from dsv4_convert.golden.archive import Golden
from dsv4_convert.golden.compact import Compact
from dsv4_convert.golden.layout import DTYPES, expected_taps, tap_shape
from dsv4_convert.golden.manifest import RecordedSource, RecordingRequest, Reference
from dsv4_convert.golden.noise import RUN_DTYPES
from dsv4_convert.golden.plan import RecordingPlan, check_space, plan
from dsv4_convert.golden.tokens import check_tokens
from dsv4_convert.golden.writer import GoldenWriter, check_destination, golden_writer
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.coverage import Resolution, resolve
from dsv4_convert.spec.names import check_layers
from dsv4_convert.spec.taps import TapKey
from dsv4_convert.spec.v4.config import V4Config
from dsv4_convert.weights.published import PublishedWeights
from dsv4_convert.weights.values import value_digests

if TYPE_CHECKING:
    from dsv4_convert.golden.references.release.released import ReleasedModel
    from dsv4_convert.golden.references.streamed import StreamedModel

Array = np.ndarray[Any, Any]

#: The releases of transformers that the probes are written for, as in pyproject.toml.
TRANSFORMERS = ">=5.23,<5.25"
#: Tokens that a prompt needs for a DSpark draft. The published code begins one after its first call alone.
LEAST_TOKENS = 3
_INSTALL = "pip install 'dsv4-convert[reference]'"
#: Called before each step: finished steps, all steps where they are known, the next one in words.
Progress = Callable[[int, int, str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordingOptions:
    """What to record.

    Attributes:
        tokens: integers ``[B, S]``, or ``[S]`` for one prompt.
        text: the prompts, where the tokens come from text; kept for the reader.
        layers: layers to keep; None for all. The layers before them run too, to compute their streams.
        stages: whether the draft stages are kept too, of multi-token prediction or of DSpark. They run after all
            layers. Not by default, since no logits of the model depend on a stage, and its own are as large.
        noise: dtypes whose noise floor is measured (:mod:`dsv4_convert.golden.noise`). Each runs every layer twice
            more. None for all that the reference has.
        compact: the part of every tap to keep (:mod:`dsv4_convert.golden.compact`); None for all.
        first_position: position of the first token in the rotary tables, to check far positions in short prompts.
        decode: how many of the last tokens come one by one, from the reference's cache. At least one comes before.
        greedy: the ``decode`` tokens follow the prompt, chosen greedily by the reference. Each takes a pass through the
            whole model first.
        release_code: the user's copy of the published ``inference`` folder, whose ``model.py`` is executed.
        numerics: ``release`` or ``plain``, of the release's code: as published, or its mathematics in float32 without
            simulated quantisation. None: what the reference does by itself. transformers knows plain ones only.

    Examples:
        >>> RecordingOptions(tokens=[[3, 1, 4]], layers=[0]).greedy
        False
    """

    tokens: Any
    text: Iterable[str] | None = None
    layers: Sequence[int] | None = None
    stages: bool = False
    noise: Iterable[str] | None = None
    compact: Compact | None = None
    first_position: int = 0
    decode: int = 0
    greedy: bool = False
    release_code: Path | None = None
    numerics: str | None = None


def record(
    source: PathLike,
    out: PathLike,
    options: RecordingOptions,
    *,
    announce: Callable[[RecordingPlan], None] = lambda _: None,
    progress: Progress = lambda done, total, what: None,
) -> Golden:
    """Run a reference over a prompt and keep its activations, and how far rounding moves them.

    The reference is transformers' model in float32, or with ``release_code`` DeepSeek's own inference code: in
    bfloat16, quantising activations on the way, or with plain ``numerics`` in float32.

    One layer is in memory at a time, and of its routed experts one. An interrupted run is continued by the same call.

    Args:
        source: what :func:`~dsv4_convert.checkpoint.locate.open_source` opens: a checkpoint folder, ``ORG/NAME`` or
            ``ORG/NAME@REVISION`` of the Hub, or ``gs://bucket/path``; in any dialect and published storage.
        out: folder to create.
        options: prompt, layers, dtypes, and the reference that runs.
        announce: called with the plan before anything is hashed or written.
        progress: called before each step.

    Raises:
        UsageError: the destination exists, tokens, layers or dtypes are impossible, torch or transformers is missing,
            transformers is not a release that the recorder is written for, or an interrupted run had other options.
        BadInput: the source is corrupt, incomplete or not a DeepSeek-V4 text model.
        ResourceError: the disk is too small or cannot be written to, or another process records the same.
        Dsv4Error: transformers computes otherwise than the recorder knows.

    Examples:
        >>> options = RecordingOptions(tokens=[[3, 1, 4, 1, 5]], layers=[0])
        >>> golden = record_golden(Path("checkpoint"), Path("my-golden"), options)
    """
    source, out = Path(source), Path(out)
    check_destination(out)
    with open_source(
        source, layers=layers_that_run(options.layers, all_of_them=options.stages or options.greedy)
    ) as checkpoint:
        return record_opened(checkpoint, out, options, announce=announce, progress=progress)


def layers_that_run(layers: Sequence[int] | None, *, all_of_them: bool) -> range | None:
    """The layers whose weights a recording of ``layers`` reads; None for all of them, and stages."""
    return None if layers is None or all_of_them else range(max(layers, default=-1) + 1)


def record_opened(
    checkpoint: Checkpoint,
    out: Path,
    options: RecordingOptions,
    *,
    announce: Callable[[RecordingPlan], None] = lambda _: None,
    progress: Progress = lambda done, total, what: None,
) -> Golden:
    """:func:`record` of an open checkpoint, which stays open."""
    check_destination(out)
    config = checkpoint.architecture()
    reference = _reference(options, config)
    wanted = check_layers(config, options.layers)
    ids = _prompt(options, config)
    last = config.num_hidden_layers - 1 if options.greedy else max(wanted)
    resolution = _resolve(checkpoint, config, None if options.stages else range(last + 1))
    if options.stages:
        wanted += _stages(checkpoint, resolution.config, tokens=ids.shape[1])
    request = RecordingRequest(
        reference=reference.described,
        source=RecordedSource(
            name=checkpoint.repository or checkpoint.root.resolve().name, revision=checkpoint.revision, files={}
        ),
        config=config,
        tokens=_rows(ids),
        text=None if options.text is None else tuple(options.text),
        layers=wanted,
        noise=_noise_dtypes(reference.noise if options.noise is None else options.noise, reference.noise),
        compact=options.compact,
        first_position=options.first_position,
        decode=options.decode,
    )
    planned = plan(checkpoint, resolution, request, passes=options.decode + 1 if options.greedy else 1)
    announce(planned)
    checkpoint.prefetch()
    model = reference.model(checkpoint, config, resolution, ids, noise=request.noise)
    if options.greedy:
        request = dataclasses.replace(request, tokens=_rows(model.choose_tokens(progress)))
    progress(0, 0, "hashing the source")
    hashed = dataclasses.replace(
        request.source,
        files=_digests(checkpoint, resolution),
        values=value_digests(PublishedWeights(checkpoint, layers=None if options.stages else wanted), wanted),
    )
    request = dataclasses.replace(request, source=hashed)
    with golden_writer(out, request) as writer:
        if not writer.complete:
            check_space(out, planned.bytes_written - writer.bytes_written)
            _run(model, writer, request, progress)
        return writer.publish()


def _prompt(options: RecordingOptions, config: Config) -> Array:
    """The tokens as int32 ``[B, S]``, with places for those that are still to be chosen. Raises :class:`UsageError`."""
    if options.first_position < 0:
        raise UsageError(f"first position {options.first_position}: expected 0 or more")
    room = config.max_position_embeddings - options.first_position
    ids = check_tokens(options.tokens, vocab_size=config.vocab_size, max_length=room)
    if options.greedy and options.decode > 0:
        ids = check_tokens(np.pad(ids, ((0, 0), (0, options.decode))), vocab_size=config.vocab_size, max_length=room)
    if not 0 <= options.decode < ids.shape[1]:
        raise UsageError(f"--decode {options.decode}: the prompt has {ids.shape[1]} tokens, so 0 to {ids.shape[1] - 1}")
    return ids


def _rows(ids: Array) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(token) for token in row) for row in ids)


@dataclasses.dataclass(frozen=True)
class _Reference:
    """A reference: its description in the manifest, the dtypes whose noise it measures, and a factory of its model."""

    described: Reference
    noise: tuple[str, ...]
    model: Callable[..., Any]


def _reference(options: RecordingOptions, config: Config) -> _Reference:
    """transformers' model, or the release's code; imports torch."""
    if options.release_code is not None and (options.first_position or options.greedy):
        raise UsageError(
            "the release's code is recorded from position 0 on, with tokens that are given: leave --first-position and "
            "--greedy out"
        )
    _installed("torch")
    if options.release_code is not None:
        from dsv4_convert.golden.references.release import code, released
        from dsv4_convert.golden.references.release.arithmetic import ARITHMETICS
        from dsv4_convert.golden.references.release.interfaces import INTERFACES

        interface, arithmetic = INTERFACES[type(config)], ARITHMETICS[options.numerics or "release"]
        loaded = code.load(
            options.release_code, interface.required, besides=interface.of_stages(config) if options.stages else ()
        )
        model: Callable[..., Any] = partial(released.ReleasedModel, loaded, arithmetic, decode=options.decode)
        described = released.describe(loaded, arithmetic, interface.decoding if options.decode else {})
        return _Reference(described, tuple(arithmetic.noise), model)
    if options.numerics not in (None, "plain"):
        raise UsageError(f"--numerics {options.numerics}: transformers computes in plain numerics; see --release-code")
    if not isinstance(config, V4Config):
        raise UsageError(
            f"transformers has no {config.title}; record what DeepSeek's own code computes: --reference release "
            "--release-code DIR"
        )
    version = _installed("transformers")
    if not SpecifierSet(TRANSFORMERS).contains(version, prereleases=True):
        raise UsageError(
            f"recording looks inside transformers' model and knows releases {TRANSFORMERS}, found {version}: {_INSTALL}"
        )
    from dsv4_convert.golden.references import streamed

    model = partial(streamed.StreamedModel, first_position=options.first_position, decode=options.decode)
    return _Reference(streamed.describe(), tuple(RUN_DTYPES), model)


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        raise UsageError(f"recording runs a reference in torch, and {package} is missing: {_INSTALL}") from None


def _resolve(checkpoint: Checkpoint, config: Config, layers: range | None) -> Resolution:
    """The tensors of some layers and of the model level; None for all, and those of stages."""
    return resolve(stored_forms(checkpoint.tensors), config, layers=layers, where=str(checkpoint.root))


def _stages(checkpoint: Checkpoint, config: Config, *, tokens: int) -> tuple[int, ...]:
    """The layer numbers of the draft stages. Raises :class:`UsageError` if there is none, or no draft is possible."""
    if not config.num_mtp_stages:
        raise UsageError(f"--stages: {checkpoint.root} has no draft stage; leave --stages out")
    if config.dspark is not None and tokens < LEAST_TOKENS:
        raise UsageError(
            f"--stages: DSpark drafts after the last token of a prompt, from at least {LEAST_TOKENS - 1} tokens before "
            f"it; the prompt has {tokens}"
        )
    return tuple(config.stage_layers)


def _digests(checkpoint: Checkpoint, resolution: Resolution) -> dict[str, str]:
    """SHA-256 of every shard that holds a tensor of the layers that run, by file name."""
    used = {name for leaf in resolution.leaves for source in leaf.sources for name in (source.weight, source.scale)}
    shards = sorted({checkpoint.tensors[name].file for name in used if name is not None})
    return {shard.name: checkpoint.file_sha256(shard) for shard in shards}


def _noise_dtypes(wanted: Iterable[str], possible: Sequence[str]) -> tuple[str, ...]:
    """In the order of ``possible``. Raises :class:`UsageError`."""
    names = set(wanted)
    if unknown := names - set(possible):
        raise UsageError(
            f"--noise {','.join(sorted(unknown))}: expected some of {', '.join(possible)}"
            + did_you_mean(min(unknown), possible)
        )
    return tuple(dtype for dtype in possible if dtype in names)


def _run(
    model: StreamedModel | ReleasedModel, writer: GoldenWriter, request: RecordingRequest, progress: Progress
) -> None:
    """Every layer up to the last wanted one, the model level, and the stages, from where an earlier run stopped."""
    config, wanted = request.config, request.layers
    batch, tokens = request.token_array.shape
    expected: dict[int | None, dict[str, Any]] = {}
    backbone = range(min(max(wanted) + 1, config.num_hidden_layers))
    steps = (*backbone, None, *(layer for layer in wanted if layer in config.stage_layers))
    for key in expected_taps(config, wanted, decode=request.decode):
        shape = tap_shape(key, config, batch=batch, tokens=tokens, decode=request.decode)
        expected.setdefault(key.layer, {})[key.tap.name] = (DTYPES[key.tap.values], shape)
    progress(0, 0, "embedding")
    embedded = model.embed()
    state = writer.last_state() or model.spread(embedded)
    begun = steps.index(writer.finished[-1]) + 1 if writer.finished else 0
    for done, layer in enumerate(steps[begun:]):
        key = TapKey.of(config, layer, "hc_ffn.streams")
        if layer is not None:
            progress(done, len(steps) - 1 - begun, config.step(layer))
            state, taken = model.run_layer(layer, state, expected.get(layer, {}))
            arrays = taken.arrays(key.prefix)
        else:
            arrays = embedded.arrays("")
            if after := {name: what for name, what in expected[None].items() if name != "embed"}:
                progress(done, len(steps) - 1 - begun, "head")
                arrays |= model.run_head(state, after).arrays("")
        if layer in writer.parts:
            writer.write(layer, request.keep(arrays), state if done + 1 < len(steps) - begun else None)

"""Recording a golden: the reference runs layer by layer, and every tap of the wanted layers is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4_convert.checkpoint import Checkpoint, open_checkpoint
from dsv4_convert.checkpoint.header import stored_forms
from dsv4_convert.config import Config
from dsv4_convert.coverage import Resolution, resolve
from dsv4_convert.errors import UsageError, did_you_mean
from dsv4_convert.golden.archive import Golden
from dsv4_convert.golden.compact import Compact
from dsv4_convert.golden.layout import DTYPES, expected_taps, tap_shape
from dsv4_convert.golden.manifest import Reference, Request, Source
from dsv4_convert.golden.noise import RUN_DTYPES
from dsv4_convert.golden.plan import Plan, check_space, plan
from dsv4_convert.golden.tokens import check_tokens
from dsv4_convert.golden.writer import GoldenWriter, check_destination, golden_writer
from dsv4_convert.names import check_layers

if TYPE_CHECKING:
    from dsv4_convert.golden.references.release.released import ReleasedModel
    from dsv4_convert.golden.references.streamed import StreamedModel

Array = np.ndarray[Any, Any]

#: The release of transformers that the probes are written for.
_TRANSFORMERS = "5.23"
_INSTALL = "pip install 'dsv4-convert[reference]'"
#: Called with what is done next, in words.
Progress = Callable[[str], None]


def record(
    source: Path,
    out: Path,
    *,
    tokens: Array,
    text: Iterable[str] | None = None,
    layers: Iterable[int] | None = None,
    noise: Iterable[str] | None = None,
    compact: Compact | None = None,
    first_position: int = 0,
    decode: int = 0,
    greedy: bool = False,
    release_code: Path | None = None,
    name: str | None = None,
    revision: str | None = None,
    announce: Callable[[Plan], None] = lambda _: None,
    progress: Progress = lambda _: None,
) -> Golden:
    """Run a reference over ``tokens`` and keep its activations, and how far rounding moves them.

    The reference is transformers' model in float32, or with ``release_code`` DeepSeek's own inference code in bfloat16,
    which quantises activations on the way.

    One layer is in memory at a time, and of its routed experts one. An interrupted run is continued by the same call.

    Args:
        source: checkpoint folder, in any dialect and any of the published storages.
        out: folder to create.
        tokens: integers ``[B, S]``, or ``[S]`` for one prompt.
        text: the prompts, where the tokens come from text; kept for the reader.
        layers: layers to keep; None for all. The layers before them run too, since their streams are needed.
        noise: dtypes whose noise floor is measured (:mod:`dsv4_convert.golden.noise`); each runs every layer twice
            more. None: all that the reference has.
        first_position: of the first token in the rotary tables; checks far positions without the tokens before.
        decode: how many of the last tokens come one by one, from the reference's cache; one at least comes before.
        compact: what to keep of every tap (:mod:`dsv4_convert.golden.compact`); None for all of it.
        greedy: the ``decode`` tokens come after the prompt, and are those that the reference likes best; every one of
            them takes a pass through the whole model first.
        release_code: the user's copy of the published ``inference`` folder, whose ``model.py`` is executed.
        name: what the golden calls its source, such as its repository; the folder's name if None.
        revision: the source's commit; what the folder itself says if None.
        announce: called with the plan before anything is hashed or written.
        progress: called before each step.

    Raises:
        UsageError: the destination exists, tokens, layers or dtypes are impossible, torch or transformers is missing,
            or transformers is not the release that the recorder is written for.
        BadInput: the source is corrupt, incomplete or not a DeepSeek-V4 text model.
        ResourceError: the disk is too small or cannot be written to, or another process records the same.
        Dsv4Error: transformers computes otherwise than the recorder knows.

    Examples:
        >>> golden = record_golden(Path("checkpoint"), Path("my-golden"), tokens=[[3, 1, 4, 1, 5]], layers=[0])
    """
    check_destination(out)
    if release_code is not None and (first_position or decode):
        raise UsageError("the release's code is recorded on a whole prompt: leave --first-position and --decode out")
    reference = _reference(release_code, first_position=first_position, decode=decode)
    with open_checkpoint(source, partial=layers is not None) as checkpoint:
        config = checkpoint.architecture()
        wanted = check_layers(config, layers)
        if first_position < 0:
            raise UsageError(f"first position {first_position}: expected 0 or more")
        room = config.max_position_embeddings - first_position
        ids = check_tokens(tokens, vocab_size=config.vocab_size, max_length=room)
        if greedy and decode > 0:  # places for the tokens that are to come
            ids = check_tokens(np.pad(ids, ((0, 0), (0, decode))), vocab_size=config.vocab_size, max_length=room)
        if not 0 <= decode < ids.shape[1]:
            raise UsageError(f"--decode {decode}: the prompt has {ids.shape[1]} tokens, so 0 to {ids.shape[1] - 1}")
        measured = _noise_dtypes(reference.noise if noise is None else noise, reference.noise)
        resolution = _resolve(checkpoint, config, config.num_hidden_layers - 1 if greedy else max(wanted))
        batch, length = ids.shape
        planned = plan(
            checkpoint,
            config,
            resolution,
            layers=wanted,
            noise=measured,
            compact=compact,
            batch=batch,
            tokens=length,
            decode=decode,
            passes=decode + 1 if greedy else 1,
        )
        announce(planned)
        model = reference.model(checkpoint, config, resolution, ids, noise=measured)
        if greedy:
            ids = model.choose_tokens(progress)
        progress("hashing the source")
        request = Request(
            reference=reference.described,
            source=_source(checkpoint, resolution, name, revision),
            config=config,
            tokens=tuple(tuple(int(token) for token in row) for row in ids),
            text=None if text is None else tuple(text),
            layers=wanted,
            noise=measured,
            compact=compact,
            first_position=first_position,
            decode=decode,
        )
        with golden_writer(out, request) as writer:
            if not writer.complete:
                check_space(out, planned.bytes_written - writer.bytes_written)
                _run(model, writer, request, progress)
            return writer.publish()


@dataclasses.dataclass(frozen=True)
class _Reference:
    """What runs: how the manifest describes it, the dtypes whose noise it measures, and what makes its model."""

    described: Reference
    noise: tuple[str, ...]
    model: Callable[..., Any]


def _reference(release_code: Path | None, *, first_position: int, decode: int) -> _Reference:
    """transformers' model, or the release's code; imports torch."""
    _installed("torch")
    if release_code is not None:
        from dsv4_convert.golden.references.release import code, released

        loaded = code.load(release_code)
        return _Reference(released.describe(loaded), ("bfloat16",), partial(released.ReleasedModel, loaded))
    version = _installed("transformers")
    if version.split(".")[:2] != _TRANSFORMERS.split("."):
        raise UsageError(
            f"recording looks into transformers' model as release {_TRANSFORMERS} computes it, found {version}: "
            f"{_INSTALL}"
        )
    from dsv4_convert.golden.references import streamed

    model = partial(streamed.StreamedModel, first_position=first_position, decode=decode)
    return _Reference(streamed.describe(), tuple(RUN_DTYPES), model)


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        raise UsageError(f"recording runs a reference in torch, and {package} is missing: {_INSTALL}") from None


def _resolve(checkpoint: Checkpoint, config: Config, last: int) -> Resolution:
    """The tensors of the layers up to ``last`` and of the model level."""
    return resolve(stored_forms(checkpoint.tensors), config, layers=range(last + 1), where=str(checkpoint.root))


def _source(checkpoint: Checkpoint, resolution: Resolution, name: str | None, revision: str | None) -> Source:
    """What was recorded from: the hash of every shard that holds a tensor of the layers that run."""
    used = {name for leaf in resolution.leaves for source in leaf.sources for name in (source.weight, source.scale)}
    shards = sorted({checkpoint.tensors[name].file for name in used if name is not None})
    return Source(
        name=name or checkpoint.root.resolve().name,
        revision=revision or checkpoint.revision,
        files={shard.name: checkpoint.file_sha256(shard) for shard in shards},
    )


def _noise_dtypes(wanted: Iterable[str], possible: Sequence[str]) -> tuple[str, ...]:
    """In the order of ``possible``. Raises :class:`UsageError`."""
    names = set(wanted)
    if unknown := names - set(possible):
        raise UsageError(
            f"--noise {','.join(sorted(unknown))}: expected some of {', '.join(possible)}"
            + did_you_mean(min(unknown), possible)
        )
    return tuple(dtype for dtype in possible if dtype in names)


def _run(model: StreamedModel | ReleasedModel, writer: GoldenWriter, request: Request, progress: Progress) -> None:
    """Every layer up to the last wanted one, from where an earlier run stopped."""
    config, wanted = request.config, request.layers
    batch, tokens = request.token_array.shape
    expected: dict[int | None, dict[str, Any]] = {}
    for _, tap, layer in expected_taps(config, wanted, decode=request.decode):
        shape = tap_shape(tap, config, layer, batch=batch, tokens=tokens, decode=request.decode)
        expected.setdefault(layer, {})[tap.name] = (DTYPES[tap.values], shape)
    progress("embedding")
    embedded = model.embed()
    state = writer.last_state() or model.spread(embedded)
    for layer in range(writer.finished[-1] + 1 if writer.finished else 0, max(wanted) + 1):
        progress(f"layer {layer} of {config.num_hidden_layers}")
        state, taken = model.run_layer(layer, state, expected.get(layer, {}))
        if layer in wanted:
            writer.write(layer, request.keep(taken.arrays(f"layers.{layer}.")), state)
    outer = expected[None]
    arrays = embedded.arrays("")
    if after := {name: what for name, what in outer.items() if name != "embed"}:
        progress("head")
        arrays |= model.run_head(state, after).arrays("")
    writer.write(None, request.keep(arrays))

"""A golden, by its manifest and the experts that its tokens reach; or the request of an unfinished recording."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from dsv4_convert.errors import BadInput
from dsv4_convert.files.strict_json import parse_object
from dsv4_convert.files.workspace import destination_of
from dsv4_convert.golden.archive import Golden
from dsv4_convert.golden.compact import is_kept_part
from dsv4_convert.golden.manifest import RecordedSource, RecordingRequest, Reference, layer_file
from dsv4_convert.golden.noise import RUN_DTYPES, is_noise
from dsv4_convert.golden.prompt_coverage import prompt_coverage
from dsv4_convert.inspection.report import Inspection, What
from dsv4_convert.show.units import number_of, ranges
from dsv4_convert.spec.taps import TapKey


def inspect_golden(golden: Golden, *, place: str, known_by: str, say: Callable[[str], None]) -> Inspection:
    """A golden. Only chosen experts and noise floors are read.

    Raises:
        BadInput: these are not what was recorded.
        ResourceError: the golden is remote and cannot be reached.
    """
    request = golden.manifest.request
    batch, tokens = golden.tokens.shape
    prompts = f"{batch} x {tokens:,}" if batch > 1 else f"{tokens:,}"
    if golden.decode:
        prompts += f", the last {golden.decode} one by one"
    if request.first_position:
        prompts += f", from position {request.first_position:,} on"
    backbone = tuple(layer for layer in golden.layers if layer not in golden.config.stage_layers)
    stages = len(golden.layers) - len(backbone)
    facts = _origin(request.reference, request.source) | {
        "tokens": prompts,
        "stored": f"{len(golden.names):,} taps, "
        + ("whole" if golden.compact is None else "compact")
        + f", of layers {ranges(backbone)}"
        + (f" and {number_of(stages, 'draft stage')}" if stages else ""),
        "noise": ", ".join(request.noise) or "none",
    }
    arrays = {"taps": 0, "sketches and rows": 0, "noise floors": 0}
    for name, entry in golden.manifest.taps.items():
        kind = "noise floors" if is_noise(name) else "sketches and rows" if is_kept_part(name) else "taps"
        arrays[kind] += entry.nbytes
    odd = []
    wanted = RUN_DTYPES if golden.numerics == "plain" else ("bfloat16",)
    if missing := [dtype for dtype in wanted if dtype not in request.noise]:
        odd.append(f"no noise floor of {' and '.join(missing)}, so parity cannot judge in that dtype")
    for layer in golden.layers:
        where = TapKey.of(golden.config, layer, "ffn").where
        say(where)
        reached = prompt_coverage(golden, layer)
        odd += [f"{where}: {missed}" for missed in reached.missed]
        if reached.experts < reached.of:
            odd.append(f"{where}: {reached.of - reached.experts} of {reached.of} experts are reached by no token")
    odd += [problem for layer in (*golden.layers, None) for problem in golden.malformed_noise(layer)]
    return Inspection(
        what=What.GOLDEN,
        place=place,
        known_by=known_by,
        facts=facts,
        config=golden.config,
        layers=None if len(backbone) == golden.config.num_hidden_layers else backbone,
        arrays={kind: nbytes for kind, nbytes in arrays.items() if nbytes},
        odd=tuple(odd),
    )


def inspect_recording(folder: Path, *, place: str, known_by: str) -> Inspection:
    """The stage of an interrupted recording.

    Raises:
        BadInput: the request is damaged.
    """
    file = folder / known_by
    try:
        request = RecordingRequest.from_json(parse_object(file.read_bytes(), where="JSON"))
    except (BadInput, ValueError, KeyError, TypeError, OSError) as error:
        raise BadInput(f"{file}: not the request of a recording: {error}; record again") from error
    finished: Sequence[int] = [layer for layer in request.layers if (folder / layer_file(layer)).is_file()]
    facts = _origin(request.reference, request.source) | {
        "tokens": f"{len(request.tokens)} x {len(request.tokens[0]):,}",
        "stored": f"{len(finished)} of {len(request.layers)} layers",
        "resumable": "yes: the same command goes on",
    }
    destination = destination_of(folder)
    return Inspection(
        what=What.RECORDING,
        place=place,
        known_by=known_by,
        facts=facts,
        config=request.config,
        layers=tuple(layer for layer in finished if layer not in request.config.stage_layers),
        odd=(f"{destination} is not complete: a run was interrupted, or is under way",),
    )


def _origin(reference: Reference, source: RecordedSource) -> dict[str, str]:
    versions = ", ".join(f"{package} {version}" for package, version in reference.versions.items())
    return {
        "source": source.name,
        "revision": source.revision or "not recorded",
        "reference": f"{reference.name} ({versions}), {reference.numerics} numerics, {reference.dtype}",
    }

"""Two checkpoints, parameter by parameter: what only one of them has, and what differs by how much.

Names, order of axes and storage differ between a release, its BF16 copy, a folder of ``save_pretrained`` and a
conversion, and parameters are compared by the model's names. Equal bytes are equal without decoding; everything else is
decoded to float32, block by block.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dsv4_convert.checkpoint.locate import open_source, wanted_tensors
from dsv4_convert.errors import BadInput, UsageError
from dsv4_convert.folders import ORBAX_FILES, is_converted, is_golden, not_converted
from dsv4_convert.show.units import ranges
from dsv4_convert.show.urls import without_secrets
from dsv4_convert.spec.names import Rule, Transform, check_layers, layer_of, stage_of
from dsv4_convert.store import as_path
from dsv4_convert.store.layout import Region
from dsv4_convert.store.threads import in_threads
from dsv4_convert.weights.converted import Weights
from dsv4_convert.weights.parameters import Array, StoredParameters
from dsv4_convert.weights.published import PublishedWeights

#: Called with (elements compared, elements in total, the parameter).
Progress = Callable[[int, int, str], None]

#: Elements that are compared at once, in a multiple of so many rows, since tiles are whole.
_ELEMENTS, _ROWS = 1 << 22, 128
_SHORT = {np.dtype(ml_dtypes.float8_e4m3fn): "FP8", np.dtype(np.int8): "FP4", np.dtype(np.uint8): "FP4"}
#: Fields of a config that say how weights are stored, or that a conversion may leave out.
_OF_STORAGE = frozenset({"expert_dtype", "weight_block_size", "num_mtp_stages"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparedCheckpoint:
    """One of the two. ``kind``: published or converted. ``dialect``: of the published names."""

    path: str
    kind: str
    storage: str
    dialect: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChangedParameter:
    """A parameter with other values.

    ``shapes``: in the first and in the second checkpoint. If they differ nothing else is known. ``stored``: how both
    store it. ``experts``: which of a stack have changed. ``changed`` of ``elements`` values are others. ``max_abs``:
    the largest absolute difference. ``relative_rms``: rms of the difference over rms of the first checkpoint's values,
    both over the changed experts. Infinite where only one of two values is finite.
    """

    path: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    stored: tuple[str, str]
    experts: tuple[int, ...] | None
    changed: int
    elements: int
    max_abs: float
    relative_rms: float

    @property
    def share(self) -> float:
        """The share of values that are others."""
        return self.changed / self.elements if self.elements else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredOtherwise:
    """A parameter with equal values and other bytes: another dtype, or other codes and scales for the same numbers."""

    path: str
    stored: tuple[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointDifference:
    """``config``: fields that differ and that the model computes by, in words. ``gone``: parameters that only the first
    has. ``added``: those that only the second has. ``equal_bytes``: number of parameters that are equal byte by byte.
    """

    first: ComparedCheckpoint
    second: ComparedCheckpoint
    config: tuple[str, ...]
    gone: tuple[str, ...]
    added: tuple[str, ...]
    changed: tuple[ChangedParameter, ...]
    stored_otherwise: tuple[StoredOtherwise, ...]
    equal_bytes: int

    @property
    def equal(self) -> bool:
        """Both have the same parameters with equal values, and there is one."""
        different = self.config or self.gone or self.added or self.changed
        return not different and bool(self.equal_bytes or self.stored_otherwise)

    def to_json(self) -> dict[str, Any]:
        """Stable, versioned JSON; infinities become strings."""

        def number(value: float) -> float | str:
            return value if math.isfinite(value) else str(value)

        return {
            "schema_version": 1,
            "verdict": "equal" if self.equal else "different",
            "first": dataclasses.asdict(self.first),
            "second": dataclasses.asdict(self.second),
            "config": list(self.config),
            "gone": list(self.gone),
            "added": list(self.added),
            "changed": [
                dataclasses.asdict(one)
                | {"share": one.share, "max_abs": number(one.max_abs), "relative_rms": number(one.relative_rms)}
                for one in self.changed
            ],
            "stored_otherwise": [dataclasses.asdict(one) for one in self.stored_otherwise],
            "equal_bytes": self.equal_bytes,
        }


def compare_checkpoints(
    first: Path | str,
    second: Path | str,
    *,
    layers: Iterable[int] | None = None,
    progress: Progress = lambda done, total, path: None,
    workers: int = 2,
) -> CheckpointDifference:
    """Compare every parameter of two checkpoints, each published or converted.

    Memory: a few blocks of 16 MB per worker, whatever the size of the model.

    Args:
        first: a folder, a repository or a URL; what :func:`~dsv4_convert.checkpoint.locate.open_source` opens, or a
            checkpoint that dsv4 converted.
        second: likewise.
        layers: those to compare, with the model level; None for everything, mtp stages too.
        progress: called after every matrix.
        workers: threads.

    Raises:
        UsageError: a layer that the first does not have.
        BadInput: one of them is no checkpoint, or damaged.
        ResourceError: the Hub or a bucket cannot be reached.

    Examples:
        >>> compare_checkpoints("checkpoint", "orbax").equal
        True
    """
    chosen = None if layers is None else tuple(layers)
    with ExitStack() as held:
        mine, its = (_opened(held, where, chosen) for where in (first, second))
        return _Sides(mine, its, chosen).run((str(first), str(second)), progress, workers)


def _opened(held: ExitStack, where: Path | str, layers: tuple[int, ...] | None) -> StoredParameters:
    """Open a checkpoint of either kind, until ``held`` closes."""
    text = str(where)
    if "://" not in text or text.startswith("gs://"):
        place = as_path(text)
        if is_converted(place):
            return Weights.open(text)
        if is_golden(place) or any((place / name).exists() for name in ORBAX_FILES):
            raise BadInput(f"{text}: {not_converted(place, text)}")
    published = PublishedWeights(held.enter_context(open_source(where, layers=layers)), layers=layers)
    published.prefetch()
    return published


@dataclasses.dataclass(frozen=True)
class _Matrix:
    """One task: a whole parameter, or entry ``at`` of a stack."""

    path: str
    rule: Rule
    shape: tuple[int, ...]
    at: int | None = None

    @property
    def expert(self) -> int | None:
        """The expert that it belongs to."""
        return self.at if self.rule.per_expert else None

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def blocks(self) -> Iterator[Region]:
        """Regions of the parameter that together are the matrix, cut along the rows of the published one."""
        first = () if self.at is None else (slice(self.at, self.at + 1),)
        if not self.shape:
            yield first
            return
        axis = len(self.shape) - 1 if self.rule.transform is not Transform.NONE else 0
        whole = [slice(0, extent) for extent in self.shape]
        row = self.elements // max(self.shape[axis], 1)
        step = max(_ROWS, _ELEMENTS // max(row, 1) // _ROWS * _ROWS)
        for start in range(0, self.shape[axis], step):
            whole[axis] = slice(start, min(start + step, self.shape[axis]))
            yield (*first, *whole)


@dataclasses.dataclass
class _Found:
    """The comparison of a matrix, or of a whole parameter."""

    stored: tuple[str, str] = ("", "")
    same_bytes: bool = True
    changed: int = 0
    max_abs: float = 0.0
    squares: float = 0.0
    squares_of_difference: float = 0.0
    experts: list[int] = dataclasses.field(default_factory=list)

    def add(self, other: _Found, expert: int | None) -> None:
        """Add a matrix of the same parameter. Only changed ones count for the rms."""
        self.stored = other.stored
        self.same_bytes &= other.same_bytes
        if other.changed:
            self.changed += other.changed
            self.max_abs = max(self.max_abs, other.max_abs)
            self.squares += other.squares
            self.squares_of_difference += other.squares_of_difference
            if expert is not None:
                self.experts.append(expert)


@dataclasses.dataclass(frozen=True)
class _Sides:
    """Compares the parameters of two sides."""

    first: StoredParameters
    second: StoredParameters
    layers: tuple[int, ...] | None

    def run(self, names: tuple[str, str], progress: Progress, workers: int) -> CheckpointDifference:
        mine, its = (self._wanted(side, name) for side, name in zip((self.first, self.second), names, strict=True))
        both = [path for path in mine if path in its]
        shapes = {path: (self.first.shape(path), self.second.shape(path)) for path in both}
        tasks = [task for path in both if shapes[path][0] == shapes[path][1] for task in self._tasks(path)]
        total, done = sum(task.elements for task in tasks), 0
        found: dict[str, _Found] = {}
        with in_threads(self._compare, tasks, workers=workers) as finished:
            for task, result in finished:
                found.setdefault(task.path, _Found()).add(result, task.expert)
                done += task.elements
                progress(done, total, task.path)
        order = sorted(both, key=_place)
        changed = [_changed(path, shapes[path], found.get(path)) for path in order]
        return CheckpointDifference(
            first=_described(self.first, names[0]),
            second=_described(self.second, names[1]),
            config=tuple(self._config()),
            gone=tuple(sorted((path for path in mine if path not in its), key=_place)),
            added=tuple(sorted((path for path in its if path not in mine), key=_place)),
            changed=tuple(one for one in changed if one is not None),
            stored_otherwise=tuple(
                StoredOtherwise(path=path, stored=found[path].stored)
                for path in order
                if path in found and not found[path].changed and not found[path].same_bytes
            ),
            equal_bytes=sum(one.same_bytes for one in found.values()),
        )

    def _wanted(self, side: StoredParameters, name: str) -> set[str]:
        """The parameters of a side that are to be compared."""
        if self.layers is None:
            return set(side.paths)
        absent = set(check_layers(side.config, self.layers)) - set(side.layers)
        if absent:
            raise UsageError(f"{name}: holds the layers {ranges(side.layers)}, not {ranges(absent)}")
        wanted = wanted_tensors(self.layers)
        return {path for path in side.paths if wanted is None or wanted(path)}

    def _config(self) -> Iterator[str]:
        for field in dataclasses.fields(self.first.config):
            mine, its = (getattr(side.config, field.name) for side in (self.first, self.second))
            if field.name not in _OF_STORAGE and mine != its:
                yield f"{field.name}: {mine} in the first, {its} in the second"

    def _tasks(self, path: str) -> Iterator[_Matrix]:
        rule, shape = self.first.config.names.rule_of(path), self.first.shape(path)
        if len(shape) < 3:
            yield _Matrix(path, rule, shape)
        else:
            yield from (_Matrix(path, rule, shape[1:], at) for at in range(shape[0]))

    def _compare(self, task: _Matrix) -> _Found:
        found, skipped = _Found(), []
        for region in task.blocks():
            parts, others = (side.read_stored(task.path, region) for side in (self.first, self.second))
            found.stored = (_stored(parts), _stored(others))
            if _same_bytes(parts, others):
                skipped.append(region)
                continue
            found.same_bytes = False
            ours, theirs = (side.read_region(task.path, region) for side in (self.first, self.second))
            _measure(found, ours, theirs)
        if found.changed:  # the rms is that of the whole matrix
            for region in skipped:
                found.squares += _squares(self.first.read_region(task.path, region))
        return found


def _changed(
    path: str, shapes: tuple[tuple[int, ...], tuple[int, ...]], found: _Found | None
) -> ChangedParameter | None:
    elements = math.prod(shapes[0])
    if found is None:
        return ChangedParameter(
            path=path,
            shapes=shapes,
            stored=("", ""),
            experts=None,
            changed=elements,
            elements=elements,
            max_abs=math.inf,
            relative_rms=math.inf,
        )
    if not found.changed:
        return None
    ratio = found.squares_of_difference / found.squares if found.squares else math.inf
    return ChangedParameter(
        path=path,
        shapes=shapes,
        stored=found.stored,
        experts=tuple(sorted(found.experts)) or None,
        changed=found.changed,
        elements=elements,
        max_abs=found.max_abs,
        relative_rms=math.sqrt(ratio),
    )


def _described(side: StoredParameters, name: str) -> ComparedCheckpoint:
    published = isinstance(side, PublishedWeights)
    return ComparedCheckpoint(
        path=without_secrets(name),
        kind="published" if published else "converted",
        storage=str(side.metadata["storage"]),
        dialect=str(side.metadata["dialect"]),
    )


def _place(path: str) -> tuple[int, int, str]:
    """The order in which parameters are shown: the model level, the layers, the stages."""
    layer, stage = layer_of(path), stage_of(path)
    if stage is not None:
        return (2, stage, path)
    return (0, 0, path) if layer is None else (1, layer, path)


def _stored(parts: tuple[Array, ...]) -> str:
    """How something is stored, in words."""
    if len(parts) == 1:
        return str(parts[0].dtype)
    return f"{_SHORT.get(parts[0].dtype, parts[0].dtype)}, scales {parts[1].dtype}"


def _same_bytes(parts: tuple[Array, ...], others: tuple[Array, ...]) -> bool:
    if [(part.shape, part.dtype) for part in parts] != [(part.shape, part.dtype) for part in others]:
        return False
    return all(
        np.array_equal(part.view(f"u{part.dtype.itemsize}"), other.view(f"u{part.dtype.itemsize}"))
        for part, other in zip(parts, others, strict=True)
    )


def _measure(found: _Found, ours: Array, theirs: Array) -> None:
    """Add a block. Zeros of both signs are equal, and so are two values that are no numbers."""
    differs = (ours != theirs) & ~((ours != ours) & (theirs != theirs))
    found.squares += _squares(ours)
    count = int(np.count_nonzero(differs))
    if not count:
        return
    found.changed += count
    with np.errstate(invalid="ignore"):
        difference = theirs[differs].astype(np.float64) - ours[differs].astype(np.float64)
    difference[~np.isfinite(difference)] = np.inf
    found.max_abs = max(found.max_abs, float(np.abs(difference).max()))
    found.squares_of_difference += float(np.square(difference).sum())


def _squares(block: Array) -> float:
    flat = block.reshape(-1)
    finite = flat[np.isfinite(flat)] if flat.dtype.kind == "f" else flat
    return float(np.square(finite.astype(np.float64)).sum())

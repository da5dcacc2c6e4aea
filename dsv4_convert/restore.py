"""Model parameters out of an Orbax checkpoint that dsv4 wrote, whatever its storage."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from dsv4_convert import names
from dsv4_convert.config import Config
from dsv4_convert.errors import BadInput, ResourceError, UsageError
from dsv4_convert.formats import cast_plain
from dsv4_convert.formats.weight import PACKED_FP4, ReadPart, StoredMatrix, decode_weight
from dsv4_convert.store import Store, open_store, verify
from dsv4_convert.store.layout import Region, bounded
from dsv4_convert.units import ranges

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh, NamedSharding

    from dsv4_convert.model import Block, Model, Numerics

Array = np.ndarray[Any, Any]
_FLOAT32 = np.dtype(np.float32)
_GROUPED = names.Transform.GROUPED
#: Leaves of a quantised parameter in a store of storage ``source``.
_PARTS = ("weight", "scale")


class Parameters(Protocol):
    """Where a model's parameters come from, one at a time: a converted checkpoint, or the published shards."""

    @property
    def config(self) -> Config:
        """The architecture."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What reports say of the weights; ``source`` and ``storage`` at least."""

    def check_layers(self, wanted: tuple[int, ...]) -> None:
        """Raises :class:`UsageError` for layers that are not there."""

    def read(self, path: str, dtype: np.dtype[Any] = ...) -> Array:
        """One parameter in the model's layout."""

    def read_expert(self, path: str, expert: int, dtype: np.dtype[Any] = ...) -> Array:
        """One matrix of a stack of experts."""

    def read_rows(self, path: str, rows: Array, dtype: np.dtype[Any] = ...) -> Array:
        """Some rows of an unquantised parameter."""

    def read_region(self, path: str, region: Region, dtype: np.dtype[Any] = ...) -> Array:
        """A part of one parameter: one slice of step 1 for every axis of the model's layout."""

    def damaged(self, path: str) -> bool:
        """Whether a parameter is known to be no longer what was written."""


class Whole(Parameters, Protocol):
    """Parameters of a checkpoint, of which it is known whether mtp stages are among them."""

    def check_stages(self) -> None:
        """Raises :class:`UsageError` if there is no mtp stage, with the reason."""


class Weights:
    """Reads single parameters, or single experts of one, in the model's layout. Nothing is held in memory."""

    def __init__(self, store: Store) -> None:
        self._store = store
        metadata = store.metadata
        if metadata.get("format") != "dsv4":
            raise BadInput(f"{store.folder}: not a model that dsv4 converted (its manifest says no such thing)")
        if metadata.get("layout", "dsv4") != "dsv4":
            raise BadInput(
                f"{store.folder}: has the layout of {metadata['layout']}, for another program; convert the source "
                "again with the default layout"
            )
        if metadata.get("names_table") != names.TABLE_VERSION:
            raise BadInput(
                f"{store.folder}: written with version {metadata.get('names_table')} of the names table, this dsv4 "
                f"has version {names.TABLE_VERSION}; convert the model again"
            )

    @classmethod
    def open(cls, path: Path) -> Weights:
        """Open a checkpoint. Raises :class:`BadInput` if it is none, or not one of ours."""
        return cls(open_store(path))

    @cached_property
    def config(self) -> Config:
        """The architecture."""
        return Config.from_json(self._store.metadata["config"])

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the conversion wrote about itself: source, storage, versions."""
        return self._store.metadata

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that were converted."""
        return tuple(self._store.metadata["layers"])

    def check_layers(self, wanted: tuple[int, ...]) -> None:
        """Raises :class:`UsageError` for layers that this checkpoint does not hold."""
        absent = [layer for layer in wanted if layer not in self.layers]
        if absent:
            raise UsageError(f"{self._store.folder}: holds the layers {ranges(self.layers)}, not {ranges(absent)}")

    def check_stages(self) -> None:
        """Raises :class:`UsageError` if no mtp stage was converted, with the reason."""
        if any(names.stage_of(path) is not None for path in self._store.paths):
            return
        if names.DSPARK in self._store.metadata["tensors"]["dropped"]:
            why = "its source has no mtp stage, but DSpark's draft stages, which dsv4 does not convert"
        elif self.config.num_mtp_stages:
            why = "an earlier version of dsv4 left it out; convert the source again"
        else:
            why = "its source has none, or was converted with --layers; convert all of a source that has one"
        raise UsageError(f"{self._store.folder}: no mtp stage to draft tokens with: {why}")

    def read(self, path: str, dtype: np.dtype[Any] = _FLOAT32) -> Array:
        """One parameter as the model has it: weights in ``dtype``, norms and the like in float32, integers as int32.

        Raises:
            BadInput: the checkpoint has no such parameter, or its shape or dtype on disk is not the manifest's.
        """
        rule = names.rule_of(path)
        if rule.per_expert:
            stack = [self.read_expert(path, expert, dtype) for expert in range(self.config.n_routed_experts)]
            return np.stack(stack)
        return self._decoded(path, rule, None, dtype)

    def read_expert(self, path: str, expert: int, dtype: np.dtype[Any] = _FLOAT32) -> Array:
        """Matrix ``expert`` of a stack such as ``layers.3.ffn.experts.w1``; reads that expert's bytes only."""
        return self._decoded(path, names.rule_of(path), expert, dtype)

    def read_rows(self, path: str, rows: Array, dtype: np.dtype[Any] = _FLOAT32) -> Array:
        """Some rows of an unquantised parameter along its first axis, such as the embeddings of a prompt's tokens."""
        return np.stack(
            [decode_weight(self._store.read(path, slice(row, row + 1)), None, dtype=dtype)[0] for row in map(int, rows)]
        )

    def read_region(self, path: str, region: Region, dtype: np.dtype[Any] = _FLOAT32) -> Array:
        """A part of what :meth:`read` gives: one slice of step 1 for every axis.

        Reads only the bytes concerned (of quantised weights whole tiles). Memory beside the result: a block of 64 MB.

        Raises:
            BadInput: as :meth:`read`.
        """
        rule = names.rule_of(path)
        region = bounded(region, self._shape(path, rule))

        def plain(part: Region) -> Array:
            stored = self._store.read_region(path, part)
            return self._expert_numbers(path, stored) if rule.kind is names.Kind.INTEGER else stored

        return assembled(region, rule, dtype, partial(self._matrix, path, rule), plain)

    def _expert_numbers(self, path: str, stored: Array) -> Array:
        """A table of experts as int32, which is JAX's widest integer by default: no number may become another one."""
        experts = self.config.n_routed_experts
        if stored.size and not (stored.min() >= 0 and stored.max() < experts):
            raise BadInput(
                f"{self._store.folder}: {path}: expected experts 0 to {experts - 1}, found numbers from {stored.min()} "
                f"to {stored.max()}; run dsv4 verify, and convert again"
            )
        return stored.astype(np.int32)

    def _shape(self, path: str, rule: names.Rule) -> tuple[int, ...]:
        """Shape of a parameter. Raises :class:`BadInput` if it is not stored so."""
        stage = names.stage_of(path)
        layer = names.layer_of(path) if stage is None else self.config.num_hidden_layers + stage
        expected = stored = rule.target_shape(self.config, layer)
        scaled = f"{path}.scale" in self._store.paths
        leaf = self._store.leaf(f"{path}.weight" if scaled else path)
        if self.metadata["storage"] == "source":
            *rest, last = rule.source_shape(self.config, layer)
            packed = 2 if scaled and leaf.dtype.kind in "iu" else 1
            stored = (*expected[: rule.per_expert], *rest, last // packed)
        if leaf.shape != stored:
            raise BadInput(f"{self._store.folder}: {path} is stored as {list(leaf.shape)}, expected {list(stored)}")
        return expected

    def _matrix(self, path: str, rule: names.Rule, at: int | None) -> StoredMatrix:
        """A matrix, or entry ``at`` of a stack of experts or groups."""
        published = self.metadata["storage"] == "source"
        scaled = published and f"{path}.scale" in self._store.paths
        of_rows = published and rule.transform is _GROUPED
        first = () if at is None or of_rows else (slice(at, at + 1),)

        def reader(leaf: str) -> ReadPart:
            return lambda rows, columns: self._store.read_region(leaf, (*first, rows, columns))[(0,) * len(first)]

        leaf = f"{path}.weight" if scaled else path
        return StoredMatrix(
            read=reader(leaf),
            dtype=self._store.leaf(leaf).dtype,
            scale=reader(f"{path}.scale") if scaled else None,
            turned=published and rule.transform is not names.Transform.NONE,
            first_row=at * self.config.o_lora_rank if of_rows and at is not None else 0,
        )

    def damaged(self, path: str) -> bool:
        """Whether the stored bytes of a parameter are no longer those whose hashes the manifest has."""
        leaves = [leaf for leaf in (path, f"{path}.weight", f"{path}.scale") if leaf in self._store.manifest.leaves]
        return bool(verify(self._store, leaves=leaves))

    def check_codes(self) -> None:
        """Raises :class:`UsageError` unless the weights are stored as they were published."""
        if self.metadata["storage"] != "source":
            raise UsageError(
                f"{self._store.folder}: its weights are expanded to {self.metadata['storage']}; to compute from the "
                "published codes, convert the source again with --dtype source"
            )

    def read_codes(self, path: str) -> tuple[Array, Array, tuple[int, int], bool] | None:
        """Codes, scales, block and packing of a quantised parameter, as
        :class:`~dsv4_convert.model.encoded.Encoded` has them; None for one that is not quantised.

        In the model's orientation. For storage ``source`` alone (:meth:`check_codes`).
        """
        from dsv4_convert.model.encoded import FP4_BLOCK, FP8_BLOCK, grouped_block

        if f"{path}.scale" not in self._store.paths:
            return None
        rule = names.rule_of(path)
        packed = self._store.leaf(f"{path}.weight").dtype in PACKED_FP4
        if rule.per_expert:
            experts = range(self.config.n_routed_experts)
            pairs = [_turned(*(self._store.read(f"{path}.{part}", expert) for part in _PARTS)) for expert in experts]
            codes, scales = (np.stack(part) for part in zip(*pairs, strict=True))
            return codes, scales, FP4_BLOCK if packed else FP8_BLOCK, packed
        codes, scales = (self._store.read(f"{path}.{part}") for part in _PARTS)
        if rule.transform is not _GROUPED:
            return *_turned(codes, scales), FP4_BLOCK if packed else FP8_BLOCK, packed
        groups = self.config.o_groups
        block = grouped_block(len(codes) // groups)
        # Where groups are narrower than a block, those that are in one each get its scale.
        scales = scales[np.arange(0, len(codes), block[1]) // FP8_BLOCK[1]]
        return grouped(_as_bytes(codes), groups), grouped(_as_bytes(scales), groups), block, packed

    def encoded_bytes(self, path: str) -> int | None:
        """Bytes of a quantised parameter's codes and scales; None for one that is not."""
        leaves = self._store.manifest.leaves
        parts = [leaves[leaf] for leaf in (f"{path}.{part}" for part in _PARTS) if leaf in leaves]
        return sum(part.layout.nbytes for part in parts) if parts else None

    def _decoded(self, path: str, rule: names.Rule, expert: int | None, dtype: np.dtype[Any]) -> Array:
        dtype = dtype if rule.kind.follows_dtype else _FLOAT32
        published = self.metadata["storage"] == "source"
        scaled = published and f"{path}.scale" in self._store.paths
        stored = self._store.read(f"{path}.weight" if scaled else path, expert)
        if rule.kind is names.Kind.INTEGER:
            return self._expert_numbers(path, stored)
        scale = self._store.read(f"{path}.scale", expert) if scaled else None
        transpose = published and rule.transform is names.Transform.TRANSPOSE
        decoded = decode_weight(stored, scale, dtype=dtype, transpose=transpose)
        return grouped(decoded, self.config.o_groups) if published and rule.transform is _GROUPED else decoded


def assembled(
    region: Region,
    rule: names.Rule,
    dtype: np.dtype[Any],
    matrix: Callable[[int | None], StoredMatrix],
    plain: Callable[[Region], Array],
) -> Array:
    """A region of a parameter, with starts and stops.

    Args:
        region: in the model's layout.
        rule: of the parameter.
        dtype: of weights.
        matrix: gives the parameter as it is stored, or an entry of its first axis if it is a stack of matrices.
        plain: reads a region of a vector or an integer table.
    """
    out = np.empty([part.stop - part.start for part in region], _dtype_of(rule, dtype))
    if rule.kind is names.Kind.INTEGER:
        out[...] = plain(region)
    elif len(region) == 1:
        out[...] = decode_weight(plain(region), None, dtype=out.dtype)
    elif len(region) == 2:
        matrix(None).fill(out, region)
    else:
        for to, at in enumerate(range(region[0].start, region[0].stop)):
            matrix(at).fill(out[to], region[1:])
    return out


def _dtype_of(rule: names.Rule, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Of a parameter in the model, where weights are ``dtype``."""
    if rule.kind is names.Kind.INTEGER:
        return np.dtype(np.int32)
    return dtype if rule.kind.follows_dtype else _FLOAT32


def _turned(codes: Array, scales: Array) -> tuple[Array, Array]:
    """The published ``[out, in]`` as ``[in, out]``, bytes as uint8."""
    codes, scales = (cast_plain(part, dtype=part.dtype, transpose=True) for part in map(_as_bytes, (codes, scales)))
    return codes, scales


def _as_bytes(part: Array) -> Array:
    """Codes and E8M0 scales as what they are stored in; float32 scales as they are."""
    return part.view(np.uint8) if part.dtype.itemsize == 1 else part


def grouped(matrix: Array, groups: int) -> Array:
    """The published ``[groups * out, in]`` of a block-diagonal matrix as ``[groups, in, out]``."""
    return np.ascontiguousarray(matrix.reshape(groups, -1, matrix.shape[1]).transpose(0, 2, 1))


def restore_block(
    weights: Parameters,
    layer: int,
    *,
    with_experts: bool,
    dtype: np.dtype[Any] = _FLOAT32,
    numerics: Numerics | None = None,
    mesh: Mesh | None = None,
) -> Block:
    """One layer of the model, filled. Without experts it is a small part of the layer's weights.

    On a ``mesh`` every process reads its parts only; see :func:`restore_model`.
    """
    from flax import nnx

    from dsv4_convert.model import PLAIN, Block

    config, numerics = weights.config, numerics or PLAIN
    kind, hashed = config.kind(layer), config.hashed(layer)
    block = nnx.eval_shape(lambda: Block(config, kind, hashed=hashed, with_experts=with_experts, numerics=numerics))
    return _fill(block, weights, f"layers.{layer}.", dtype, mesh)


def restore_model(
    weights: Whole,
    *,
    dtype: np.dtype[Any] = _FLOAT32,
    drafts: bool = False,
    release: bool = False,
    scanned: bool = False,
    mesh: Mesh | None = None,
    encoded: bool = False,
) -> Model:
    """The whole model, filled; its mtp stages, which only draft tokens, with ``drafts`` alone.

    With ``release`` it rounds on the way where DeepSeek's inference code does; ``dtype`` is that of its activations.
    With ``scanned`` layers of one kind have their weights stacked, and share a program.

    On a ``mesh`` (:mod:`dsv4_convert.model.mesh`), whose devices may belong to several processes, every parameter is
    one array over all of it, laid out by :mod:`dsv4_convert.model.axes`. A process reads the parts of its own devices
    and holds, beside these, one part of one parameter.

    With ``encoded`` quantised matrices stay the codes and scales that were published, of which each use makes numbers
    in ``dtype``: less memory, and more work where they are used.

    Raises:
        ResourceError: the memory of this machine is too small for it (where the model runs on the CPU), or on a mesh
            for the parts of this process.
        UsageError: layers are missing, or the stages that are asked for; the model's widths are not those of release
            numerics; the mesh does not divide an axis that it splits; or ``encoded`` of weights whose storage is not
            ``source``, or on a mesh or of scanned layers.
    """
    from flax import nnx

    from dsv4_convert.model import PLAIN, Model, Numerics

    config = weights.config
    numerics = Numerics.of_release(config) if release else PLAIN
    dtype = np.dtype(numerics.held(dtype))
    weights.check_layers(tuple(range(config.num_hidden_layers)))
    if drafts:
        weights.check_stages()
    else:
        config = dataclasses.replace(config, num_mtp_stages=0)
    model = nnx.eval_shape(lambda: Model(config, numerics, scanned=scanned))
    codes = _codes(weights, apart=mesh is None and not scanned) if encoded else None
    _check_memory(model, weights.config, dtype, mesh, codes)
    return _fill(model, weights, "", dtype, mesh, codes)


def _codes(weights: Whole, *, apart: bool) -> Weights:
    """Where encoded matrices come from, ``apart`` for one device and layers one by one.

    Raises:
        UsageError: they cannot.
    """
    if not isinstance(weights, Weights):
        raise UsageError("encoded weights come from a converted checkpoint: convert the source with --dtype source")
    if not apart:
        raise UsageError("encoded weights are restored for one device and layers one by one; expand them here")
    weights.check_codes()
    return weights


@dataclasses.dataclass(frozen=True)
class _Variable:
    """A variable of a model, and where its value comes from.

    ``paths``: the parameter that it is, or those of the layers that it stacks.
    """

    axes: tuple[str | None, ...]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    paths: tuple[str, ...]
    stacked: bool

    @classmethod
    def of(cls, key: tuple[Any, ...], variable: Any, prefix: str, config: Config, dtype: np.dtype[Any]) -> _Variable:
        from dsv4_convert.model.segments import paths_of

        paths = tuple(prefix + path for path in paths_of(config, key))
        stacked = key[:2] == ("layers", "segments")
        return cls(variable.axes, variable.shape, _dtype_of(names.rule_of(paths[0]), dtype), paths, stacked)

    def sharding(self, mesh: Mesh) -> NamedSharding:
        """How it lies on a mesh. Raises :class:`UsageError` as :func:`dsv4_convert.model.axes.partition`."""
        from jax.sharding import NamedSharding

        from dsv4_convert.model.axes import partition

        return NamedSharding(mesh, partition(self.axes, self.shape, mesh.shape, what=self.paths[0]))

    def read(self, weights: Parameters) -> Array:
        """All of it. Raises :class:`BadInput` on a wrong shape."""
        read = [weights.read(path, self.dtype) for path in self.paths]
        expected = self.shape[1:] if self.stacked else self.shape
        for path, value in zip(self.paths, read, strict=True):
            if value.shape != expected:
                raise BadInput(f"{path}: the model has shape {list(expected)}, the checkpoint {list(value.shape)}")
        return np.stack(read) if self.stacked else read[0]

    def read_region(self, weights: Parameters, region: Region) -> Array:
        """A part of it, stacked layers one by one."""
        if not self.stacked:
            return weights.read_region(self.paths[0], region, self.dtype)
        layers, *rest = bounded(region, self.shape)
        out = np.empty([part.stop - part.start for part in (layers, *rest)], self.dtype)
        for to, path in zip(out, self.paths[layers], strict=True):
            to[...] = weights.read_region(path, tuple(rest), self.dtype)
        return out

    def on_mesh(self, weights: Parameters, mesh: Mesh) -> jax.Array:
        """All of it over a mesh."""
        return read_sharded(self.shape, self.dtype, self.sharding(mesh), partial(self.read_region, weights))


def read_sharded(
    shape: tuple[int, ...], dtype: np.dtype[Any], sharding: NamedSharding, read: Callable[[Region], Array]
) -> jax.Array:
    """An array over a mesh, of which this process reads the parts of its own devices, one after the other.

    ``read`` gives the numbers of a region, slices with starts and stops. What several devices hold is read once.
    """
    import jax

    holders: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, region in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple((part.start, part.stop) for part in bounded(region or (), shape))
        holders.setdefault(bounds, []).append(device)
    parts = []
    for bounds, devices in holders.items():
        value = read(tuple(slice(*bound) for bound in bounds))
        parts += jax.block_until_ready([jax.device_put(value, device) for device in devices])
    return jax.make_array_from_single_device_arrays(shape, sharding, parts, dtype=dtype)


def _variables(module: Any, prefix: str, config: Config, dtype: np.dtype[Any]) -> Iterator[tuple[Any, Any, _Variable]]:
    """Key, abstract variable and origin of everything that a module holds."""
    from flax import nnx

    for key, variable in nnx.to_flat_state(nnx.state(module)):
        yield key, variable, _Variable.of(key, variable, prefix, config, dtype)


def _check_memory(model: Model, config: Config, dtype: np.dtype[Any], mesh: Mesh | None, codes: Weights | None) -> None:
    import jax

    file = Path("/proc/meminfo")
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    if platform != "cpu" or not file.exists():
        return
    available = next(
        1024 * int(line.split()[1]) for line in file.read_text().splitlines() if line.startswith("MemAvailable")
    )
    needed = 0
    for _, _, variable in _variables(model, "", config, dtype):
        coded = None if codes is None else codes.encoded_bytes(variable.paths[0])
        shape, holders = variable.shape, 1
        if mesh is not None:
            sharding = variable.sharding(mesh)
            shape, holders = sharding.shard_shape(shape), len(sharding.addressable_devices)
        needed += math.prod(shape) * holders * variable.dtype.itemsize if coded is None else coded
    if needed > available:
        what = "the whole model takes" if mesh is None else "the devices of this process take"
        raise ResourceError(
            f"{what} {needed:,} bytes in {dtype if codes is None else 'their published form'}, {available:,} are "
            "available; parity, which holds one layer at a time, runs on this machine"
        )


def _fill(
    module: Any,
    weights: Parameters,
    prefix: str,
    dtype: np.dtype[Any],
    mesh: Mesh | None,
    codes: Weights | None = None,
) -> Any:
    """Give every variable of an abstract module its value, from ``codes`` those that are quantised.

    Raises:
        BadInput: a wrong shape.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from dsv4_convert.model.encoded import Encoded

    filled = {}
    for key, variable, origin in _variables(module, prefix, weights.config, dtype):
        coded = None if codes is None else codes.read_codes(origin.paths[0])
        if mesh is not None:
            value = origin.on_mesh(weights, mesh)
        elif coded is None:
            value = jnp.asarray(origin.read(weights))
        else:
            value = jax.tree.map(jnp.asarray, Encoded(*coded, np.dtype(dtype)))
            if value.shape != variable.shape:
                path = origin.paths[0]
                raise BadInput(f"{path}: the model has shape {list(variable.shape)}, its codes {list(value.shape)}")
        filled[key] = variable.replace(value)
    return nnx.merge(nnx.graphdef(module), nnx.from_flat_state(filled))

"""Restoring the model, or one layer of it, on one device or over a mesh of devices."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4_convert.errors import BadInput, ResourceError, UsageError
from dsv4_convert.folders import PathLike
from dsv4_convert.spec.config import Config
from dsv4_convert.store.layout import Region, bounded
from dsv4_convert.store.threads import in_threads
from dsv4_convert.weights.codes import PARTS, Codes, Part
from dsv4_convert.weights.converted import Weights
from dsv4_convert.weights.parameters import FLOAT32, Array, Parameters, Whole, dtype_of

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh, NamedSharding

    from dsv4_convert.model import Numerics
    from dsv4_convert.model.block import DecoderBlock
    from dsv4_convert.model.encoded import Encoded
    from dsv4_convert.model.layers import Layers
    from dsv4_convert.model.model import Decoder

#: Host memory for parts of an array that are read at once.
_BYTES_AT_ONCE = 512 << 20


def restore_block(
    weights: Parameters,
    layer: int,
    *,
    with_experts: bool,
    dtype: np.dtype[Any] = FLOAT32,
    numerics: Numerics | None = None,
    mesh: Mesh | None = None,
    encoded: bool = False,
) -> DecoderBlock:
    """One layer or stage of the model with its weights. Without experts these are a small part of it.

    On a ``mesh`` every process reads only its parts; see :func:`restore_model`. With ``encoded`` matrices that are
    stored as codes stay codes; the others are expanded.
    """
    from flax import nnx

    from dsv4_convert.model import PLAIN
    from dsv4_convert.model.layers import block_of, stage_of

    config, numerics = weights.config, numerics or PLAIN

    def make() -> DecoderBlock:
        if layer in config.stage_layers:
            stage = layer - config.num_hidden_layers
            return stage_of(config, stage, with_experts=with_experts, numerics=numerics)
        return block_of(config, config.layer_kind(layer), with_experts=with_experts, numerics=numerics)

    return _Filling(weights, config, config.prefix(layer).__add__, dtype, mesh, encoded).fill(nnx.eval_shape(make))


def restore_layers(
    weights: Parameters,
    layers: Sequence[int],
    *,
    dtype: np.dtype[Any] = FLOAT32,
    numerics: Numerics | None = None,
    scanned: bool = False,
    mesh: Mesh | None = None,
    encoded: bool = False,
) -> Layers:
    """Some layers as a model has them, numbered from 0. Arguments as for :func:`restore_model`.

    Raises:
        UsageError: as :func:`restore_model`.
    """
    from flax import nnx

    from dsv4_convert.model import PLAIN
    from dsv4_convert.model.layers import Layers

    filling = _of_layers(weights, layers, dtype, mesh, encoded=encoded)
    return filling.fill(nnx.eval_shape(lambda: Layers(filling.config, numerics or PLAIN, scanned=scanned)))


def layers_bytes(
    weights: Parameters,
    layers: Sequence[int],
    *,
    dtype: np.dtype[Any] = FLOAT32,
    scanned: bool = False,
    mesh: Mesh | None = None,
    encoded: bool = False,
) -> int:
    """Bytes of :func:`restore_layers` on the devices of this process. Raises likewise."""
    from flax import nnx

    from dsv4_convert.model import PLAIN
    from dsv4_convert.model.layers import Layers

    filling = _of_layers(weights, layers, dtype, mesh, encoded=encoded)
    return filling.bytes_of(nnx.eval_shape(lambda: Layers(filling.config, PLAIN, scanned=scanned)))


def restore_stage(
    weights: Parameters,
    layer: int,
    *,
    dtype: np.dtype[Any] = FLOAT32,
    numerics: Numerics | None = None,
    mesh: Mesh | None = None,
    encoded: bool = False,
) -> Decoder:
    """A model without layers, whose only stage is that of ``layer``; otherwise as :func:`restore_model`."""
    from dsv4_convert.model import PLAIN

    filling = _of_stage(weights, layer, dtype, mesh, encoded=encoded)
    return filling.fill(_with_stage(filling.config, layer - weights.config.num_hidden_layers, numerics or PLAIN))


def stage_bytes(
    weights: Parameters,
    layer: int,
    *,
    dtype: np.dtype[Any] = FLOAT32,
    mesh: Mesh | None = None,
    encoded: bool = False,
) -> int:
    """Bytes of :func:`restore_stage` on the devices of this process. Raises likewise."""
    from dsv4_convert.model import PLAIN

    filling = _of_stage(weights, layer, dtype, mesh, encoded=encoded)
    return filling.bytes_of(_with_stage(filling.config, layer - weights.config.num_hidden_layers, PLAIN))


def _with_stage(config: Config, stage: int, numerics: Numerics) -> Decoder:
    """A model without values, with one of its stages only."""
    from flax import nnx

    from dsv4_convert.model.architectures import model_of

    def make() -> Decoder:
        model = model_of(config, numerics)
        model.mtp = nnx.List([model.mtp[stage]])
        return model

    model: Decoder = nnx.eval_shape(make)
    return model


def _of_stage(weights: Parameters, layer: int, dtype: np.dtype[Any], mesh: Mesh | None, *, encoded: bool) -> _Filling:
    """Fills a model without layers, whose stage 0 has the parameters of ``layer``."""
    config, own = weights.config, weights.config.prefix(layer)
    alone = dataclasses.replace(config.of_layers(()), num_mtp_stages=config.num_mtp_stages, dspark=config.dspark)
    if encoded:
        _check_codes(weights)
    first = alone.prefix(0)
    return _Filling(
        weights,
        alone,
        lambda path: own + path.removeprefix(first) if path.startswith(first) else path,
        dtype,
        mesh,
        encoded,
    )


def _model(config: Config, numerics: Numerics, *, scanned: bool = False) -> Decoder:
    """A model without values."""
    from flax import nnx

    from dsv4_convert.model.architectures import model_of

    model: Decoder = nnx.eval_shape(lambda: model_of(config, numerics, scanned=scanned))
    return model


def _of_layers(
    weights: Parameters,
    layers: Sequence[int],
    dtype: np.dtype[Any],
    mesh: Mesh | None,
    *,
    encoded: bool,
) -> _Filling:
    """Fills layers that are numbered from 0 with the parameters of ``layers``."""

    def path(own: str) -> str:
        _, number, rest = own.split(".", 2)
        return f"layers.{layers[int(number)]}.{rest}"

    if encoded:
        _check_codes(weights)
    return _Filling(weights, weights.config.of_layers(layers), path, dtype, mesh, encoded)


def restore_model(
    weights: Whole | PathLike,
    *,
    dtype: np.dtype[Any] = FLOAT32,
    drafts: bool = False,
    release: bool = False,
    scanned: bool = False,
    mesh: Mesh | None = None,
    encoded: bool = False,
) -> Decoder:
    """The whole model with its weights, open or given by the path of a converted checkpoint.

    Its draft stages, which only draft tokens, are restored with ``drafts``.

    With ``release`` it rounds intermediate values where DeepSeek's inference code does, with activations in ``dtype``.
    With ``scanned`` layers of one kind share a program, and their weights are stacked.

    On a ``mesh`` (:mod:`dsv4_convert.model.mesh`), whose devices may belong to several processes, every parameter is
    one array over all of it, laid out by :mod:`dsv4_convert.model.axes`. A process reads the parts of its own devices
    and holds one further part of one parameter at a time.

    With ``encoded`` quantised matrices stay the published codes and scales, and each use decodes them to ``dtype``:
    less memory, and more work where they are used.

    Raises:
        ResourceError: the model (on a mesh: this process's parts) exceeds the memory of this machine; checked on CPU.
        UsageError: layers or draft stages are missing; widths do not suit release numerics. Or the mesh does not
            divide an axis that it splits, or cuts through a block of codes that share a scale. Or ``encoded``, of a
            converted checkpoint whose storage is not ``source``.

    Examples:
        >>> model = restore_model("orbax")
        >>> model.config.num_hidden_layers
        4
    """
    from dsv4_convert.model import PLAIN
    from dsv4_convert.model.architectures import release_numerics

    if isinstance(weights, str | os.PathLike):
        weights = Weights.open(weights)
    config = weights.config
    numerics = release_numerics(config) if release else PLAIN
    dtype = np.dtype(numerics.weight_dtype(dtype))
    weights.check_layers(tuple(range(config.num_hidden_layers)))
    if drafts:
        weights.check_stages()
    else:
        config = config.without_stages()
    model = _model(config, numerics, scanned=scanned)
    if drafts and model.why_no_drafts is not None:
        raise UsageError(f"speculative decoding: {model.why_no_drafts}")
    if encoded:
        _check_codes(weights)
    filling = _Filling(weights, weights.config, str, dtype, mesh, encoded)
    _check_memory(filling, model)
    return filling.fill(model)


def _check_codes(weights: Parameters) -> None:
    """Raises :class:`UsageError` if a conversion has expanded the weights."""
    if isinstance(weights, Weights):
        weights.check_codes()


@dataclasses.dataclass(frozen=True)
class _Variable:
    """A variable of a model, and the ``paths`` of the parameter, or of the stacked layers' parameters, that fill it.

    ``derived``: it is made from another file of the checkpoint than its tensors.
    """

    axes: tuple[str | None, ...]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    paths: tuple[str, ...]
    stacked: bool
    derived: bool

    @classmethod
    def of(
        cls, key: tuple[Any, ...], variable: Any, path: Callable[[str], str], config: Config, dtype: np.dtype[Any]
    ) -> _Variable:
        from dsv4_convert.model.ops import Derived
        from dsv4_convert.spec.segments import paths_of

        paths = tuple(map(path, paths_of(config, key)))
        stacked, derived = key[:2] == ("layers", "segments"), isinstance(variable, Derived)
        own = np.dtype(variable.dtype) if derived else dtype_of(config.names.rule_of(paths[0]), dtype)
        return cls(variable.axes, variable.shape, own, paths, stacked, derived)

    @property
    def own_shape(self) -> tuple[int, ...]:
        """Shape in one layer."""
        return self.shape[1:] if self.stacked else self.shape

    def codes(self, weights: Parameters) -> tuple[Codes, ...]:
        """The codes of every path; empty if the parameter is not quantised."""
        found = [Codes.of(weights, path, self.own_shape) for path in self.paths]
        return tuple(codes for codes in found if codes is not None)

    def read(self, weights: Parameters) -> Array:
        """All of it. Raises :class:`BadInput` on a wrong shape."""
        read = [weights.token_map() if self.derived else weights.read(path, self.dtype) for path in self.paths]
        for path, value in zip(self.paths, read, strict=True):
            if value.shape != self.own_shape:
                raise BadInput(
                    f"{path}: the model has shape {list(self.own_shape)}, the checkpoint {list(value.shape)}"
                )
        return np.stack(read) if self.stacked else read[0]

    def read_region(self, weights: Parameters, region: Region) -> Array:
        """A part of it."""
        if self.derived:
            return self.read(weights)[region]
        return self._stack(region, lambda layer, own: weights.read_region(self.paths[layer], own, self.dtype))

    def read_codes(self, codes: Sequence[Codes], part: Part, region: Region) -> Array:
        """A part of its codes or scales."""
        return self._stack(region, lambda layer, own: codes[layer].read(part, own))

    def _stack(self, region: Region, read: Callable[[int, Region], Array]) -> Array:
        """Regions of stacked layers, read one by one into their places."""
        if not self.stacked:
            return read(0, region)
        layers, *rest = region
        of_layers = (read(layer, tuple(rest)) for layer in range(layers.start, layers.stop))
        first = next(of_layers)
        out = np.empty((layers.stop - layers.start, *first.shape), first.dtype)
        for to, value in zip(out, itertools.chain([first], of_layers), strict=True):
            to[...] = value
        return out


def _padded(read: Callable[[Region], Array], stored: jax.ShapeDtypeStruct) -> Callable[[Region], Array]:
    """``read`` of a ``stored`` array, for regions that go beyond it too: there are zeros."""

    def padded(region: Region) -> Array:
        own = tuple(slice(part.start, min(part.stop, size)) for part, size in zip(region, stored.shape, strict=True))
        if own == region:
            return read(region)
        out = np.zeros([part.stop - part.start for part in region], stored.dtype)
        if all(part.start < part.stop for part in own):
            out[tuple(slice(part.stop - part.start) for part in own)] = read(own)
        return out

    return padded


def read_sharded(
    shape: tuple[int, ...], dtype: np.dtype[Any], sharding: NamedSharding, read: Callable[[Region], Array]
) -> jax.Array:
    """An array over a mesh; this process reads the parts of its own devices, several at once.

    ``read`` returns the values of a region, slices with starts and stops; threads call it. A region that several
    devices hold is read once. Parts that are not on their devices yet take at most :data:`_BYTES_AT_ONCE`, or one part
    that is larger.
    """
    import jax

    holders: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, region in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple((part.start, part.stop) for part in bounded(region or (), shape))
        holders.setdefault(bounds, []).append(device)

    def put(bounds: tuple[tuple[int, int], ...]) -> list[jax.Array]:
        value = read(tuple(slice(*bound) for bound in bounds))
        on_devices: list[jax.Array] = [jax.device_put(value, device) for device in holders[bounds]]
        return jax.block_until_ready(on_devices)

    # All parts have the same size.
    nbytes = math.prod(sharding.shard_shape(shape)) * dtype.itemsize
    workers = min(len(holders), os.cpu_count() or 1, max(1, _BYTES_AT_ONCE // max(1, nbytes)))
    with in_threads(put, holders, workers=workers) as done:
        parts = [part for _, put_parts in done for part in put_parts]
    return jax.make_array_from_single_device_arrays(shape, sharding, parts, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class _Filling:
    """Fills the variables of an abstract module.

    Attributes:
        weights: the parameters.
        config: the module's, whose layers ``path`` finds among the parameters: their paths by the module's own.
        dtype, mesh: as for :func:`restore_model`.
        encoded: quantised matrices stay codes and scales.
    """

    weights: Parameters
    config: Config
    path: Callable[[str], str]
    dtype: np.dtype[Any]
    mesh: Mesh | None = None
    encoded: bool = False

    def fill(self, module: Any) -> Any:
        """The module with its weights. Raises :class:`BadInput` on a wrong shape."""
        from flax import nnx

        filled = {
            key: variable.replace(self._value(origin, self._codes(origin)))
            for key, variable, origin in self._variables(module)
        }
        return nnx.merge(nnx.graphdef(module), nnx.from_flat_state(filled))

    def _codes(self, variable: _Variable) -> tuple[Codes, ...]:
        """The codes that fill a variable; empty for an expanded one."""
        return variable.codes(self.weights) if self.encoded and not variable.derived else ()

    def _value(self, variable: _Variable, codes: Sequence[Codes]) -> jax.Array | Encoded:
        """A variable's numbers, or its codes and scales; over the mesh if there is one."""
        import jax
        import jax.numpy as jnp

        if not codes and self.mesh is None:
            return jnp.asarray(variable.read(self.weights))
        reads = [partial(variable.read_codes, codes, part) for part in PARTS if codes]
        stored, form = jax.tree.flatten(self._stored(variable, codes))
        placed = jax.tree.leaves(self._placed(variable, codes))
        values = []
        for read, own, on in zip(reads or [partial(variable.read_region, self.weights)], stored, placed, strict=True):
            if self.mesh is None:
                values.append(jnp.asarray(read(tuple(slice(0, length) for length in own.shape))))
            else:
                values.append(read_sharded(on.shape, on.dtype, on.sharding, _padded(read, own)))
        value: jax.Array | Encoded = jax.tree.unflatten(form, values)
        return value

    def _stored(self, variable: _Variable, codes: Sequence[Codes]) -> Any:
        """Shape and dtype of a variable, of codes and scales in an ``Encoded``."""
        import jax

        from dsv4_convert.model.encoded import Encoded

        if not codes:
            return jax.ShapeDtypeStruct(variable.shape, variable.dtype)
        first = codes[0]
        stack = variable.shape[:1] if variable.stacked else ()
        parts = [jax.ShapeDtypeStruct((*stack, *first.shape_of(part)), first.dtype_of(part)) for part in PARTS]
        return Encoded(parts[0], parts[1], first.block, first.packed, np.dtype(self.dtype))

    def _placed(self, variable: _Variable, codes: Sequence[Codes]) -> Any:
        """:meth:`_stored` as it lies on the mesh, if there is one. Raises :class:`UsageError` as ``partitions``."""
        from dsv4_convert.model.encoded import on_mesh

        stored = self._stored(variable, codes)
        return stored if self.mesh is None else on_mesh(stored, variable.axes, self.mesh, what=variable.paths[0])

    def bytes_of(self, module: Any) -> int:
        """Bytes that the devices of this process need for the module."""
        import jax

        needed = 0
        for _, _, variable in self._variables(module):
            for part in jax.tree.leaves(self._placed(variable, self._codes(variable))):
                own = part.shape if self.mesh is None else part.sharding.shard_shape(part.shape)
                holders = 1 if self.mesh is None else len(part.sharding.addressable_devices)
                needed += math.prod(own) * holders * part.dtype.itemsize
        return needed

    def _variables(self, module: Any) -> Iterator[tuple[Any, Any, _Variable]]:
        """Key, abstract variable and origin of every variable of a module."""
        from flax import nnx

        for key, variable in nnx.to_flat_state(nnx.state(module)):
            yield key, variable, _Variable.of(key, variable, self.path, self.config, self.dtype)


def available_bytes(mesh: Mesh | None = None) -> int | None:
    """Bytes that this process could still use on its devices: of this machine for CPUs; None if that is unknown."""
    import jax

    devices = jax.local_devices() if mesh is None else [d for d in mesh.devices.flat if d in jax.local_devices()]
    if devices[0].platform != "cpu":
        stats = [device.memory_stats() or {} for device in (devices[:1] if mesh is None else devices)]
        free = [of["bytes_limit"] - of.get("bytes_in_use", 0) for of in stats if "bytes_limit" in of]
        return sum(free) if len(free) == len(stats) else None
    file = Path("/proc/meminfo")
    if not file.exists():
        return None
    return next(
        1024 * int(line.split()[1]) for line in file.read_text().splitlines() if line.startswith("MemAvailable")
    )


def _check_memory(filling: _Filling, model: Decoder) -> None:
    """Raise :class:`ResourceError` if the model exceeds this machine's memory."""
    import jax

    mesh = filling.mesh
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    available = available_bytes(mesh)
    if platform != "cpu" or available is None:
        return
    needed = filling.bytes_of(model)
    if needed > available:
        what = "the whole model takes" if mesh is None else "the devices of this process take"
        raise ResourceError(
            f"{what} {needed:,} bytes in {filling.dtype if not filling.encoded else 'their published form'}, "
            f"{available:,} are available; parity, which holds one layer at a time, runs on this machine"
        )

"""Digests of weights by their values: which weights they are, whatever their dialect, storage and file.

A digest covers a sample of a parameter: three blocks along the diagonal of a matrix, and the same in four matrices of a
stack. They are decoded and rounded to bfloat16. So a BF16 copy, a folder of ``save_pretrained`` and a conversion in any
storage have the digests of the release. Other weights, or a tensor in another place or order, have others. Only the
bytes of the sample are read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import product

import ml_dtypes
import numpy as np

from dsv4_convert.spec.names import Kind, Rule, parameters
from dsv4_convert.store.layout import Region
from dsv4_convert.weights.parameters import Parameters

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
#: Elements of a block along each axis.
_BLOCK = 16
_BLOCKS, _MATRICES = 3, 4


def value_digests(weights: Parameters, layers: Iterable[int]) -> dict[str, str]:
    """SHA-256 of the sample of every parameter of some layers and of the model level, by path.

    Raises:
        BadInput: a weight is missing or cannot be read.
    """
    config = weights.config
    return {
        path: _digest(weights, path, rule, rule.target_shape(config, layer))
        for path, rule, layer in parameters(config, tuple(layers))
    }


def differing_values(weights: Parameters, recorded: Mapping[str, str], layers: Iterable[int]) -> tuple[str, ...]:
    """The parameters of some layers and of the model level whose values are not the recorded ones, in their order.

    Raises:
        BadInput: a weight is missing or cannot be read.
    """
    found = value_digests(weights, layers)
    return tuple(path for path, digest in found.items() if recorded.get(path, digest) != digest)


def _digest(weights: Parameters, path: str, rule: Rule, shape: tuple[int, ...]) -> str:
    digest = hashlib.sha256(repr(shape).encode())
    stored = np.dtype(np.int32) if rule.kind is Kind.INTEGER else _BFLOAT16
    for region in _sample(shape):
        digest.update(np.ascontiguousarray(weights.read_region(path, region, _BFLOAT16).astype(stored)).tobytes())
    return digest.hexdigest()


def _sample(shape: tuple[int, ...]) -> Iterator[Region]:
    """The sampled regions of a parameter."""
    stack, matrix = shape[:-2], shape[-2:]
    blocks = zip(*(_spread(size, _BLOCKS, _BLOCK) for size in matrix), strict=True)
    for at, block in product(product(*(_spread(size, _MATRICES, 1) for size in stack)), list(blocks)):
        yield (*at, *block)


def _spread(size: int, count: int, width: int) -> list[slice]:
    """``count`` runs of ``width``, evenly spread over ``size`` from its beginning to its end."""
    last = max(size - width, 0)
    return [slice(start, min(start + width, size)) for start in (last * at // (count - 1) for at in range(count))]

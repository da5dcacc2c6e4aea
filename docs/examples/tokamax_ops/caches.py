"""tokamax's paged caches of DeepSeek-V4 as NumPy arrays: packed here, so that an op is not checked by its own code.

Every function takes or gives float32 rows ``[T, channels]``.
"""

import ml_dtypes
import numpy as np

FP8, E8M0, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu, ml_dtypes.bfloat16
#: Rows of a page.
PAGE = 128
#: Channels of an attended entry: without a rotation in FP8, rotated in bfloat16.
NOPE, ROPE = 448, 64


def pages(rows):
    """Rows ``[T, ...]`` as pages ``[P, PAGE, ...]``, filled up with zeros."""
    filled = np.pad(rows, ((0, -len(rows) % PAGE), *((0, 0),) * (rows.ndim - 1)))
    return filled.reshape(-1, PAGE, *rows.shape[1:])


def room_for(pages, tokens):
    """Empty pages beside others, for what a compressor makes of so many tokens: at most a row of each."""
    return np.zeros((-(-tokens // PAGE), *pages.shape[1:]), pages.dtype)


def fp8(rows, axis):
    """Codes, and the power of two of each group along ``axis`` that makes its largest value fit."""
    largest = np.maximum(np.abs(rows).max(axis, keepdims=True), 1e-4)
    scale = np.exp2(np.ceil(np.log2(largest / 448)))
    return (rows / scale).astype(FP8), scale.squeeze(axis)


def pack_entries(entries):
    """Attended entries of a CSA layer: int32 ``[P, PAGE, 128]``, and ``[P, PAGE / 4, 128]`` of the rotated channels.

    Scales repeat along the channels: channel d has the one of lane d % 64. A word's bytes are 128 bytes apart.
    """
    codes, scale = fp8(entries[:, :NOPE].reshape(-1, NOPE // 64, 64), axis=1)
    record = np.concatenate([codes.reshape(-1, NOPE).view(np.uint8), scale.astype(E8M0).view(np.uint8)], axis=1)
    words = np.ascontiguousarray(record.reshape(-1, 4, 128).swapaxes(1, 2)).view(np.int32)[..., 0]
    bits = entries[:, NOPE:].astype(BF16).view(np.uint16)
    halves = np.ascontiguousarray(np.stack([bits[:, :32], bits[:, 32:]], axis=-1)).view(np.int32)[..., 0]
    return pages(words), pages(halves).reshape(-1, PAGE // 4, 128)


def unpack_entries(words, halves):
    """The entries of such caches, of all pages."""
    record = np.ascontiguousarray(words).view(np.uint8).reshape(-1, 128, 4).swapaxes(1, 2).reshape(-1, 512)
    codes, scale = np.ascontiguousarray(record[:, :NOPE]).view(FP8), np.ascontiguousarray(record[:, NOPE:]).view(E8M0)
    nope = codes.astype(np.float32).reshape(-1, NOPE // 64, 64) * scale.astype(np.float32)[:, None]
    bits = np.ascontiguousarray(halves).view(np.uint16).reshape(-1, 32, 2).swapaxes(1, 2).reshape(-1, ROPE)
    return np.concatenate([nope.reshape(-1, NOPE), bits.view(BF16).astype(np.float32)], axis=1)


def unpack_gathered(words, halves, block):
    """The entries that ``csa_gather`` returns. In a block of ``block`` entries, i and i + block / 2 share a row."""
    bits = np.ascontiguousarray(halves).view(np.uint16).reshape(-1, 128, 2).swapaxes(1, 2)
    bits = bits.reshape(-1, block // 2, 2, ROPE).swapaxes(1, 2).reshape(-1, ROPE)
    packed = np.ascontiguousarray(np.stack([bits[:, :32], bits[:, 32:]], axis=-1)).view(np.int32)[..., 0]
    return unpack_entries(words, packed)


def unpack_dense(slabs):
    """Entries of an HCA layer, bfloat16 in two rows each of uint8 ``[P, PAGE, 4, 128]``."""
    bits = np.ascontiguousarray(slabs.reshape(-1, 4, 2, 128).swapaxes(2, 3)).view(np.uint16)
    return bits.reshape(-1, 512).view(BF16).astype(np.float32)


def pack_keys(keys):
    """Keys of the indexer: FP8 with one scale each, records of 256 bytes in uint8 ``[P, PAGE / 4, 4, 256]``."""
    codes, scale = fp8(keys, axis=1)
    record = np.zeros((len(keys), 256), np.uint8)
    record[:, :128], record[:, 128] = codes.view(np.uint8), scale.astype(E8M0).view(np.uint8)
    return pages(record).reshape(-1, PAGE // 4, 4, 256)


def unpack_keys(cache):
    """The keys of such a cache, of all pages."""
    record = cache.reshape(-1, 256)
    codes = np.ascontiguousarray(record[:, :128]).view(FP8)
    return codes.astype(np.float32) * record[:, 128:129].copy().view(E8M0).astype(np.float32)


def pack_states(states, lanes=128):
    """A compressor's float32 states, in as many rows each as they need: uint8 ``[P, PAGE, 4, lanes]``."""
    rows = states.astype(np.float32).reshape(-1, lanes)
    return pages(np.ascontiguousarray(rows).view(np.uint8).reshape(-1, lanes, 4).swapaxes(1, 2))


def unpack_states(slabs, width):
    """The states ``[T, width]`` of such a cache, of all pages."""
    rows = np.ascontiguousarray(slabs.reshape(-1, *slabs.shape[2:]).swapaxes(1, 2))
    return rows.view(np.float32).reshape(-1, width)


def as_words(slabs):
    """uint8 ``[P, PAGE, 4, 128]`` as the int32 ``[P, PAGE, 128]`` that a CSA layer keeps."""
    return np.ascontiguousarray(slabs.swapaxes(2, 3)).view(np.int32)[..., 0]

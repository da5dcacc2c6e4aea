"""Exact, fast codecs of the tensors that DeepSeek-V4 publishes: FP8 blocks, packed FP4 groups, and plain floats.

numpy arrays in and out, one core per call, the GIL released while the loops run. The loops, and with them numba, are
loaded when something is decoded or encoded: copying published bytes needs neither. See :mod:`.tables` for what "exact"
means at zeros, NaN and both ends of the range.
"""

from dsv4_convert.formats.fp4 import FP4_MAX, decode_fp4, encode_fp4, quantize_fp4
from dsv4_convert.formats.fp8 import FP8_MAX, decode_fp8, encode_fp8, quantize_fp8
from dsv4_convert.formats.plain import cast_plain

__all__ = [
    "FP4_MAX",
    "FP8_MAX",
    "cast_plain",
    "decode_fp4",
    "decode_fp8",
    "encode_fp4",
    "encode_fp8",
    "quantize_fp4",
    "quantize_fp8",
]

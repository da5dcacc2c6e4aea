"""A JSON file of a checkpoint, read strictly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsv4_convert.checkpoint.files import foreign_content, read_start, stat_regular
from dsv4_convert.errors import BadInput
from dsv4_convert.strict_json import parse_object

#: The largest published index is 14 MB; a config.json has a few KB.
MAX_JSON_BYTES = 100_000_000


def read_object(path: Path) -> dict[str, Any]:
    """Parse a JSON file of at most 100 MB whose root is an object.

    Raises:
        BadInput: missing, not a regular file, too large, or refused by :func:`~dsv4_convert.strict_json.parse_object`.
    """
    size = stat_regular(path).st_size
    if size > MAX_JSON_BYTES:
        raise BadInput(f"{path}: {size:,} bytes, where at most {MAX_JSON_BYTES:,} are expected of a JSON file")
    text = read_start(path, MAX_JSON_BYTES)
    is_json = text.lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"{", b"["))
    if not is_json and (found := foreign_content(text[:512])) is not None:
        raise BadInput(f"{path}: expected a JSON object, found {found}")
    return parse_object(text, where=str(path))

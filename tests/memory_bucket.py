"""A bucket in memory: fsspec's own file system, under the names that etils.epath asks for."""

from __future__ import annotations

from typing import Any, ClassVar

from fsspec.implementations.memory import MemoryFileSystem


class MemoryBucket(MemoryFileSystem):
    """``gs://`` without a network."""

    protocol = ("gs", "gcs")
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    def __init__(self, *, finalize_on_close: bool = False, **options: Any) -> None:
        super().__init__(**options)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        inside = path.removeprefix("gs://").removeprefix("gcs://").strip("/")
        return f"/{inside}" if inside else ""

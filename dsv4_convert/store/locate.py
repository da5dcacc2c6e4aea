"""Where a checkpoint of ours is, or will be: a local folder, or a bucket."""

from __future__ import annotations

import os
from pathlib import Path

from dsv4_convert.errors import UsageError
from dsv4_convert.store.arrays import is_local
from dsv4_convert.store.bucket import Bucket, bucket_path
from dsv4_convert.store.destination import AnyPath, Destination
from dsv4_convert.store.folder import Folder


def as_path(where: str | os.PathLike[str]) -> AnyPath:
    """A path to read from or write to: local, or of a bucket for a URL such as ``gs://bucket/model``.

    Raises:
        UsageError: a URL of something that is not supported, or whose library is not installed.
    """
    text = os.fspath(where)
    if "://" not in text:
        return Path(os.path.abspath(text))
    return bucket_path(text)


def open_destination(destination: str | os.PathLike[str]) -> Destination:
    """What is written to: a path or a URL. Nothing is made yet.

    Raises:
        UsageError: as :func:`as_path`, or a name that is not text in this locale, which Orbax and tensorstore ask for.
    """
    try:
        os.fspath(destination).encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"{destination}: not a name in UTF-8; choose another, or set a locale that has it, such as LC_ALL=C.UTF-8"
        ) from None
    path = as_path(destination)
    return Folder(path) if is_local(path) else Bucket(path)

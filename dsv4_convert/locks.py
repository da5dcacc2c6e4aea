"""One writer at a time: a lock that the system releases when its holder ends, however that happens."""

from __future__ import annotations

import fcntl
from pathlib import Path

from dsv4_convert.errors import ResourceError


def lock(descriptor: int, path: Path) -> bool:
    """Lock an open file or folder until it is closed; whether it could be had, which another holder prevents.

    Args:
        descriptor: of ``path``, open.
        path: for the message.

    Raises:
        ResourceError: the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise ResourceError(
            f"{path}: cannot be locked ({error.strerror}), so that nothing would keep two runs apart; choose another "
            "destination, on a file system that has locks"
        ) from error
    return True

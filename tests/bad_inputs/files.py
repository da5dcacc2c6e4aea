"""A shard that is no file, no safetensors file, or not all of one."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from tests.checkpoint.safetensors_files import raw_file

from .case import AGAINST, CONVERT, READERS, Case, Place, Step, accepted, as_nobody, refused
from .edit import in_bytes, in_text, load

_AGAIN = "download the file again"


def _header(text: bytes, length: int | None = None) -> Callable[[Place], object]:
    return lambda place: place.shard.write_bytes(raw_file(text, b"1234", length=length))


def _content(content: bytes) -> Callable[[Place], object]:
    return lambda place: place.shard.write_bytes(content)


def _instead(make: Callable[[Path], object]) -> Callable[[Place], None]:
    """Something else under the shard's name."""

    def edit(place: Place) -> None:
        shard = place.shard
        shard.unlink()
        make(shard)

    return edit


def _cut(share: Callable[[bytearray], int]) -> Callable[[Place], None]:
    return in_bytes(lambda content: content[: share(content)])


def _tensor_boundary(content: bytearray) -> int:
    length = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + length]).values()
    return 8 + length + sorted(entry["data_offsets"][1] for entry in entries)[len(entries) // 2]


def _zipped() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("data.pkl", b"x")
    return stream.getvalue()


def _huge_header(place: Place) -> None:
    place.shard.write_bytes((100_000_001).to_bytes(8, "little") + b"{")
    os.truncate(place.shard, 100_000_100)


def _unreadable(place: Place) -> None:
    for path in (place.source, *place.source.iterdir()):
        path.chmod(0o755)
    place.shard.chmod(0)


@contextmanager
def _changed_meanwhile(place: Place) -> Iterator[None]:
    """Somebody writes to the shard between the plan and the conversion."""

    def append(*_: object) -> None:
        content = place.shard.read_bytes()
        place.shard.write_bytes(content + b"more")

    with patch("dsv4_convert.convert.check_disk", append):
        yield


def _hole(place: Place) -> None:
    """The data of a tensor are zeros that take no space on the disk."""
    tensors = load(place.shard)
    start = place.shard.stat().st_size - sum(len(tensor.data) for tensor in tensors.values())
    name, tensor = next((name, one) for name, one in tensors.items() if name.endswith("wq_a.weight"))
    before = sum(len(one.data) for one in list(tensors.values())[: list(tensors).index(name)])
    content = place.shard.read_bytes()
    with place.shard.open("wb") as stream:
        stream.write(content[: start + before])
        stream.seek(len(tensor.data), os.SEEK_CUR)
        stream.write(content[start + before + len(tensor.data) :])


def _zero(leaf: str) -> Callable[[Place], None]:
    def check(place: Place) -> None:
        from dsv4_convert.store import open_store

        assert not open_store(place.dest).read(leaf).astype("float32").any()

    return check


FILES: tuple[Case, ...] = (
    refused("F01", "0 bytes", "{shard}: empty", _AGAIN, edit=_content(b""), by=READERS),
    refused("F02", "5 bytes", "{shard}: 5 bytes, too short for a safetensors", _AGAIN, edit=_content(b"abcde")),
    refused(
        "F03",
        "a header longer than the file",
        "{shard}: truncated: a header of 5,000 bytes, but the file has 14",
        _AGAIN,
        edit=_header(b"{}", 5000),
    ),
    refused(
        "F04",
        "a header of 2^63 bytes",
        "{shard}",
        "9,223,372,036,854,775,808",
        "at most 100 MB are allowed",
        edit=_header(b"{}", 2**63),
    ),
    refused(
        "F05",
        "a header of 100 MB and a byte",
        "{shard}",
        "100,000,001",
        "at most 100 MB are allowed",
        edit=_huge_header,
        by=READERS,
    ),
    refused(
        "F06",
        "a header that is not UTF-8",
        "{shard} (header): not UTF-8 (byte 2)",
        "download it again",
        edit=_header(b'{"\xff": 1}'),
    ),
    refused(
        "F07", "a header that is not JSON", "{shard} (header): not JSON", "download it again", edit=_header(b"{oops}")
    ),
    refused(
        "F08",
        "a space before the header",
        "{shard}",
        "has to begin with '{', found b' '",
        edit=in_text(lambda text: b" " + text),
    ),
    refused("F09", "an array as header", "{shard}", "has to begin with '{', found b'['", edit=_header(b"[]")),
    refused(
        "F10",
        "JSON a hundred thousand deep",
        "{shard} (header): JSON nested too deeply",
        edit=_header(b'{"a":' * 100_000),
    ),
    refused(
        "F11",
        "a Git LFS pointer",
        "{shard}: expected a safetensors file, found a Git LFS pointer",
        "git lfs pull",
        edit=_content(b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"),
        by=READERS,
    ),
    refused(
        "F11",
        "a Git LFS pointer as config",
        "{config}: expected a JSON object, found a Git LFS pointer",
        edit=lambda place: place.config.write_text("version https://git-lfs.github.com/spec/v1\n"),
    ),
    refused(
        "F12",
        "a web page",
        "{shard}",
        "a web page, probably the error page",
        _AGAIN,
        edit=_content(b"<!DOCTYPE html><html>404</html>"),
    ),
    refused(
        "F12",
        "an error answer in JSON",
        "{shard}",
        "JSON text, probably the error answer",
        _AGAIN,
        edit=_content(b'{"error": "Invalid username or password."}'),
    ),
    refused(
        "F13", "a gzip archive", "{shard}", "found a gzip archive; unpack it", edit=_content(gzip.compress(b"x" * 99))
    ),
    refused("F13", "a zip archive, as torch.save writes", "{shard}", "a ZIP archive", edit=_content(_zipped())),
    refused(
        "F13",
        "a pickle",
        "{shard}",
        "a Python pickle",
        "unpickling runs foreign code",
        edit=_content(pickle.dumps({"a": 1}, protocol=4)),
        by=READERS,
    ),
    refused("F14", "a folder", "{shard}: a folder, where a file is expected", edit=_instead(Path.mkdir)),
    refused(
        "F15",
        "a file that may not be read",
        "{shard_name}: cannot be read (Permission denied)",
        "check its permissions",
        edit=_unreadable,
        during=as_nobody,
        by=(("convert", "hf-to-orbax", "source", "{dest}", "--dry-run"),),
    ),
    refused(
        "F16",
        "a named pipe",
        "{shard}: a named pipe, where a regular file is expected",
        edit=_instead(os.mkfifo),
        by=READERS,
    ),
    refused(
        "F16", "a device", "{shard}: a device or socket", edit=_instead(lambda shard: shard.symlink_to("/dev/zero"))
    ),
    refused(
        "F17",
        "a link to itself",
        "{shard}: a link that leads back to itself",
        "replace it by the file",
        edit=_instead(lambda shard: shard.symlink_to(shard.name)),
        by=READERS,
    ),
    refused(
        "F18",
        "a link to nothing",
        "{shard}: a link to gone, which does not exist",
        "download that file again",
        edit=_instead(lambda shard: shard.symlink_to("gone")),
    ),
    refused(
        "F18",
        "a link out of the folder",
        "{shard}: a link out of the checkpoint",
        "put the file itself in its place",
        edit=_instead(lambda shard: shard.symlink_to("/etc/passwd")),
    ),
    refused("F19", "a byte is missing", "{shard}: truncated", _AGAIN, edit=_cut(lambda content: -1), by=READERS),
    refused("F19", "half is missing", "{shard}: truncated", _AGAIN, edit=_cut(lambda content: len(content) // 2)),
    refused("F19", "cut between two tensors", "{shard}: truncated", _AGAIN, edit=_cut(_tensor_boundary)),
    refused(
        "F20",
        "bytes after the last tensor",
        "{shard}: 3 bytes after the last tensor, expected none",
        _AGAIN,
        edit=in_bytes(lambda content: content + b"abc"),
    ),
    refused(
        "F21",
        "a flipped bit in the length of the header",
        "{shard}",
        edit=in_bytes(lambda content: content.__setitem__(1, content[1] ^ 0x40)),
    ),
    refused(
        "F21",
        "a flipped bit in the header",
        "{shard}",
        edit=in_bytes(lambda content: content.__setitem__(40, content[40] ^ 0x04)),
    ),
    Case(
        id="F21",
        what="a flipped bit in the data, which only the hash of the conversion or of the Hub shows",
        edit=in_bytes(lambda content: content.__setitem__(-1, content[-1] ^ 0x01)),
        steps=(
            Step(CONVERT, 0),
            Step(AGAINST, 1, ("in {shard} is not the tensor that was converted", "Convert the model again")),
        ),
    ),
    Case(
        id="F22",
        what="a file that changes after it was opened",
        during=_changed_meanwhile,
        steps=(
            Step(CONVERT, 3, ("{shard}: changed since the checkpoint was opened", "open it again when nobody writes")),
        ),
    ),
    refused(
        "F23",
        "full of zeros",
        "{shard}",
        "full of zeros at its start",
        _AGAIN,
        edit=lambda place: place.shard.write_bytes(bytes(9999)),
    ),
    accepted("F23", "a tensor of zeros that is a hole of the file", edit=_hole, after=_zero("layers.0.attn.wq_a")),
)

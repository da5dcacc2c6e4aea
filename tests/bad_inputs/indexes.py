"""An index that leads out of the folder, or that is not that of the shards beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .case import READERS, SHARDS, Case, Place, accepted, refused
from .checks import equals_healthy
from .edit import Tensor, in_index, in_json, load, save

_NAME = "layers.0.attn.wq_a.weight"
_CONTRADICT = (
    "{source}: model.safetensors.index.json and the shards contradict each other",
    "download all of them again at one revision",
)


def _leads_to(shard: object) -> Callable[[Place], None]:
    return in_index(lambda weight_map: weight_map.update({_NAME: shard}))  # type: ignore[dict-item]


def _leading(id: str, what: str, shard: object, **more: Any) -> Case:
    return refused(
        id,
        what,
        "{index}: a shard has to be a plain file name",
        f"given for '{_NAME}'",
        "do not use this checkpoint",
        edit=_leads_to(shard),
        **more,
    )


def _without(*shards: str) -> Callable[[Place], None]:
    def edit(place: Place) -> None:
        for shard in shards:
            (place.source / shard).unlink()

    return edit


def _in_two(place: Place) -> None:
    tensors = load(place.source / SHARDS[2])
    save(place.source / SHARDS[2], {**tensors, _NAME: load(place.shard)[_NAME]})


def _in_another(place: Place) -> None:
    tensors = load(place.shard)
    moved = tensors.pop(_NAME)
    save(place.shard, tensors)
    save(place.source / SHARDS[2], {**load(place.source / SHARDS[2]), _NAME: moved})


def _records(commits: dict[str, str]) -> Callable[[Place], None]:
    """Write the Hub client's records beside downloaded files: the commit of each."""

    def edit(place: Place) -> None:
        folder = place.source / ".cache" / "huggingface" / "download"
        folder.mkdir(parents=True)
        for file in place.source.iterdir():
            if file.is_file():
                commit = commits.get(file.name, "1" * 40)
                (folder / f"{file.name}.metadata").write_text(f"{commit}\n{'a' * 64}\n{file.stat().st_mtime}\n")

    return edit


def _unfinished(place: Place) -> None:
    _without(SHARDS[1], SHARDS[3])(place)
    folder = place.source / ".cache" / "huggingface" / "download"
    folder.mkdir(parents=True)
    (folder / "abc.incomplete").write_bytes(b"part")


def _text(text: str) -> Callable[[Place], object]:
    return lambda place: place.index.write_text(text)


INDEXES: tuple[Case, ...] = (
    _leading("I01", "a shard in the folder above", "../evil.safetensors", by=READERS),
    _leading("I01", "a shard in a folder below and above", "a/../../evil.safetensors"),
    _leading("I02", "an absolute path", "/etc/passwd"),
    _leading("I03", "backslashes", "..\\evil.safetensors"),
    _leading("I03", "a drive", "C:evil.safetensors"),
    _leading("I04", "a URL", "https://evil.example/x.safetensors"),
    refused(
        "I05",
        "two shards are not there",
        "{source}: 2 of 5 shards are missing",
        SHARDS[1],
        SHARDS[3],
        "download again",
        edit=_without(SHARDS[1], SHARDS[3]),
        by=READERS[:2],
    ),
    refused(
        "I06",
        "a shard that the index does not name",
        "{source}: model.safetensors.index.json does not name these files",
        "'model-extra.safetensors'",
        "move them away, or download the index again",
        edit=lambda place: save(place.source / "model-extra.safetensors", {"x": Tensor("U8", [1], b"1")}),
        by=READERS,
    ),
    refused(
        "I07",
        "a tensor that no shard has",
        *_CONTRADICT,
        f"'ghost': the index says {SHARDS[1]}, but it is in no shard",
        edit=in_index(lambda weight_map: weight_map.update({"ghost": SHARDS[1]})),
        by=READERS,
    ),
    refused(
        "I08",
        "a tensor that the index has not",
        *_CONTRADICT,
        f"'{_NAME}': in {SHARDS[1]}, but not in the index",
        edit=in_index(lambda weight_map: weight_map.pop(_NAME)),
    ),
    refused(
        "I09",
        "a tensor in two shards",
        *_CONTRADICT,
        f"'{_NAME}': in several shards: {SHARDS[1]}, {SHARDS[2]}",
        edit=_in_two,
    ),
    refused(
        "I10",
        "a tensor in another shard than the index says",
        *_CONTRADICT,
        f"'{_NAME}': the index says {SHARDS[1]}, but it is in {SHARDS[2]}",
        edit=_in_another,
    ),
    accepted(
        "I11",
        "a total size that is wrong, on which writers disagree",
        edit=in_json("model.safetensors.index.json", lambda document: document["metadata"].update(total_size=7)),
        after=equals_healthy,
    ),
    refused(
        "I12",
        "five shards and no index",
        "{source}: 5 .safetensors files but no model.safetensors.index.json",
        "download the index too",
        edit=lambda place: place.index.unlink(),
        by=READERS,
    ),
    refused(
        "I13",
        "files of two revisions",
        "{source}: files of 2 revisions of the repository are mixed",
        f"{'2' * 40}: {SHARDS[2]}",
        "download all of them at one revision",
        edit=_records({SHARDS[2]: "2" * 40}),
        by=READERS,
    ),
    accepted("I13", "files of one recorded revision", edit=_records({}), after=equals_healthy),
    refused("I14", "an index that is no JSON", "{index}: not JSON", "download it again", edit=_text("{oops")),
    refused(
        "I14",
        "an index of nothing",
        "{index}: expected a non-empty object `weight_map` (tensor -> shard), found none",
        "download that file again",
        edit=_text('{"metadata": {}}'),
    ),
    refused(
        "I14",
        "a list as map",
        "{index}: expected a non-empty object `weight_map` (tensor -> shard), found list",
        edit=_text('{"weight_map": []}'),
    ),
    refused(
        "I14",
        "a tensor named twice in the index",
        "{index}: the key 'embed.weight' appears twice",
        edit=_text(f'{{"weight_map": {{"embed.weight": "{SHARDS[0]}", "embed.weight": "{SHARDS[1]}"}}}}'),
    ),
    _leading("I14", "a number as shard", 7),
    _leading("I14", "null as shard", None),
    refused(
        "I15",
        "a download that was cut off",
        "{source}: 2 of 5 shards are missing (a download was cut off)",
        SHARDS[1],
        "download again",
        edit=_unfinished,
        by=READERS[:2],
    ),
)

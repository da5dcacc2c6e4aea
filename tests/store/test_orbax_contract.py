"""The parts of Orbax that committing relies on. If one of these fails, see the list in ``store/orbax_commit.py``."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from dsv4_convert.errors import ResourceError
from dsv4_convert.store.orbax_commit import commit_arrays


def test_the_names_exist_with_their_arguments() -> None:
    handler = inspect.signature(ocp.PyTreeCheckpointHandler.__init__).parameters
    needed = {"use_ocdbt", "use_zarr3", "type_handler_registry", "enable_pinned_host_transfer"}
    assert needed <= set(handler), f"PyTreeCheckpointHandler lost {needed - set(handler)}"
    abstract = ocp.type_handlers.TypeHandler.__abstractmethods__
    assert abstract == {"typestr", "metadata", "serialize", "deserialize"}, "TypeHandler asks for other methods"
    assert list(inspect.signature(ocp.type_handlers.TypeHandler.serialize).parameters)[1:] == [
        "values",
        "infos",
        "args",
    ]
    info = ocp.type_handlers.ParamInfo
    assert inspect.iscoroutinefunction(info.await_path_creation), "ParamInfo.await_path_creation is gone"
    assert isinstance(inspect.getattr_static(info, "path"), property), "ParamInfo.path is gone"


def test_numpy_arrays_still_have_the_type_string_that_we_write() -> None:
    assert ocp.type_handlers.get_type_handler(np.ndarray).typestr() == "np.ndarray"


def test_folders_are_moved_not_copied_and_named_by_path(tmp_path: Path) -> None:
    saved = tmp_path / "plain"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(saved, args=ocp.args.PyTreeSave({"x": np.arange(4)}))
    array = tmp_path / "array"
    (saved / "x").rename(array)
    inode = (array / "0").stat().st_ino
    commit_arrays({"a.b": array}, tmp_path / "commit")
    assert not array.exists()
    assert (tmp_path / "commit" / "a.b" / "0").stat().st_ino == inode
    with ocp.StandardCheckpointer() as checkpointer:
        assert checkpointer.restore(tmp_path / "commit")["a"]["b"].tolist() == [0, 1, 2, 3]


def test_a_folder_that_cannot_be_moved_fails_the_commit(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="cannot write: No such file"):
        commit_arrays({"a.b": tmp_path / "absent"}, tmp_path / "commit")
    assert not (tmp_path / "commit").exists()

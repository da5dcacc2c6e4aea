"""The parts of Orbax that committing relies on. If one of these fails, see the list in ``store/orbax_commit.py``.

And the promise made to users: either API of Orbax loads a converted checkpoint where dsv4 is not even installed.
"""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors import safe_open

from dsv4_convert.convert import hf_to_orbax
from dsv4_convert.errors import ResourceError
from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint
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


#: Loads by one of Orbax's APIs in a process that cannot import dsv4, and writes the leaves' bytes and shapes by path.
_LOAD = """
import sys
sys.modules["dsv4_convert"] = None
import jax, numpy as np
{load}
leaves = jax.tree_util.tree_leaves_with_path(tree)
named = {{".".join(str(getattr(key, "key", key)) for key in path): np.asarray(leaf) for path, leaf in leaves}}
np.savez(sys.argv[2], **{{name: leaf.view(f"u{{leaf.itemsize}}") for name, leaf in named.items()}})
"""
_APIS = {
    "v0": "import orbax.checkpoint as ocp\ntree = ocp.StandardCheckpointer().restore(sys.argv[1])",
    "v1": "from orbax.checkpoint import v1\ntree = v1.load(sys.argv[1])",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A published checkpoint with every kind of layer, and the converted one."""
    folder = tmp_path_factory.mktemp("orbax")
    write_checkpoint(folder / "hf", tiny_config(), seed=3)
    hf_to_orbax(folder / "hf", folder / "orbax")
    return folder / "hf", folder / "orbax"


def unquantised(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The tensors that a conversion only moves or transposes, as safetensors itself reads them."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "flax") as tensors:
            kept = [name for name in tensors.keys() if tensors.get_slice(name).get_dtype() in ("BF16", "F32")]  # noqa: SIM118
            found |= {name: np.asarray(tensors.get_tensor(name)) for name in kept}
    return found


@pytest.mark.parametrize("api", _APIS)
def test_a_converted_checkpoint_loads_without_dsv4(folders: tuple[Path, Path], tmp_path: Path, api: str) -> None:
    source, converted = folders
    script, out = _LOAD.format(load=_APIS[api]), tmp_path / "leaves.npz"
    subprocess.run([sys.executable, "-c", script, converted, out], check=True)
    with np.load(out) as loaded:
        leaves = dict(loaded)
    published = unquantised(source)
    assert len(published) > 90
    for name, tensor in published.items():
        leaf = leaves[name if name in leaves else name.removesuffix(".weight")].view(tensor.dtype)
        assert np.array_equal(leaf, tensor) or np.array_equal(leaf, tensor.T), name

"""The files that Orbax writes beside the arrays, which ``store/orbax_metadata.py`` writes in its place.

And the promise made to users: either API of Orbax loads a converted checkpoint where dsv4 is not even installed.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors import safe_open

from dsv4_convert.convert import hf_to_orbax
from dsv4_convert.golden.synthetic import tiny_config, write_checkpoint
from dsv4_convert.store.orbax_metadata import orbax_files


def test_orbax_s_own_files_are_those_that_it_writes(tmp_path: Path) -> None:
    """Byte for byte, but for the times, of which Orbax can do without."""
    tree = {"a": {"z": np.arange(4), "b_c": np.ones(2), "b": {"w": np.ones((2, 2), np.float16)}}, "a_a": np.ones(1)}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(tmp_path / "plain", args=ocp.args.PyTreeSave(tree))
    theirs = {file.name: file.read_bytes() for file in (tmp_path / "plain").iterdir() if file.is_file()}
    times = re.compile(rb'(_timestamp_nsecs": )\d+')
    theirs["_CHECKPOINT_METADATA"], changed = times.subn(rb"\1null", theirs["_CHECKPOINT_METADATA"])
    assert changed == 2
    ours = orbax_files(["a_a", "a.b.w", "a.z", "a.b_c"])
    assert {name: ours[name] for name in theirs if name != "commit_success.txt"} == {
        name: content for name, content in theirs.items() if name != "commit_success.txt"
    }
    assert ours.keys() - theirs.keys() <= {"commit_success.txt"}


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

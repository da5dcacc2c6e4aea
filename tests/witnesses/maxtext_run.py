"""MaxText on a CPU: a model out of a checkpoint that dsv4 converted, its logits, and what corrects it.

Everything goes through MaxText's own code: its config, its ``from_pretrained``, its ``Transformer``. Nothing is patched
outside of :func:`corrected`. Needs ``maxtext`` 0.2.5; its Google Cloud libraries are not asked for.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

os.environ.setdefault("DECOUPLE_GCLOUD", "TRUE")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from maxtext.common import checkpointing, train_state_nnx
from maxtext.configs import pyconfig
from maxtext.layers import embeddings
from maxtext.utils import maxtext_utils, model_creation_utils

from dsv4_convert.spec.config import Config
from dsv4_convert.spec.maxtext_config import flags

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "maxtext"

#: Beside the flags of a model: no run directory, float32 throughout, and the experts by plain matrix products,
#: as the kernels are those of TPUs.
ON_A_CPU = (
    "run_name=witness",
    "base_output_directory=/dev/null",
    "enable_checkpointing=False",
    "log_config=False",
    "skip_jax_distributed_system=True",
    "dtype=float32",
    "weight_dtype=float32",
    "matmul_precision=highest",
    "sparse_matmul=False",
    "megablox=False",
    "per_device_batch_size=1",
)


def read_config(config: Config, *more: str, scanned: bool) -> Any:
    """MaxText's config of a model, by its own reader of flags: those that a conversion prints, then ``more``."""
    return pyconfig.initialize(["", *flags(config, scanned=scanned), *ON_A_CPU, *more])


def load(folder: Path, *more: str, scanned: bool, tokens: int) -> nnx.Module:
    """MaxText's model for prompts of so many tokens, filled by its ``from_pretrained``.

    Args:
        folder: what ``--layout maxtext`` (scanned) or ``maxtext-unscanned`` wrote, its ``config.json`` included.
        more: flags of MaxText.
        scanned: which of the two it is.
        tokens: length of the prompts.
    """
    sizes = (f"load_parameters_path={folder}", f"max_target_length={tokens}")
    config = read_config(Config.from_file(folder / "config.json"), *sizes, *more, scanned=scanned)
    model, _ = model_creation_utils.from_pretrained(config)
    return model


def load_for_training(folder: Path, flag: str, *, scanned: bool) -> nnx.State:
    """The variables of MaxText's model out of a folder that the flag names, by the loader of its training.

    The loader gets an abstract state of model and optimizer, as from MaxText's ``setup_train_loop``. If a checkpoint
    lacks the collection of a class of variables, MaxText looks for them among the weights. That is switched off here,
    so a variable is found only where MaxText wants it.
    """
    more = (f"{flag}={folder}", "enable_checkpointing=True")
    config = read_config(Config.from_file(folder / "config.json"), *more, scanned=scanned)
    mesh = maxtext_utils.get_mesh_from_config(config)
    create, _ = model_creation_utils.create_nnx_abstract_model(config, mesh)

    def begin() -> nnx.Module:
        model = create()
        return train_state_nnx.TrainStateNNX(model, nnx.Optimizer(model, optax.sgd(1e-3), wrt=nnx.Param))

    state, _, _ = maxtext_utils.get_abstract_state(config, mesh, begin)
    with mock.patch.object(checkpointing, "_alias_legacy_collections", lambda wanted, stored: (wanted, {})):
        full, weights = checkpointing.load_state_if_possible(
            None,
            None,
            config.load_parameters_path,
            config.load_full_state_path,
            config.checkpoint_storage_concurrent_gb,
            state,
            use_ocdbt=config.checkpoint_storage_use_ocdbt,
            use_zarr3=config.checkpoint_storage_use_zarr3,
            maxtext_config=config,
        )
    return full["items"]["model"] if weights is None else weights


def tree(config: Config, *, scanned: bool) -> nnx.State:
    """The variables of MaxText's model, without their values."""
    _, model = model_creation_utils.create_nnx_abstract_model(read_config(config, scanned=scanned))
    return nnx.state(model)


def variables(state: nnx.State) -> dict[str, nnx.Variable[Any]]:
    """By name, those that MaxText's loaders read."""
    passing = (nnx.RngState, nnx.Cache, nnx.Intermediate, nnx.BatchStat)
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state) if not isinstance(leaf, passing)}


def logits(model: nnx.Module, tokens: np.ndarray) -> np.ndarray:
    """Logits ``[B, S, V]`` of whole prompts ``[B, S]``, each one segment that starts at position 0."""

    @nnx.jit
    def run(model: Callable[..., Any], tokens: jax.Array) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        given = model(tokens, positions, decoder_segment_ids=jnp.ones_like(tokens), enable_dropout=False)
        return given[0] if isinstance(given, tuple) else given

    return np.asarray(run(model, jnp.asarray(tokens, jnp.int32)))


def frequencies(config: Config) -> np.ndarray:
    """The rotary frequencies of MaxText's layers with a compressor."""
    factor = config.qk_rope_head_dim / config.head_dim
    rotary = embeddings.DeepSeekV4RotaryEmbedding(config.head_dim, factor, config.compress_rope_theta)
    return np.asarray(rotary.inv_freq)


def example(name: str) -> ModuleType:
    """A file of the example of docs/maxtext.md."""
    spec = importlib.util.spec_from_file_location(f"maxtext_example_{name}", EXAMPLE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def corrected(config: Config, *, yarn: bool = True, clamp: bool = True) -> Iterator[None]:
    """MaxText with the patches of docs/maxtext.md, for models that run in this context."""
    patches = example("patches")
    with ExitStack() as stack:
        for wanted, patch in ((yarn, patches.yarn), (clamp, patches.clamp)):
            if wanted:
                stack.enter_context(patch(config))
        yield

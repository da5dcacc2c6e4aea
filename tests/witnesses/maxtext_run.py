"""MaxText on a CPU: a model out of a checkpoint that dsv4 converted, its logits, and what corrects it.

Everything goes through MaxText's own code: its config, its ``from_pretrained``, its ``Transformer``. Nothing is patched
outside of :func:`corrected`. Needs ``maxtext`` 0.2.5; its Google Cloud libraries are not asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("DECOUPLE_GCLOUD", "TRUE")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from maxtext.configs import pyconfig
from maxtext.layers import embeddings, linears
from maxtext.utils import model_creation_utils

from dsv4_convert.config import Attention, Config
from dsv4_convert.maxtext_config import flags
from dsv4_convert.model.rope import frequencies

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


def logits(model: nnx.Module, tokens: np.ndarray) -> np.ndarray:
    """Logits ``[B, S, V]`` of whole prompts ``[B, S]``, each one segment that starts at position 0."""

    @nnx.jit
    def run(model: Callable[..., Any], tokens: jax.Array) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        given = model(tokens, positions, decoder_segment_ids=jnp.ones_like(tokens), enable_dropout=False)
        return given[0] if isinstance(given, tuple) else given

    return np.asarray(run(model, jnp.asarray(tokens, jnp.int32)))


@contextmanager
def corrected(config: Config) -> Iterator[None]:
    """MaxText with the two computations of the release that 0.2.5 lacks, for models that run in this context.

    * ``DeepSeekV4RotaryEmbedding`` (``layers/embeddings.py``) ignores ``rope_scaling``: here the layers with a
      compressor, which are those with its base, take the frequencies of YaRN.
    * ``MlpBlock`` (``layers/linears.py``), the shared expert, does not clamp: here both of its activations do. The
      routed experts take the first of them, too, behind a clamp of their own, so nothing changes for them.
    """
    plain, activation = embeddings.DeepSeekV4RotaryEmbedding.inv_freq.fget, linears._convert_to_activation_function
    limit = config.swiglu_limit

    def inv_freq(self: Any) -> jax.Array:
        if self.rope_theta == config.compress_rope_theta:
            return jnp.asarray(frequencies(config, Attention.CSA))
        return plain(self)

    def clamped(name: str) -> Callable[[jax.Array], jax.Array]:
        original = activation(name)
        if name == "silu":
            return lambda x: original(jnp.minimum(x, limit))
        if name == "linear":
            return lambda x: original(jnp.clip(x, -limit, limit))
        return original

    with (
        mock.patch.object(embeddings.DeepSeekV4RotaryEmbedding, "inv_freq", property(inv_freq)),
        mock.patch.object(linears, "_convert_to_activation_function", clamped),
    ):
        yield

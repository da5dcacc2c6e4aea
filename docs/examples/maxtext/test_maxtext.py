"""MaxText's layers against a golden of dsv4: `pytest --dsv4-golden GOLDEN`, with the weights in $CHECKPOINT.

$PATCHES names functions of patches.py, with a space between them.
"""

import os
from contextlib import ExitStack

import patches
import pytest
from adapter import activations
from maxtext.configs import pyconfig
from maxtext.utils import model_creation_utils

from dsv4_convert.spec.maxtext_config import flags

#: A CPU computes in float32 throughout, and experts by plain products instead of the kernels of TPUs.
ON_A_CPU = (
    "dtype=float32",
    "weight_dtype=float32",
    "matmul_precision=highest",
    "sparse_matmul=False",
    "megablox=False",
    "per_device_batch_size=1",
    "skip_jax_distributed_system=True",
    "enable_checkpointing=False",
    "run_name=taps",
    "base_output_directory=/dev/null",
    "log_config=False",
)
#: The streams that a layer is given, and what MaxText computes within one function.
NOT_THERE = {"input", "hc_head.pre"}


@pytest.fixture(scope="module")
def model(dsv4_golden):
    """MaxText's model, filled by its `from_pretrained`. A project has its own way to one."""
    run = f"load_parameters_path={os.environ['CHECKPOINT']}", f"max_target_length={dsv4_golden.tokens.shape[1]}"
    config = pyconfig.initialize(["", *flags(dsv4_golden.config, scanned=False), *ON_A_CPU, *run])
    model, _ = model_creation_utils.from_pretrained(config)
    return model


@pytest.fixture(autouse=True)
def patched(dsv4_golden):
    with ExitStack() as stack:
        for name in os.environ.get("PATCHES", "").split():
            stack.enter_context(getattr(patches, name)(dsv4_golden.config))
        yield


@pytest.mark.parametrize("layer", [0, 1, 2, None])
def test_layer(dsv4_golden, model, layer):
    found = activations(model, layer, dsv4_golden.input(layer), dsv4_golden.tokens, dsv4_golden.positions)
    missing = {name.removeprefix(f"layers.{layer}.") for name in dsv4_golden.names(layer)} - {*found}
    assert missing <= NOT_THERE, "MaxText no longer makes these calls"
    dsv4_golden.check(found, layer=layer)

"""The mesh that a user describes, and the one that suits a model."""

from __future__ import annotations

import dataclasses

import jax
import pytest
from jax.sharding import AxisType

from dsv4_convert.errors import UsageError
from dsv4_convert.golden.synthetic import tiny_config
from dsv4_convert.model.axes import RULES
from dsv4_convert.model.mesh import describe_mesh, make_mesh, parse_mesh, suitable_mesh
from dsv4_convert.spec.config import Config


def test_a_mesh_is_read_in_its_order() -> None:
    assert list(parse_mesh(" tensor=4, fsdp = 2").items()) == [("tensor", 4), ("fsdp", 2)]
    assert parse_mesh(describe_mesh({"data": 1, "expert": 16})) == {"data": 1, "expert": 16}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not AXIS=SIZE"),
        ("fsdp", "'fsdp' is not AXIS=SIZE"),
        ("fsdp=2,", "'' is not AXIS=SIZE"),
        ("fsdp=0", "'fsdp=0' is not AXIS=SIZE"),
        ("fsdp=-2", "'fsdp=-2' is not AXIS=SIZE"),
        ("fsdp=²", "is not AXIS=SIZE"),
        ("model=2", "no axis 'model'; expected some of data, fsdp, expert, sequence, tensor"),
        ("fsdp=2,tensor=2,fsdp=2", "the axis fsdp occurs twice"),
    ],
)
def test_what_is_no_mesh_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match="mesh ") as error:
        parse_mesh(text)
    assert message in str(error.value)


def test_a_mesh_takes_all_devices() -> None:
    with pytest.raises(UsageError, match=r"mesh fsdp=2,tensor=4: makes 8 devices, and there are 1"):
        make_mesh({"fsdp": 2, "tensor": 4}, jax.devices()[:1])
    mesh = make_mesh({"fsdp": 1, "tensor": 1}, jax.devices()[:1])
    assert dict(mesh.shape) == {"fsdp": 1, "tensor": 1}
    assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)


def test_an_axis_of_weights_without_a_length_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv4_convert.model.mesh.RULES", {**RULES, "engram_rows": ("tensor",)})
    with pytest.raises(KeyError, match="engram_rows"):
        suitable_mesh(Config.from_hf(tiny_config()), 2)


def test_a_suitable_mesh_divides_what_it_splits() -> None:
    config = Config.from_hf(tiny_config())
    wide = dataclasses.replace(
        config, num_attention_heads=64, index_n_heads=64, o_groups=8, moe_intermediate_size=2048, vocab_size=129280,
        hidden_size=4096,
    )  # fmt: skip
    assert suitable_mesh(wide, 1) == {"data": 1}
    assert suitable_mesh(wide, 4) == {"tensor": 4}
    assert suitable_mesh(wide, 32) == {"fsdp": 4, "tensor": 8}
    assert suitable_mesh(wide, 7) == {"data": 7}
    assert suitable_mesh(wide, 24) == {"data": 3, "tensor": 8}

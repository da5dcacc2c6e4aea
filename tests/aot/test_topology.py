"""Slices by name and by shape; against libtpu itself where it is installed."""

from __future__ import annotations

import pytest

from dsv4_convert.aot import Slice
from dsv4_convert.aot.topology import CHIPS
from dsv4_convert.errors import UsageError


@pytest.mark.parametrize(
    ("name", "layout", "devices"),
    [
        # As Google Cloud lists them: the number is of TensorCores, or of chips where a chip has one.
        ("v4-8", "v4:2x2x1", 4),
        ("v4-512", "v4:4x8x8", 256),
        ("v5e-256", "v5e:16x16", 256),
        ("v5e-8", "v5e:2x4", 8),
        ("v5p-8", "v5p:2x2x1", 4),
        ("v5p-16", "v5p:2x2x2", 8),
        ("v5p-32", "v5p:2x2x4", 16),
        ("v5p-512", "v5p:4x8x8", 256),
        ("v6e-64", "v6e:8x8", 64),
        ("tpu7x-8", "tpu7x:2x2x1", 8),
    ],
)
def test_a_name_is_a_shape(name: str, layout: str, devices: int) -> None:
    found = Slice.parse(name)
    assert (found.layout, found.count, found.name) == (layout, devices, name)
    assert Slice.parse(layout) == found == Slice.parse(f" {name.upper()} ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5p", "expected a name such as v5p-512"),
        ("v9-8", "one of v4, v5e, v5p, v6e, tpu7x"),
        ("v5p-7", "2 are one chip"),
        ("v5p-24", "give any other slice by its shape"),
        ("v5p-2", "expected are 4, 8, 16"),
        ("v5p:4x4", "has 3 dimensions"),
        ("v6e:3x4", "the first two even"),
        ("v5p:4x8x8x", "expected a name"),
    ],
)
def test_what_is_no_slice_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Slice.parse(text)


def test_all_of_a_generation_are_in_order() -> None:
    for generation, chip in CHIPS.items():
        found = list(Slice.all(generation))
        assert [where.chips for where in found] == sorted(where.chips for where in found)
        assert (found[0].chips, found[-1].chips) == (4, chip.most)
        assert all(Slice.parse(where.name) == where for where in found)
    with pytest.raises(UsageError, match="no TPU 'v9'"):
        list(Slice.all("v9"))


@pytest.mark.tpu
@pytest.mark.parametrize("name", ["v4-16", "v5e-16", "v5p-32", "v6e-16", "tpu7x-16"])
def test_libtpu_has_as_many_devices(name: str) -> None:
    where = Slice.parse(name)
    assert len(where.devices()) == where.count

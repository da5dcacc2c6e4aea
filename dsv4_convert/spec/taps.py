"""Taps by name, of whatever architecture: the keys that model, golden, tolerances and report speak of.

A full name is ``layers.12.attn.wq_a``, ``mtp.0.attn.wq_a`` or, for the model level, ``embed``.
:mod:`dsv4_convert.spec.tap` explains rows.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Iterator

from dsv4_convert.errors import UsageError
from dsv4_convert.spec.architectures import ARCHITECTURES
from dsv4_convert.spec.config import Config, prefix_of
from dsv4_convert.spec.tap import Tap

#: Every tap of every architecture.
ALL_TAPS: tuple[Tap, ...] = tuple(dict.fromkeys(tap for known in ARCHITECTURES for tap in (*known.taps, *known.state)))

_BY_NAME = {tap.name: tap for tap in ALL_TAPS}
assert len(_BY_NAME) == len(ALL_TAPS), "two architectures have different taps of one name"


@dataclasses.dataclass(frozen=True)
class TapKey:
    """A tap of one layer or stage, or of the model level (``layer`` None). ``str`` gives its full name.

    ``stage``: the number of the stage, whose ``layer`` is the one that :class:`Config` gives it.
    """

    layer: int | None
    tap: Tap
    stage: int | None = None

    @classmethod
    def of(cls, config: Config, layer: int | None, tap: Tap | str) -> TapKey:
        """The key of a tap, given by itself or by its name within ``layer``, which may be that of a stage."""
        stage = layer - config.num_hidden_layers if layer is not None and layer in config.stage_layers else None
        return cls(layer, _BY_NAME[tap] if isinstance(tap, str) else tap, stage)

    @classmethod
    def parse(cls, name: str, config: Config | None = None) -> TapKey:
        """The key of a full name such as ``layers.12.attn.wq_a``. The layer of a stage is known with a ``config`` only.

        Raises:
            UsageError: there is no such tap.
        """
        kind, number, rest = _split(name)
        tap = _BY_NAME.get(rest)
        if tap is None or (kind != "mtp" and (number is None) != tap.where.of_model):
            raise UsageError(f"{name}: unknown tap; close ones: {', '.join(_close(rest))}")
        if kind != "mtp" or number is None:
            return cls(number, tap)
        return cls(None if config is None else config.num_hidden_layers + number, tap, number)

    @property
    def prefix(self) -> str:
        """The beginning of its full name: ``layers.12.``, ``mtp.0.`` or nothing."""
        return prefix_of(self.layer, self.stage)

    @property
    def label(self) -> str:
        """Its layer, stage or level in tables: ``12``, ``mtp.0`` or ``model``."""
        return self.prefix.removeprefix("layers.").rstrip(".") or "model"

    @property
    def where(self) -> str:
        """Its layer, stage or level in sentences: ``layer 12``, ``stage mtp.0`` or ``model level``."""
        return "model level" if not self.prefix else f"{'layer' if self.stage is None else 'stage'} {self.label}"

    def __str__(self) -> str:
        return self.prefix + self.tap.name


def _split(name: str) -> tuple[str, int | None, str]:
    """A full name as ``layers``, ``mtp`` or nothing, number, and name within the layer."""
    parts = name.split(".", 2)
    if len(parts) == 3 and parts[0] in ("layers", "mtp") and parts[1].isascii() and parts[1].isdecimal():
        return parts[0], int(parts[1]), parts[2]
    return "", None, name


def taps_of(config: Config, layer: int | None) -> tuple[Tap, ...]:
    """The taps of one layer or stage, or of the model level (None), in order of execution."""
    return tuple(tap for tap in config.taps if tap.where.holds(config, layer))


def state_of(config: Config, layer: int) -> tuple[Tap, ...]:
    """The taps of the state that a layer or stage keeps between calls."""
    return tuple(tap for tap in config.state if tap.where.holds(config, layer))


def is_state(name: str) -> bool:
    """Whether a tap, by its name within its layer, is one of :data:`STATE`."""
    return name.startswith("cache.")


def tap_named(name: str) -> Tap:
    """The tap with this name within its layer. Raises :class:`KeyError` for an unknown one."""
    return _BY_NAME[name]


def shape_of(name: str) -> tuple[str, ...] | None:
    """The shape letters of a tap by its full name; None for what is no tap."""
    tap = _BY_NAME.get(_split(name)[2])
    return None if tap is None else tuple(tap.shape.split())


def select(keys: Iterable[TapKey], patterns: Iterable[str]) -> Iterator[TapKey]:
    """The taps that match any pattern, by shell rules, against the full name or the name within the layer.

    Raises:
        UsageError: a pattern that matches nothing, with close names.
    """
    keys = list(keys)
    matched = {pattern: {key for key in keys if _matches(key, pattern)} for pattern in patterns}
    for pattern, found in matched.items():
        if not found:
            known = ", a tap of other layers or of the model level" if pattern in _BY_NAME else ""
            close = _close(pattern, dict.fromkeys(key.tap.name for key in keys))
            raise UsageError(f"{pattern}{known}: matches no tap of this run; close ones: {', '.join(close)}")
    chosen = set().union(*matched.values())
    yield from (key for key in keys if key in chosen)


def _matches(key: TapKey, pattern: str) -> bool:
    return fnmatch.fnmatchcase(str(key), pattern) or fnmatch.fnmatchcase(key.tap.name, pattern)


def _close(name: str, names: Iterable[str] = _BY_NAME) -> list[str]:
    import difflib

    return difflib.get_close_matches(name, list(names), n=4, cutoff=0.0)

"""The table of taps against the table of names: every parameter is used by an operation that has a tap."""

from __future__ import annotations

from collections import Counter

from dsv4_convert.spec.v4.names import RULES, STAGE_RULES, WITH_VISION
from dsv4_convert.spec.v4.taps import TAPS


def test_every_parameter_is_some_taps() -> None:
    """But for those of image tokens, which are not run."""
    used = {weight for tap in TAPS for weight in tap.weights}
    rules = [rule for rule in (*RULES, *STAGE_RULES) if rule.when is not WITH_VISION]
    assert used == {rule.path.removeprefix("layers.{}.").removeprefix("mtp.{}.") for rule in rules}


def test_only_hyper_connections_and_keys_of_known_tokens_share_theirs() -> None:
    count = Counter(weight for tap in TAPS for weight in tap.weights)
    shared = {weight for weight, taps in count.items() if taps > 1}
    connections = {f"{half}_{part}" for half in ("hc_attn", "hc_ffn") for part in ("fn", "base", "scale")}
    assert shared == connections | {"attn.wkv", "attn.kv_norm"}


def test_scores_of_a_choice_are_a_tap_before_it() -> None:
    names = [tap.name for tap in TAPS]
    for tap in TAPS:
        if tap.scores is not None:
            assert names.index(tap.scores) < names.index(tap.name)

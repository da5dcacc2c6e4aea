"""The table of taps against the table of names: every parameter is used by an operation that has a tap."""

from __future__ import annotations

from collections import Counter

from dsv4_convert.spec.v4.names import DSPARK_FIRST, DSPARK_LAST, RULES, STAGE_RULES, WITH_VISION
from dsv4_convert.spec.v4.taps import TAPS


def test_every_parameter_is_some_taps() -> None:
    """But for those of DSpark's stages, and of image tokens, which are not run."""
    used = {weight for tap in TAPS for weight in tap.weights}
    others = (DSPARK_FIRST, DSPARK_LAST, WITH_VISION)
    rules = [rule for rule in (*RULES, *STAGE_RULES) if rule.when not in others]
    assert used == {rule.path.removeprefix("layers.{}.").removeprefix("mtp.{}.") for rule in rules}


def test_only_the_hyper_connections_share_theirs() -> None:
    count = Counter(weight for tap in TAPS for weight in tap.weights)
    assert {weight.rsplit("_", 1)[0] for weight, taps in count.items() if taps > 1} == {"hc_attn", "hc_ffn"}


def test_scores_of_a_choice_are_a_tap_before_it() -> None:
    names = [tap.name for tap in TAPS]
    for tap in TAPS:
        if tap.scores is not None:
            assert names.index(tap.scores) < names.index(tap.name)

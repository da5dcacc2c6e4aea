"""Naming the operation: a failing layer runs once more, every operation on the golden's own inputs.

What still differs then is wrong by itself, and what agrees only inherited its error. Faults after the first are found
as well. A compact golden does not hold these inputs; there the first tap that diverges is blamed, since all before it
agrees.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from dsv4_convert.config import Config
from dsv4_convert.golden.layout import INPUT, STREAMS
from dsv4_convert.golden.noise import Mode
from dsv4_convert.names import parameters
from dsv4_convert.parameters import Parameters
from dsv4_convert.parity.blame import differing_weights
from dsv4_convert.parity.comparison import Comparison
from dsv4_convert.parity.forward import Forward, Taken
from dsv4_convert.parity.metrics import Verdict
from dsv4_convert.parity.report import Descent, TapResult
from dsv4_convert.published import PublishedWeights
from dsv4_convert.taps import by_name


def descend(
    layer: int | None,
    forward: Forward,
    comparison: Comparison,
    weights: Parameters,
    against: PublishedWeights | None,
    taken: Taken | None = None,
) -> Descent:
    """Run a layer, or the model level after the layers (None), operation by operation.

    Args:
        layer: the layer; the golden recorded it.
        forward: the model.
        comparison: with the golden.
        weights: where the model's weights come from.
        against: the published checkpoint to compare the weights of wrong operations with, if it is at hand.
        taken: the layer's taps, if it ran this way already.

    Raises:
        BadInput: golden or weights are damaged.
    """
    golden = comparison.golden
    if layer is None:
        last = golden.config.num_hidden_layers - 1
        embedded, _ = forward.embed()
        taken = embedded | forward.head(golden.read(f"layers.{last}.{STREAMS}"), comparison.everything(None))
    elif taken is None:
        taken, _ = forward.layer(layer, golden.read(f"layers.{layer}.{INPUT}"), comparison.everything(layer))
    results = comparison.judge(taken, Mode.ISOLATED, golden.taps(layer), fed=True)
    wrong = tuple(result for result in results if result.verdict is Verdict.FAIL)
    return _descent(layer, wrong, taken, comparison, weights, against, fed=True)


def blame_first(
    first: TapResult, taken: Taken, comparison: Comparison, weights: Parameters, against: PublishedWeights | None
) -> Descent:
    """What :func:`descend` says, of the operation of the first failing tap alone; ``taken`` are the taps of its layer.

    Raises:
        BadInput: golden or weights are damaged.
    """
    return _descent(first.layer, (first,), taken, comparison, weights, against, fed=False)


def _descent(
    layer: int | None,
    wrong: tuple[TapResult, ...],
    taken: Taken,
    comparison: Comparison,
    weights: Parameters,
    against: PublishedWeights | None,
    *,
    fed: bool,
) -> Descent:
    """What the wrong operations have to do with weights and experts."""
    paths = _weights(layer, wrong, comparison.golden.config)
    return Descent(
        layer=layer,
        fed=fed,
        wrong=wrong,
        weights=paths,
        damaged=tuple(path for path in paths if weights.damaged(path)),
        differing=None if against is None else tuple(differing_weights(weights, against, paths)),
        experts=_suspects(layer, wrong, taken, comparison),
    )


def _weights(layer: int | None, wrong: Iterable[TapResult], config: Config) -> tuple[str, ...]:
    """The parameters that the wrong operations use, each once, in order of execution."""
    exist = {path for path, _, owner in parameters(config, () if layer is None else (layer,)) if owner == layer}
    prefix = "" if layer is None else f"layers.{layer}."
    used = (prefix + weight for result in wrong for weight in by_name(result.name)[0].weights)
    return tuple(dict.fromkeys(path for path in used if path in exist))


def _suspects(layer: int | None, wrong: Iterable[TapResult], taken: Taken, comparison: Comparison) -> tuple[int, ...]:
    """If the routed experts are wrong: the experts that every failing token, and no passing one, was sent to."""
    name = f"layers.{layer}.ffn.experts"
    result = next((result for result in wrong if result.name == name), None)
    if layer is None or result is None:
        return ()
    failing = comparison.rows_beyond(name, taken[name], result.mode)
    chosen = comparison.golden.read(f"layers.{layer}.ffn.gate.experts")
    suspects = np.setdiff1d(chosen[failing], chosen[~failing])
    explained = np.isin(chosen[failing], suspects).any(axis=-1).all()
    return tuple(int(expert) for expert in suspects) if explained else ()

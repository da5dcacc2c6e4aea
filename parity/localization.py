"""Naming the operation: a failing layer runs once more, every operation on the golden's own inputs.

A result that still differs then is wrong by itself; one that agrees only inherited its error. So faults after the first
are found as well. A compact golden does not hold these inputs; there the first tap that diverges is blamed, since all
before it agrees.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from dsv4_convert.golden.noise import Mode
from dsv4_convert.parity.blame import differing_weights
from dsv4_convert.parity.comparison import Comparison, weights_of
from dsv4_convert.parity.forward import Activations, Forward
from dsv4_convert.parity.metrics import Verdict
from dsv4_convert.parity.report.data import Localization, TapResult
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.taps import TapKey
from dsv4_convert.weights.parameters import Parameters
from dsv4_convert.weights.published import PublishedWeights


@dataclasses.dataclass(frozen=True)
class Localizer:
    """Finds the wrong operations of a failing layer, and the weights and experts that they involve.

    ``weights`` are the model's. The weights of wrong operations are compared with the tensors of ``against``, the
    published checkpoint, if it is given.
    """

    forward: Forward
    comparison: Comparison
    weights: Parameters
    against: PublishedWeights | None

    def run(self, layer: int | None) -> Activations:
        """Run a layer, or the model level (None), operation by operation: each on the golden's own inputs.

        Raises :class:`BadInput` if golden or weights are damaged.
        """
        overrides = self.comparison.everything(layer)
        entering = self.comparison.entering(layer)
        if layer is None:
            embedded, _ = self.forward.embed()
            return embedded | self.forward.head(entering, overrides)
        activations, _ = self.forward.layer(layer, entering, overrides)
        return activations

    def localize(self, layer: int | None, activations: Activations) -> Localization:
        """The wrong operations among ``activations`` of :meth:`run`. Raises likewise."""
        golden, comparison = self.comparison.golden, self.comparison
        results = comparison.judge(activations, Mode.ISOLATED, golden.taps(layer), teacher_forced=True)
        wrong = [result for result in results if result.verdict is Verdict.FAIL]
        return self._explain(layer, wrong, activations, teacher_forced=True)

    def localize_first(self, first: TapResult, activations: Activations) -> Localization:
        """Blame the operation of the first failing tap. ``activations`` are those of its layer. Raises likewise."""
        return self._explain(first.layer, [first], activations, teacher_forced=False)

    def blame_hand_over(self, layer: int, wrong: Sequence[TapResult]) -> Localization:
        """Blame inputs of a layer that are not what an earlier layer made, which agrees."""
        return self._explain(layer, wrong, {}, teacher_forced=False)

    def _explain(
        self, layer: int | None, wrong: Sequence[TapResult], activations: Activations, *, teacher_forced: bool
    ) -> Localization:
        paths = _weights_of(wrong, self.comparison.golden.config)
        source = self.against
        return Localization(
            layer=layer,
            teacher_forced=teacher_forced,
            wrong=tuple(wrong),
            weights=paths,
            damaged=tuple(path for path in paths if self.weights.damaged(path)),
            differing=None if source is None else tuple(differing_weights(self.weights, source, paths)),
            experts=self._suspects(layer, wrong, activations),
        )

    def _suspects(self, layer: int | None, wrong: Iterable[TapResult], activations: Activations) -> tuple[int, ...]:
        """If the routed experts are wrong: the experts that every failing token, and no passing one, was sent to."""
        config = self.comparison.golden.config
        key = TapKey.of(config, layer, "ffn.experts")
        result = next((result for result in wrong if result.key == key), None)
        if result is None:
            return ()
        failing = self.comparison.rows_beyond(key, activations[key], result.mode)
        chosen = self.comparison.golden.read(TapKey.of(config, layer, "ffn.gate.experts"))
        suspects = np.setdiff1d(chosen[failing], chosen[~failing])
        explained = np.isin(chosen[failing], suspects).any(axis=-1).all()
        return tuple(int(expert) for expert in suspects) if explained else ()


def _weights_of(wrong: Iterable[TapResult], config: Config) -> tuple[str, ...]:
    """The parameters that the wrong operations use, each once, in order of execution."""
    return tuple(dict.fromkeys(path for result in wrong for path in weights_of(result.key, config)))

"""The part of a checkpoint that a run says nothing about: weights and paths that its golden does not use."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from dsv4_convert.golden.archive import Golden
from dsv4_convert.golden.prompt_coverage import LayerCoverage
from dsv4_convert.parity.blame import WeightDifference
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.names import parameters
from dsv4_convert.spec.taps import TapKey


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unchecked:
    """The parts of a checkpoint that a run does not use.

    Attributes:
        stages: number of draft stages that were left out.
        layers: layers that were left out.
        taps: number of taps that were left out in the layers that ran.
        embedding, head: whether the model level was left out, before and after the layers.
        experts: number of experts that no token reaches, in all layers that ran.
        rows: number of tokens of the vocabulary that are not in the prompt.
        vocabulary: number of tokens of the vocabulary.
        tables: layers whose table of experts by token has a row for each.
        cache: whether no token was decoded from a cache.
        prompt: whether nothing ties the golden's arrays to its tokens.
        weights: the parameters that the run used in part or not at all, without layers and taps that it left out.
        converted: whether they come from a conversion.
        compared: whether all of them were compared with the source.
        differing: those that differ from it.
    """

    stages: int
    layers: tuple[int, ...]
    taps: int
    embedding: bool
    head: bool
    experts: int
    rows: int
    vocabulary: int
    tables: tuple[int, ...]
    cache: bool
    prompt: bool
    weights: tuple[str, ...]
    converted: bool
    compared: bool = False
    differing: tuple[WeightDifference, ...] = ()

    @property
    def unproven(self) -> bool:
        """Whether a conversion's weights were neither used nor compared with the source, or differ from it."""
        return self.converted and bool(self.differing or (self.weights and not self.compared))


def unchecked(
    golden: Golden,
    config: Config,
    *,
    wanted: Sequence[TapKey],
    coverage: Sequence[LayerCoverage],
    decoded: bool,
    converted: bool,
) -> Unchecked:
    """Find the parts that a run of the taps ``wanted`` leaves out, of a model of this ``config``.

    Args:
        golden: what it is compared with.
        config: of the weights, which may have stages.
        wanted: the compared taps.
        coverage: of the layers that ran.
        decoded: whether tokens decoded from a cache were compared.
        converted: whether the weights are those of a conversion.
    """
    ran = {layer.layer: layer for layer in coverage}
    names = {str(key) for key in wanted}
    left_out = tuple(layer for layer in range(config.num_hidden_layers) if layer not in ran)
    stages = tuple(layer for layer in config.stage_layers if layer not in ran)
    rows = config.vocab_size - len(np.unique(golden.tokens))
    tables = tuple(layer for layer in ran if config.hashed(layer))
    whole = not left_out and "embed" in names

    def weights() -> Iterator[str]:
        if whole:
            yield from (path for path, _, layer in parameters(config, stages) if layer is not None)
        if rows and whole:
            yield "embed"
        if rows:
            yield from (f"layers.{layer}.ffn.gate.tid2eid" for layer in tables)
        for layer in (layer for layer, covered in ran.items() if covered.experts < covered.of):
            yield from (f"{config.prefix(layer)}ffn.experts.{part}" for part in ("w1", "w2", "w3"))

    return Unchecked(
        stages=len(stages),
        layers=left_out,
        taps=sum(len(golden.taps(layer)) for layer in ran) - sum(key.layer is not None for key in wanted),
        embedding="embed" not in names,
        head="logits" not in names,
        experts=sum(covered.of - covered.experts for covered in coverage),
        rows=rows,
        vocabulary=config.vocab_size,
        tables=tables,
        cache=not decoded,
        prompt=not golden.manifest.ties_prompt,
        weights=tuple(weights()),
        converted=converted,
    )


def unchecked_parts(left: Unchecked) -> Iterator[str]:
    """The same in noun phrases."""
    if left.stages:
        yield "the draft stage" if left.stages == 1 else f"{left.stages} draft stages"
    if left.layers:
        yield f"{len(left.layers)} of the layers"
    if left.embedding:
        yield "the embedding"
    if left.head:
        yield "the output head"
    if left.taps:
        yield f"{left.taps} taps"
    if left.experts:
        yield f"{left.experts} experts"
    if left.rows and (left.tables or not left.embedding):
        where = ["the embedding"] * (not left.embedding) + ["tid2eid"] * bool(left.tables)
        yield f"{left.rows} of {left.vocabulary} rows of {' and '.join(where)}"
    if left.cache:
        yield "decoding from a cache"
    if left.prompt:
        yield "whether the golden's arrays belong to its tokens (a golden of an earlier version)"


def unchecked_sentences(left: Unchecked) -> Iterator[str]:
    """A sentence that names the parts, then the result of comparing their weights with the source."""
    if parts := ", ".join(unchecked_parts(left)):
        yield f"This run says nothing about {parts}."
    for difference in left.differing[:3]:
        yield f"{difference.sentence}."
    if left.compared and left.converted and not left.differing:
        yield "Weights that it does not use are those of the source, bit by bit."


def closing_step(left: Unchecked, checkpoint: str) -> str | None:
    """The command that compares the unused weights of a conversion; None where there are none."""
    if not left.converted or not left.weights or left.compared:
        return None
    return f"`dsv4 verify {checkpoint} --against SOURCE` compares the weights that this run does not use, bit by bit."

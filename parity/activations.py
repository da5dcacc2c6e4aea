"""Comparing another implementation's activations with a golden. It brings arrays, by tap name.

The other implementation runs one layer on :meth:`Expected.input` (or everything from :attr:`Expected.tokens`), keeps
what it computes on the way, and hands over as much of it as it likes. Nothing of ours runs, and no weights are needed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jax.core import Tracer

from dsv4_convert.errors import UsageError
from dsv4_convert.golden.archive import Golden, open_golden
from dsv4_convert.golden.layout import STREAMS, carried
from dsv4_convert.golden.noise import Mode
from dsv4_convert.golden.prompt_coverage import prompt_coverage
from dsv4_convert.parity.comparison import Comparison
from dsv4_convert.parity.forward import Activations
from dsv4_convert.parity.metrics import Verdict
from dsv4_convert.parity.report.data import ParityReport, TapResult
from dsv4_convert.parity.tolerances import UNIT
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.tap import Values
from dsv4_convert.spec.taps import TapKey, tap_named

Array = np.ndarray[Any, Any]
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_TIED = (
    "After a tie the implementation went on with its own choice, so what follows it differs rightly. Make it follow "
    "Expected.choices(layer), and nothing does."
)
_EXPERTS, _WEIGHTS = tap_named("ffn.gate.experts"), tap_named("ffn.gate.weights")


def compare_activations(
    activations: Mapping[str, Any],
    golden: Golden | Path | str,
    *,
    layer: int | None = None,
    mode: Mode | str = Mode.ISOLATED,
    dtype: str | None = None,
    name: str = "activations",
) -> ParityReport:
    """Compare arrays of another implementation with a golden, tap by tap.

    The limits are those of :func:`dsv4_convert.parity.run.run`, which compares our own.

    Args:
        activations: by tap name, full (``layers.3.attn.q_rope``, ``logits``) or, with ``layer``, within it
            (``attn.q_rope``). Arrays of NumPy, JAX or PyTorch, in the golden's shape (``dsv4 golden show``), batch
            and tokens first. Experts may come in any order, with ``ffn.gate.weights`` in the same.
        golden: an open golden, or its folder or URL.
        layer: of names that do not say it.
        mode: ``isolated`` if the layers ran on the golden's own inputs, ``cumulative`` if they ran from the tokens.
        dtype: that of the computation, ``float32`` or ``bfloat16``, whose noise floor is the measure; None for
            bfloat16 if an array is of it or the golden is of the release's own code, and float32 otherwise.
        name: what the report calls the activations.

    Returns:
        The report, without the search for the operation that is to blame, which needs to run the model. One without
        taps has failed.

    Raises:
        UsageError: a tap that there is not, with those that come close; a mode or dtype that the golden cannot serve;
            an array that is no array, or a traced one.
        BadInput: the golden is damaged.
        ResourceError: the golden is remote and cannot be reached.

    Examples:
        >>> golden = open_golden("golden/data/tiny")
        >>> activations = {"attn.wq_a": golden.read("layers.0.attn.wq_a")}  # here the golden's own
        >>> compare_activations(activations, golden, layer=0).passed
        True
    """
    golden = golden if isinstance(golden, Golden) else open_golden(golden)
    chosen = _mode(mode, golden)
    taken = {_key(given, layer, golden): _array(given, value) for given, value in activations.items()}
    if len(taken) < len(activations):
        raise UsageError("activations: a tap was given twice, by its full name and by that within the layer")
    dtype = _dtype(dtype, taken, golden)
    taken = _sorted_choices(taken)
    comparison = Comparison(golden, dtype)
    results = _judged(comparison, taken, chosen, [key for key in golden.keys if key in taken])
    layers = tuple(sorted({result.layer for result in results if result.layer is not None}))
    return ParityReport(
        modes=(chosen,),
        decode=golden.decode,
        phase=None,
        dtype=dtype,
        limits=comparison.limits,
        layers=layers,
        stages=golden.config.stage_layers,
        taps=tuple(results),
        localizations=(),
        error_splits=(),
        prompt_coverage=tuple(prompt_coverage(golden, each) for each in layers),
        require_coverage=False,
        logits=None,
        checkpoint={"path": name},
        golden={"path": str(golden.path), "digest": golden.manifest.digest},
        platform={"dtype": dtype},
    )


class Expected:
    """A golden seen from another implementation: the inputs to feed it with, and :meth:`check`.

    Attributes:
        golden: the open golden.
        config: the architecture of the recorded model.
        tokens: int32 ``[B, S]``.
        positions: int32 ``[B, S]``, of the tokens in the rotary tables.
        layers: the recorded layers.
        dtype: what :meth:`check` takes for the dtype of the computation; None: see :func:`compare_activations`.
    """

    def __init__(self, golden: Golden | Path | str, *, dtype: str | None = None) -> None:
        """Raises as :func:`dsv4_convert.golden.archive.open_golden`."""
        self.golden = golden if isinstance(golden, Golden) else open_golden(golden)
        self.config: Config = self.golden.config
        self.tokens: Array = self.golden.tokens
        first = self.golden.manifest.request.first_position
        self.positions: Array = np.broadcast_to(
            np.arange(first, first + self.tokens.shape[1], dtype=np.int32), self.tokens.shape
        )
        self.layers: tuple[int, ...] = self.golden.layers
        self.dtype = dtype

    def __repr__(self) -> str:
        return f"Expected({str(self.golden.path)!r})"

    def input(self, layer: int | None) -> Array:
        """The streams that enter a layer, or the head (None): float32 ``[B, S, N, D]``.

        Raises:
            UsageError: the layer was not recorded, or the golden is compact and does not hold its input.
        """
        return self.inputs(layer)[STREAMS.name]

    def inputs(self, layer: int | None) -> dict[str, Array]:
        """All that enters a layer, or the head (None), by the names that the same taps have in the layer they leave.

        In DeepSeek-V4 that is ``hc_ffn.streams``, the streams; layers of V4.1 also read what earlier ones share.

        Raises:
            UsageError: as :meth:`input`.
        """
        keys = carried(self.config, layer)
        if any(key not in self.golden.keys for key in keys.values()):
            raise UsageError(f"{self.golden.path}: layer {layer} was not recorded; recorded are {list(self.layers)}")
        if not all(map(self.golden.whole, keys.values())):
            raise UsageError(f"{_no_inputs(self.golden)}: run from the tokens, and check with mode='cumulative'")
        return {name: self.golden.read(key) for name, key in keys.items()}

    def choices(self, layer: int) -> dict[str, Array]:
        """The golden's chosen experts and entries in a layer by tap name within it: int32, -1 for none.

        For an implementation that can be made to follow them, so that a tie changes nothing that comes after it.
        """
        choices = Comparison(self.golden, "float32").choices(layer)
        return {key.tap.name: chosen for key, chosen in choices.items()}

    def names(self, layer: int | None) -> tuple[str, ...]:
        """Full names of the taps of a layer, or of the model level (None), in order of execution."""
        return tuple(map(str, self.golden.taps(layer)))

    def shape(self, name: str, *, layer: int | None = None) -> tuple[int, ...]:
        """The shape of a tap, named as for :meth:`check`. A name without its layer will do where all layers agree.

        Raises:
            UsageError: no such tap was recorded, or its shape depends on the layer.
        """
        shapes = {self.golden.shape(key) for key in self.golden.keys if layer is None and key.tap.name == name}
        return shapes.pop() if len(shapes) == 1 else self.golden.shape(_key(name, layer, self.golden))

    def report(
        self,
        activations: Mapping[str, Any],
        *,
        layer: int | None = None,
        mode: Mode | str = Mode.ISOLATED,
        dtype: str | None = None,
    ) -> ParityReport:
        """:func:`compare_activations` with this golden; ``dtype``: this object's, if not given."""
        return compare_activations(activations, self.golden, layer=layer, mode=mode, dtype=dtype or self.dtype)

    def check(
        self,
        activations: Mapping[str, Any],
        *,
        layer: int | None = None,
        mode: Mode | str = Mode.ISOLATED,
        dtype: str | None = None,
    ) -> ParityReport:
        """The report of :meth:`report`, if it passes.

        Raises:
            AssertionError: anything diverges, or nothing was compared; with the verdict and the table of
                ``dsv4 parity``.
        """
        __tracebackhide__ = True  # of pytest: the failure is the caller's
        report = self.report(activations, layer=layer, mode=mode, dtype=dtype)
        if not report.passed:
            raise AssertionError(as_text(report))
        return report


def as_text(report: ParityReport, *, width: int = 100) -> str:
    """The verdict, then the tables of what does not pass: plain text."""
    from dsv4_convert.parity.report.tables import labelled, render_tables
    from dsv4_convert.parity.report.words import summarized
    from dsv4_convert.show.screen import Screen

    out = StringIO()
    console = Screen(file=out, width=width, no_color=True, force_terminal=False, legacy_windows=False)
    said = summarized(report)
    console.print(*labelled(said, width), "", sep="\n")
    if report.taps:
        render_tables(report, console)
    lines = [said.headline, *(line.rstrip() for line in out.getvalue().splitlines())]
    if Mode.CUMULATIVE in report.modes and report.count(Verdict.TIE):
        lines += ["", _TIED]
    return "\n".join(lines).rstrip()


def _judged(comparison: Comparison, taken: Activations, mode: Mode, keys: Iterable[TapKey]) -> list[TapResult]:
    """Judge in order of execution. After a tie the implementation went on with its own choice, which is not wrong: in
    isolated mode the tokens concerned are left out of what follows in the layer."""
    golden = comparison.golden
    tied: dict[int | None, Array] = {}
    results = []
    for key in keys:
        given = taken
        if (rows := tied.get(key.layer)) is not None and _follows(key, golden.config):
            given = {**taken, key: _left_out(taken[key], golden.read(key), rows)}
        (result,) = comparison.judge(given, mode, [key])
        if result.verdict is Verdict.TIE and mode is Mode.ISOLATED:
            differs = (np.sort(given[key], axis=-1) != np.sort(golden.read(key), axis=-1)).any(axis=-1)
            tied[key.layer] = differs | tied.get(key.layer, np.zeros_like(differs))
        results.append(_explained(result, golden))
    return results


def _follows(key: TapKey, config: Config) -> bool:
    """Whether a tap depends on a choice before it: not the state that was there before, nor a choice by table."""
    by_table = key.tap.values is Values.CHOICE and key.layer is not None and config.hashed(key.layer)
    return not (by_table or key.tap.is_state)


def _left_out(found: Array, golden: Array, rows: Array) -> Array:
    """``found`` as the golden in some tokens, where the shapes allow it. After a choice every tap is by token."""
    if found.shape != golden.shape:
        return found
    without = found.copy()
    without[rows] = golden[rows]
    return without


def _explained(result: TapResult, golden: Golden) -> TapResult:
    """Say what a shape stands for where it is another one."""
    expected = golden.shape(result.key)
    if result.verdict is not Verdict.FAIL or result.shape == expected:
        return result
    letters = ", ".join(f"{letter} {size}" for letter, size in zip(result.key.tap.shape.split(), expected, strict=True))
    hint = ""
    if sorted(result.shape) == sorted(expected):
        hint = "; the axes are in another order"
    elif math.prod(result.shape) == math.prod(expected):
        hint = "; as many elements: reshape it"
    reason = f"shape {list(result.shape)}, expected {list(expected)} ({letters}){hint}"
    return dataclasses.replace(result, reason=reason)


def _mode(mode: Mode | str, golden: Golden) -> Mode:
    if mode not in tuple(Mode):
        raise UsageError(f"mode {mode!r}: expected isolated or cumulative")
    if golden.compact is not None and mode == Mode.ISOLATED:
        raise UsageError(f"{_no_inputs(golden)}: run from the tokens, and check with mode='cumulative'")
    if golden.numerics != "plain" and mode == Mode.ISOLATED:
        raise UsageError(
            f"{golden.path}: of release numerics, where isolated means that every operation gets the golden's own "
            "inputs, which a layer of another implementation does not; run from the tokens, with mode='cumulative'"
        )
    return Mode(mode)


def _no_inputs(golden: Golden) -> str:
    return f"{golden.path}: a compact golden, which does not hold the inputs of layers"


def _key(name: str, layer: int | None, golden: Golden) -> TapKey:
    """The tap of the golden that a user means by ``name``. Raises :class:`UsageError`."""
    config = golden.config
    outer = name in map(str, golden.taps(None)) and layer not in config.stage_layers
    full = name if layer is None or outer or name.startswith(("layers.", "mtp.")) else config.prefix(layer) + name
    inner = next((key for key in golden.keys if key.layer is not None and key.tap.name == name), None)
    if layer is None and not outer and inner is not None:
        raise UsageError(f"{name}: of which layer? Say layer=, or the full name, such as {inner}")
    key = TapKey.parse(full, config)
    number = key.layer
    if number is not None:
        golden.taps(number)  # refuses one that was not recorded
    if key not in golden.keys:
        if number is None:
            why = "the head was not recorded, since that takes the last layer"
        elif key.tap.is_state:
            why = "no token came one by one, so there is no state between calls"
        else:
            why = f"{key.where}, of {config.describe(number)}, has no such tap"
        raise UsageError(f"{full}: not in {golden.path}: {why}")
    return key


def _array(name: str, value: Any) -> Array:
    """A NumPy array of whatever has come: NumPy, JAX or PyTorch. Raises :class:`UsageError`."""
    if isinstance(value, Tracer):
        raise UsageError(
            f"{name}: traced by JAX ({value.dtype} {list(value.shape)}), so it has no numbers yet. Return it from jit "
            "(or grad, vmap, scan), and check what comes back."
        )
    if not getattr(value, "is_fully_addressable", True):
        raise UsageError(f"{name}: spread over processes; gather it first (jax.experimental.multihost_utils)")
    try:
        if hasattr(value, "detach"):  # PyTorch, which has no NumPy form of bfloat16
            value = value.detach().cpu()
            bfloat16 = str(value.dtype) == "torch.bfloat16"
            array = np.asarray(value.float()).astype(_BFLOAT16) if bfloat16 else np.asarray(value)
        else:
            array = np.asarray(value)
    except Exception as error:  # whatever the other library raises
        raise UsageError(f"{name}: cannot be made a NumPy array ({type(error).__name__}: {error})") from None
    if array.dtype == object or array.dtype.kind not in "iufV" or array.ndim == 0:
        raise UsageError(f"{name}: expected an array of numbers, found {type(value).__name__} of {array.dtype}")
    if array.dtype.kind == "V" and array.dtype != _BFLOAT16:
        raise UsageError(
            f"{name}: {array.dtype} has no noise floor in a golden; hand it over in the dtype of the layer"
        )
    if array.dtype == np.float16:
        raise UsageError(f"{name}: float16 has no noise floor in a golden; compute in float32 or bfloat16")
    return array


def _dtype(dtype: str | None, taken: Activations, golden: Golden) -> str:
    if dtype is None:
        bfloat16 = golden.numerics != "plain" or any(array.dtype == _BFLOAT16 for array in taken.values())
        dtype = "bfloat16" if bfloat16 else "float32"
    if dtype not in UNIT:
        raise UsageError(f"dtype {dtype!r}: expected one of {', '.join(UNIT)}")
    return dtype


def _sorted_choices(taken: Activations) -> Activations:
    """Experts ascending and their weights with them, as in the golden; everything as float32 or int32 would be.

    Raises:
        UsageError: weights without the experts that they belong to.
    """
    found = {key: array.astype(np.float32) if array.dtype == _BFLOAT16 else array for key, array in taken.items()}
    for weights in taken:
        if weights.tap is not _WEIGHTS:
            continue
        chosen = dataclasses.replace(weights, tap=_EXPERTS)
        experts = taken.get(chosen)
        if experts is None:
            raise UsageError(f"{weights}: in the order of {chosen}, which has to be handed over too")
        if experts.shape == found[weights].shape:
            order = np.argsort(experts, axis=-1, kind="stable")
            found[weights] = np.take_along_axis(found[weights], order, axis=-1)
            found[chosen] = np.take_along_axis(experts, order, axis=-1)
    return found

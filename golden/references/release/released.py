"""DeepSeek's inference code on a prompt, one layer at a time: its activations, and how far rounding may move them.

Every operation is the code's own. This module only decides when weights are in memory: it has a block built and filled
from the published bytes, runs it and drops it; of the routed experts only the one that runs is in memory. The inputs
of a layer are taps of the layers before, by the table of taps.

In release numerics a layer amplifies a rounding error beyond the size of the faults to find: a key that changes by one
part in 256 may become another FP8 number, which is one part in 8. So the isolated mode isolates *operations*: every
operation of a layer gets the golden's own values. Tokens that come one by one find their past in the block's own
caches. Isolated operations find the golden's before each call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dsv4_convert.checkpoint import Checkpoint
from dsv4_convert.errors import BadInput, listed
from dsv4_convert.golden.layout import (
    DTYPES,
    calls,
    entering,
    entering_head,
    joined,
    known_tokens,
    of_entries,
    part_of,
    part_shape,
    rows_of,
    tap_shape,
)
from dsv4_convert.golden.manifest import Reference
from dsv4_convert.golden.noise import MODES, Mode, RecordedTaps, row_noise
from dsv4_convert.golden.references.release.arithmetic import Arithmetic, Run
from dsv4_convert.golden.references.release.code import Code, complaint
from dsv4_convert.golden.references.release.drafts import BEGINS, KNOWN
from dsv4_convert.golden.references.release.interface import Entering, PromptCalls, StoredAs, caches
from dsv4_convert.golden.references.release.interfaces import INTERFACES
from dsv4_convert.golden.references.release.probes import EXPERTS, WEIGHTS, Choices, Expected, Visit
from dsv4_convert.golden.references.release.state import state_after
from dsv4_convert.golden.references.release.weights import CodeWeights
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.coverage import Resolution
from dsv4_convert.spec.names import Dialect
from dsv4_convert.spec.tap import AFTER
from dsv4_convert.spec.taps import TapKey, is_state, tap_named, taps_of

Array = np.ndarray[Any, Any]
#: Values that leave layers: taps of the layers that made them, by their names behind the name of the run and a colon.
State = dict[str, Array]
#: The same of one run, by the names of the taps.
_Carry = Mapping[str, Array]

_GOLDEN = "golden"
#: Rows of the output head that are in memory at a time.
_HEAD_ROWS = 8192


def describe(code: Code, arithmetic: Arithmetic, changes: Mapping[str, str]) -> Reference:
    """This reference as the manifest describes it; ``changes`` say where the code is not called as published."""
    return Reference(
        name="release",
        versions={"torch": torch.__version__, **code.versions, **changes},
        numerics=arithmetic.numerics,
        dtype=arithmetic.dtype,
        attention_implementation="CPU stand-in",
        experts_implementation="CPU stand-in",
    )


class ReleasedModel:
    """The code for one prompt."""

    def __init__(
        self,
        code: Code,
        arithmetic: Arithmetic,
        checkpoint: Checkpoint,
        config: Config,
        resolution: Resolution,
        tokens: Array,
        *,
        noise: Sequence[str] = (),
        decode: int = 0,
    ) -> None:
        """Set the code up for ``tokens`` ``[B, S]``; no weight is read. Without ``noise`` none is measured.

        The last ``decode`` tokens come one by one, from the code's own caches.

        Raises:
            BadInput: the code is of another model, or the checkpoint has other names than it was published with.
            UsageError: the code does not run such a prompt.
        """
        if resolution.dialect is not Dialect.PUBLISHED:
            raise BadInput(
                f"{checkpoint.root}: has {resolution.dialect} names; the release's code reads published ones"
            )
        self._code = code
        self._arithmetic = arithmetic
        self._config = config
        self._noise = {dtype: arithmetic.noise[dtype] for dtype in noise}
        self._weights = CodeWeights(code, checkpoint, config, resolution)
        self._batch, length = tokens.shape
        self._whole, self._calls = calls(length, 0), calls(length, decode)
        layers = sorted({leaf.layer for leaf in resolution.leaves if leaf.layer is not None})
        prompt = PromptCalls(torch.from_numpy(tokens.astype(np.int64)), self._calls, checkpoint.root, layers)
        storage = _storage(checkpoint, config, resolution) if arithmetic.quantized else StoredAs(False, False, False)
        self._ids = prompt.ids
        with self._active(arithmetic.golden):
            self._interface = INTERFACES[type(config)](code, config, prompt, storage)
            self._try_head()

    @contextmanager
    def _active(self, run: Run) -> Iterator[None]:
        """The settings that the code expects around it in a run."""
        with self._code.active(run.dtype, self._arithmetic.functions):
            yield

    def embed(self) -> RecordedTaps:
        """The embedded tokens, ``[B, S, D]``. Only their rows of the table are read."""
        embedded = _array(self._weights.embedded(self._ids, self._arithmetic.golden.dtype))
        runs = [_array(torch.from_numpy(embedded).to(run.dtype)) for run in self._noise.values()]
        noise = [[row_noise(run, embedded)] * len(MODES) for run in runs]
        return RecordedTaps({"embed": embedded}, {"embed": np.array(noise)} if noise else {})

    def spread(self, embedded: RecordedTaps) -> State:
        """The values that enter layer 0: the embedding in each of the streams, and what the code begins with."""
        streams = np.repeat(embedded.taps["embed"][:, :, None], self._config.hc_mult, axis=2)
        state: State = {}
        for name, run in {_GOLDEN: self._arithmetic.golden, **self._noise}.items():
            begun = self._interface.entered(torch.from_numpy(streams).to(run.dtype))
            state |= _named(name, {tap: _array(value) for tap, value in begun.items()})
        return state

    def run_layer(self, layer: int, state: State, expected: Expected) -> tuple[State, RecordedTaps]:
        """The values that leave ``layer``, and its expected taps (by name within the layer) with their noise.

        The layer may be that of a stage, which gets the streams that left the last layer, or the stage before.
        """
        if self._config.drafts_blocks(layer):
            return self._run(partial(self._draft, layer), state, expected)
        of_block = {name: what for name, what in expected.items() if tap_named(name).where is not AFTER}
        left, taken = self._run(partial(self._step, layer), state, of_block)
        if layer not in self._config.stage_layers:
            return left | self._targets(layer, state, left), taken
        of_head = {name: what for name, what in expected.items() if name not in of_block}
        _, head = self._run(partial(self._head, layer), left, of_head)
        return left, RecordedTaps({**taken.taps, **head.taps}, {**taken.noise, **head.noise})

    def run_head(self, state: State, expected: Expected) -> RecordedTaps:
        """The taps after the last layer, the logits among them."""
        return self._run(partial(self._head, None), state, expected)[1]

    def _step(self, layer: int, run: Run) -> _Step:
        """A layer or stage with its weights."""
        interface = self._interface
        block = interface.block(layer, self._weights, run)
        return _Step(
            layer,
            self._calls,
            inputs={key.tap.name: _origin(key) for key in entering(self._config, layer)},
            forward=lambda given, tokens, _: interface.forward(layer, block, given, tokens),
            watching=lambda visit, choices, start: interface.watching(layer, block, visit, choices, start),
            block=block,
        )

    def _draft(self, layer: int, run: Run) -> _Step:
        """A DSpark stage with its weights. Its head is a part of it.

        At least the last known token comes by itself, because the code drafts after such ones.
        """
        draft = self._interface.draft(layer, self._weights, run, partial(self._logits, run, at_once=True))
        known = known_tokens(self._ids.shape[1])
        begun = min(self._calls[0][1], known - 1)
        calls = [(0, begun), *((token, token + 1) for token in range(begun, known))]
        return _Step(
            layer,
            calls,
            inputs={key.tap.name: _origin(key) for key in entering(self._config, layer)},
            forward=draft.forward,
            watching=partial(draft.watching, last=known - 1),
            block=draft.block,
            drafts=True,
        )

    def _targets(self, layer: int, entered: State, left: State) -> State:
        """The streams that DSpark's stages read of a layer, under a name of their own."""
        if self._config.dspark is None or layer not in self._config.draft_sources:
            return {}
        tap, values = tap_named(self._config.draft_tap(layer)), left
        if tap.origin is not None:
            tap, values = tap_named(tap.origin.tap), entered
        return {f"{run}:{_target(layer)}": values[f"{run}:{tap.name}"] for run in (_GOLDEN, *self._noise)}

    def _head(self, layer: int | None, run: Run) -> _Step:
        """The operations after the last layer, or after the layer of a stage."""
        prefix = "" if layer is None else self._config.prefix(layer)
        head = self._interface.head(prefix, self._weights, run)
        return self._head_step(layer, lambda given, visit: head(given, partial(self._logits, run), visit))

    def _head_step(self, layer: int | None, head: Callable[[Entering, Visit], None]) -> _Step:
        return _Step(
            layer,
            self._whole,
            inputs={name: key.tap.name for name, key in entering_head(self._config).items()},
            forward=lambda given, _, visit: head(given, visit),
            watching=lambda visit, choices, start: nullcontext(),
        )

    def _logits(self, run: Run, normed: Tensor, *, at_once: bool = False) -> Tensor:
        """Logits ``[B, S, V]``, some rows of the output matrix at a time."""
        starts = range(0, self._config.vocab_size, _HEAD_ROWS)
        parts = (slice(start, start + _HEAD_ROWS) for start in starts)
        rows = (self._weights.floats("head.weight", run.wide, rows=part) for part in parts)
        return torch.cat([self._code.logits(normed, weight, at_once=at_once) for weight in rows], dim=-1)

    def _try_head(self) -> None:
        """Run the head on one token of zeros, so that code with another one is refused before a layer runs.

        Raises:
            Dsv4Error: the code's head is not one of those that the recorder knows.
        """
        taps = [tap for tap in taps_of(self._config, None) if tap.where is AFTER]
        shapes = {tap.name: self._shape(TapKey(None, tap), 1) for tap in taps} | {"logits": (1, 1, 1)}
        call = _Call({name: (np.dtype(np.float32), shape) for name, shape in shapes.items()})
        step = self._head_step(None, self._interface.try_head)
        zeros = self._interface.entered(torch.zeros(1, 1, self._config.hc_mult, self._config.hidden_size))
        given = {name: zeros[origin] for name, origin in step.inputs.items()}
        try:
            call.run(self._code, step, given, slice(0, 1))
        except (AttributeError, TypeError) as error:
            raise complaint(self._code, f"its output head: {error}") from error

    def _shape(self, key: TapKey, tokens: int) -> tuple[int, ...]:
        return tap_shape(key, self._config, batch=1, tokens=tokens)

    def _run(self, step_of: Callable[[Run], _Step], state: State, expected: Expected) -> tuple[State, RecordedTaps]:
        """The golden's run, then those that measure its noise."""
        golden, by_operation = self._arithmetic.golden, self._arithmetic.by_operation
        states: list[dict[str, Tensor]] = []
        with self._active(golden):
            step = step_of(golden)
            given = _of_run(_GOLDEN, state)
            left, taps = self._pass(_Pass(step, golden, given, states), expected)
        leaving = _named(_GOLDEN, {**given, **left})
        noise: dict[str, list[list[Array]]] = {name: [] for name in taps if expected[name][0].kind == "f"}
        for dtype, run in self._noise.items():
            with self._active(run):
                if run.dtype != golden.dtype:
                    step = step_of(run)
                with run.around():
                    alone = _Pass(step, run, given, states if by_operation else states[:1], taps, feed=by_operation)
                    _, isolated = self._pass(alone, expected)
                    own = _of_run(dtype, state)
                    left, cumulative = self._pass(_Pass(step, run, own, states[:1], taps), expected)
            leaving |= _named(dtype, {**own, **left})
            found = {Mode.ISOLATED: isolated, Mode.CUMULATIVE: cumulative}
            for name, rows in noise.items():
                rows.append([found[mode][name] for mode in MODES])
        stacked: dict[str, Array] = {name: np.array(rows) for name, rows in noise.items()} if self._noise else {}
        return leaving, RecordedTaps(taps, stacked)

    def _pass(self, what: _Pass, expected: Expected) -> tuple[dict[str, Array], dict[str, Array]]:
        """One run over all tokens, call by call: what leaves, and the taps, or their row noise beside the golden's.

        Raises:
            Dsv4Error: a tap did not turn up, turned up twice, or has another shape.
        """
        step, golden = what.step, what.golden
        given = self._given(step, what)
        kept: Expected = {} if step.block is None else self._carried(step.layer)
        every = {**expected, **kept}
        computed = {name: tap for name, tap in every.items() if not is_state(name) and name not in given}
        held = {} if step.block is None else caches(step.block)
        found: dict[str, list[Array]] = {name: [] for name in computed if name in expected}
        left: dict[str, list[Array]] = {name: [] for name in kept}
        taps: dict[str, Array] = {}
        for number, (start, stop) in enumerate(step.calls):
            if golden is None:
                what.states.append({name: cache.clone() for name, cache in held.items()})
            elif number < len(what.states):
                for name, cache in held.items():
                    cache.copy_(what.states[number][name])
            parts = {name: self._part(step, name, start, stop) for name in computed}
            if step.drafts:
                parts = self._parts_of_draft(step, {name: computed[name][1] for name in computed}, start, stop)
            call = _Call(
                {name: (computed[name][0], shape) for name, (_, shape) in parts.items()},
                {name: part_of(golden[name], *parts[name]) for name in parts if name in found}
                if golden is not None
                else None,
                kept=kept,
                feed=what.feed,
            )
            own = given if step.drafts else self._rows_by(step, given, start, stop)
            call.run(self._code, step, own, slice(start, stop))
            for name, value in call.taps.items():
                if name in found:
                    found[name].append(value)
            for name, value in call.left.items():
                left[name].append(value)
            if stop == self._calls[0][1] and len(self._calls) > 1 and step.block is not None:
                taps |= state_after(self._code, step.block, self._interface.window(step.block), expected, stop)
        taps |= {name: _array(value) for name, value in given.items() if name in expected}
        if golden is None:
            taps |= {name: joined(values, expected[name][1]) for name, values in found.items()}
        else:
            taps = {name: row_noise(value, golden[name]) for name, value in taps.items() if value.dtype.kind == "f"}
            taps |= {name: np.concatenate(values, axis=2) for name, values in found.items() if values}
        return {name: joined(values, kept[name][1]) for name, values in left.items()}, taps

    def _given(self, step: _Step, what: _Pass) -> dict[str, Tensor]:
        """The values that enter a step, in the dtypes of a run, by the names of the step's own taps."""
        given = {}
        for name, origin in step.inputs.items():
            key = TapKey.of(self._config, step.layer, name)
            value = torch.from_numpy(what.carry[origin] if not _stacked(key) else self._stack(what.carry))
            if value.is_floating_point():
                value = value.to(what.run.wide if name in self._interface.wide else what.run.dtype)
            given[name] = value
        return given

    def _stack(self, carry: Mapping[str, Array]) -> Array:
        """The streams ``[B, M, L, N, D]`` of all target layers."""
        streams = [carry[_target(layer)] for layer in self._config.draft_sources]
        return np.stack(streams, axis=2)[:, : known_tokens(self._ids.shape[1])]

    def _parts_of_draft(
        self, step: _Step, shapes: Mapping[str, tuple[int, ...]], start: int, stop: int
    ) -> dict[str, tuple[range, tuple[int, ...]]]:
        """The rows of a DSpark stage's taps that a call makes, and the shape of what it makes."""
        parts = {}
        for name, shape in shapes.items():
            if name.startswith(KNOWN):
                parts[name] = range(start, stop), (shape[0], stop - start, *shape[2:])
            elif start == 0 if name in BEGINS else (start, stop) == step.calls[-1]:
                parts[name] = range(shape[1]), shape
        return parts

    def _rows_by(self, step: _Step, given: Mapping[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
        """The inputs of a call on tokens ``start:stop``: their rows, and all of the compressed past so far."""
        parts = {}
        for name, value in given.items():
            key = TapKey.of(self._config, step.layer, name)
            shape = part_shape(key, self._config, batch=self._batch, start=start, stop=stop)
            entries = of_entries(key)
            rows = range(rows_of(key, self._config, start, stop).stop) if entries else range(start, stop)
            parts[name] = value[:, rows.start : rows.stop, *(slice(size) for size in shape[2:])]
        return parts

    def _part(self, step: _Step, name: str, start: int, stop: int) -> tuple[range, tuple[int, ...]]:
        """The rows of a tap that a call makes, and the shape of what it makes."""
        key = TapKey.of(self._config, step.layer, name)
        shape = part_shape(key, self._config, batch=self._batch, start=start, stop=stop)
        return rows_of(key, self._config, start, stop), shape

    def _carried(self, layer: int | None) -> Expected:
        """The taps of a layer that later layers and stages start from, as far as it makes them."""
        origins = {tap.origin.tap for tap in self._config.taps if tap.origin is not None}
        if self._config.dspark is not None and layer in self._config.draft_sources:
            origins.add(self._config.draft_tap(layer))
        taps = (tap for tap in taps_of(self._config, layer) if tap.name in origins and tap.origin is None)
        keys = [TapKey.of(self._config, layer, tap) for tap in taps]
        tokens = self._ids.shape[1]
        return {
            key.tap.name: (
                DTYPES[key.tap.values],
                tap_shape(key, self._config, batch=self._batch, tokens=tokens),
            )
            for key in keys
        }


def _origin(key: TapKey) -> str:
    """The tap that has the values of one that a layer starts from."""
    assert key.tap.origin is not None
    return key.tap.origin.tap


def _stacked(key: TapKey) -> bool:
    return key.tap.origin is not None and key.tap.origin.stacked


def _target(layer: int) -> str:
    """The name of a target layer's streams, which travel beside what enters the next layer."""
    return f"targets.{layer}"


def _storage(checkpoint: Checkpoint, config: Config, resolution: Resolution) -> StoredAs:
    """How the checkpoint's weights are stored."""
    stored = checkpoint.tensors
    names = {source.weight for leaf in resolution.leaves if leaf.rule.per_expert for source in leaf.sources}
    scales = {source.scale for leaf in resolution.leaves for source in leaf.sources if source.scale is not None}
    return StoredAs(
        fp8=config.weight_block_size is not None,
        fp4_experts=all(stored[name].dtype == "I8" for name in names),
        float_scales=any(stored[name].dtype == "F32" for name in scales),
    )


def _named(run: str, values: Mapping[str, Array]) -> State:
    return {f"{run}:{name}": value for name, value in values.items()}


def _of_run(run: str, state: State) -> dict[str, Array]:
    prefix = f"{run}:"
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


@dataclasses.dataclass(frozen=True)
class _Step:
    """A layer, a stage, or what is behind it or the last layer (None).

    Attributes:
        layer: its number.
        calls: the tokens ``start:stop`` of each call.
        inputs: what enters it by the names of its own taps -> the tap of an earlier layer that it is.
        forward: ``(what enters, tokens of the call, visitor)``.
        watching: ``(visitor, choices, start)``: a context in which taps are visited.
        block: the code's block, which has caches.
        drafts: whether it is a DSpark stage, whose calls are on the known tokens.
    """

    layer: int | None
    calls: Sequence[tuple[int, int]]
    inputs: Mapping[str, str]
    forward: Callable[[Entering, slice, Visit], None]
    watching: Callable[[Visit, Choices, int], AbstractContextManager[None]]
    block: nn.Module | None = None
    drafts: bool = False


@dataclasses.dataclass(frozen=True)
class _Pass:
    """One run of a step over all tokens.

    Attributes:
        step: what runs.
        run: how it computes.
        carry: what earlier layers made, in the golden or in this run.
        states: the code's caches before each call, which the golden's run adds. The other runs start a call from its
            entry, if there is one.
        golden: taps of the golden's run; None for that run.
        feed: every operation goes on with the golden's values.
    """

    step: _Step
    run: Run
    carry: _Carry
    states: list[dict[str, Tensor]]
    golden: Mapping[str, Array] | None = None
    feed: bool = False


class _Call:
    """One call of a step.

    Attributes:
        taps: the taps, or with ``golden``, the part of its taps, the row noise of those of real numbers.
        left: the values of those that are ``kept``.
    """

    def __init__(
        self,
        computed: Expected,
        golden: Mapping[str, Array] | None = None,
        *,
        kept: Expected | None = None,
        feed: bool = False,
    ) -> None:
        """``feed``: every operation goes on with the golden's values."""
        self._computed, self._golden, self._kept, self._feed = computed, golden, kept or {}, feed
        self._problems: list[str] = []
        self.taps: dict[str, Array] = {}
        self.left: dict[str, Array] = {}

    def run(self, code: Code, step: _Step, given: Entering, tokens: slice) -> None:
        """Raises :class:`Dsv4Error` for taps that are not the expected ones."""
        golden, seen = self._golden or {}, self.taps
        choices = {name: value for name, value in golden.items() if value.dtype.kind != "f"}
        with step.watching(self._visit, choices, tokens.start):
            step.forward(given, tokens, self._visit)
        if EXPERTS in seen:
            _order(seen)
            if WEIGHTS in golden:
                seen[WEIGHTS] = row_noise(seen[WEIGHTS], golden[WEIGHTS])
        for name, (dtype, shape) in self._computed.items():
            if name not in seen and 0 in shape:  # the code skips what would be empty: no block is complete
                self._keep(name, np.zeros(shape, dtype))
        problems = self._problems + [f"{name}: not computed" for name in self._computed if name not in seen]
        if problems:
            raise complaint(code, f"taps differ:\n{listed(problems)}")
        for name in choices:
            del seen[name]

    def _keep(self, name: str, found: Array) -> None:
        if name in self._kept:
            self.left[name] = found
        golden = (self._golden or {}).get(name)
        noisy = golden is not None and found.dtype.kind == "f" and name != WEIGHTS
        self.taps[name] = row_noise(found, golden) if golden is not None and noisy else found

    def _visit(self, name: str, value: Tensor) -> None:
        if name not in self._computed:
            return
        dtype, shape = self._computed[name]
        if name in self.taps:
            self._problems.append(f"{name}: computed more than once")
        elif value.numel() != np.prod(shape) or value.is_floating_point() != (dtype.kind == "f"):
            self._problems.append(f"{name}: expected {dtype} {list(shape)}, found {value.dtype} {list(value.shape)}")
        else:
            self._keep(name, _array(value).reshape(shape))
            golden = (self._golden or {}).get(name)
            if self._feed and golden is not None and dtype.kind == "f" and name != WEIGHTS:
                value.copy_(torch.from_numpy(np.ascontiguousarray(golden)).reshape(value.shape))


def _order(seen: dict[str, Array]) -> None:
    """Chosen experts ascending per token, and their weights in the same order."""
    order = np.argsort(seen[EXPERTS], axis=-1, kind="stable")
    for name in (EXPERTS, WEIGHTS):
        seen[name] = np.take_along_axis(seen[name], order, axis=-1)


def _array(value: Tensor) -> Array:
    """A copy: real numbers as float32, which every dtype but float64 fits into, indices as int32."""
    if value.dtype == torch.float64:
        return np.array(value.numpy())
    return np.array(value.float().numpy() if value.is_floating_point() else value.int().numpy())

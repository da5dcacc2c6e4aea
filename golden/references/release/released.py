"""DeepSeek's inference code on a prompt, one layer at a time: its activations, and how far rounding may move them.

Every operation is the code's own. This module only decides when weights are in memory: it builds a block, fills it from
the published bytes, runs it and drops it, and holds only the routed expert that runs.

In these numerics a layer amplifies a rounding error beyond the size of the faults to find: a key that changes by one
part in 256 may become another FP8 number, which is one part in 8. So the isolated mode isolates *operations*: every
operation of a layer gets the golden's own values. Its noise is the change when sums are float64 instead of float32;
cumulative noise is the same change from the tokens on, with the golden's discrete choices.

Tokens that come one by one find their past in the block's own caches. Isolated, these are the golden's before each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dsv4_convert.checkpoint import Checkpoint
from dsv4_convert.checkpoint.weights import read_table, read_weight
from dsv4_convert.errors import BadInput, listed
from dsv4_convert.golden.layout import calls, joined, known_tokens, part_of, part_shape, rows_of, token_ids
from dsv4_convert.golden.manifest import Reference
from dsv4_convert.golden.noise import MODES, Mode, RecordedTaps, row_noise
from dsv4_convert.golden.references.release.code import DSPARK, MTP, Code, complaint
from dsv4_convert.golden.references.release.drafts import BEGINS, KNOWN, TOKENS, Draft
from dsv4_convert.golden.references.release.kernels import exact_sums
from dsv4_convert.golden.references.release.probes import (
    CHOSEN,
    EXPERTS,
    WEIGHTS,
    Choices,
    Expected,
    Visit,
    exact_functions,
    watching_block,
    watching_head,
)
from dsv4_convert.golden.references.release.state import state_after
from dsv4_convert.golden.references.targets import gathered, kept
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.coverage import Resolution, Source
from dsv4_convert.spec.names import Dialect
from dsv4_convert.spec.tap import AFTER
from dsv4_convert.spec.taps import TapKey, is_state, tap_named
from dsv4_convert.spec.v4.config import as_v4

Array = np.ndarray[Any, Any]
#: Streams by the run that they belong to.
State = dict[str, Array]

_GOLDEN, _NOISE = "golden", "noise"
#: The end of the name of what a DSpark stage hands on.
_CONTEXT = "/context"
_FLOAT32 = np.dtype(np.float32)
#: Rows of the output head that are in memory at a time.
_HEAD_ROWS = 8192
#: Bytes as torch reads them.
_CODES = {torch.float8_e4m3fn: "F8_E4M3", torch.float4_e2m1fn_x2: "I8", torch.float8_e8m0fnu: "F8_E8M0"}


def describe(code: Code) -> Reference:
    """This reference as the manifest describes it."""
    return Reference(
        name="release",
        versions={"torch": torch.__version__, **code.versions},
        numerics="release",
        dtype="bfloat16",
        attention_implementation="CPU stand-in",
        experts_implementation="CPU stand-in",
    )


class ReleasedModel:
    """The code for one prompt. Streams go in and out as ``[B, S, N, D]``, float32 arrays of bfloat16 values."""

    def __init__(
        self,
        code: Code,
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
        """
        if resolution.dialect is not Dialect.PUBLISHED:
            raise BadInput(
                f"{checkpoint.root}: has {resolution.dialect} names; the release's code reads published ones"
            )
        self._code = code
        self._checkpoint = checkpoint
        self._config = as_v4(config)
        self._leaves = {leaf.path: leaf for leaf in resolution.leaves}
        self._sources = {source.weight: source for leaf in resolution.leaves for source in leaf.sources}
        self._ids = torch.from_numpy(tokens.astype(np.int64))
        self._noise = bool(noise)
        self._whole, self._calls = calls(tokens.shape[1], 0), calls(tokens.shape[1], decode)
        stored = checkpoint.tensors
        names = {source.weight for leaf in resolution.leaves if leaf.rule.per_expert for source in leaf.sources}
        scales = {source.scale for leaf in resolution.leaves for source in leaf.sources if source.scale is not None}
        with code.active():
            self._args = code.begin(
                self._config,
                batch=tokens.shape[0],
                tokens=tokens.shape[1],
                expert_dtype="fp4" if all(stored[name].dtype == "I8" for name in names) else None,
                float_scales=any(stored[name].dtype == "F32" for name in scales),
                drafts=self._has_stages(resolution) and self._config.dspark is not None,
            )
            self._try_head()

    def _has_stages(self, resolution: Resolution) -> bool:
        """Whether stages run too. Raises :class:`BadInput` if the code has none of their kind."""
        wanted = MTP if self._config.dspark is None else DSPARK
        there = any(leaf.layer in self._config.stage_layers for leaf in resolution.leaves)
        if there and not hasattr(self._code.module, wanted):
            raise BadInput(
                f"{self._code.path}: has no {wanted}, and {self._checkpoint.root} has its stages; expected the "
                "`inference` folder that the same repository has beside its weights"
            )
        return there

    def embed(self) -> RecordedTaps:
        """The embedded tokens, ``[B, S, D]``. Only their rows of the table are read."""
        embedded = _array(self._embedded(self._ids))
        none = np.zeros((1, len(MODES), 2, *embedded.shape[:2]), np.float32)
        return RecordedTaps({"embed": embedded}, {"embed": none} if self._noise else {})

    def _embedded(self, ids: Tensor) -> Tensor:
        (source,) = self._leaves["embed"].sources
        used, places = np.unique(ids.numpy(), return_inverse=True)
        rows = torch.from_numpy(self._checkpoint.read(source.weight)[used].astype(np.float32)).bfloat16()
        self._checkpoint.release(source.weight)
        return rows[torch.from_numpy(places.reshape(ids.shape))]

    def spread(self, embedded: RecordedTaps) -> State:
        """The streams entering layer 0: the embedding in each of them."""
        streams = np.repeat(embedded.taps["embed"][:, :, None], self._config.hc_mult, axis=2)
        return {_GOLDEN: streams} | ({_NOISE: streams} if self._noise else {})

    def run_layer(self, layer: int, state: State, expected: Expected) -> tuple[State, RecordedTaps]:
        """The streams leaving ``layer``, and its expected taps (by name within the layer) with their noise.

        The layer may be that of a stage, which gets the streams that left the last layer, or the stage before.
        """
        with self._code.active():
            block = self._block(layer)
            ids = torch.from_numpy(token_ids(self._ids.numpy(), self._config, layer))
            window = self._config.sliding_window

            def forward(streams: Tensor, start: int, visit: Visit) -> Tensor:
                result: Tensor = block(streams, start, ids[:, start : start + streams.shape[1]])
                return result

            def watching(visit: Visit, choices: Choices | None, start: int) -> AbstractContextManager[None]:
                slot = start % window if start else None
                return watching_block(self._code, block, visit, choices, slot=slot)

            of_block = {name: what for name, what in expected.items() if tap_named(name).where is not AFTER}
            if self._config.drafts_blocks(layer):
                return self._run(self._draft(layer, block), state, expected)
            part = _Step(layer, self._calls, forward, watching, block)
            left, taken = self._run(part, state, of_block)
            if layer not in self._config.stage_layers:
                return kept(state, left, self._config, layer), taken
            of_head = {name: what for name, what in expected.items() if name not in of_block}
            head = self._run_head(left, of_head, block.norm, self._config.prefix(layer), layer)
            return left, RecordedTaps({**taken.taps, **head.taps}, {**taken.noise, **head.noise})

    def _draft(self, layer: int, block: Any) -> _Step:
        """A DSpark stage. At least its last known token comes by itself, because the code drafts after such ones."""
        known = known_tokens(self._ids.shape[1])
        begun = min(self._calls[0][1], known - 1)
        calls = [(0, begun), *((token, token + 1) for token in range(begun, known))]
        draft = Draft(self._code, block, self._ids[:, -1], calls)
        return _Step(layer, calls, draft.forward, draft.watching, block, draft)

    def run_head(self, state: State, expected: Expected) -> RecordedTaps:
        """The taps after the last layer, the logits among them."""
        with self._code.active():
            norm = self._norm()
            self._fill(norm, "norm.")
            return self._run_head(state, expected, norm, "", None)

    def _run_head(
        self, state: State, expected: Expected, norm: nn.Module, prefix: str, layer: int | None
    ) -> RecordedTaps:
        """The taps behind the last layer, or in a stage behind its layer, whose parameters begin with ``prefix``."""
        mixing = [
            self._floats(prefix + name, torch.float32) for name in ("hc_head_fn", "hc_head_scale", "hc_head_base")
        ]
        forward = partial(self._to_logits, norm, mixing, self._logits)
        _, taken = self._run(_Step(layer, self._whole, forward, _watching_head), state, expected)
        return taken

    def _to_logits(
        self,
        norm: nn.Module,
        mixing: Sequence[Tensor],
        logits: Callable[[Tensor], Tensor],
        streams: Tensor,
        start: int,
        visit: Visit,
    ) -> Tensor:
        """Everything after the last layer, step by step. ``mixing``: the parameters of the collapse."""
        collapsed = self._code.collapse(self._args)(streams, *mixing)
        visit("hc_head", collapsed)
        normed = norm(collapsed)
        visit("norm", normed)
        visit("logits", logits(normed))
        return streams

    def _try_head(self) -> None:
        """Run the head on one token of zeros, so that code with another one is refused before a layer runs.

        Raises:
            Dsv4Error: the code's head is not one of those that the recorder knows.
        """
        streams, width = self._config.hc_mult, self._config.hidden_size
        mixing = [torch.zeros(*shape, dtype=torch.float32) for shape in ((streams, streams * width), (1,), (streams,))]
        shapes = {"hc_head.pre": streams, "hc_head": width, "norm": width, "logits": 1}
        word = torch.zeros(1, width, dtype=torch.float32)
        forward = partial(self._to_logits, self._norm(), mixing, partial(self._code.logits, weight=word))
        call = _Call({name: (_FLOAT32, (1, 1, size)) for name, size in shapes.items()})
        try:
            call.run(self._code, _Step(None, [(0, 1)], forward, _watching_head), torch.zeros(1, 1, streams, width), 0)
        except (AttributeError, TypeError) as error:
            raise complaint(self._code, f"its output head: {error}") from error

    def _norm(self) -> nn.Module:
        norm: nn.Module = self._code.module.RMSNorm(self._config.hidden_size, self._config.rms_norm_eps)
        return norm

    def _run(self, part: _Step, state: State, expected: Expected) -> tuple[State, RecordedTaps]:
        """The golden's run, then those that measure its noise."""
        states: list[dict[str, Tensor]] = []
        entering = self._entering(part, state, _GOLDEN)
        leaving, taps = self._pass(part, entering, expected, states)
        left = _left(part, _GOLDEN, leaving)
        if not self._noise:
            return left, RecordedTaps(taps, {})
        noise: dict[Mode, dict[str, Array]] = {}
        with exact_sums(), exact_functions():
            _, noise[Mode.ISOLATED] = self._pass(part, entering, expected, states, golden=taps, feed=True)
            own = self._entering(part, state, _NOISE)
            apart, noise[Mode.CUMULATIVE] = self._pass(part, own, expected, states[:1], golden=taps)
        stacked = {name: np.array([[noise[mode][name] for mode in MODES]]) for name in noise[Mode.ISOLATED]}
        return left | _left(part, _NOISE, apart), RecordedTaps(taps, stacked)

    def _entering(self, part: _Step, state: State, run: str) -> Any:
        """What enters a part in a run: streams, and for a DSpark stage the context too."""
        if part.draft is None:
            return _tensor(state[run])
        if part.layer is not None and self._config.embeds(part.layer):
            return _tensor(gathered(state, run, self._config)[:, : part.calls[-1][1]]), None
        return _tensor(state[run]), _tensor(state[f"{run}{_CONTEXT}"])

    def _pass(
        self,
        part: _Step,
        entering: Any,
        expected: Expected,
        states: list[dict[str, Tensor]],
        *,
        golden: Mapping[str, Array] | None = None,
        feed: bool = False,
    ) -> tuple[Tensor, dict[str, Array]]:
        """One run over all tokens, call by call: what leaves, and the taps; with ``golden``, its taps, their row noise.

        Args:
            part: what runs.
            entering: the streams that enter it.
            expected: dtype and shape of the taps.
            states: the code's caches before each call, which the golden's run adds. The other runs start a call from
                its entry, if there is one.
            golden: taps of the golden's run.
            feed: every operation goes on with the golden's values.

        Raises:
            Dsv4Error: a tap did not turn up, turned up twice, or has another shape.
        """
        caches = {} if part.block is None else _caches(part.block)
        found: dict[str, list[Array]] = {name: [] for name in expected if not is_state(name)}
        streams, held = [], {}
        for number, (start, stop) in enumerate(part.calls):
            if golden is None:
                states.append({name: cache.clone() for name, cache in caches.items()})
            elif number < len(states):
                for name, cache in caches.items():
                    cache.copy_(states[number][name])
            places = self._places(part, {name: expected[name][1] for name in found}, start, stop)
            given = golden and {name: part_of(golden[name], *place) for name, place in places.items()}
            call = _Call({name: (expected[name][0], shape) for name, (_, shape) in places.items()}, given, feed=feed)
            own = entering[:, start:stop] if part.draft is None else entering
            streams.append(call.run(self._code, part, own, start))
            for name, value in call.taps.items():
                found[name].append(value)
            if stop == self._calls[0][1] and len(self._calls) > 1 and part.block is not None:
                held = {
                    name: value if golden is None else row_noise(value, golden[name])
                    for name, value in state_after(self._code, part.block, expected, stop).items()
                }
        whole = {
            name: np.concatenate(values, axis=2) if golden is not None else joined(values, expected[name][1])
            for name, values in found.items()
            if golden is None or expected[name][0].kind == "f"
        }
        return streams[-1] if part.draft is not None else torch.cat(streams, dim=1), whole | held

    def _places(
        self, part: _Step, shapes: Mapping[str, tuple[int, ...]], start: int, stop: int
    ) -> dict[str, tuple[range, tuple[int, ...]]]:
        """The rows of taps that a call makes, and the shape of what it makes, of the taps that it makes any rows of."""
        places = {}
        for name, shape in shapes.items():
            key = TapKey.of(self._config, part.layer, name)
            if part.draft is None:
                own = part_shape(key, self._config, batch=len(self._ids), start=start, stop=stop)
                places[name] = rows_of(key, self._config, start, stop), own
            elif name.startswith(KNOWN):
                places[name] = range(start, stop), (shape[0], stop - start, *shape[2:])
            elif start == 0 if name in BEGINS else (start, stop) == part.calls[-1]:
                places[name] = range(shape[1]), shape
        return places

    def _block(self, layer: int) -> Any:
        """The code's block of a layer or stage with its weights; of the experts each while it runs."""
        stage, module = layer in self._config.stage_layers, self._code.module
        of_stage = MTP if self._config.dspark is None else DSPARK
        block = (getattr(module, of_stage) if stage else module.Block)(layer, self._args).eval()
        prefix = self._config.prefix(layer)
        for expert, module in enumerate(block.ffn.experts):
            self._stream(module, f"{prefix}ffn.experts.{expert}.")
        self._fill(block, prefix, besides=block.ffn.experts)
        if stage:  # both are the model's own; the head, which evaluates one position only, is run for all of them
            block.embed = self._embedded
            block.head = (lambda streams, *mixing: streams) if of_stage == MTP else self._of_all
        return block

    def _of_all(self, normed: Tensor, full_logits: bool) -> Tensor:
        """The head of a DSpark stage, which wants the logits of all positions."""
        assert full_logits
        return self._logits(normed)

    def _logits(self, normed: Tensor) -> Tensor:
        """Logits ``[B, S, V]``, some rows of the output matrix at a time."""
        words = self._config.vocab_size
        parts = (slice(start, min(start + _HEAD_ROWS, words)) for start in range(0, words, _HEAD_ROWS))
        weights = (self._floats("head.weight", torch.float32, rows=rows) for rows in parts)
        return torch.cat([self._code.logits(normed, weight) for weight in weights], dim=-1)

    def _stream(self, expert: nn.Module, prefix: str) -> None:
        """Give an expert its weights when it is called, and take them away when it is done."""
        empty = dict(expert.named_parameters())

        def fill(module: nn.Module, _: Any) -> None:
            self._fill(module, prefix)

        def drop(module: nn.Module, *others: Any) -> None:
            for path, parameter in empty.items():
                owner, _, key = path.rpartition(".")
                setattr(module.get_submodule(owner), key, parameter)

        expert.register_forward_pre_hook(fill)
        expert.register_forward_hook(drop)

    def _fill(self, module: nn.Module, prefix: str, *, besides: nn.Module | None = None) -> None:
        """Give every parameter of ``module`` its tensor.

        Raises:
            Dsv4Error: the code has a parameter that the checkpoint has not.
        """
        left_out = set() if besides is None else set(besides.modules())
        absent = []
        for path, part in module.named_modules():
            if part in left_out:
                continue
            for key, parameter in list(part.named_parameters(recurse=False)):
                name = prefix + (f"{path}." if path else "") + key
                if name not in self._checkpoint.tensors:
                    absent.append(name)
                elif key != "scale":
                    setattr(part, key, nn.Parameter(self._stored(name, parameter.dtype), requires_grad=False))
            if isinstance(getattr(part, "scale", None), nn.Parameter) and not absent:
                scale = prefix + (f"{path}." if path else "") + "scale"
                part.scale = nn.Parameter(self._scale(scale), requires_grad=False)
                part.weight.scale = part.scale
        if absent:
            raise complaint(self._code, f"it has parameters that the checkpoint has not:\n{listed(absent)}")

    def _stored(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor as the code holds it: published codes as they are, everything else decoded to ``dtype``."""
        info = self._checkpoint.tensors[name]
        if dtype in _CODES:
            if info.dtype != _CODES[dtype]:
                raise complaint(self._code, f"it wants {name} as {_CODES[dtype]}, the checkpoint has {info.dtype}")
            return self._bytes(name).view(dtype)
        if not dtype.is_floating_point:
            table = read_table(self._checkpoint, name, self._config.n_routed_experts)
            return torch.from_numpy(table.astype(np.int64)).to(dtype)
        return self._floats(name, dtype)

    def _scale(self, name: str) -> Tensor:
        """Scales in the dtype that they were published in."""
        if self._checkpoint.tensors[name].dtype == "F32":
            return self._floats(name, torch.float32)
        return self._bytes(name).view(torch.float8_e8m0fnu)

    def _bytes(self, name: str) -> Tensor:
        info = self._checkpoint.tensors[name]
        stored = np.frombuffer(self._checkpoint.read_bytes(name), np.uint8).reshape(info.shape)
        copied = torch.from_numpy(stored.copy())
        self._checkpoint.release(name)
        return copied

    def _floats(self, name: str, dtype: torch.dtype, *, rows: slice = slice(None)) -> Tensor:
        source = self._sources.get(name, Source(name))  # scales have none themselves
        value = torch.from_numpy(np.array(read_weight(self._checkpoint, source, dtype=_FLOAT32, rows=rows)))
        self._checkpoint.release(name)
        return value.to(dtype)


def _watching_head(visit: Visit, choices: Choices | None, start: int) -> AbstractContextManager[None]:
    """The head makes no choices."""
    return watching_head(visit)


@dataclasses.dataclass(frozen=True)
class _Step:
    """A layer, a stage, or what is behind it or the last layer (None).

    Attributes:
        layer: its number.
        calls: the tokens ``start:stop`` of each call.
        forward: ``(streams, first position, visitor)`` to the streams that leave.
        watching: ``(visitor, choices, first position)``: a context in which taps are visited.
        block: the code's block, which has caches.
        draft: of a DSpark stage.
    """

    layer: int | None
    calls: Sequence[tuple[int, int]]
    forward: Callable[[Any, int, Visit], Tensor]
    watching: Callable[[Visit, Choices | None, int], AbstractContextManager[None]]
    block: Any = None
    draft: Draft | None = None


def _left(part: _Step, run: str, streams: Tensor) -> State:
    """What a run leaves for the next layer or stage."""
    context = None if part.draft is None else part.draft.context
    return {run: _array(streams)} | ({} if context is None else {f"{run}{_CONTEXT}": _array(context)})


def _caches(block: nn.Module) -> dict[str, Tensor]:
    """All that a block keeps between calls; rotary tables do not change."""
    return {name: buffer for name, buffer in block.named_buffers() if not name.endswith("freqs_cis")}


class _Call:
    """One call of a part: its taps, or with ``golden``, the part of its taps, the row noise of those of real numbers.

    ``feed``: every operation goes on with the golden's values.
    """

    def __init__(self, expected: Expected, golden: Mapping[str, Array] | None = None, *, feed: bool = False) -> None:
        self._expected, self._golden, self._feed = expected, golden, feed
        self._problems: list[str] = []
        self.taps: dict[str, Array] = {}

    def run(self, code: Code, part: _Step, entering: Tensor, start: int) -> Tensor:
        """The streams that leave. Raises :class:`Dsv4Error` for taps that are not the expected ones."""
        golden, seen = self._golden, self.taps
        choices = (
            None if golden is None else {name: golden[name] for name in (EXPERTS, CHOSEN, TOKENS) if name in golden}
        )
        with part.watching(self._visit, choices, start):
            leaving = part.forward(entering, start, self._visit)
        _order(seen)
        if golden is not None and WEIGHTS in seen:
            seen[WEIGHTS] = row_noise(seen[WEIGHTS], golden[WEIGHTS])
        for name, (dtype, shape) in self._expected.items():
            if name not in seen and 0 in shape:  # the code skips what would be empty: no block is complete
                seen[name] = np.zeros(shape, dtype) if golden is None else np.zeros((2, *shape[:2]), np.float32)
        problems = self._problems + [f"{name}: not computed" for name in self._expected if name not in seen]
        if problems:
            raise complaint(code, f"taps differ:\n{listed(problems)}")
        return leaving

    def _visit(self, name: str, value: Tensor) -> None:
        if name not in self._expected:
            return
        golden, (dtype, shape) = self._golden, self._expected[name]
        if name in self.taps:
            self._problems.append(f"{name}: computed more than once")
        elif value.numel() != np.prod(shape) or value.is_floating_point() != (dtype.kind == "f"):
            self._problems.append(f"{name}: expected {dtype} {list(shape)}, found {value.dtype} {list(value.shape)}")
        else:
            found = _array(value).reshape(shape)
            self.taps[name] = found if golden is None or name in _ORDERED else row_noise(found, golden[name])
            if self._feed and golden is not None and name not in _ORDERED:
                value.copy_(torch.from_numpy(np.ascontiguousarray(golden[name])).reshape(value.shape))


#: Taps that are put into order when both are there: experts ascending, and the chosen entries, none last.
_ORDERED = (EXPERTS, WEIGHTS, CHOSEN)


def _order(seen: dict[str, Array]) -> None:
    if EXPERTS in seen:
        order = np.argsort(seen[EXPERTS], axis=-1, kind="stable")
        for name in (EXPERTS, WEIGHTS):
            seen[name] = np.take_along_axis(seen[name], order, axis=-1)
    if CHOSEN in seen:
        none = np.iinfo(seen[CHOSEN].dtype).max
        ordered = np.sort(np.where(seen[CHOSEN] < 0, none, seen[CHOSEN]), axis=-1)
        seen[CHOSEN] = np.where(ordered == none, -1, ordered)


def _array(value: Tensor) -> Array:
    """A copy: real numbers as float32, which every dtype here fits into, indices as int32."""
    copied = value.float().numpy() if value.is_floating_point() else value.int().numpy()
    return np.array(copied)


def _tensor(streams: Array) -> Tensor:
    return torch.from_numpy(streams).bfloat16()

"""DeepSeek's inference code on a prompt, one layer at a time: its activations, and how far rounding may move them.

Every operation is the code's own. This module only decides when weights are in memory: it builds a block, fills it from
the published bytes, runs it and drops it, and holds only the routed expert that runs.

In these numerics a layer amplifies a rounding error beyond the size of the faults to find: a key that changes by one
part in 256 may become another FP8 number, which is one part in 8. So the isolated mode isolates *operations*: every
operation of a layer gets the golden's own values. Its noise is the change when sums are float64 instead of float32;
cumulative noise is the same change from the tokens on, with the golden's discrete choices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dsv4_convert.checkpoint import Checkpoint
from dsv4_convert.checkpoint.weights import read_table, read_weight
from dsv4_convert.errors import BadInput, listed
from dsv4_convert.golden.manifest import Reference
from dsv4_convert.golden.noise import MODES, Mode, RecordedTaps, row_noise
from dsv4_convert.golden.references.release.code import Code, complaint
from dsv4_convert.golden.references.release.kernels import exact_sums
from dsv4_convert.golden.references.release.probes import (
    CHOSEN,
    EXPERTS,
    WEIGHTS,
    exact_functions,
    watching_block,
    watching_head,
)
from dsv4_convert.spec.config import Config
from dsv4_convert.spec.coverage import Resolution, Source
from dsv4_convert.spec.names import Dialect
from dsv4_convert.spec.v4.config import as_v4

Array = np.ndarray[Any, Any]
#: Tap (name within the layer, or of the model level) -> dtype and shape that it must have.
Expected = Mapping[str, tuple[np.dtype[np.generic], tuple[int, ...]]]
#: Streams by the run that they belong to.
State = dict[str, Array]

_GOLDEN, _NOISE = "golden", "noise"
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
    ) -> None:
        """Set the code up for ``tokens`` ``[B, S]``; no weight is read. Without ``noise`` none is measured.

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
        self._ids = torch.from_numpy(tokens.astype(np.int64))
        self._noise = bool(noise)
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
            )
            self._try_head()

    def embed(self) -> RecordedTaps:
        """The embedded tokens, ``[B, S, D]``. Only their rows of the table are read."""
        (source,) = self._leaves["embed"].sources
        used, places = np.unique(self._ids.numpy(), return_inverse=True)
        rows = torch.from_numpy(self._checkpoint.read(source.weight)[used].astype(np.float32)).bfloat16()
        self._checkpoint.release(source.weight)
        embedded = _array(rows[torch.from_numpy(places.reshape(self._ids.shape))])
        none = np.zeros((1, len(MODES), 2, *embedded.shape[:2]), np.float32)
        return RecordedTaps({"embed": embedded}, {"embed": none} if self._noise else {})

    def spread(self, embedded: RecordedTaps) -> State:
        """The streams entering layer 0: the embedding in each of them."""
        streams = np.repeat(embedded.taps["embed"][:, :, None], self._config.hc_mult, axis=2)
        return {_GOLDEN: streams} | ({_NOISE: streams} if self._noise else {})

    def run_layer(self, layer: int, state: State, expected: Expected) -> tuple[State, RecordedTaps]:
        """The streams leaving ``layer``, and its expected taps (by name within the layer) with their noise."""
        with self._code.active():
            block = self._block(layer)

            def forward(streams: Tensor) -> Tensor:
                result: Tensor = block(streams, 0, self._ids)
                return result

            def watching(visit: Any, choices: Mapping[str, Array] | None) -> Any:
                return watching_block(self._code, block, visit, choices)

            return self._run(forward, watching, state, expected)

    def run_head(self, state: State, expected: Expected) -> RecordedTaps:
        """The taps after the last layer, the logits among them."""
        with self._code.active():
            norm = self._norm()
            self._fill(norm, "norm.")
            names = ("hc_head_fn", "hc_head_scale", "hc_head_base")
            mixing = [self._floats(name, torch.float32) for name in names]
            forward = partial(self._to_logits, norm, mixing, self._logits)
            _, taken = self._run(forward, _watching_head, state, expected, of_visits=True)
            return taken

    def _to_logits(
        self,
        norm: nn.Module,
        mixing: Sequence[Tensor],
        logits: Callable[[Tensor], Tensor],
        visit: Callable[[str, Tensor], None],
        streams: Tensor,
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
        expected = {name: (_FLOAT32, (1, 1, size)) for name, size in shapes.items()}
        word = torch.zeros(1, width, dtype=torch.float32)
        forward = partial(self._to_logits, self._norm(), mixing, partial(self._code.logits, weight=word))
        try:
            entering = torch.zeros(1, 1, streams, width)
            _observed(self._code, forward, _watching_head, expected, entering, of_visits=True)
        except (AttributeError, TypeError) as error:
            raise complaint(self._code, f"its output head: {error}") from error

    def _norm(self) -> nn.Module:
        norm: nn.Module = self._code.module.RMSNorm(self._config.hidden_size, self._config.rms_norm_eps)
        return norm

    def _run(
        self,
        forward: Callable[..., Tensor],
        watching: Callable[..., Any],
        state: State,
        expected: Expected,
        *,
        of_visits: bool = False,
    ) -> tuple[State, RecordedTaps]:
        """The golden's run, then those that measure its noise."""
        run = partial(_observed, self._code, forward, watching, expected, of_visits=of_visits)
        entering = _tensor(state[_GOLDEN])
        leaving, taps = run(entering)
        if not self._noise:
            return {_GOLDEN: _array(leaving)}, RecordedTaps(taps, {})
        noise: dict[Mode, dict[str, Array]] = {}
        with exact_sums(), exact_functions():
            _, noise[Mode.ISOLATED] = run(entering, golden=taps, feed=True)
            apart, noise[Mode.CUMULATIVE] = run(_tensor(state[_NOISE]), golden=taps)
        stacked = {name: np.array([[noise[mode][name] for mode in MODES]]) for name in noise[Mode.ISOLATED]}
        return {_GOLDEN: _array(leaving), _NOISE: _array(apart)}, RecordedTaps(taps, stacked)

    def _block(self, layer: int) -> Any:
        """The code's block of a layer with its weights; of the experts each while it runs."""
        block = self._code.module.Block(layer, self._args).eval()
        prefix = f"layers.{layer}."
        for expert, module in enumerate(block.ffn.experts):
            self._stream(module, f"{prefix}ffn.experts.{expert}.")
        self._fill(block, prefix, besides=block.ffn.experts)
        return block

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
        scale = name.removesuffix(".weight") + ".scale"
        source = Source(name, scale if name.endswith(".weight") and scale in self._checkpoint.tensors else None)
        value = torch.from_numpy(np.array(read_weight(self._checkpoint, source, dtype=_FLOAT32, rows=rows)))
        self._checkpoint.release(name)
        return value.to(dtype)


def _watching_head(visit: Any, choices: Mapping[str, Array] | None) -> Any:
    """The head makes no choices."""
    return watching_head(visit)


def _observed(
    code: Code,
    forward: Callable[..., Tensor],
    watching: Callable[..., Any],
    expected: Expected,
    entering: Tensor,
    *,
    golden: Mapping[str, Array] | None = None,
    feed: bool = False,
    of_visits: bool = False,
) -> tuple[Tensor, dict[str, Array]]:
    """One run: what leaves, and the taps; with ``golden``, its taps, the row noise of those of real numbers.

    ``feed``: every operation goes on with the golden's values. ``of_visits``: ``forward`` visits taps itself.

    Raises:
        Dsv4Error: a tap did not turn up, turned up twice, or has another shape.
    """
    seen: dict[str, Array] = {}
    problems: list[str] = []

    def visit(name: str, value: Tensor) -> None:
        if name not in expected:
            return
        dtype, shape = expected[name]
        if name in seen:
            problems.append(f"{name}: computed more than once")
        elif value.numel() != np.prod(shape) or value.is_floating_point() != (dtype.kind == "f"):
            problems.append(f"{name}: expected {dtype} {list(shape)}, found {value.dtype} {list(value.shape)}")
        else:
            found = _array(value).reshape(shape)
            seen[name] = found if golden is None or name in _ORDERED else row_noise(found, golden[name])
            if feed and golden is not None and name not in _ORDERED:
                value.copy_(torch.from_numpy(golden[name]).reshape(value.shape))

    choices = None if golden is None else {name: golden[name] for name in (EXPERTS, CHOSEN) if name in golden}
    with ExitStack() as stack:
        stack.enter_context(watching(visit, choices))
        leaving = forward(visit, entering) if of_visits else forward(entering)
    _order(seen)
    if golden is not None and WEIGHTS in seen:
        seen[WEIGHTS] = row_noise(seen[WEIGHTS], golden[WEIGHTS])
    for name, (dtype, shape) in expected.items():
        if name not in seen and 0 in shape:  # the code skips what would be empty: no block is complete
            seen[name] = np.zeros(shape, dtype) if golden is None else np.zeros((2, *shape[:2]), np.float32)
    problems += [f"{name}: not computed" for name in expected if name not in seen]
    if problems:
        raise complaint(code, f"taps differ:\n{listed(problems)}")
    real = [name for name in expected if golden is None or expected[name][0].kind == "f"]
    return leaving, {name: seen[name] for name in real}


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

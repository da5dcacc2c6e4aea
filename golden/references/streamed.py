"""transformers' DeepSeek-V4 on a prompt, one layer at a time: in float32, and in other dtypes for its noise floor.

Every computation is the reference's own: its decoder layer, hyper-head, norms, rotary tables and masks. This module
only decides when weights are in memory. It builds a layer without memory, fills it from the checkpoint, runs it and
drops it. Routed experts are nearly all of a layer, and only the one that runs is in memory. The result is bit-equal to
the whole model's.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import DeepseekV4Config, DynamicCache
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

from dsv4_convert.checkpoint import Checkpoint
from dsv4_convert.checkpoint.weights import read_expert, read_table, read_weight, release
from dsv4_convert.errors import Dsv4Error, listed
from dsv4_convert.formats.weight import decode_weight
from dsv4_convert.golden.layout import calls, joined, known_tokens, part_of, part_shape, rows_of, token_ids
from dsv4_convert.golden.manifest import Reference
from dsv4_convert.golden.noise import MODES, RUN_DTYPES, Mode, RecordedTaps, row_noise
from dsv4_convert.golden.references import draft
from dsv4_convert.golden.references.draft import DraftStage
from dsv4_convert.golden.references.precision import (
    CHOICES,
    TORCH,
    as_array,
    as_tensor,
    change_dtype,
    choosing,
    widened,
)
from dsv4_convert.golden.references.probes import HEAD_PROBES, Expected, Probe, layer_probes, recording
from dsv4_convert.golden.references.stage import Stage, module_name
from dsv4_convert.golden.references.stage import probes as stage_probes
from dsv4_convert.golden.references.state import state_after
from dsv4_convert.golden.references.targets import gathered, kept
from dsv4_convert.spec.config import Config, Yarn
from dsv4_convert.spec.coverage import Leaf, Resolution, Source
from dsv4_convert.spec.names import Dialect, Kind, Rule
from dsv4_convert.spec.taps import TapKey, is_state
from dsv4_convert.spec.v4.config import V4Config, as_v4
from dsv4_convert.spec.v4.kinds import AttentionKind

Array = np.ndarray[Any, Any]

_EAGER = "eager"
#: Taps of a DSpark stage, and the end of the name of what it hands on.
_TOKENS, _WINDOW, _CONTEXT = "tokens", "cache.window", "/context"
#: The dtype that goldens are recorded in.
_GOLDEN = "float32"
_FLOAT32 = np.dtype(np.float32)
#: Rows of the output head that are in memory at a time; at V4-Flash's width 128 MiB.
HEAD_ROWS = 8192
#: The keyword by which a layer gets its cache: ``past_key_values`` in transformers 5.23, ``cache`` in 5.24.
(_CACHE,) = {"past_key_values", "cache"} & set(inspect.signature(modeling.DeepseekV4Attention.forward).parameters)


def describe() -> Reference:
    """This reference as the manifest describes it."""
    return Reference(
        name="transformers",
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
        numerics="plain",
        dtype="float32",
        attention_implementation=_EAGER,
        experts_implementation=_EAGER,
    )


#: Streams by the dtype of the run that they belong to: float32 is the golden's own run. Other values, which DSpark's
#: stages read, have names that begin with its own (:mod:`dsv4_convert.golden.references.targets`).
State = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class _Given:
    """The arguments of one call of a layer in one dtype, besides streams, weights and cache."""

    ids: Tensor
    positions: Tensor
    mask: Tensor
    angles: dict[str, tuple[Tensor, Tensor]]


#: One call of a part of the model: the dtype of the run, what enters, number of the call, cache; to the streams.
_Forward = Callable[[str, Any, int, DynamicCache | None], Tensor]


@dataclasses.dataclass(frozen=True)
class _Part:
    """A layer, a stage or the head (None): its module, a call of it, and a function that converts it to the dtype of a
    run. ``block`` is the decoder layer in the module. ``probes``: the places of its taps, by those of its layer's."""

    module: nn.Module
    layer: int | None
    block: nn.Module
    forward: _Forward
    convert: Callable[[str], None]
    probes: Callable[[Mapping[str, Probe]], Mapping[str, Probe]] = dict


class StreamedModel:
    """The reference for one prompt. Streams go in and out as ``[B, S, N, D]``, one array for every dtype that runs.

    The golden is the run in float32. Every dtype of ``noise`` adds two runs of each layer
    (:mod:`dsv4_convert.golden.noise`).
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: Config,
        resolution: Resolution,
        tokens: Array,
        *,
        noise: Sequence[str] = (),
        first_position: int = 0,
        decode: int = 0,
    ) -> None:
        """Prepare masks and rotary tables; no weight is read.

        Args:
            checkpoint: where weights come from.
            config: the checkpoint's architecture.
            resolution: which tensors fill which parameters, for all layers that will run.
            tokens: int32 ``[B, S]``.
            noise: dtypes whose noise floor is measured.
            first_position: of the first token in the rotary tables. Everything else counts tokens from 0, so that the
                prompt stands there without any token before it.
            decode: how many of the last tokens come one by one, from the reference's own cache.

        Raises:
            Dsv4Error: transformers understands the checkpoint's config.json in another way than ``config`` does.
        """
        self._checkpoint = checkpoint
        self._config = as_v4(config)
        self._leaves = resolution.leaves
        self._ids = torch.from_numpy(tokens.astype(np.int64))
        self._noise = {dtype: RUN_DTYPES[dtype] for dtype in noise}
        raw = copy.deepcopy(dict(checkpoint.config))
        raw.pop("quantization_config", None)  # weights are decoded here, so nothing is to be quantised there
        self._hf = DeepseekV4Config.from_dict(raw, attn_implementation=_EAGER, experts_implementation=_EAGER)
        self._rotary = modeling.DeepseekV4RotaryEmbedding(self._hf)
        _check_agreement(self._hf, self._rotary, self._config)
        # Its config describes the stages as further layers.
        self._hf.num_hidden_layers = self._config.stage_layers.stop
        self._hf.layer_types = [self._config.kind(layer).value for layer in range(self._config.stage_layers.stop)]
        self._hf.mlp_layer_types += ["moe"] * self._config.num_mtp_stages
        self._rotary.register_forward_pre_hook(partial(_moved, first_position), with_kwargs=True)
        self._calls = calls(tokens.shape[1], decode)
        self._given = {dtype: self._prepare(TORCH[dtype]) for dtype in (_GOLDEN, *self._noise.values())}

    def _cache(self) -> DynamicCache | None:
        """An empty cache of the reference, where tokens come one by one."""
        return DynamicCache(config=self._hf) if len(self._calls) > 1 else None

    def _prepare(self, dtype: torch.dtype) -> list[_Given]:
        """The arguments of every call, as the reference's own model makes them."""
        seen, given = self._cache(), []
        for start, stop in self._calls:
            ids, positions = self._ids[:, start:stop], torch.arange(start, stop).unsqueeze(0)
            like_embeddings = torch.empty(*ids.shape, 1, dtype=dtype)  # only its batch, length and dtype matter
            mask = create_sliding_window_causal_mask(self._hf, like_embeddings, None, seen, positions)
            angles = {
                label: self._rotary(like_embeddings, position_ids=positions, layer_type=label)
                for label in ("main", "compress")
            }
            given.append(_Given(ids, positions, mask, angles))
            if seen is not None:  # a mask depends on how many tokens were seen, not on what they were
                keys = torch.zeros(ids.shape[0], 1, ids.shape[1], 1)
                for layer in range(len(seen.layers)):
                    seen.update(keys, keys, layer)
        return given

    @torch.no_grad()
    def embed(self) -> RecordedTaps:
        """The embedded tokens, ``[B, S, D]``. Only their rows of the table are read."""
        embedded = self._embedded(self._ids)
        runs = {dtype: as_array(torch.from_numpy(embedded).to(TORCH[dtype])) for dtype in self._noise.values()}
        noise = [[row_noise(runs[run], embedded)] * len(MODES) for run in self._noise.values()]
        return RecordedTaps({"embed": embedded}, {"embed": np.array(noise)} if noise else {})

    def _embedded(self, ids: Tensor) -> Array:
        (source,) = self._leaf("embed").sources
        used, places = np.unique(ids.numpy(), return_inverse=True)
        rows = decode_weight(self._checkpoint.read(source.weight)[used], None, dtype=_FLOAT32)
        self._checkpoint.release(source.weight)
        embedded: Array = rows[places.reshape(ids.shape)]
        return embedded

    @torch.no_grad()
    def choose_tokens(self, progress: Callable[[int, int, str], None] = lambda done, total, what: None) -> Array:
        """Replace the tokens that come one by one by those that the reference likes best: all tokens ``[B, S]``.

        Every token takes one pass through all layers, whose weights are read again.
        """
        cache = self._cache()
        for call, (start, stop) in enumerate(self._calls[:-1]):
            progress(call, len(self._calls) - 1, f"token {call + 1} of {len(self._calls) - 1}")
            embedded = torch.from_numpy(self._embedded(self._ids[:, start:stop]))
            streams = embedded[:, :, None].expand(-1, -1, self._config.hc_mult, -1).contiguous()
            for layer in range(self._config.num_hidden_layers):
                streams = self._layer(layer).forward(_GOLDEN, streams, call, cache)
            logits = self._head().forward(_GOLDEN, streams[:, -1:], call, None)
            self._ids[:, stop] = logits[:, -1].argmax(dim=-1)  # what the next call is given is a view of it
        return self._ids.numpy()

    def spread(self, embedded: RecordedTaps) -> State:
        """The streams entering layer 0: the embedding in each of them."""
        streams = torch.from_numpy(np.repeat(embedded.taps["embed"][:, :, None], self._config.hc_mult, axis=2))
        return {dtype: as_array(streams.to(TORCH[dtype])) for dtype in self._given}

    @torch.no_grad()
    def run_layer(self, layer: int, state: State, expected: Expected) -> tuple[State, RecordedTaps]:
        """The streams leaving ``layer``, and its expected taps (by name within the layer) with their noise.

        The layer may be that of a stage, which gets the streams that left the last layer, or the stage before. The
        first DSpark stage gets those that left the target layers.
        """
        config = self._config
        make = self._draft if config.drafts_blocks(layer) else self._stage
        part = make(layer) if layer in config.stage_layers else self._layer(layer)
        left, taken = self._run(part, state, expected)
        return kept(state, left, config, layer), taken

    def _layer(self, layer: int) -> _Part:
        """The reference's module of a layer with its weights, in the golden's dtype."""
        with torch.device("meta"):
            module = modeling.DeepseekV4DecoderLayer(self._hf, layer)
        prefix = f"model.layers.{layer}."

        def name(rule: Rule) -> str:
            return rule.template(Dialect.MODULE).format(layer).removeprefix(prefix)

        convert = self._fill_layer(module, module, layer, name)

        def forward(run: str, streams: Tensor, call: int, cache: DynamicCache | None) -> Tensor:
            result: Tensor = module(streams, **self._options(run, call, cache))
            return result

        return _Part(module, layer, module, forward, convert)

    def _stage(self, layer: int) -> _Part:
        """A stage of the reference's modules with its weights, in the golden's dtype."""
        with torch.device("meta"):
            module = Stage(self._hf, layer)
        own = "mtp.{}."
        convert = self._fill_layer(module, module.block, layer, lambda rule: module_name(rule.path.removeprefix(own)))
        following = torch.from_numpy(token_ids(self._ids.numpy(), self._config, layer))

        def forward(run: str, streams: Tensor, call: int, cache: DynamicCache | None) -> Tensor:
            start, stop = self._calls[call]
            embedded = torch.from_numpy(self._embedded(following[:, start:stop])).to(streams.dtype)
            result, normed = module(streams, embedded, **self._options(run, call, cache))
            module.lm_head(self._logits(normed))
            leaving: Tensor = result
            return leaving

        return _Part(module, layer, module.block, forward, convert, stage_probes)

    def _draft(self, layer: int) -> _Part:
        """A DSpark stage of the reference's modules with its weights, in the golden's dtype."""
        config, tokens = self._config, self._ids.shape[1]
        with torch.device("meta"):
            module = DraftStage(self._hf, layer, config)
        own = "mtp.{}."
        convert = self._fill_layer(module, module.block, layer, lambda rule: module_name(rule.path.removeprefix(own)))
        ids = torch.from_numpy(token_ids(self._ids.numpy(), config, layer))
        known = known_tokens(tokens)

        def forward(run: str, entering: Any, call: int, cache: DynamicCache | None) -> Tensor:
            streams, context = entering
            places = torch.arange(known + ids.shape[1]).unsqueeze(0)
            cos, sin = self._rotary(streams, position_ids=places, layer_type="main")
            options = {
                "input_ids": ids,
                "position_embeddings": {"main": (cos[:, known:], sin[:, known:])},
                "position_ids": places[:, known:],
                "attention_mask": None,
            }
            embedded = torch.from_numpy(self._embedded(ids)).to(streams.dtype)
            angles = (cos[:, :known], sin[:, :known])
            leaving = module(streams, context, embedded, angles, options, _CACHE)
            if module.last:
                module.draft(leaving, ids[:, 0], self._logits)
            return leaving

        probes = partial(draft.probes, first=module.first, last=module.last)
        return _Part(module, layer, module.block, forward, convert, probes)

    def _fill_layer(
        self, module: nn.Module, block: Any, layer: int, name: Callable[[Rule], str]
    ) -> Callable[[str], None]:
        """Give ``module``, with a decoder layer ``block`` in it, the weights of ``layer`` under their ``name`` in it.

        Returns:
            A function that converts them to the dtype of a run.
        """
        leaves = [leaf for leaf in self._leaves if leaf.layer == layer]
        stacks = {leaf.path.rpartition(".")[2]: leaf for leaf in leaves if leaf.rule.per_expert}
        experts = self._use_streamed_experts(block.mlp.experts, stacks)
        for inner in [path for path, part in module.named_modules() if type(part) is type(self._rotary)]:
            module.set_submodule(inner, self._rotary)
        self._fill(module, {name(leaf.rule): leaf for leaf in leaves if not leaf.rule.per_expert})

        def convert(run: str) -> None:
            change_dtype(module, TORCH[run])
            for stack in experts:
                stack.convert(TORCH[run])

        return convert

    def _options(self, run: str, call: int, cache: DynamicCache | None) -> dict[str, Any]:
        """The arguments of a decoder layer besides streams."""
        given = self._given[run][call]
        return {
            "input_ids": given.ids,
            "position_embeddings": given.angles,
            "position_ids": given.positions,
            "attention_mask": given.mask,
            _CACHE: cache,
        }

    @torch.no_grad()
    def run_head(self, state: State, expected: Expected) -> RecordedTaps:
        """The taps after the last layer, the logits among them."""
        _, taken = self._run(self._head(), state, expected)
        return taken

    def _head(self) -> _Part:
        """The reference's modules behind the last layer."""
        with torch.device("meta"):
            hc_head = modeling.DeepseekV4HyperHead(self._hf)
            norm = modeling.DeepseekV4RMSNorm(self._config.hidden_size, eps=self._config.rms_norm_eps)
            head = nn.Identity()
        root = nn.ModuleDict({"hc_head": hc_head, "norm": norm, "lm_head": head})
        leaves = [self._leaf(name) for name in ("hc_head_fn", "hc_head_base", "hc_head_scale", "norm")]
        self._fill(root, {leaf.rule.template(Dialect.MODULE).removeprefix("model."): leaf for leaf in leaves})

        def forward(run: str, streams: Tensor, call: int, cache: DynamicCache | None) -> Tensor:
            result: Tensor = head(self._logits(norm(hc_head(streams))))
            return result

        return _Part(root, None, root, forward, lambda run: change_dtype(root, TORCH[run]))

    def _logits(self, normed: Tensor) -> Tensor:
        """Logits ``[B, S, V]``; some rows of the output matrix are in memory at a time."""
        leaf = self._leaf("head")
        starts = range(0, self._config.vocab_size, HEAD_ROWS)
        rows = (self._floats(leaf, leaf.sources[0], rows=slice(start, start + HEAD_ROWS)) for start in starts)
        return torch.cat([nn.functional.linear(normed, weight.to(normed.dtype)) for weight in rows], dim=-1)

    def _run(self, part: _Part, state: State, expected: Expected) -> tuple[State, RecordedTaps]:
        """The golden's run, then those that measure its noise."""
        streams, taps = self._pass(part, _GOLDEN, self._entering(part, state, _GOLDEN), expected)
        leaving = {_GOLDEN: streams.numpy()} | _beside(part, _GOLDEN)
        noise: dict[str, list[Array]] = {name: [] for name, (dtype, _) in expected.items() if dtype.kind == "f"}
        for run in self._noise.values():
            part.convert(run)
            for mode in MODES:
                entering = self._entering(part, state, _GOLDEN if mode is Mode.ISOLATED else run, TORCH[run])
                with ExitStack() as stack:
                    if run == "float64":
                        stack.enter_context(widened(self._rotary))
                    streams, found = self._pass(part, run, entering, expected, golden=taps)
                if mode is Mode.CUMULATIVE:
                    leaving |= {run: as_array(streams)} | _beside(part, run)
                for name, rows in noise.items():
                    rows.append(found[name])
        shape = (len(self._noise), len(MODES))
        stacked = {name: np.array(rows).reshape(*shape, *rows[0].shape) for name, rows in noise.items() if rows}
        return leaving, RecordedTaps(taps, stacked)

    def _entering(self, part: _Part, state: State, run: str, dtype: torch.dtype = torch.float32) -> Any:
        """The values that enter a part in a run: streams, and for a DSpark stage the context too."""
        if not isinstance(part.module, DraftStage):
            return as_tensor(state[run]).to(dtype)
        if part.module.first:
            known = known_tokens(self._ids.shape[1])
            return as_tensor(gathered(state, run, self._config)[:, :known]).to(dtype), None
        return tuple(as_tensor(state[name]).to(dtype) for name in (run, f"{run}{_CONTEXT}"))

    def _pass(
        self, part: _Part, run: str, entering: Any, expected: Expected, golden: Mapping[str, Array] | None = None
    ) -> tuple[Tensor, dict[str, Array]]:
        """One run over all tokens, call by call: the streams that leave, and the taps.

        With ``golden``, its taps, the run makes the golden's choices and gives, of every tap of real numbers, the row
        noise. The head keeps nothing between calls, so it has one.
        """
        drafts = part.module if isinstance(part.module, DraftStage) else None
        at_once = part.layer is None or drafts is not None
        cache = None if at_once else self._cache()
        every = [(0, self._ids.shape[1])] if at_once else self._calls
        if drafts is not None:
            drafts.chosen = None if golden is None or not drafts.last else torch.from_numpy(golden[_TOKENS]).long()
        streams: list[Tensor] = []
        found: dict[str, list[Array]] = {name: [] for name in expected if not is_state(name)}
        held: dict[str, Array] = {}
        for call, (start, stop) in enumerate(every):
            places = {name: self._place(name, part.layer, start, stop) for name in found}
            before = min(start, self._config.sliding_window - 1)
            if drafts is not None:
                places = {name: (range(shape[1]), shape) for name, (_, shape) in expected.items() if name in found}
                before = min(known_tokens(stop), drafts.window)
            inside = {name: (expected[name][0], shape) for name, (_, shape) in places.items()}
            probes = HEAD_PROBES if part.layer is None else part.probes(layer_probes(before))
            with ExitStack() as stack:
                reduce = None
                if golden is not None:
                    choices = {name: part_of(golden[name], *places[name]) for name in found if name in CHOICES}
                    stack.enter_context(choosing(part.block, choices))
                    reduce = partial(_distance, golden, places)
                taps = stack.enter_context(recording(part.module, probes, inside, reduce))
                streams.append(part.forward(run, entering if drafts else entering[:, start:stop], call, cache))
            for name, value in taps.items():
                found[name].append(value)
            if call == 0 and cache is not None:
                assert part.layer is not None
                held = state_after(cache, part.layer, expected)
            if drafts is not None and drafts.keys is not None and _WINDOW in expected:
                held = {_WINDOW: as_array(_before(drafts.keys, self._calls[0][1], expected[_WINDOW][1][1]))}
        for name, value in held.items():
            held[name] = value if golden is None else row_noise(value, golden[name])
        whole = {
            name: _joined_noise(parts) if golden is not None and expected[name][0].kind == "f"
            else joined(parts, expected[name][1])
            for name, parts in found.items()
        }  # fmt: skip
        return torch.cat(streams, dim=1), whole | held

    def _place(self, name: str, layer: int | None, start: int, stop: int) -> tuple[range, tuple[int, ...]]:
        """The rows of a tap that a call makes, and the shape of what it makes."""
        key = TapKey.of(self._config, layer, name)
        shape = part_shape(key, self._config, batch=self._ids.shape[0], start=start, stop=stop)
        return rows_of(key, self._config, start, stop), shape

    def _leaf(self, path: str) -> Leaf:
        return next(leaf for leaf in self._leaves if leaf.path == path)

    def _fill(self, module: nn.Module, leaves: Mapping[str, Leaf]) -> None:
        """Give ``module`` its weights, by name. Every parameter and buffer has to be filled, and every leaf has to have
        a place.

        Raises:
            Dsv4Error: the module has other parameters than the checkpoint fills.
        """
        weights = {}
        for name, leaf in leaves.items():
            (source,) = leaf.sources
            weights[name] = self._integers(source) if leaf.rule.kind is Kind.INTEGER else self._floats(leaf, source)
        try:
            module.load_state_dict(weights, strict=True, assign=True)
        except RuntimeError as error:
            kind = type(module).__name__
            raise Dsv4Error(f"transformers' {kind} does not take the checkpoint's weights: {error}") from error
        module.eval().requires_grad_(False)

    def _use_streamed_experts(self, experts: nn.Module, leaves: Mapping[str, Leaf]) -> list[_Streamed]:
        """Replace the fused parameters by objects that decode the expert that the eager forward asks for."""
        w1, w2, w3 = (leaves[name] for name in ("w1", "w2", "w3"))
        stacks = []
        for name, halves in (("gate_up_proj", (w1, w3)), ("down_proj", (w2,))):
            delattr(experts, name)  # a registered parameter cannot be overwritten by another kind of object
            shape = (sum(leaf.source_shape[0] for leaf in halves), halves[0].source_shape[1])
            stacks.append(_Streamed(partial(self._expert, halves), shape))
            setattr(experts, name, stacks[-1])
        return stacks

    def _expert(self, leaves: tuple[Leaf, ...], expert: int, out: Tensor) -> None:
        """Fill ``[out, in]`` with the rows of one expert, those of several leaves one below the other."""
        for leaf, part in zip(leaves, torch.split(out, [leaf.source_shape[0] for leaf in leaves]), strict=True):
            rows = as_array(part)
            read_expert(self._checkpoint, leaf, expert, dtype=rows.dtype, out=rows)

    def _integers(self, source: Source) -> Tensor:
        """An index table as int64."""
        table = read_table(self._checkpoint, source.weight, self._config.n_routed_experts)
        return torch.from_numpy(table.astype(np.int64))

    def _floats(self, leaf: Leaf, source: Source, *, rows: slice = slice(None)) -> Tensor:
        """A weight of ``leaf``, or rows of it, float32 ``[out, in]``; its pages of the file are given back."""
        # Memory from torch, because where a matrix begins may change how its products are rounded.
        out = torch.empty(len(range(*rows.indices(leaf.source_shape[0]))), *leaf.source_shape[1:])
        read_weight(self._checkpoint, source, dtype=_FLOAT32, rows=rows, out=out.numpy())
        release(self._checkpoint, source)
        return out


def _beside(part: _Part, run: str) -> State:
    """The values that a run leaves for the next stage besides streams."""
    context = part.module.context if isinstance(part.module, DraftStage) else None
    return {} if context is None else {f"{run}{_CONTEXT}": as_array(context)}


def _before(keys: Tensor, token: int, count: int) -> Tensor:
    """The keys of ``count`` tokens before a token."""
    return keys[:, token - count : token].contiguous()


def _distance(
    golden: Mapping[str, Array], places: Mapping[str, tuple[range, tuple[int, ...]]], name: str, value: Tensor
) -> Array:
    """Row noise of what a call gives, which stands at its place in the golden's tap."""
    return row_noise(
        as_array(value if value.is_contiguous() else value.contiguous()), part_of(golden[name], *places[name])
    )


def _joined_noise(parts: Sequence[Array]) -> Array:
    """The row noise of a tap, ``[2, B, S]``, joined from its parts."""
    return np.concatenate(parts, axis=2)


def _moved(
    first: int, rotary: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a rotary table, with positions moved on by ``first``."""
    return args, kwargs | {"position_ids": kwargs["position_ids"] + first}


class _Streamed:
    """Stands in for a parameter ``[E, out, in]`` of which one expert at a time is asked for.

    An expert is valid until the next one is asked for, as every one is decoded into the same memory: writing into new
    memory takes several times as long.
    """

    def __init__(self, read: Callable[[int, Tensor], None], shape: tuple[int, int]) -> None:
        """``read`` fills a tensor ``[out, in]``, of float32 or bfloat16, with an expert."""
        self._read = read
        self._expert = self._decoded = torch.empty(shape)

    def convert(self, dtype: torch.dtype) -> None:
        """Give the experts in this dtype from now on."""
        self._expert = torch.empty(self._expert.shape, dtype=dtype)
        self._decoded = torch.empty(self._expert.shape) if dtype == torch.float64 else self._expert

    def __getitem__(self, expert: Tensor) -> Tensor:
        self._read(int(expert), self._decoded)
        if self._expert is not self._decoded:
            self._expert.copy_(self._decoded)
        return self._expert


#: Fields that transformers' config has under the same name.
_SAME_NAME = (
    "vocab_size", "hidden_size", "moe_intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
    "q_lora_rank", "o_groups", "o_lora_rank", "n_routed_experts", "num_experts_per_tok", "sliding_window",
    "index_n_heads", "index_head_dim", "index_topk", "hc_mult", "hc_sinkhorn_iters", "hc_eps", "rms_norm_eps",
    "routed_scaling_factor", "swiglu_limit", "rope_theta", "compress_rope_theta",
)  # fmt: skip


def _check_agreement(hf: DeepseekV4Config, rotary: nn.Module, config: V4Config) -> None:
    """transformers fills in defaults for what a config.json does not say; here none of them may differ from ours.

    Raises:
        Dsv4Error: naming every field that differs.
    """
    pairs = {name: (getattr(hf, name), getattr(config, name)) for name in _SAME_NAME}
    pairs["layer_types"] = (list(hf.layer_types), [kind.value for kind in config.attention])
    pairs["mlp_layer_types"] = (
        list(hf.mlp_layer_types),
        ["hash_moe" if hashed else "moe" for hashed in config.hash_routed],
    )
    rates = {AttentionKind.CSA.value: config.csa_ratio, AttentionKind.HCA.value: config.hca_ratio}
    pairs["compress_rates"] = (dict(hf.compress_rates), rates)
    pairs["scaled rotary table"] = (_yarn(hf.rope_parameters["compress"]), config.yarn)
    pairs["unscaled rotary table"] = (_yarn(hf.rope_parameters["main"]), None)
    for label, theta in (("main", config.rope_theta), ("compress", config.compress_rope_theta)):
        pairs[f"{label} rotary base"] = (hf.rope_parameters[label]["rope_theta"], theta)
        pairs[f"{label} rotary width"] = (2 * getattr(rotary, f"{label}_inv_freq").numel(), config.qk_rope_head_dim)
        pairs[f"{label} rotary scaling of cos and sin"] = (getattr(rotary, f"{label}_attention_scaling"), 1.0)
    problems = [
        f"{name}: transformers {theirs}, dsv4 {ours}" for name, (theirs, ours) in pairs.items() if theirs != ours
    ]
    if problems:
        raise Dsv4Error(
            f"config.json: transformers {transformers.__version__} understands it differently than dsv4, so a golden "
            f"would be of another model; state these fields explicitly:\n{listed(problems)}"
        )


def _yarn(table: Mapping[str, Any]) -> Yarn | None:
    """The scaling that transformers applies in one rotary table."""
    if table["rope_type"] == "default":
        return None
    return Yarn(
        factor=float(table["factor"]),
        beta_fast=float(table.get("beta_fast") or 32),
        beta_slow=float(table.get("beta_slow") or 1),
        original_max_position_embeddings=int(table["original_max_position_embeddings"]),
    )

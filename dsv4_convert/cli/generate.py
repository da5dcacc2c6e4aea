"""``dsv4 generate``."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from dsv4_convert.cli.common import (
    CHECKPOINT_HELP,
    Json,
    Platform,
    echo,
    one_of,
    parse_bytes,
    parse_choice,
    reported,
    write_json,
)
from dsv4_convert.cli.status import note_compilations, status
from dsv4_convert.cli.stream import Stream
from dsv4_convert.show.text import for_terminal


@reported
def generate(
    checkpoint: Annotated[str, typer.Argument(help=CHECKPOINT_HELP)],
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to continue, encoded with --tokenizer; may be repeated.")
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Token ids instead of text: 1,2,3, or several prompts as 1,2;3,4, or a file.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.json of the model's repository, or its folder.")
    ] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Put --prompt into the checkpoint's chat template, and end with its answer."),
    ] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=0, help="Tokens to add.")] = 64,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token (greedy), 1 samples from the logits.")
    ] = 0,
    top_k: Annotated[int, typer.Option(help="Sample from this number of likeliest tokens; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens with this total probability.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    stop: Annotated[list[int] | None, typer.Option(help="Token id that ends a text; may be repeated.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            **one_of("float32", "bfloat16"),
            help="Dtype of weights, activations and cache. Default: float32, or bfloat16 with --numerics release.",
        ),
    ] = None,
    numerics: Annotated[
        str,
        typer.Option(
            **one_of("plain", "release"),
            help="release: quantise activations where DeepSeek's inference code does.",
        ),
    ] = "plain",
    weights: Annotated[
        str,
        typer.Option(
            **one_of("expanded", "source"),
            help="source: keep FP8 and FP4 matrices as published and decode each at every use. For V4-Flash this takes "
            "a quarter of bfloat16's memory, costs time, and gives the same numbers. Needs a checkpoint of --dtype "
            "source.",
        ),
    ] = "expanded",
    speculative: Annotated[
        bool,
        typer.Option(
            "--speculative", help="Draft tokens with the model's mtp or DSpark stages: fewer passes. Greedy only."
        ),
    ] = False,
    stream_weights: Annotated[
        bool,
        typer.Option(
            "--stream-weights",
            help="For a model larger than memory: read routed experts from the disk as tokens choose them, and hold "
            "the other weights as they are stored. CHECKPOINT may also be a published folder.",
        ),
    ] = False,
    max_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="With --stream-weights: memory beside the interpreter, such as 12GiB; experts fill what is left. "
            "Default: three quarters of what is available.",
        ),
    ] = None,
    platform: Platform = None,
    json: Json = None,
) -> None:
    """Generate tokens after a prompt with a converted model, with all of its weights in memory.

    The prompt runs in chunks of 128 tokens, then generation runs token by token from the cache. Several prompts of any
    length run together. stdout gets the text, or token ids without a tokenizer; that of a single prompt as it comes.
    With --speculative, a pass yields the drafts that it confirms and one token more. An mtp stage drafts one token,
    DSpark a block. With --stream-weights, routed experts stay on the disk.

    Example: dsv4 generate ./flash-orbax --prompt "The capital of France is" --tokenizer ./DeepSeek-V4-Flash -n 20
    """
    from dsv4_convert.files.limits import TO_COMPUTE, require_address_space

    require_address_space(TO_COMPUTE)
    from dsv4_convert.platforms import check_platform, keep_programs, select_platform

    select_platform(platform)
    keep_programs()
    note_compilations()
    check_platform(platform)
    import jax.numpy as jnp

    from dsv4_convert.errors import UsageError
    from dsv4_convert.golden.chat import chat_prompt
    from dsv4_convert.golden.tokens import encode_prompts, parse_prompts, text_decoder, token_of, tokenizer_file
    from dsv4_convert.serve.from_disk import ModelFromDisk, open_from_disk
    from dsv4_convert.serve.generate import Generator, Sampling
    from dsv4_convert.weights.converted import Weights
    from dsv4_convert.weights.restore import restore_model

    if (prompt is None) == (tokens is None):
        raise UsageError("a prompt is needed: --prompt TEXT or --tokens IDS")
    if prompt is not None and tokenizer is None:
        raise UsageError("--prompt needs --tokenizer: tokenizer.json of the model's repository; or give --tokens")
    if chat and prompt is None:
        raise UsageError("--chat needs --prompt, the message")
    file = None if tokenizer is None else tokenizer_file(tokenizer)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    if speculative and temperature:
        raise UsageError("--speculative takes the likeliest token every time; leave --temperature at 0")
    if stream_weights and (speculative or weights == "source"):
        left = "--speculative" if speculative else "--weights"
        raise UsageError(
            f"--stream-weights reads the weights as they are stored, without the mtp stage; leave {left} out"
        )
    if max_memory is not None and not stream_weights:
        raise UsageError("--max-memory bounds --stream-weights; without it all weights are in memory")
    limit = None if max_memory is None else parse_bytes("--max-memory", max_memory)
    released = parse_choice("--numerics", numerics, ("plain", "release")) == "release"
    dtype = parse_choice("--dtype", dtype or ("bfloat16" if released else "float32"), ("float32", "bfloat16"))
    if released and dtype != "bfloat16":
        raise UsageError("--numerics release computes in bfloat16; leave --dtype out")
    encoded = parse_choice("--weights", weights, ("expanded", "source")) == "source"
    width = jnp.dtype(dtype)
    ends = list(stop or ())
    texts = prompt
    if prompt is not None:
        assert file is not None
        if chat:
            framed = [chat_prompt(file, message) for message in prompt]
            texts = [text for text, _ in framed]
            ends += [end for name in {name for _, name in framed if name} if (end := token_of(file, name)) is not None]
        given = encode_prompts(file, texts or (), special=not chat)
    else:
        assert tokens is not None
        given = parse_prompts(tokens)
    words = None if file is None else text_decoder(file)
    shown = [text if not chat else "" for text in texts] if texts else [""] * len(given)
    stream = Stream(words, shown[0], err=json == "-") if len(given) == 1 else None
    with ExitStack() as watched:
        say = watched.enter_context(status("generate"))
        say("restoring the model")
        count = [0] * len(given)

        def on_layer(done: int, total: int) -> None:
            if not any(count):
                say(f"reading the prompt, layer {done} of {total}")

        streamed: ModelFromDisk | None = None
        if stream_weights:
            room = max(map(len, given), default=0) + max_new_tokens
            streamed = open_from_disk(checkpoint, width, release=released, prompts=len(given), room=room, limit=limit)
            streamed.on_layer = on_layer
            echo(f"in memory: {streamed.plan}", err=True)
        model = streamed or restore_model(
            Weights.open(checkpoint), dtype=width, drafts=speculative, release=released, encoded=encoded
        )
        generator = Generator(model, width, speculative=speculative)

        def on_token(row: int, token: int) -> None:
            count[row] += 1
            rate = "" if streamed is None or streamed.pace is None else f", {streamed.pace}"
            say.step(max(count), max_new_tokens, f"{max(count)} of {max_new_tokens} tokens{rate}")
            if stream is not None:
                if stream.is_terminal:
                    watched.close()  # the text shows how far it is
                stream.add(token)

        say("reading the prompt")
        found = generator(given, new_tokens=max_new_tokens, sampling=sampling, stop=ends, on_token=on_token)
    if stream is not None:
        stream.end()
    texts = None if words is None else [words(new) for new in found]
    outcome: dict[str, object] = {
        "schema_version": 1,
        "checkpoint": str(checkpoint),
        "dtype": dtype,
        "numerics": numerics,
        "weights": "streamed" if stream_weights else weights,
        "prompts": given,
        "tokens": found,
    }
    drafts = generator.drafts
    if speculative:
        share = f" ({drafts.accepted / drafts.drafted:.0%})" if drafts.drafted else ""
        echo(f"drafted {drafts.drafted} tokens, of which the model accepted {drafts.accepted}{share}", err=True)
        outcome["drafts"] = dataclasses.asdict(drafts)
    if streamed is not None and streamed.pace is not None:
        echo(str(streamed.pace), err=True)
        outcome["pace"] = dataclasses.asdict(streamed.pace)
    write_json(outcome | ({} if texts is None else {"texts": texts}), json)
    for row, new in enumerate(found if stream is None else ()):
        text = shown[row] + (",".join(map(str, new)) if texts is None else texts[row])
        typer.echo(for_terminal(text), err=json == "-")

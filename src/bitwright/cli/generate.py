"""`bitwright generate`: text from a language model on weights in few bits."""

from __future__ import annotations

import sys
from time import perf_counter

import typer

from bitwright.cli.main import app


@app.command("generate")
def generate_command(
    model: str = typer.Argument(help="A known model (smollm2-135m), a GGUF file, or a Hugging Face folder."),
    prompt: str = typer.Argument(help="Text to go on from."),
    tokens: int = typer.Option(64, "--tokens", "-n", min=0, help="Most tokens that are added."),
    bits: int = typer.Option(
        None, "--bits", help="Round weights to so many bits (1 to 4, 8); default: the codes a GGUF file stores."
    ),
    group: int = typer.Option(32, "--group", help="Weights of a row that share a scale when they are rounded."),
    threads: int = typer.Option(None, "--threads", "-t", min=1, help="Threads; default as many as torch takes."),
    temperature: float = typer.Option(0.0, "--temperature", min=0.0, help="0 takes the likeliest token every time."),
    seed: int = typer.Option(0, "--seed", min=0, help="Of the random draws at temperatures above 0."),
) -> None:
    """Write the text that follows a prompt, token by token as it is decoded; the speed goes to standard error.

    Weights stay in 1 to 4 or 8 bits, activations are rounded to int8 before each product, as llama.cpp does.

    Example: `bitwright generate smollm2-135m "The largest river of Egypt is" --tokens 20`
    """
    from bitwright.core.errors import InputError
    from bitwright.models.low_bit_decoder import generate, load_low_bit

    loaded = load_low_bit(model, bits, group, threads=threads)
    ids = loaded.tokenizer.encode(prompt).ids
    if not ids:
        raise InputError("The prompt holds no token; give some text.")
    made: list[int] = []
    shown, first = 0, 0.0
    start = perf_counter()
    steps = generate(loaded.decoder, ids, tokens, temperature=temperature, seed=seed, stop=loaded.stop)
    for token in steps:
        first = first or perf_counter()
        if token in loaded.stop:
            break
        made.append(token)
        text = loaded.tokenizer.decode(made)
        if not text.endswith("�"):  # a character may take several tokens
            sys.stdout.write(text[shown:])
            sys.stdout.flush()
            shown = len(text)
    sys.stdout.write("\n")
    end = perf_counter()
    if len(made) > 1:
        print(
            f"prompt of {len(ids)} tokens in {first - start:.2f} s; {(len(made) - 1) / (end - first):.1f} tokens/s, "
            f"{loaded.decoder.weight_bytes / 1e6:.1f} MB of weights, {loaded.decoder.threads} threads",
            file=sys.stderr,
        )

"""`atlasctl generate`: one completion."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from .context import app, common
from .options import model_name, sampling
from .output import Writer, clean, emit, plain
from .reply import follow, usage_line
from .text import prompt as read_prompt

FIELDS = (
    *("text", "tokens", "finish_reason", "usage", "timings", "session", "durable", "kv_durable"),
    *("reset_reason", "seed", "request_id", "logprobs"),
)


@click.command()
@click.argument("prompt", required=False)
@click.option("-f", "--file", type=click.Path(path_type=Path), help="Read the prompt from a file.")
@click.option("-s", "--session", help="Continue this session; it is made when it does not exist.")
@click.option("-v", "--verbose", is_flag=True, help="Print tokens and times on standard error, not only on a terminal.")
@click.option("--model", callback=model_name, help="Refuse unless this model is loaded.")
@click.option("--deadline-ms", type=click.IntRange(min=1), help="Give up after this many milliseconds.")
@click.option("--retries", type=click.IntRange(min=0), default=0, help="Send again after an error that may pass.")
@sampling
@common
def generate(prompt: str | None, file: Path | None, verbose: bool, **options: Any) -> None:
    """Complete PROMPT and stream the answer to standard output.

    PROMPT is text, `-` for standard input, or @FILE (@@text sends `@text`). Without PROMPT a pipe on standard input is
    read. The text is sent exactly as it is, a newline at its end too. Ctrl-C cancels.
    """
    text = read_prompt(prompt, file)
    with app().client() as client:
        generation = client.generate(text, **options)
        if app().json:
            done = follow(generation, lambda piece: None)
            extra = {"request_id": generation.request_id, "logprobs": generation.logprobs}
            emit({name: value for name, value in {**plain(done), **extra}.items() if name in FIELDS})
            return
        out = Writer()
        try:
            done = follow(generation, out.write)
        finally:
            out.end_line()
        if verbose or sys.stderr.isatty():
            print(clean(usage_line(done)), file=sys.stderr)

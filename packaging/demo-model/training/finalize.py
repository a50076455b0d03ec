"""Step 3 of 3: makes the model directory: bfloat16 weights, tokenizer, chat template, held-out figures.

    python finalize.py OUT MODEL

OUT is the folder that prepare.py and train.py wrote to. Prints a few completions to look at.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import torch
from perplexity import figures, read_tokens
from prepare import END_OF_TEXT, PAD, SPECIALS
from train import POSITIONS
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}# {{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}# assistant:{% endif %}"
)
PROMPTS = (
    'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n',
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "<|fim_prefix|>def area(self):\n    return <|fim_suffix|>\n\ndef perimeter(self):\n<|fim_middle|>",
)


def wrap_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The trained BPE with its special tokens named and a chat template of Python comments."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(path),
        eos_token=SPECIALS[END_OF_TEXT],
        pad_token=SPECIALS[PAD],
        extra_special_tokens=list(SPECIALS[PAD + 1 : -1]),
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def write_model(trained: Path, tokenizer: PreTrainedTokenizerFast, target: Path) -> None:
    """Weights in bfloat16 and everything from_pretrained() needs. Greedy unless asked otherwise."""
    model = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.bfloat16)
    generation = GenerationConfig(eos_token_id=END_OF_TEXT, pad_token_id=PAD, do_sample=False)
    model.generation_config = generation
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


@click.command(help=__doc__)
@click.argument("out", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("target", metavar="MODEL", type=click.Path(file_okay=False, path_type=Path))
@click.option("--samples/--no-samples", default=True, help="print completions")
def main(out: Path, target: Path, samples: bool) -> None:
    tokenizer = wrap_tokenizer(out / "tokenizer.json")
    write_model(out / "trained", tokenizer, target)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    record = json.loads((out / "training.json").read_text(encoding="utf-8"))
    record |= figures(model, read_tokens(out / "held_out.u16"))
    record |= {"parameters": model.num_parameters(), "vocabulary": model.config.vocab_size}
    (target / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for prompt in PROMPTS if samples else ():
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False)  # type: ignore[misc]
        click.echo(f"-----\n{tokenizer.decode(answer[0])}")


if __name__ == "__main__":
    main()

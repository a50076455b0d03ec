"""Step 1 of 3: reads a standard library, trains the tokenizer on it, writes token files.

    python prepare.py OUT

OUT then holds tokenizer.json, train.u16 and held_out.u16 (token ids, little-endian uint16, every file followed by
`<|endoftext|>`) and held_out_files.txt.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import click
import numpy as np
from corpus import Document, documents, library_root
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 4096
SPECIALS = (
    "<|endoftext|>",
    "<|pad|>",
    "<|fim_prefix|>",
    "<|fim_suffix|>",
    "<|fim_middle|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|unused|>",
)
END_OF_TEXT, PAD, FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE = range(5)  # places in SPECIALS

# A word with the space before it, a line break with the indentation after it, one digit, punctuation, other space.
PIECES = r" ?\p{L}+|\n[ \t]*|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE of `vocabulary` tokens, SPECIALS first. Any bytes can be written with it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern=Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_tokens(path: Path, docs: Iterable[Document], tokenizer: Tokenizer) -> int:
    """Writes the documents' token ids one after the other; returns how many."""
    count = 0
    with path.open("wb") as file:
        for doc in docs:
            ids = np.array([*tokenizer.encode(doc.text).ids, END_OF_TEXT], dtype="<u2")
            file.write(ids.tobytes())
            count += ids.size
    return count


@click.command(help=__doc__)
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--root", type=click.Path(exists=True, file_okay=False, path_type=Path), help="another library")
@click.option("--vocabulary", default=VOCABULARY, show_default=True, help="tokens in the vocabulary")
def main(out: Path, root: Path | None, vocabulary: int) -> None:
    docs = list(documents(root or library_root()))
    training, held_out = [d for d in docs if not d.held_out], [d for d in docs if d.held_out]
    if not training or not held_out:
        raise click.ClickException("too few source files: some must be left to train on and some to hold out")
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer((d.text for d in docs), vocabulary)
    tokenizer.save(str(out / "tokenizer.json"))
    trained_on = write_tokens(out / "train.u16", training, tokenizer)
    kept = write_tokens(out / "held_out.u16", held_out, tokenizer)
    (out / "held_out_files.txt").write_text("".join(f"{d.name}\n" for d in held_out), encoding="utf-8")
    click.echo(f"{len(docs)} files: {trained_on} tokens to train on, {kept} held out ({len(held_out)} files)")


if __name__ == "__main__":
    main()

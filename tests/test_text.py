"""Incremental decoding, stop strings and chat templates with the bundled tokenizer."""

from __future__ import annotations

from typing import Any

import pytest
from atlas_client.errors import ErrorCode, ErrorReply
from atlas_client.protocol import ChatMessage, Generate
from families import DEMO, VOCAB

from atlasd.engine.text import Text, _OffsetStream

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SAMPLES = [
    "def f(x):\n    return x + 1\n",
    "héllo ☃ 漢字 🎉 done",
    "  leading\tand trailing  ",
    "🎉" * 5,
    "a\x00b\x1b[0m",
]


@pytest.fixture(scope="module")
def text() -> Text:
    from transformers import AutoTokenizer

    return Text(AutoTokenizer.from_pretrained(DEMO), VOCAB, 8192)


def _ids(text: Text, sample: str) -> list[int]:
    return list(text.tokenizer(sample)["input_ids"])


@pytest.mark.parametrize("sample", SAMPLES)
def test_pieces_add_up_and_never_hold_half_a_character(text: Text, sample: str) -> None:
    ids = _ids(text, sample)
    decoder = text.decoder([], [])
    pieces = [decoder.feed(token) for token in ids] + [decoder.flush()]
    assert "".join(pieces) == sample
    assert "\ufffd" not in "".join(pieces)
    assert all(piece.encode("utf-8") is not None for piece in pieces)


@pytest.mark.parametrize("sample", SAMPLES)
def test_the_stream_for_tokenizers_without_a_rust_backend_agrees(text: Text, sample: str) -> None:
    stream = _OffsetStream(text.tokenizer, [])
    assert "".join(stream(token) for token in _ids(text, sample)) == sample


def test_an_unfinished_character_at_the_end_is_dropped(text: Text) -> None:
    ids = _ids(text, "ab🎉")
    decoder = text.decoder([], [])
    assert "".join(decoder.feed(token) for token in ids[:-1]) + decoder.flush() == "ab"


@pytest.mark.parametrize("stop", ["return", "x):\n", "n x", "🎉", "\n"])
def test_a_stop_string_ends_the_text_wherever_tokens_are_cut(text: Text, stop: str) -> None:
    sample = "def f(x):\n    return x 🎉 tail"
    decoder = text.decoder([], ["never there", stop])
    shown = ""
    for token in _ids(text, sample):
        shown += decoder.feed(token)
        assert stop not in shown
        if decoder.stopped:
            break
    assert decoder.stopped
    assert shown == sample[: sample.index(stop)]


def test_text_held_back_for_a_stop_string_that_never_comes_is_given_at_the_end(text: Text) -> None:
    decoder = text.decoder([], ["return y"])
    sample = "  return"
    assert "".join(decoder.feed(token) for token in _ids(text, sample)) != sample
    assert decoder.flush() in sample


def _turn(text: Text, content: str, **options: Any) -> str:
    request = Generate(messages=[ChatMessage("user", content)])
    ids, _ = text.prompt(request, **{"fresh": False, "last_finish": "eos", "answer": True, **options})
    return str(text.tokenizer.decode(ids))


def test_later_turns_render_only_what_follows_the_answer(text: Text) -> None:
    own = text.tokenizer.chat_template
    text.tokenizer.chat_template = CHATML
    try:
        opening = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        assert _turn(text, "hi", fresh=True) == opening
        assert _turn(text, "hi") == "<|im_end|>\n" + opening
        assert _turn(text, "hi", last_finish="append") == opening
        assert _turn(text, "hi", answer=False, fresh=True) == "<|im_start|>user\nhi<|im_end|>\n"
    finally:
        text.tokenizer.chat_template = own


def test_a_template_that_refuses_is_an_invalid_parameter(text: Text) -> None:
    own = text.tokenizer.chat_template
    try:
        for template in ("{{ raise_exception('roles must alternate') }}", None):
            text.tokenizer.chat_template = template
            with pytest.raises(ErrorReply) as caught:
                _turn(text, "hi", fresh=True)
            assert caught.value.code is ErrorCode.INVALID_PARAMETER
    finally:
        text.tokenizer.chat_template = own


def test_tokens_outside_the_vocabulary_are_refused(text: Text) -> None:
    with pytest.raises(ErrorReply) as caught:
        text.prompt(Generate(tokens=[1, VOCAB]), fresh=True, last_finish="", answer=True)
    assert caught.value.code is ErrorCode.INVALID_PARAMETER

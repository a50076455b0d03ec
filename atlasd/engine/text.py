"""Text and tokens: encoding, chat templates, incremental decoding, stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from atlas_client.errors import ErrorCode, ErrorReply
from atlas_client.protocol import Generate
from tokenizers.decoders import DecodeStream

CONTEXT_IDS = 6  # ids before the first generated one that its decoding may depend on (leading spaces, byte runs)
PIECE = 1 << 16  # characters; longer texts are measured in pieces before they are encoded as a whole
_MARK = "ATLASINFER_EARLIER_ANSWER"


class Text:
    """One model's tokenizer and chat template. `limit`: the most tokens that are of use."""

    def __init__(self, tokenizer: Any, vocab: int, limit: int) -> None:
        self.tokenizer = tokenizer
        self.vocab = vocab
        self.limit = limit

    def prompt(self, request: Generate, *, fresh: bool, last_finish: str, answer: bool) -> tuple[list[int], str]:
        """(token ids to add to the context, the same as text).

        `fresh`: nothing precedes; `last_finish`: how the session's last turn ended; `answer`: the model speaks next.
        Raises ErrorReply INVALID_PARAMETER.
        """
        if request.tokens is not None:
            self.check(request.tokens)
            return list(request.tokens), self._decode(request.tokens)
        if request.prompt is not None:
            return self._encode(request.prompt, special=fresh), request.prompt
        messages = [{"role": m.role, "content": m.content} for m in request.messages or []]
        text = self._chat(messages, fresh, last_finish, answer)
        shown = "\n".join(f"{m.role}: {m.content}" for m in request.messages or [])
        return self._encode(text, special=False), shown

    def check(self, tokens: Sequence[int]) -> None:
        """Raises INVALID_PARAMETER for an id that the model has no embedding for: it would fail a whole batch."""
        if (largest := max(tokens, default=0)) >= self.vocab:
            raise ErrorReply(ErrorCode.INVALID_PARAMETER, f"token {largest} is outside the vocabulary of {self.vocab}")

    def _encode(self, text: str, *, special: bool) -> list[int]:
        self._measure(text)
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def _measure(self, text: str) -> None:
        """Raises CONTEXT_OVERFLOW for a text far beyond the limit. While megabytes are encoded
        every session waits. Cuts between pieces cost a few tokens each, so twice the limit in pieces is too much."""
        found = 0
        for start in range(0, len(text) if len(text) > PIECE else 0, PIECE):
            found += len(self.tokenizer(text[start : start + PIECE], add_special_tokens=False)["input_ids"])
            if found > 2 * self.limit:
                raise ErrorReply(
                    ErrorCode.CONTEXT_OVERFLOW,
                    f"a prompt of {len(text)} characters does not fit into {self.limit} tokens",
                )

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _chat(self, messages: list[dict[str, str]], fresh: bool, last_finish: str, answer: bool) -> str:
        """The template's text for `messages` alone. In a session only what follows the earlier turns is rendered: their
        exact tokens are kept, so the template is asked what it writes after a placeholder that stands for them."""
        if fresh:
            return self._render(messages, answer)
        if last_finish == "append":  # the last message was closed when it was appended
            earlier = [{"role": "user", "content": _MARK}]
            return _after(self._render(earlier + messages, answer), self._render(earlier, False))
        earlier = [{"role": "user", "content": "."}, {"role": "assistant", "content": _MARK}]
        whole = self._render(earlier + messages, answer)
        _, mark, after = whole.partition(_MARK)
        if not mark:
            raise ErrorReply(
                ErrorCode.INVALID_PARAMETER, "this chat template leaves earlier answers out: send `prompt`"
            )
        return after

    def _render(self, messages: list[dict[str, str]], answer: bool) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            raise ErrorReply(
                ErrorCode.INVALID_PARAMETER,
                "this model has no chat template",
                "send `prompt` instead of `messages` (atlasctl chat --raw)",
            )
        try:
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=answer, tokenize=False)
        except (
            Exception
        ) as error:  # templates are Jinja programs of their own: whatever they raise is about the messages
            message = f"the chat template refused the messages: {error}"
            raise ErrorReply(ErrorCode.INVALID_PARAMETER, message) from None
        return str(text)

    def decoder(self, before: Sequence[int], stop: Sequence[str]) -> Decoder:
        """A decoder for the ids that follow `before`."""
        return Decoder(self.tokenizer, before[-CONTEXT_IDS:], stop)


def _after(whole: str, start: str) -> str:
    if not whole.startswith(start):
        raise ErrorReply(ErrorCode.INVALID_PARAMETER, "this chat template can't continue an appended message")
    return whole[len(start) :]


class Decoder:
    """Ids in, text out: whole characters only, nothing that could still become a stop string.

    Text is held back while it ends in an incomplete UTF-8 sequence or in the beginning of a stop string.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int], stop: Sequence[str]) -> None:
        self._stream = _stream(tokenizer, before)
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def feed(self, token: int) -> str:
        """The text that became certain with `token`. Sets `stopped` at a complete stop string, which is left out."""
        self._held += self._stream(token)
        found = [i for i in (self._held.find(s) for s in self._stop) if i >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        keep = max((_overlap(self._held, s) for s in self._stop), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def flush(self) -> str:
        """What was held back in case it became a stop string; an incomplete character is dropped."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that ends `text`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def _stream(tokenizer: Any, before: Sequence[int]) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return _OffsetStream(tokenizer, before)
    stream = DecodeStream(ids=list(before), skip_special_tokens=True)
    return lambda token: stream.step(backend, token) or ""


class _OffsetStream:
    """For tokenizers without a Rust backend: the difference of a short window decoded with and without the new id."""

    def __init__(self, tokenizer: Any, before: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(before)
        self._shown = len(self._decode())

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True))

    def __call__(self, token: int) -> str:
        self._ids.append(token)
        text = self._decode()
        if text.endswith("\ufffd"):
            return ""
        new = text[self._shown :]
        self._ids = self._ids[-CONTEXT_IDS:]
        self._shown = len(self._decode())
        return new

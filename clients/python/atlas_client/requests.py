"""What a caller writes, made into protocol messages; shared by Client and AsyncClient."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, TypeVar

from .errors import ErrorCode, ErrorReply
from .protocol import ChatMessage, Generate, Sampling, SessionAppend
from .stream import Stream

T = TypeVar("T")
Message = ChatMessage | Mapping[str, str]


class SamplingArgs(TypedDict, total=False):
    """Keyword arguments of `generate` beside max_tokens; protocol.Sampling says what each one means."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float
    frequency_penalty: float
    seed: int | None
    stop: list[str]
    logit_bias: dict[int, float]
    logprobs: int | None
    ignore_eos: bool


class RequestArgs(SamplingArgs, total=False):
    """Keyword arguments of `generate` that concern the request: protocol.Generate says what each one means."""

    stream: bool
    detach: bool | None
    model: str | None
    deadline_ms: int | None
    credit: int


_SAMPLING = SamplingArgs.__annotations__


def generate(
    prompt: str | None,
    tokens: Sequence[int] | None,
    messages: Sequence[Message] | None,
    session: str | None,
    max_tokens: int | None,
    given: Mapping[str, Any],
) -> Generate:
    """A GENERATE with a seed, so that it can be repeated. Raises ErrorReply (INVALID_PARAMETER), TypeError."""
    sampling = {name: value for name, value in given.items() if name in _SAMPLING}
    request = {name: value for name, value in given.items() if name not in _SAMPLING}
    if sampling.get("seed") is None:
        sampling["seed"] = secrets.randbits(63)
    return Generate(
        **content(prompt, tokens, messages),
        session=session,
        sampling=Sampling(max_tokens=max_tokens, **sampling),
        **request,
    )


def append(
    session: str, prompt: str | None, tokens: Sequence[int] | None, messages: Sequence[Message] | None
) -> SessionAppend:
    """A SESSION.APPEND. Raises ErrorReply (INVALID_PARAMETER)."""
    return SessionAppend(session=session, **content(prompt, tokens, messages))


def content(prompt: str | None, tokens: Sequence[int] | None, messages: Sequence[Message] | None) -> dict[str, Any]:
    """The one of the three that is given. Raises ErrorReply (INVALID_PARAMETER) when it is not exactly one."""
    given = {"prompt": prompt, "tokens": tokens, "messages": messages}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise ErrorReply(
            ErrorCode.INVALID_PARAMETER,
            f"one of prompt, tokens and messages is needed, {' and '.join(named) or 'none'} given",
        )
    if tokens is not None:
        return {"tokens": list(tokens)}
    if messages is not None:
        return {"messages": [_message(message) for message in messages]}
    return {"prompt": prompt}


def _message(message: Message) -> ChatMessage:
    if isinstance(message, ChatMessage):
        return message
    try:
        return ChatMessage(message["role"], message["content"])
    except (KeyError, TypeError):
        raise ErrorReply(ErrorCode.INVALID_PARAMETER, "a message needs `role` and `content`") from None


def answer(stream: Stream, expected: type[T]) -> T:
    """The terminal reply of a stream that has finished. Raises its error."""
    if stream.error is not None:
        raise stream.error
    if not isinstance(stream.reply, expected):
        raise ErrorReply(ErrorCode.BAD_FRAME, f"{type(stream.reply).__name__} came where {expected.__name__} was due")
    return stream.reply

"""The engine through a real daemon: limits, cancels, crowding, death, and what a resume must equal."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from atlas_client import Client, ErrorReply
from atlas_client.errors import ErrorCode
from atlas_client.protocol import Done, Progress, Tokens
from conftest import Daemon
from families import DEMO

CODE = (DEMO / "training" / "prepare.py").read_text(encoding="utf-8")


@pytest.fixture
def client(shared_daemon: Daemon) -> Iterator[Client]:
    with Client(shared_daemon.socket) as client:
        yield client


def _refused(code: ErrorCode, call: Any) -> ErrorReply:
    with pytest.raises(ErrorReply) as caught:
        call()
    assert caught.value.code is code
    assert caught.value.next_step
    return caught.value


def _until_idle(client: Client) -> None:
    """Waits for the beat that says nothing runs; then every page is free or sealed, or some sequence leaked one."""
    deadline = time.monotonic() + 10
    while client.status().tiers[0].open and time.monotonic() < deadline:
        time.sleep(0.1)
    for tier in client.status().tiers:
        assert tier.free + tier.open + tier.sealed == tier.total
        assert tier.open == 0


def test_layers_are_quantized_and_the_count_is_reported(client: Client) -> None:
    model = client.status().model
    assert model is not None
    assert model.layers_quantized == 6 * 7  # q, k, v, o, gate, up, down in six layers
    linear = 6 * (2 * 384 * 384 + 2 * 384 * 128 + 3 * 384 * 1024)
    kept = 4 * (4096 * 384 + 13 * 384)  # embeddings and norms, float32
    assert 8.0 < 8 * (model.weight_bytes - kept) / linear < 8.5  # bits per weight


def test_a_stream_adds_up_to_the_result(client: Client) -> None:
    generation = client.generate("def main():\n", max_tokens=40, temperature=0)
    events = list(generation)
    tokens = [event for event in events if isinstance(event, Tokens)]
    done = generation.result
    assert isinstance(events[-1], Done)
    assert "".join(event.text for event in tokens) == done.text != ""
    assert [token for event in tokens for token in event.ids] == done.tokens
    assert [event.index for event in tokens if event.ids] == list(range(len(done.tokens)))
    assert done.usage.generated == len(done.tokens)
    assert done.usage.prompt == done.usage.reused + done.usage.restored + done.usage.prefilled
    assert not done.durable


def test_the_same_seed_draws_the_same_and_another_seed_does_not(client: Client) -> None:
    def draw(seed: int) -> list[int]:
        return client.generate("import ", max_tokens=30, temperature=1.0, seed=seed, ignore_eos=True).result.tokens

    assert draw(1) == draw(1) != draw(2)


def test_stop_strings_end_the_text_before_them(client: Client) -> None:
    whole = client.generate("class A:\n    def __init__(self", max_tokens=60, temperature=0).text
    stop = whole[10:14]
    done = client.generate("class A:\n    def __init__(self", max_tokens=60, temperature=0, stop=[stop]).result
    assert done.finish_reason == "stop"
    assert done.text == whole[: whole.index(stop)]


def test_a_prompt_that_does_not_fit_is_refused_not_cut(client: Client) -> None:
    limit = client.status().model.max_context  # type: ignore[union-attr]
    error = _refused(ErrorCode.CONTEXT_OVERFLOW, lambda: client.generate(tokens=[9] * limit).result)
    assert str(limit) in error.message
    done = client.generate(tokens=[9] * 100, max_tokens=0).result
    assert done.usage.prefilled + done.usage.reused == 100


def test_generation_ends_at_the_end_of_the_context(client: Client) -> None:
    limit = client.status().model.max_context  # type: ignore[union-attr]
    done = client.generate(tokens=[9] * (limit - 5), max_tokens=50, ignore_eos=True, temperature=0).result
    assert (done.finish_reason, len(done.tokens)) == ("length", 5)


@pytest.mark.parametrize(
    "request_",
    [
        {"prompt": "a", "tokens": [1]},
        {},
        {"prompt": ""},
        {"tokens": [4096]},
        {"tokens": [-1]},
        {"prompt": "a", "temperature": -1.0},
        {"prompt": "a", "top_p": 0.0},
        {"prompt": "a", "stop": [""]},
        {"prompt": "a", "logit_bias": {5000: 1.0}},
        {"prompt": "a", "session": "tab\there"},
        {"prompt": "a", "session": "a\u202eb"},
    ],
)
def test_invalid_parameters(client: Client, request_: dict[str, Any]) -> None:
    prompt = request_.pop("prompt", None)
    _refused(ErrorCode.INVALID_PARAMETER, lambda: client.generate(prompt, **request_).result)


def test_long_prefill_reports_progress_and_can_be_cancelled_within_a_chunk(client: Client) -> None:
    tokens = [(7 * n) % 4000 + 7 for n in range(2900)]
    generation = client.generate(tokens=tokens, max_tokens=5)
    chunks: list[Progress] = []

    def cancel_at_the_second_chunk() -> None:
        for event in generation:
            if isinstance(event, Progress) and event.phase == "prefill":
                chunks.append(event)
                if len(chunks) == 2:
                    generation.cancel()

    _refused(ErrorCode.CANCELLED, cancel_at_the_second_chunk)
    assert chunks[0].done == 256
    assert chunks[0].total == len(tokens)
    assert len(chunks) <= 4  # the one running when the cancel arrived, and one already sent


def test_sessions_of_different_lengths_together_equal_each_alone(client: Client) -> None:
    prompts = [CODE[: 40 * n * n] for n in range(1, 9)]
    alone = [client.generate(p, max_tokens=24, temperature=0).result.tokens for p in prompts]
    together: dict[int, list[int]] = {}

    def run(index: int) -> None:
        together[index] = client.generate(prompts[index], max_tokens=24, temperature=0).result.tokens

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [together[i] for i in range(len(prompts))] == alone


def test_a_chat_session_keeps_exact_tokens(client: Client) -> None:
    with client.session("chat-exact") as session:
        first = session.generate(messages=[{"role": "user", "content": "hello"}], max_tokens=8, temperature=0).result
        before = session.token_ids()
        second = session.generate(messages=[{"role": "user", "content": "more"}], max_tokens=8, temperature=0).result
        after = session.token_ids()
        assert after[: len(before)] == before
        assert before[-len(first.tokens) :] == first.tokens
        assert second.usage.reused >= len(before) - 1
        assert second.reset_reason == ""
        session.delete()


def test_fork_and_truncate_reuse_what_they_share(client: Client) -> None:
    with client.session("fork-a") as session:
        session.append(CODE[:3000])
        base = session.token_ids()
        fork = session.fork("fork-b")
        left = session.generate("\n# left", max_tokens=10, temperature=0).result
        right = fork.generate("\n# right", max_tokens=10, temperature=0).result
        for done in (left, right):
            assert done.usage.reused >= len(base) - 1
        assert fork.token_ids()[: len(base)] == base == session.token_ids()[: len(base)]
        session.truncate(turns=1)
        assert session.token_ids() == base
        again = session.generate("\n# left", max_tokens=10, temperature=0).result
        assert again.tokens == left.tokens
        session.delete()
        fork.delete()


def test_an_appended_session_answers_like_one_prompt(client: Client) -> None:
    with client.session("append") as session:
        appended = session.append(CODE[:2000])
        assert appended.durable
        done = session.generate(tokens=[206], max_tokens=12, temperature=0).result
        whole = session.token_ids()[: -len(done.tokens)]
        assert client.generate(tokens=whole, max_tokens=12, temperature=0).result.tokens == done.tokens
        session.delete()


def test_many_requests_in_little_memory_give_way_and_all_finish(daemon: Daemon) -> None:
    """A pool of 12 pages (768 tokens) for 4 requests that grow to 300 tokens each."""
    daemon.flags[daemon.flags.index("--kv-ram-gb") + 1] = "0.0045"
    daemon.flags += ["--kv-disk-path", "none"]
    daemon.start()
    with Client(daemon.socket) as client:
        prompts = [[(n * 31 + i * 7) % 4000 + 7 for i in range(200)] for n in range(4)]
        alone = [
            client.generate(tokens=p, max_tokens=100, temperature=0, ignore_eos=True).result.tokens for p in prompts
        ]
        results: dict[int, list[int]] = {}

        def run(index: int) -> None:
            generation = client.generate(tokens=prompts[index], max_tokens=100, temperature=0, ignore_eos=True)
            results[index] = generation.result.tokens

        threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(200)
        assert [results[i] for i in range(4)] == alone
        _until_idle(client)
        _refused(ErrorCode.OUT_OF_RAM, lambda: client.generate(tokens=[9] * 800).result)


def test_a_killed_engine_is_replaced_and_the_session_goes_on(daemon: Daemon) -> None:
    daemon.start()
    with Client(daemon.socket) as client:
        done = client.generate(CODE[:4000], session="kept", max_tokens=20, temperature=0).result
        assert done.durable
        assert done.kv_durable
        tokens = client.session("kept").token_ids()
        generation = client.generate(" ", session="kept", max_tokens=2000, temperature=0, ignore_eos=True)

        def kill_at_the_first_token() -> None:
            engine = client.status().engine_pid
            for event in generation:
                if isinstance(event, Tokens) and event.index == 0:
                    os.kill(engine, signal.SIGKILL)

        assert _refused(ErrorCode.ENGINE_DIED, kill_at_the_first_token).retryable
        assert client.session("kept").token_ids() == tokens  # the lost turn left nothing behind
        again = client.generate("\n\n", session="kept", max_tokens=20, temperature=0).result
        assert again.usage.restored >= len(tokens) - 1
        assert client.status().engine_restarts == 1


def test_resumed_sessions_equal_undisturbed_ones(daemon: Daemon) -> None:
    """The daemon is killed between two turns; then the same on an empty state without a kill. The first turns end after
    33 tokens, after one and after none: their last page and last token are in different states."""
    first_turns = (33, 1, 0)

    def turn(n: int, prompt: str, max_tokens: int) -> Done:
        with Client(daemon.socket) as client:
            return client.generate(
                prompt, session=f"s{n}", max_tokens=max_tokens, temperature=0, ignore_eos=True
            ).result

    def two_turns(strike: bool) -> list[tuple[Done, Done]]:
        daemon.start()
        first = [turn(n, CODE[n : n + 4000], count) for n, count in enumerate(first_turns)]
        if strike:
            daemon.kill()
            daemon.start()
        second = [turn(n, "\nimport", 33) for n in range(len(first_turns))]
        daemon.kill()
        shutil.rmtree(daemon.state)
        return list(zip(first, second, strict=True))

    for resumed, undisturbed in zip(two_turns(True), two_turns(False), strict=True):
        assert [d.tokens for d in resumed] == [d.tokens for d in undisturbed]
        assert resumed[1].usage.restored == undisturbed[1].usage.reused > 700
        assert resumed[1].reset_reason == ""


def test_lost_pages_cost_time_and_never_a_token(daemon: Daemon) -> None:
    daemon.start()
    with Client(daemon.socket) as client:
        assert client.generate(CODE[:5000], session="cold", max_tokens=10, temperature=0).result.kv_durable
        warm = client.session("cold").fork("warm").generate("\nx", max_tokens=30, temperature=0).result
    daemon.kill()
    for file in (daemon.state / "kv").rglob("*"):
        if file.is_file():
            file.unlink()
    daemon.start()
    with Client(daemon.socket) as client:
        cold = client.generate("\nx", session="cold", max_tokens=30, temperature=0).result
    assert cold.tokens == warm.tokens
    assert cold.usage.restored == 0
    assert "evicted" in cold.reset_reason


def test_other_weights_under_the_same_path_are_noticed(daemon: Daemon, root: Any) -> None:
    from families import make

    model = make("llama", root / "model", seed=1)
    daemon.flags[daemon.flags.index("--model") + 1] = str(model)
    daemon.start()
    with Client(daemon.socket) as client:
        assert client.generate(tokens=list(range(7, 300)), session="s", max_tokens=5, temperature=0).result.durable
    daemon.stop()
    make("llama", root / "model", seed=2)
    daemon.start()
    with Client(daemon.socket) as client:
        done = client.generate(tokens=[9], session="s", max_tokens=12, temperature=0, ignore_eos=True).result
        whole = client.session("s").token_ids()[:-12]
        fresh = client.generate(tokens=whole, max_tokens=12, temperature=0, ignore_eos=True).result
    assert done.usage.restored == done.usage.reused == 0
    assert "another model" in done.reset_reason
    assert done.tokens == fresh.tokens


def test_time_to_first_token_counts_from_the_broker(client: Client) -> None:
    began = time.monotonic()
    done = client.generate(CODE[:3000], max_tokens=2).result
    assert 0 < done.timings.ttft_ms <= 1e3 * (time.monotonic() - began)
    assert done.timings.prefill_ms <= done.timings.ttft_ms


def test_pages_come_back_from_the_ram_tier(daemon: Daemon) -> None:
    """A device pool of 24 pages, a RAM tier, no disk: three sessions push each other out and go on unchanged."""
    daemon.flags[daemon.flags.index("--kv-ram-gb") + 1] = "0.1"
    daemon.flags += ["--kv-vram-gb", "0.009", "--kv-disk-path", "none"]
    daemon.start()
    with Client(daemon.socket) as client:
        prompts = [[(n * 31 + i * 7) % 4000 + 7 for i in range(900)] for n in range(3)]
        for n, prompt in enumerate(prompts):
            client.session(f"s{n}").append(tokens=prompt)
        done = client.generate(tokens=[9], session="s0", max_tokens=20, temperature=0, ignore_eos=True).result
        assert done.usage.restored > 800
        assert not done.kv_durable
        names = [tier.name for tier in client.status().tiers]
        assert names == ["device", "host"]
    daemon.kill()
    daemon.start(extra=("--kv-vram-gb", "1"))
    with Client(daemon.socket) as client:
        fresh = client.generate(tokens=[*prompts[0], 9], max_tokens=20, temperature=0, ignore_eos=True).result
        assert fresh.usage.restored == 0
        assert fresh.tokens == done.tokens
        again = client.generate(tokens=[9], session="s1", max_tokens=5, temperature=0, ignore_eos=True).result
        assert "memory only" in again.reset_reason

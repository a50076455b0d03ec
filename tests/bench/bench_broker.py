"""What the broker costs: start, memory, and the time it adds to each streamed token, with a scripted engine.

Each token's text is the monotonic clock as the engine took it right before sending, so the delay measured contains two
socket hops, the broker between them, and the client's decoding. The limit it is set against is one hop of the same
message between two processes, measured in the same run; the broker itself adds what lies between.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import zmq
from atlas_client import framing, protocol
from atlas_client.protocol import Generate, Header, Sampling, Status, Tokens
from broker_support import Client, Daemon
from report import row

COMMAND = "make bench ONLY=broker"
TOKENS = 400  # in a round
ROUNDS = 5
STARTS = 9


def start_ms(directory: Path) -> tuple[float, int]:
    """Milliseconds from the start of the process to READY=1, and resident bytes right after."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        address = directory / "notify"
        address.unlink(missing_ok=True)
        listener.bind(str(address))
        os.environ["NOTIFY_SOCKET"] = str(address)
        daemon = Daemon(directory)
        begun = time.perf_counter()
        daemon.start()
        try:
            assert b"READY=1" in listener.recv(4096)
            elapsed = (time.perf_counter() - begun) * 1000
            return elapsed, daemon.ready().ask(Status()).rss_bytes
        finally:
            del os.environ["NOTIFY_SOCKET"]
            daemon.kill()


def delays_ms(client: Client, streams: int, gap: float) -> list[float]:
    """For each token of that many streams at once: milliseconds from the engine's sending to the client's hands."""
    orders = f'{{"stamp": 1, "delay": {gap}, "start": 0.2}}'
    request = Generate(prompt=orders, sampling=Sampling(max_tokens=TOKENS // streams))
    open_ = {client.send(request) for _ in range(streams)}
    delays = []
    while open_:
        assert client.work.poll(10_000)
        header, body, _ = framing.decode_reply(client.work.recv_multipart())
        now = time.monotonic_ns()
        if isinstance(body, Tokens):
            delays.append((now - int(body.text)) / 1e6)
        elif not isinstance(body, protocol.STREAMING):
            open_.discard(header.rid)
    return delays


def _echo(path: str, streams: int, gap: float) -> None:
    sender = zmq.Context().socket(zmq.PAIR)
    sender.connect(f"ipc://{path}")
    for index in range(TOKENS):
        if index % streams == 0:
            time.sleep(gap)
        tokens = Tokens(index, [index], str(time.monotonic_ns()))
        sender.send_multipart(framing.encode(Header("r", index), tokens))
    sender.close(1000)


def hop_ms(directory: Path, streams: int, gap: float) -> list[float]:
    """The same messages in the same bursts over one socket, without a broker."""
    receiver = zmq.Context.instance().socket(zmq.PAIR)
    receiver.bind(f"ipc://{directory}/hop")
    process = multiprocessing.get_context("spawn").Process(target=_echo, args=(f"{directory}/hop", streams, gap))
    process.start()
    delays = []
    for _ in range(TOKENS):
        assert receiver.poll(10_000)
        body = framing.decode_reply(receiver.recv_multipart())[1]
        delays.append((time.monotonic_ns() - int(body.text)) / 1e6)
    process.join()
    receiver.close(0)
    return delays


def p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[98]


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="atlas-") as name:
        directory = Path(name)
        starts = [start_ms(directory) for _ in range(STARTS)]
        row("broker", "start to ready", statistics.median(ms for ms, _ in starts), "ms", against="process start",
            bar=300, higher_is_better=False, command=COMMAND)  # fmt: skip
        row("broker", "resident when ready", max(rss for _, rss in starts) / 1e6, "MB",
            bar=60, higher_is_better=False, command=COMMAND)  # fmt: skip
        daemon = Daemon(directory).start()
        client = daemon.ready()
        try:
            for streams, gap in ((1, 0.003), (8, 0.016)):
                measure(client, directory, streams, gap)
        finally:
            daemon.kill()


def measure(client: Client, directory: Path, streams: int, gap: float) -> None:
    """Added delay per token: what came through the broker less one hop without it; the median round of several."""
    rounds = [(hop_ms(directory, streams, gap), delays_ms(client, streams, gap)) for _ in range(ROUNDS)]
    for what, of, bar in (("median", statistics.median, 0.5), ("p99", p99, 2.0)):
        direct = statistics.median(of(hop) for hop, _ in rounds)
        total = statistics.median(of(through) for _, through in rounds)
        added = statistics.median(of(through) - of(hop) for hop, through in rounds)
        against = f"one hop: {direct:.3f} ms, engine to client: {total:.3f} ms"
        row("broker", f"added per token, {what}, {streams} streams", added, "ms", against=against,
            bar=bar, higher_is_better=False, command=COMMAND)  # fmt: skip


if __name__ == "__main__":
    main()

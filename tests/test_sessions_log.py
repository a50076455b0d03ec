"""The durable session log: records, group commit, growth, full disk, damage, versions."""

from __future__ import annotations

import contextlib
import random
import select
import shutil
import subprocess
import sys
import tempfile
import textwrap
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lmdb
import pytest
from atlas_client.errors import ErrorCode, ErrorReply
from atlas_client.protocol import Sampling, Timings, Usage

from atlasd.broker import archive
from atlasd.broker.log import Log, LogError
from atlasd.broker.sessions import SessionRecord, Sessions, TurnRecord, check_name


@pytest.fixture
def root() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="atlas-") as directory:
        yield Path(directory)


@pytest.fixture
def log(root: Path) -> Iterator[Log]:
    log = Log(root / "sessions")
    yield log
    log.close()


def do(log: Log, work: Callable[[Sessions], Any], limit: float = 20.0) -> Any:
    """Runs work and waits for it, as the broker's loop would."""
    results: list[tuple[Any, ErrorReply | None]] = []
    log.submit(work, lambda result, error: results.append((result, error)))

    while not results:
        assert select.select([log.fd], [], [], limit)[0], "no answer from the log"
        log.deliver()
    result, error = results[0]
    if error is not None:
        raise error
    return result


def turn(rid: str, start: int, prompt: list[int], made: list[int], **rest: Any) -> TurnRecord:
    return TurnRecord(
        rid=rid, digest=b"d", start=start,
        prompt_ids=array("I", prompt).tobytes(), generated_ids=array("I", made).tobytes(), finish_reason="length",
        created=1.0, prompt_text=f"p{rid}", text=f"t{rid}", sampling=Sampling(seed=3),
        usage=Usage(1, 2, 3, 4, 5), timings=Timings(1.0, 2.0), seed=3, **rest,
    )  # fmt: skip


def add(log: Log, name: str, rid: str, prompt: list[int], made: list[int], owner: str = "1") -> None:
    record = do(log, lambda book: book.open(owner, name))
    do(log, lambda book: book.append(record, turn(rid, record.tokens, prompt, made)))


def ids(log: Log, name: str, owner: str = "1") -> list[int]:
    return array("I", do(log, lambda book: book.tokens(book.get(owner, name)))).tolist()


def test_what_is_stored_is_found_after_reopening(root: Path) -> None:
    log = Log(root / "s")
    add(log, "a", "r1", [1, 2], [3])
    add(log, "a", "r2", [4], [5, 6])
    log.close()
    log = Log(root / "s")
    assert log.sessions == 1
    assert ids(log, "a") == [1, 2, 3, 4, 5, 6]
    record, found = do(log, lambda book: book.answered("1", "r2"))
    assert record.name == "a"
    assert found == turn("r2", 3, [4], [5, 6])
    done = found.done("a")
    assert (done.tokens, done.text, done.usage.generated, done.seed, done.durable) == ([5, 6], "tr2", 5, 3, True)
    log.close()


def test_owners_do_not_meet(log: Log) -> None:
    add(log, "a", "r", [1], [2], owner="1")
    add(log, "a", "r", [7], [8], owner="11")
    assert ids(log, "a", "1") == [1, 2]
    assert ids(log, "a", "11") == [7, 8]
    assert [s.owner for s in do(log, lambda book: book.owned("1"))] == ["1"]
    assert do(log, lambda book: book.answered("2", "r")) is None
    do(log, lambda book: book.delete("1", "a"))
    assert do(log, lambda book: book.answered("11", "r"))
    with pytest.raises(ErrorReply, match="NO_SUCH_SESSION"):
        ids(log, "a", "1")


def test_a_turn_on_a_session_that_changed_is_refused(log: Log) -> None:
    record = do(log, lambda book: book.open("1", "a"))
    do(log, lambda book: book.append(record, turn("r1", 0, [1], [2])))
    with pytest.raises(ErrorReply, match="SESSION_BUSY"):
        do(log, lambda book: book.append(record, turn("r2", 0, [1], [2])))
    assert ids(log, "a") == [1, 2]


def test_truncate_at_every_place(log: Log) -> None:
    for cut in range(10):
        name = f"s{cut}"
        for number, (prompt, made) in enumerate([([1, 2], [3]), ([4], [5, 6]), ([7, 8], [9])]):
            add(log, name, f"{name}-{number}", prompt, made)
        record = do(log, lambda book, name=name, cut=cut: book.truncate("1", name, None, cut))
        assert ids(log, name) == list(range(1, 10))[:cut]
        turns = do(log, lambda book, record=record: book.turns(record))
        assert record.tokens == sum(t.tokens for t in turns) == cut
        assert len(turns) == -(-cut // 3)
        part = cut % 3 != 0
        assert (turns[-1].finish_reason == "truncated") == part if turns else not part
        for number in range(3):
            whole = (number + 1) * 3 <= cut
            assert (do(log, lambda b, r=f"{name}-{number}": b.answered("1", r)) is not None) == whole


def test_forks_are_independent(log: Log) -> None:
    add(log, "a", "r1", [1, 2], [3])
    add(log, "a", "r2", [4], [5])
    fork = do(log, lambda book: book.fork("1", "a", "b", None, 4))
    assert (fork.tokens, fork.turns, fork.forked_at, fork.last_finish) == (4, 2, 4, "truncated")
    do(log, lambda book: book.truncate("1", "b", 0, None))
    assert ids(log, "b") == []
    assert ids(log, "a") == [1, 2, 3, 4, 5]
    assert do(log, lambda book: book.answered("1", "r1"))  # the fork's turns never answered it
    do(log, lambda book: book.delete("1", "a"))
    assert do(log, lambda book: book.answered("1", "r1")) is None


def test_random_operations_against_a_plain_model(log: Log) -> None:
    draw = random.Random(3)
    model: dict[str, list[list[int]]] = {}  # name -> turns
    for step in range(400):
        name, other = (f"n{draw.randrange(6)}" for _ in range(2))
        kind = draw.choice(["append", "append", "append", "fork", "truncate", "rename", "delete"])
        with contextlib.suppress(ErrorReply):  # the names don't exist, exist already, or the cut is too long
            if kind == "append":
                made = [draw.randrange(2**32) for _ in range(draw.randrange(5))]
                add(log, name, f"r{step}", [step], made)
                model.setdefault(name, []).append([step, *made])
            elif kind == "fork":
                count = draw.randrange(4)
                do(log, lambda b, a=name, c=other, n=count: b.fork("1", a, c, n, None))
                assert other not in model
                model[other] = [list(t) for t in model[name][:count]]
            elif kind == "truncate":
                keep = draw.randrange(12)
                do(log, lambda b, a=name, n=keep: b.truncate("1", a, None, n))
                model[name] = cut(model[name], keep)
            elif kind == "rename":
                do(log, lambda b, a=name, c=other: b.rename("1", a, c))
                model[other] = model.pop(name)
            else:
                do(log, lambda b, a=name: b.delete("1", a))
                del model[name]
    found = {record.name: record for record in do(log, lambda book: book.owned("1"))}
    assert set(found) == set(model)
    for name, turns in model.items():
        assert ids(log, name) == [token for t in turns for token in t]
        assert found[name].turns == len(turns)


def cut(turns: list[list[int]], keep: int) -> list[list[int]]:
    kept = []
    for t in turns:
        if keep:
            kept.append(t[:keep])
            keep -= len(kept[-1])
    return kept


def test_a_failing_job_undoes_itself_alone(log: Log) -> None:
    outcomes: dict[str, Any] = {}

    def bad(book: Sessions) -> None:
        book.open("1", "bad")
        raise ErrorReply(ErrorCode.INTERNAL, "on purpose")

    def worse(book: Sessions) -> None:
        book.open("1", "worse")
        raise KeyError("on purpose")

    for name, work in (
        ("a", lambda b: b.open("1", "a")), ("bad", bad), ("worse", worse), ("b", lambda b: b.open("1", "b")),
    ):  # fmt: skip
        log.submit(work, lambda result, error, name=name: outcomes.update({name: error}))
    assert [r.name for r in do(log, lambda book: book.owned("1"))] in (["a", "b"], ["b", "a"])
    assert outcomes["a"] is outcomes["b"] is None
    assert outcomes["bad"].code is outcomes["worse"].code is ErrorCode.INTERNAL


def test_the_map_grows(root: Path) -> None:
    log = Log(root / "s", map_bytes=2**20)
    for number in range(20):
        add(log, "a", f"r{number}", list(range(30_000)), [number])
    assert len(ids(log, "a")) == 20 * 30_001
    log.close()
    log = Log(root / "s", map_bytes=2**20)
    assert len(ids(log, "a")) == 20 * 30_001
    add(log, "a", "more", list(range(100_000)), [1])
    log.close()


def test_damaged_records_are_refused(root: Path) -> None:
    log = Log(root / "s")
    add(log, "a", "r1", [1, 2], [3])
    log.close()
    env = lmdb.open(str(root / "s"), max_dbs=5, lib_version=0)
    db = env.open_db(b"turns")
    with env.begin(write=True) as txn:
        key, value = next(iter(txn.cursor(db)))
        damaged = bytearray(value)
        damaged[len(value) // 2] ^= 1
        txn.put(key, bytes(damaged), db=db)
    env.close()
    log = Log(root / "s")
    with pytest.raises(ErrorReply, match="damaged"):
        ids(log, "a")
    log.close()


def test_unknown_versions_are_refused(root: Path) -> None:
    Log(root / "s").close()
    env = lmdb.open(str(root / "s"), max_dbs=5, lib_version=0)
    with env.begin(write=True) as txn:
        txn.put(b"version", b"2", db=env.open_db(b"meta", txn=txn))
    env.close()
    with pytest.raises(LogError, match="layout version"):
        Log(root / "s")
    newer = lmdb.open(str(root / "t"), lib_version=1)
    newer.begin(write=True).commit()
    newer.close()
    with pytest.raises(LogError, match="can't be opened"):
        Log(root / "t")


def test_full_disk(root: Path) -> None:
    """In a mount namespace of its own, on a file system of 1 MiB."""
    unshare = shutil.which("unshare")
    script = root / "full.py"
    script.write_text(
        textwrap.dedent("""
        import sys
        sys.path.insert(0, sys.argv[2])
        from pathlib import Path
        from test_sessions_log import Log, add, do, ids, ErrorReply
        log = Log(Path(sys.argv[1]) / "s")
        add(log, "a", "r0", [1], [2])
        for number in range(1, 100):
            before = ids(log, "a")
            try:
                add(log, "a", f"r{number}", list(range(20_000)), [number])
            except ErrorReply as error:
                print(error.code, number)
                break
        assert ids(log, "a") == before
        assert any("is full" in warning for warning in log.warnings), log.warnings
        assert do(log, lambda book: book.answered("1", f"r{number}")) is None
        do(log, lambda book: book.truncate("1", "a", 1, None))
        assert ids(log, "a") == [1, 2]
        add(log, "a", "after", [3], [4])
        log.close()
        log = Log(Path(sys.argv[1]) / "s")
        assert ids(log, "a") == [1, 2, 3, 4]
        log.close()
        print("served on")
        """)
    )
    (root / "disk").mkdir()
    mount = f"mount -t tmpfs -o size=1m none {root}/disk"
    probe = [unshare or "unshare", "-m", "sh", "-c", mount]
    if unshare is None or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    run = f"{mount} && exec {sys.executable} {script} {root}/disk {Path(__file__).parent}"
    ended = subprocess.run([unshare, "-m", "sh", "-c", run], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert "DISK_FULL" in ended.stdout
    assert "served on" in ended.stdout


@pytest.mark.parametrize("fault", ["fdatasync:error=EIO:when=9+7", "pwrite64:error=EIO:when=25+9"])
def test_write_errors(root: Path, fault: str) -> None:
    """Data pages, meta pages and syncs that fail every now and then: what was reported stored is, and nothing else."""
    script = root / "faults.py"
    script.write_text(
        textwrap.dedent("""
        import sys
        sys.path.insert(0, sys.argv[2])
        from pathlib import Path
        from test_sessions_log import Log, add, ids, ErrorReply
        log = Log(Path(sys.argv[1]) / "s")
        kept = []
        for number in range(40):
            try:
                add(log, "a", f"r{number}", [number], [number])
                kept += [number, number]
            except ErrorReply as error:
                print(error.code)
            assert ids(log, "a") == kept
        log.close()
        log = Log(Path(sys.argv[1]) / "s")
        assert ids(log, "a") == kept
        log.close()
        print("kept", len(kept))
        """)
    )
    inject = [
        "strace",
        "-f",
        "-qq",
        "-o",
        str(root / "trace"),
        "-e",
        "trace=fdatasync,pwrite64",
        "-e",
        f"inject={fault}",
    ]
    if not shutil.which("strace") or subprocess.run([*inject, "true"], capture_output=True).returncode:
        pytest.skip("strace cannot inject faults here")
    run = [*inject, sys.executable, str(script), str(root), str(Path(__file__).parent)]
    ended = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert "INJECTED" in (root / "trace").read_text()
    assert "kept" in ended.stdout


def test_archives() -> None:
    record = SessionRecord(id="0" * 16, owner="1", name="a", created=1.0, updated=1.0, tokens=3, turns=1)
    data = archive.pack(record, [turn("r", 0, [1, 2], [3])])
    assert archive.unpack(data).turns == [turn("r", 0, [1, 2], [3])]
    for size in range(len(data)):
        with pytest.raises(ErrorReply, match="INVALID_PARAMETER"):
            archive.unpack(data[:size])
    for at in range(len(data)):
        with pytest.raises(ErrorReply, match="INVALID_PARAMETER"):
            archive.unpack(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
    with pytest.raises(ErrorReply, match="do not follow"):
        archive.unpack(archive.pack(record, [turn("r", 1, [1, 2], [3])]))
    with pytest.raises(ErrorReply, match="differ"):
        archive.unpack(archive.pack(record, []))


@pytest.mark.parametrize("name", ["a", "a b", "naïve 会話", "../../etc", "'\"", "🙂", "x" * 200])
def test_good_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", " a", "a ", "a\nb", "\x7f", "\u2028", "\u0085", "\ud800", "é" * 101])
def test_bad_names(name: str) -> None:
    with pytest.raises(ErrorReply, match="INVALID_PARAMETER"):
        check_name(name)

"""The session log: the LMDB environment and the one thread that reads and writes it.

Work is given as functions of `Sessions`; the thread takes all that waits, runs each in a child transaction of its own,
commits them together (group commit, fdatasync) and reports back through an eventfd. So the broker's loop never waits
for the disk, work on one session happens in the order it was given, and a result is seen only when it is durable.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
from atlas_client.errors import ErrorCode, ErrorReply

from .sessions import DATABASES, VERSION, Sessions

logger = logging.getLogger("atlasd.log")
FIRST_MAP_BYTES = 64 * 2**20
MAX_BATCH = 128
MAX_WARNINGS = 4
FULL_BYTES = 16 * 2**20  # an I/O error with less room than this is taken for a full disk

Work = Callable[[Sessions], Any]
Report = Callable[[Any, ErrorReply | None], None]


class LogError(Exception):
    """The log can't be opened. The message says why and what to do."""


class _Job:
    __slots__ = ("error", "report", "result", "work")

    def __init__(self, work: Work, report: Report) -> None:
        self.work = work
        self.report = report
        self.result: Any = None
        self.error: ErrorReply | None = None


class Log:
    """Opened before the sockets are bound. Raises LogError. `fd` is readable when deliver() has something to do."""

    def __init__(self, directory: Path, map_bytes: int = FIRST_MAP_BYTES) -> None:
        self.directory = directory
        self.map_bytes = map_bytes
        self._closed = False  # opening it anew has failed
        self.sessions = 0  # how many there are; set by the thread after each commit
        self.warnings: list[str] = []  # what went wrong since the start; the thread puts another list in its place
        self._open()
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._finished: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="session-log", daemon=True)
        self._thread.start()

    def submit(self, work: Work, report: Report) -> None:
        """Runs `work` in the log's thread; `report(result, None)` or `report(None, error)` then runs in deliver()."""
        self._jobs.put(_Job(work, report))

    def deliver(self) -> None:
        """Runs the reports of finished work. Called by the broker's loop."""
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            return
        while True:
            try:
                job = self._finished.get_nowait()
            except queue.Empty:
                return
            try:
                job.report(job.result, job.error)
            except Exception:  # the reports behind it must not wait for the next commit
                logger.exception("unexpected error in a report of the session log")

    def close(self) -> None:
        """Finishes what waits, commits it, and closes the environment. Reports are delivered."""
        self._jobs.put(None)
        self._thread.join()
        self.deliver()
        self.env.close()
        os.close(self.fd)

    # --- the environment ---------------------------------------------------------------------------------

    def _open(self) -> None:
        fresh = not self.directory.exists()
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            self.env = lmdb.open(
                str(self.directory), map_size=self.map_bytes, mode=0o600, max_dbs=len(DATABASES), lib_version=0
            )
            self._prepare()
        except lmdb.Error as error:
            raise LogError(f"{self.directory}: the session log can't be opened: {error}") from None
        if fresh:
            _sync_directory(self.directory.parent)

    def _prepare(self) -> None:
        self.databases = {name: self.env.open_db(name.encode()) for name in DATABASES}
        with self.env.begin(write=True) as txn:
            version = txn.get(b"version", db=self.databases["meta"])
            if version not in (None, VERSION):
                raise LogError(
                    f"{self.directory}: the session log has layout version {version!r}, this daemon knows {VERSION!r}; "
                    "use the atlasd that wrote it"
                )
            if version is None:
                txn.put(b"version", VERSION, db=self.databases["meta"])
            self.sessions = txn.stat(self.databases["sessions"])["entries"]

    # --- the thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            batch = [job]
            stop = self._gather(batch)
            try:
                self._settle(batch)
            except Exception as error:  # whatever it is, each job gets an answer and the thread goes on
                logger.exception("unexpected error in the session log")
                for job in batch:
                    job.result, job.error = None, ErrorReply(ErrorCode.INTERNAL, f"the session log failed: {error}")
            for job in batch:
                self._finished.put(job)
            os.eventfd_write(self.fd, 1)
            if stop:
                return

    def _gather(self, batch: list[_Job]) -> bool:
        """Adds what waits. True: the end was asked for."""
        while len(batch) < MAX_BATCH:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return False
            if job is None:
                return True
            batch.append(job)
        return False

    def _settle(self, batch: list[_Job]) -> None:
        """Runs the batch in one transaction; if that can't be committed, each job in one of its own, so that
        reads are answered and only the writes that have no room fail."""
        failure = self._commit(batch)
        if failure is None:
            return
        logger.error("commit failed: %s", failure.message)
        self._warn(failure.message)
        if failure.code is ErrorCode.DISK_FULL:
            self._turn_over()
        for job in batch:
            alone = self._commit([job])
            if alone is not None:
                job.result, job.error = None, alone

    def _turn_over(self) -> None:
        """Two commits of one small record. LMDB uses pages again that were freed two commits ago, so room made just
        before (a session cut or deleted) counts only after these."""
        with contextlib.suppress(lmdb.Error, OSError):
            for count in (b"1", b"2"):
                with self.env.begin(write=True) as txn:
                    txn.put(b"turnover", count, db=self.databases["meta"])

    def _commit(self, batch: list[_Job]) -> ErrorReply | None:
        while True:
            if self._closed:
                self._reopen()
            try:
                with self.env.begin(write=True) as txn:
                    for job in batch:
                        self._attempt(txn, job)
                    count = txn.stat(self.databases["sessions"])["entries"]
                self.sessions = count
                return None
            except lmdb.MapFullError:
                self._grow()
            except lmdb.PanicError:
                self._reopen()
            except (lmdb.Error, OSError) as error:
                return _failure(error, self.directory)

    def _attempt(self, parent: Any, job: _Job) -> None:
        """One job in a child transaction: a typed error undoes that job alone."""
        job.result, job.error = None, None
        try:
            with self.env.begin(write=True, parent=parent) as txn:
                job.result = job.work(Sessions(txn, self.databases, time.time()))
        except ErrorReply as error:
            job.error = error
        except (lmdb.Error, OSError):
            raise
        except Exception:
            logger.exception("unexpected error in the session log")
            job.error = ErrorReply(ErrorCode.INTERNAL, "unexpected error in the session log")

    def _warn(self, text: str) -> None:
        """Keeps a warning once, the latest few."""
        self.warnings = [*[each for each in self.warnings if each != text][-MAX_WARNINGS + 1 :], text]

    def _grow(self) -> None:
        self.map_bytes = self.env.info()["map_size"] * 2
        self.env.set_mapsize(self.map_bytes)
        logger.info("session log grown to %d MiB", self.map_bytes >> 20)

    def _reopen(self) -> None:
        """After a failed write of a meta page LMDB refuses every further transaction until it is opened anew."""
        logger.warning("opening the session log anew")
        self._warn("a write of the session log failed; it was opened anew")
        self._closed = True
        self.env.close()
        self._open()
        self._closed = False


def _failure(error: Exception, directory: Path) -> ErrorReply:
    """LMDB reports a short write, which is how a disk gets full, as an I/O error: so look at the room that is left."""
    text = str(error)
    full = any(os.strerror(code) in text for code in (errno.ENOSPC, errno.EDQUOT))
    if full or (os.strerror(errno.EIO) in text and shutil.disk_usage(directory).free < FULL_BYTES):
        return ErrorReply(ErrorCode.DISK_FULL, "the disk of the session log is full; nothing was stored")
    return ErrorReply(ErrorCode.INTERNAL, f"the session log can't be written: {text}")


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

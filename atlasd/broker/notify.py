"""Telling systemd how the daemon fares: READY, STATUS, STOPPING, WATCHDOG. Nothing happens without a notify socket."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

NOTIFY_ENV = "NOTIFY_SOCKET"
WATCHDOG_ENV = "WATCHDOG_USEC"


class Notifier:
    """Sends sd_notify datagrams. A socket that is gone or full never disturbs the daemon."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._address = environment.get(NOTIFY_ENV, "")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) if self._address else None
        if self._socket:
            self._socket.setblocking(False)
        self._fed = 0.0
        self._status = ""
        self.interval = _interval(environment)

    def send(self, **fields: str) -> None:
        """One datagram of NAME=value lines."""
        if not self._socket:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        text = "\n".join(f"{name}={value}" for name, value in fields.items())
        try:
            self._socket.sendto(text.encode(), address)
        except OSError:
            return

    def status(self, text: str) -> None:
        """STATUS, when it has changed."""
        if text != self._status:
            self._status = text
            self.send(STATUS=text)

    def feed(self, now: float) -> None:
        """WATCHDOG=1 when half the watchdog's time has passed. The main loop calls it, so a hung loop is noticed."""
        if self.interval and now - self._fed >= self.interval:
            self._fed = now
            self.send(WATCHDOG="1")


def _interval(environment: Mapping[str, str]) -> float:
    """Seconds between two feedings; 0 without a watchdog, or with one meant for another process."""
    if environment.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return 0.0
    value = environment.get(WATCHDOG_ENV, "")
    return int(value) / 2e6 if value.isdigit() else 0.0

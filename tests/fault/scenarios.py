"""The table of scenarios: name, function(world, runs, draw) -> Row, faults in a plain `make fault`."""

from __future__ import annotations

import random
from collections.abc import Callable

from kills import kills
from points import points
from readers import readers
from stops import stops
from world import Row, World

SCENARIOS: dict[str, tuple[Callable[[World, int, random.Random], Row], int]] = {
    "kills": (kills, 30),
    "points": (points, 16),
    "clients": (readers, 6),
    "stops": (stops, 2),
}

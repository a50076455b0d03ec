"""The table of scenarios. The first ones hurt the disk tier alone, the others a daemon."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

from cuts import cuts
from deaths import calls, deaths
from flips import flips
from full import full
from harmed import harmed
from ioerrors import ioerrors
from kills import kills
from maps import maps
from neighbours import neighbours
from outages import outages
from planted import planted
from points import points
from readers import readers
from segments import segments
from stops import stops
from swaps import swaps
from world import Row, World


@dataclasses.dataclass(frozen=True)
class Scenario:
    """`runs`: faults in a plain `make fault`. `daemons`: whether the world's daemons must run."""

    act: Callable[[World, int, random.Random], Row]
    runs: int
    daemons: bool = True

    def run(self, world: World, runs: int, draw: random.Random) -> Row:
        """Does it, at least once."""
        if self.daemons:
            world.start()
        return self.act(world, max(1, runs), draw)


SCENARIOS = {
    "flips": Scenario(flips, 540, daemons=False),
    "segments": Scenario(segments, 100, daemons=False),
    "planted": Scenario(planted, 100, daemons=False),
    "deaths": Scenario(deaths, 324, daemons=False),
    "calls": Scenario(calls, 60, daemons=False),
    "cuts": Scenario(cuts, 120, daemons=False),
    "maps": Scenario(maps, 8, daemons=False),
    "full": Scenario(full, 48, daemons=False),
    "ioerrors": Scenario(ioerrors, 30, daemons=False),
    "kills": Scenario(kills, 30),
    "points": Scenario(points, 16),
    "clients": Scenario(readers, 6),
    "stops": Scenario(stops, 2),
    "harmed": Scenario(harmed, 19),
    "neighbours": Scenario(neighbours, 6),
    "outages": Scenario(outages, 4),
    "swaps": Scenario(swaps, 6, daemons=False),
}

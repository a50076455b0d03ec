"""Model requests: list, load, unload. A switch waits for the running turns; new ones wait for the new model."""

from __future__ import annotations

import logging

import msgspec
from atlas_client.errors import ErrorCode, ErrorReply
from atlas_client.protocol import Error, ModelInfo, ModelLoad, ModelReply, ModelsReply, Ok, Progress

from ..engine import hub as files
from ..engine.messages import State
from . import hub
from .calls import Call
from .outbox import Outbox
from .streams import Stream
from .supervisor import Supervisor
from .turns import PHASES, Turns

log = logging.getLogger("atlasd.models")
STATES = {"starting": "loading", "quantizing": "loading", "stopped": "unloaded"}


class Models:
    """Handlers of model requests."""

    def __init__(self, outbox: Outbox, turns: Turns, engine: Supervisor, configured: str) -> None:
        self.outbox = outbox
        self.turns = turns
        self.engine = engine
        self.configured = configured
        self._loading: list[Stream] = []  # wait for the engine to become ready
        self._unloading: list[Stream] = []  # wait for it to be gone
        self._switch: ModelLoad | None = None  # waits for running turns
        self._leave = False  # an unload waits for running turns

    def list(self, call: Call) -> None:
        """MODEL.LIST: the loaded model, the bundled one, the configured one, and those in the hub's cache."""
        current = self.current()
        others = [info for info in hub.available(self.configured) if current is None or info.name != current.name]
        self.outbox.end(call.stream, ModelsReply([*([current] if current else []), *others]))

    def current(self) -> ModelInfo | None:
        """The model the engine has or is getting; None after an unload."""
        state = self.engine.state
        if state.state == "stopped":
            return None
        info = state.model or ModelInfo(self.engine.model, "")
        return msgspec.structs.replace(info, state=STATES.get(state.state, state.state), error=self.engine.error)

    def load(self, call: Call) -> None:
        """MODEL.LOAD. Raises QUEUE_FULL while another switch waits, NO_SUCH_MODEL for a directory that plainly holds
        none: the running model goes on then. What only the engine can find out ends it."""
        asked: ModelLoad = call.request
        if self._switch is not None or self._leave:
            raise ErrorReply(ErrorCode.QUEUE_FULL, "another model is about to be loaded or unloaded")
        same = (asked.model, asked.revision or self.engine.revision) == (self.engine.model, self.engine.revision)
        state = self.engine.state
        if same and self.engine.ready and state.model is not None:
            self.outbox.end(call.stream, ModelReply(state.model))
            return
        if directory := files.local(asked.model):
            files.check(directory)
        self._loading.append(call.stream)
        if same and state.state not in ("failed", "stopped", "ready"):
            self.on_state(state)
            return
        self._switch = asked
        self.turns.paused = True
        self.outbox.progress(call.stream, Progress("queue", 0, self.turns.in_engine, "requests"))
        self.tick()

    def unload(self, call: Call) -> None:
        """MODEL.UNLOAD. Running turns finish first; those that wait for an engine get MODEL_NOT_LOADED."""
        self._unloading.append(call.stream)
        self._leave = True
        self._switch = None
        self.turns.paused = True
        self._end_loading(Error.of(ErrorReply(ErrorCode.MODEL_NOT_LOADED, "the model is being unloaded")))
        self.tick()

    def tick(self) -> None:
        """Carries out a switch once no turn runs."""
        if self.turns.in_engine:
            return
        if self._switch is not None:
            asked, self._switch = self._switch, None
            log.info("loading model=%s", asked.model)
            self.turns.paused = False
            self.engine.load(asked.model, asked.revision)
        elif self._leave:
            self._leave = False
            self.turns.paused = False
            self.engine.stop()

    def on_state(self, state: State) -> None:
        """Tells those who wait for a load or unload how it goes."""
        if self._switch is not None or self._leave:
            return
        if state.state == "ready":
            self._end_loading(ModelReply(state.model or ModelInfo(self.engine.model, "ready")))
        elif state.state == "failed":
            died = ErrorReply(ErrorCode.ENGINE_DIED, self.engine.error, retryable=False)
            self._end_loading(state.error or Error.of(died))
        elif state.state == "stopped":
            unloading, self._unloading = self._unloading, []
            for stream in unloading:
                self.outbox.end(stream, Ok("the model was unloaded"))
        elif phase := PHASES.get(state.state):
            for stream in self._loading:
                self.outbox.progress(stream, Progress(phase, state.done, state.total, state.unit or "bytes"))

    def _end_loading(self, reply: Error | ModelReply) -> None:
        loading, self._loading = self._loading, []
        for stream in loading:
            self.outbox.end(stream, reply)

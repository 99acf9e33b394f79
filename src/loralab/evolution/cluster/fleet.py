"""Who does which job next: work is pulled, and what a lost actor had in hand is done by another.

The fleet knows a search as its opening message and one entry a generation. An actor that starts, or
starts anew, is sent both and works out its own state before it gets a job.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Protocol

from loralab.errors import UserError
from loralab.evolution.cluster.alike import Alike
from loralab.evolution.cluster.messages import Files, Message, pack, unpack
from loralab.evolution.events import Notice, OnEvent

Job = Callable[[], tuple[Message, Files]]
"""Makes a message, and what goes beside it, when an actor is there for it."""
Heard = Callable[[int, dict[str, Any]], None]
"""Called with a job's place and its answer, as answers come."""

_OWN = ("open", "begin", "advance")
"""Messages of the fleet itself; all others are jobs."""
_LOOKS = ("look", "reach")
"""Jobs that a search goes on without: what goes wrong in one is its caller's alone."""
_TRIES = 3
"""Actors that a job may break by an error: three that meet the same one were not unlucky."""
_STEP = 1.0
"""Seconds of waiting after which a signal to this process is seen at the latest."""


class Lost(Exception):
    """An actor is gone, and with it what it was doing."""


class Raised(Exception):
    """An actor answers that it raised. Its engine may not bear another job."""


class Crew(Protocol):
    """Where actors come from. Handles and tickets are its own."""

    def hire(self) -> Any:
        """A new actor, which may take a while to be there."""
        ...

    def call(self, actor: Any, message: bytes, files: Files) -> Any:
        """Send a message; a ticket for the answer. One at a time to an actor."""
        ...

    def wait(self, tickets: Sequence[Any], seconds: float) -> list[Any]:
        """Those of the tickets that have an answer, or whose actor is lost."""
        ...

    def answer(self, ticket: Any) -> bytes:
        """The answer of a ticket that `wait` gave. Raises Lost."""
        ...

    def dismiss(self, actor: Any) -> None:
        """End an actor, if it is still there."""
        ...


@dataclass
class Traffic:
    """Bytes of messages. setup: of actors that open and begin, and of questions beside the search;
    the others are of generations."""

    setup_sent: int = 0
    setup_received: int = 0
    sent: int = 0
    received: int = 0


@dataclass
class _Slot:
    """A place for an actor. told: entries it has been sent, None before it has begun."""

    number: int
    actor: Any = None
    kind: str = ""
    about: str = ""
    ticket: Any = None
    job: int | None = None
    node: str = ""
    versions: Mapping[str, Any] = field(default_factory=dict)
    opened: bool = False
    told: int | None = None
    losses: int = 0


@dataclass
class _Round:
    """Jobs that are asked for together, by their places. errors: how often a job raised."""

    waiting: deque[int] = field(default_factory=deque)
    answers: dict[int, dict[str, Any]] = field(default_factory=dict)
    errors: Counter[int] = field(default_factory=Counter)
    heard: Heard | None = None


@dataclass
class Fleet:
    """Actors that do jobs.

    size: actors at most. restarts: of one of them. patience: seconds to wait while there is none.
    """

    crew: Crew
    size: int
    restarts: int
    patience: float
    on_event: OnEvent
    traffic: Traffic = field(default_factory=Traffic)
    again: int = 0
    """Jobs done once more because their actor was lost."""
    alike: Alike | None = None
    """What actors are compared with; to be there before `open`."""

    def __post_init__(self) -> None:
        self._slots = [_Slot(number) for number in range(self.size)]
        self._facts: dict[str, Any] | None = None
        self._beginning: Message | None = None
        self._files: Files = {}
        self._entries: list[Message] = []
        self._why = "none of them started"
        self._since = monotonic()

    @property
    def present(self) -> int:
        """Actors that have opened."""
        return sum(slot.opened for slot in self._slots)

    def hire(self) -> None:
        """Have everyone start, and not wait for it."""
        self._since = monotonic()
        for slot in self._slots:
            self._hire(slot)

    def open(self) -> Mapping[str, Any]:
        """What the first actor that is there says of its engine and its data.

        Raises:
            UserError: no actor can start.
        """
        while self._facts is None:
            self._settle(_Round())
        return self._facts

    def begin(self, message: Message, files: Files, entries: Sequence[Message]) -> None:
        """The search that every actor works on from now on."""
        self._beginning, self._files, self._entries = message, files, list(entries)
        self._prepare()

    def advance(self, entry: Message) -> None:
        """A generation's fitness, which actors work out their next state from meanwhile."""
        self._entries.append(entry)
        self._prepare()

    def run(self, jobs: Sequence[Job], heard: Heard | None = None) -> list[dict[str, Any]]:
        """The jobs' answers, in their order, whoever did them.

        Raises:
            UserError: an actor met something that the user can mend, a job raises whoever does
                it, a look raised, or no actor is left.
        """
        asked = _Round(deque(range(len(jobs))), heard=heard)
        try:
            while len(asked.answers) < len(jobs):
                self._prepare()
                for slot in self._slots:
                    if asked.waiting and self._ready(slot):
                        place = asked.waiting.popleft()
                        slot.job = place
                        self._send(slot, *jobs[place]())
                self._settle(asked)
        except BaseException:
            self._forget()
            raise
        return [asked.answers[place] for place in range(len(jobs))]

    def close(self) -> None:
        """Dismiss everyone."""
        actors = [slot.actor for slot in self._slots if slot.actor is not None]
        self._slots = []
        for actor in actors:
            self.crew.dismiss(actor)

    def _ready(self, slot: _Slot) -> bool:
        idle = slot.opened and slot.ticket is None
        return idle and (self._beginning is None or slot.told == len(self._entries))

    def _prepare(self) -> None:
        """Send whoever is idle what it has not been told of the search."""
        if self._beginning is None:
            return
        for slot in self._slots:
            if not slot.opened or slot.ticket is not None or slot.told == len(self._entries):
                continue
            if slot.told is None:
                message = {**self._beginning, "kind": "begin", "entries": self._entries}
                self._send(slot, message, self._files)
            else:
                self._send(slot, {"kind": "advance", "entries": self._entries[slot.told :]})
            slot.told = len(self._entries)

    def _hire(self, slot: _Slot) -> None:
        slot.actor, slot.opened, slot.told = self.crew.hire(), False, None
        self._send(slot, {"kind": "open"})

    def _send(self, slot: _Slot, message: Message, files: Files | None = None) -> None:
        data, files = pack(message), files or {}
        slot.kind, slot.about = message["kind"], _about(message)
        size = len(data) + sum(len(name) + len(content) for name, content in files.items())
        if slot.kind in ("unit", "test", "advance"):
            self.traffic.sent += size
        else:
            self.traffic.setup_sent += size
        slot.ticket = self.crew.call(slot.actor, data, files)

    def _settle(self, asked: _Round) -> None:
        """Wait for an answer or a loss, and see to it."""
        busy = {slot.number: slot.ticket for slot in self._slots if slot.ticket is not None}
        if not busy:
            raise UserError(
                f"cluster: no actor is left ({self._why}); mend that or raise cluster.restarts, "
                "then continue with --resume"
            )
        done = self.crew.wait(list(busy.values()), _STEP)
        for slot in [slot for slot in self._slots if slot.ticket in done]:
            job, slot.job = slot.job, None
            ticket, slot.ticket = slot.ticket, None
            try:
                data = self.crew.answer(ticket)
                if job is None and slot.kind not in _OWN:
                    continue
                answer = self._heard(slot, data)
            except (Lost, Raised) as loss:
                if job is not None:
                    if isinstance(loss, Raised):
                        self._bear(slot, job, asked, str(loss))
                    asked.waiting.appendleft(job)
                    self.again += 1
                self._replace(slot, str(loss))
                continue
            if slot.kind == "open":
                self._take(slot, answer)
            elif job is not None:
                asked.answers[job] = answer
                if asked.heard is not None:
                    asked.heard(job, answer)
        if self.present:
            self._since = monotonic()
        elif monotonic() - self._since > self.patience:
            raise UserError(
                f"cluster: no actor for {self.patience:g} s ({self._why}): is there room for "
                "cluster.cpus_per_actor and gpus_per_actor? mend that, then continue with --resume"
            )

    def _heard(self, slot: _Slot, data: bytes) -> dict[str, Any]:
        if slot.kind in ("unit", "test", "advance"):
            self.traffic.received += len(data)
        else:
            self.traffic.setup_received += len(data)
        answer = unpack(data)
        if "error" in answer:
            if answer["mendable"]:
                raise UserError(f"{_name(slot)}: {answer['error']}")
            raise Raised(answer["error"])
        return {"by": _name(slot), "versions": slot.versions, **answer}

    def _bear(self, slot: _Slot, job: int, asked: _Round, why: str) -> None:
        """A job raised. Raises UserError if nobody is to be asked for it again."""
        asked.errors[job] += 1
        if slot.kind in _LOOKS:
            raise UserError(f"{_name(slot)}: {why}")
        if asked.errors[job] == _TRIES:
            raise UserError(
                f"cluster: {slot.about} raised on {_TRIES} actors, the last of them "
                f"{_name(slot)}: {why}; mend that, then continue with --resume"
            )

    def _take(self, slot: _Slot, facts: dict[str, Any]) -> None:
        """An actor has opened: it must be what the others are."""
        slot.node, slot.versions, slot.opened = facts["node"], facts["versions"], True
        assert self.alike is not None
        self.alike.check(_name(slot), facts)
        self._facts = self._facts or facts

    def _replace(self, slot: _Slot, why: str) -> None:
        """Hire anew for an actor that was lost, unless it was lost too often."""
        # It may be the answer alone that was lost: two would want the place of one.
        self.crew.dismiss(slot.actor)
        slot.losses += 1
        slot.opened, slot.told, self._why = False, None, why
        if slot.losses > self.restarts:
            slot.actor = None
            said = f"it was lost {slot.losses} times and is not started again"
        else:
            said = f"its work is done again, and it is started anew ({slot.losses}/{self.restarts})"
        self.on_event(Notice(f"{_name(slot)} is gone: {said}: {why}"))
        if slot.actor is not None:
            self._hire(slot)

    def _forget(self) -> None:
        """Nobody waits any longer for what actors are at; they finish it and are free again."""
        for slot in self._slots:
            slot.job = None


def _name(slot: _Slot) -> str:
    return f"actor {slot.number}" + (f" on {slot.node}" if slot.node else "")


def _about(message: Message) -> str:
    """A job as a line names it."""
    told = {key: message[key] for key in ("generation", "pairs", "places") if key in message}
    return " ".join([message["kind"], *(f"{key} {value}" for key, value in told.items())])

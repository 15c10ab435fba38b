"""Who is to be served next: the lines that sequences wait in, and virtual token counters.

After "Fairness in Serving Large Language Models" (Sheng et al., OSDI '24).
A flow is whatever shares are counted for: today the set of adapters that a sequence runs on, below the first of them.
Its counter tells what it got: PROMPT_WEIGHT for each token of a prompt that had to be computed (what the prefix cache
held costs nothing), all of them when the sequence starts, and REPLY_WEIGHT for each token of a reply, when the step
that chooses it is scheduled. The flow of the least counter is next. One that becomes active, so that somebody of it
waits and could be served, brings no credit from the time before: its counter is lifted to the least of those that are
active. So of two flows that are active all the time, none gets more than 2 max(PROMPT_WEIGHT x longest prompt,
REPLY_WEIGHT x tokens of a full batch) beyond the other, however long.
That is proven where the one whose turn it is starts before all others; what passes it while it lacks room comes on top,
and a flow whose adapter has to be loaded first is not active.

A flow is a path, from the outside in. Each level is shared fairly between those that are active on it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, pairwise

from loramux_adapters.lora.host_cache import LoadState
from loramux_server.engine.scheduling.sequence import Flow, Sequence

PROMPT_WEIGHT = 1
REPLY_WEIGHT = 2  # as in the paper: a token of a reply is made in a step of its own. The bound needs it to be no less
_FEW = 64  # accounts of idle flows that nobody minds


@dataclass(eq=False, slots=True)
class _Account:
    """What one flow, or all below one part of its path, got.

    Attributes:
        active: flows below it, or itself, that are active.
        users: sequences that have not ended; without any, it may be forgotten.
        last: of its parts, the one that was active last.
    """

    counter: float = 0
    active: int = 0
    users: int = 0
    parts: dict[str, _Account] = field(default_factory=dict)
    last: _Account | None = None
    crowded: int = _FEW  # with so many parts it looks for some to forget
    known_least: float | None = None  # until something changes below it

    @property
    def least(self) -> float:
        """What a part that becomes active is lifted to."""
        if self.known_least is None:
            of_last = 0 if self.last is None else self.last.counter
            self.known_least = min((part.counter for part in self.parts.values() if part.active), default=of_last)
        return self.known_least


@dataclass(eq=False, slots=True)
class Waiting:
    """A sequence in its line. `number`: in order of arrival."""

    sequence: Sequence
    number: int
    blocked_since: float | None = None
    passed_over: int = 0


@dataclass(eq=False, slots=True)
class Line:
    """Sequences of one flow that wait, so all of them need the same adapters.

    Attributes:
        needs: bytes in host memory of each of these versions.
        blocked: those that were found blocked in their turn, in order; before all others of the line.
        held: those that wait for another's prompt, and have no turn before it is read.
        tried: so many of them have had their turn in this step.
        loads: the versions that it pins in the host cache; none until all of them could be.
        is_active: it counts for the fair share.
    """

    flow: Flow
    needs: dict[str, int]
    blocked: list[Waiting] = field(default_factory=list)
    fresh: deque[Waiting] = field(default_factory=deque)  # by number
    held: list[Waiting] = field(default_factory=list)
    tried: int = 0
    loads: dict[str, LoadState] = field(default_factory=dict)
    is_active: bool = False
    prompt_tokens: int = 0  # of all in the line
    reply_tokens: int = 0  # that they may get at most

    def add(self, entry: Waiting, *, held: bool = False) -> None:
        """At the end, or among the held."""
        (self.held if held else self.fresh).append(entry)
        self._count(entry.sequence, 1)

    def release(self, sequence_id: str) -> None:
        """Those that were held for this one's prompt take the places that they came for."""
        released = [entry for entry in self.held if entry.sequence.shares_prompt_with == sequence_id]
        for entry in released:
            self.held.remove(entry)
        if released:
            self.fresh = deque(sorted([*self.fresh, *released], key=lambda entry: entry.number))

    def block(self) -> None:
        """The next has had its turn and could not start."""
        if self.tried == len(self.blocked):
            self.blocked.append(self.fresh.popleft())
        self.tried += 1

    def remove(self, entry: Waiting) -> None:
        """It leaves the line, wherever it is in it."""
        if self.fresh and self.fresh[0] is entry:
            self.fresh.popleft()
        elif entry in self.blocked:
            self.blocked.remove(entry)
        elif entry in self.held:
            self.held.remove(entry)
        else:
            self.fresh.remove(entry)
        self._count(entry.sequence, -1)

    def __len__(self) -> int:
        return len(self.blocked) + len(self.fresh) + len(self.held)

    def __iter__(self) -> Iterator[Waiting]:
        return chain(self.in_turn, self.held)

    @property
    def in_turn(self) -> Iterator[Waiting]:
        """All but the held."""
        return chain(self.blocked, self.fresh)

    @property
    def has_turn(self) -> bool:
        """Whether there is anyone but the held."""
        return bool(self.blocked or self.fresh)

    @property
    def next(self) -> Waiting | None:
        """Whose turn it is in this step."""
        if self.tried < len(self.blocked):
            return self.blocked[self.tried]
        return self.fresh[0] if self.fresh else None

    def _count(self, sequence: Sequence, sign: int) -> None:
        self.prompt_tokens += sign * len(sequence.prompt)
        self.reply_tokens += sign * sequence.params.max_tokens


class FairShare:
    """Counters of all flows. Owner: the engine thread."""

    def __init__(self) -> None:
        self._root = _Account()

    def enter(self, flow: Flow) -> None:
        """A sequence of this flow is here until it `leave`s."""
        account = self._root
        account.users += 1
        for name in flow:
            if name not in account.parts:
                if len(account.parts) >= account.crowded:
                    _forget_idle(account)
                account.parts[name] = _Account()
            account = account.parts[name]
            account.users += 1

    def leave(self, flow: Flow) -> None:
        """It has ended, or never started."""
        for account in self._path(flow):
            account.users -= 1
            assert account.users >= 0

    def activate(self, flow: Flow) -> None:
        """From now on somebody of it waits and could be served."""
        for around, part in pairwise(self._path(flow)):
            if not part.active:
                part.counter = max(part.counter, around.least)
            part.active += 1
            around.known_least = None

    def deactivate(self, flow: Flow) -> None:
        """Nobody does any more."""
        for around, part in pairwise(self._path(flow)):
            assert part.active > 0
            part.active -= 1
            around.last, around.known_least = part, None

    def charge(self, flow: Flow, cost: int, weight: int = 1) -> None:
        """It got something that costs so much. `weight`: of its outermost part, which gets so many times as much."""
        for level, account in enumerate(self._path(flow)):
            account.counter += cost / weight if level == 1 and weight > 1 else cost
            account.known_least = None

    def turn(self, flow: Flow) -> tuple[float, ...]:
        """Orders flows: the least comes next. Of one that is not active, what it would be if it were now."""
        return tuple(
            part.counter if part.active else max(part.counter, around.least)
            for around, part in pairwise(self._path(flow))
        )

    def __len__(self) -> int:
        """How many flows are remembered on the outermost level."""
        return len(self._root.parts)

    def _path(self, flow: Flow) -> Iterator[_Account]:
        account = self._root
        yield account
        for name in flow:
            account = account.parts[name]
            yield account


def cost_of_prompt(sequence: Sequence) -> int:
    """Of what a sequence reads that was just given its part of the cache."""
    return PROMPT_WEIGHT * (sequence.num_uncomputed + sum(map(len, sequence.params.continuations)))


def _forget_idle(account: _Account) -> None:
    """Those that would be lifted anyway when they come back."""
    least = account.least
    account.parts = {
        name: part for name, part in account.parts.items() if part.users or part.counter > least or part is account.last
    }
    account.crowded = max(_FEW, 2 * len(account.parts))

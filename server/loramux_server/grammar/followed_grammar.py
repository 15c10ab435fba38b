"""One sequence's grammar, followed token by token: masks are made on other threads while the engine computes."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Executor, Future
from concurrent.futures import wait as wait_for
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from loramux_server.errors import GrammarFailed, MaskLate
from loramux_server.grammar.limits import GrammarLimits
from loramux_server.grammar.reply_check import Normal, problem_of
from loramux_server.grammar.shared_masks import Mask, SharedMasks
from loramux_server.grammar.vocabulary import Vocabulary

if TYPE_CHECKING:
    import llguidance

_WHERE = re.compile(r"^at 1\(\d+\): (?:failed to compile JSON schema: )?|\s\d+ \| .*$")  # in a text that is ours
_STOPS = "the server follows no grammar any more: it stops"
_SHOWN = 300  # characters of a message of llguidance's
SLOW_MASK = 0.005  # seconds of a processor for one mask, from which on a grammar counts as slow
_QUICK_MASKS = 4  # in a row, after which it does not any more; twice as many each time that it has become slow again


class Lanes(NamedTuple):
    """Where masks are made. Slow grammars have threads of their own, so that nobody else's masks wait for theirs."""

    quick: Executor
    slow: Executor


class Used:
    """Attributes:
    seconds: of a processor, that a matcher's automaton has taken for all replies so far; it has grown with them.
    """

    __slots__ = ("seconds",)

    def __init__(self) -> None:
        self.seconds = 0.0


class FollowedGrammar:
    """A `Grammar` of `engine/scheduling/sequence.py`: the engine's thread calls its methods.

    The matcher, and how long its masks take, belong to the thread that makes a mask until that is done, and to the
    engine's otherwise. To take in a token costs the engine's thread a few microseconds.

    Attributes:
        is_slow, mask_seconds: as in the protocol.
    """

    def __init__(
        self,
        matcher: llguidance.LLMatcher,
        vocabulary: Vocabulary,
        schema: Normal | None,
        lanes: Lanes,
        limits: GrammarLimits,
        used: Used | None = None,
        shared: SharedMasks | None = None,
    ) -> None:
        """Starts the first mask.

        Args:
            matcher: at the start of its grammar, and nobody else's.
            schema: that a complete reply is valid under; None where the grammar alone says what it is.
            limits: on the time that masks take.
            used: of the matcher, kept up to date here.
            shared: masks of the pattern that is all of the grammar, with no schema; None where nobody shares them.
        """
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._schema = schema
        self._lanes = lanes
        self._limits = limits
        self._spent = 0.0  # seconds of a processor, for this reply
        self._used = used or Used()
        self._shared = shared
        self._place = None if shared is None else shared.start  # None: it cannot be told, masks are the matcher's
        self._unmoved = b""  # the newest token's text, where `_place` is still that before it
        self._allowance = limits.spent_seconds
        self._reply = bytearray()
        self._may_end = False
        self._ended = False
        self._failed: str | None = None
        self.is_slow = False
        self._quick_masks = 0  # in a row
        self._quick_needed = _QUICK_MASKS // 2
        self.mask_seconds = 0.0
        self._asked = 0.0
        self._begun: float | None = None  # when a thread began with the next mask
        self._next = self._ask()

    @property
    def ended(self) -> bool:
        """Nothing but the reply's end could follow what was chosen so far."""
        return self._ended

    @property
    def is_ready(self) -> bool:
        return self._failed is not None or self._next.done() or self._time_left() <= 0

    def on_ready(self, call: Callable[[], None]) -> None:
        self._next.add_done_callback(lambda _: call())

    def mask(self, patience: float | None = None) -> npt.NDArray[np.uint32]:
        """[ceil(vocabulary / 32)]: what may come next, see the protocol. Raises GrammarFailed or MaskLate."""
        if self._failed is not None:
            raise GrammarFailed(self._failed)
        while not self._next.done():
            left = self._time_left()
            if left <= 0:
                self._give_up()
            wait_for([self._next], left if patience is None else min(left, patience))
            if patience is not None and not self._next.done() and self._time_left() > 0:
                raise MaskLate
        try:
            return self._next.result()
        except GrammarFailed as error:
            self._failed = str(error)
            raise
        except CancelledError as error:
            self._fail(_STOPS, error)
        except Exception as error:  # of llguidance, or of threads that have been stopped: one row's, not the engine's
            self._fail(f"the grammar of this reply cannot be followed ({type(error).__name__})", error)

    def advance(self, token: int) -> None:
        """This token was chosen. Raises GrammarFailed, and nothing else: it may not come, or the reply is complete and
        wrong.
        """
        try:
            self._advance(token)
        except GrammarFailed:
            raise
        except Exception as error:  # of llguidance, or of a check: one row's failure, not the engine's
            self._fail(f"the grammar of this reply cannot be followed ({type(error).__name__})", error)

    def _advance(self, token: int) -> None:
        self.mask()
        if self._ended:
            self._fail("the reply goes on behind the end of its grammar")
        if token in self._vocabulary.stop_ids:
            if not self._may_end:
                self._fail("the reply ends where its grammar does not let it")
            self._ended = True
            return
        begun = time.thread_time()
        taken = self._matcher.consume_token(token)
        self._spend(time.thread_time() - begun)
        self._allowance += self._limits.spent_seconds_per_token
        if not taken:
            self._fail(f"the reply has left its grammar: {shortened(self._matcher.get_error())}")
        text = self._vocabulary.text(token)
        self._reply += text
        if self._shared is not None and self._place is not None:
            moved = self._shared.moved(self._place, text)
            self._place, self._unmoved = (self._place, text) if moved is None else (moved[0], b"")
        if self._matcher.is_stopped():
            wrong = self._problem() if self._matcher.is_accepting() else "its grammar ends before it is complete"
            if wrong is not None:
                self._fail(f"the reply cannot be completed: {wrong}")
            self._ended = True
            return
        self._next = self._ask()

    def _ask(self) -> Future[npt.NDArray[np.uint32]]:
        """Has the next mask made. Raises GrammarFailed."""
        self._asked, self._begun = time.monotonic(), None
        if (known := self._known()) is not None:
            self.mask_seconds = 0.0
            there: Future[npt.NDArray[np.uint32]] = Future()
            there.set_result(known)
            return there
        try:
            return (self._lanes.slow if self.is_slow else self._lanes.quick).submit(self._make_mask)
        except RuntimeError as error:
            self._fail(_STOPS, error)

    def _time_left(self) -> float:
        """Seconds until the mask that is being made is given up."""
        if self._begun is None:
            return self._asked + self._limits.mask_queue_seconds - time.monotonic()
        return self._begun + self._limits.mask_seconds - time.monotonic()

    def _give_up(self) -> NoReturn:
        if self._begun is None:
            self._fail("the grammars of other replies keep the server from saying what may come next; try again later")
        self._fail(
            f"the grammar of this reply takes longer than {self._limits.mask_seconds:g} s to say what may come "
            "next; make it simpler"
        )

    def _make_mask(self) -> npt.NDArray[np.uint32]:
        """On another thread. Raises GrammarFailed."""
        self._begun = time.monotonic()
        begun = time.thread_time()
        try:
            return self._made_mask()
        finally:
            self._judge(time.thread_time() - begun)
            self.mask_seconds = time.monotonic() - self._asked

    def _judge(self, seconds: float) -> None:
        """Of a processor, that a mask took."""
        if seconds > SLOW_MASK:
            if not self.is_slow:
                self._quick_needed *= 2
            self.is_slow, self._quick_masks = True, 0
        elif self.is_slow:
            self._quick_masks += 1
            self.is_slow = self._quick_masks < self._quick_needed

    def _known(self) -> npt.NDArray[np.uint32] | None:
        """The next mask, if another reply, or this one, has had it made."""
        if self._shared is None or self._place is None or self._unmoved:
            return None
        known = self._shared.known(self._place)
        if known is None:
            return None
        self._may_end = known.may_end
        return known.bits

    def _move(self) -> None:
        if self._shared is not None and self._place is not None and self._unmoved:
            self._place, self._unmoved = self._shared.move(self._place, self._unmoved), b""

    def _made_mask(self) -> npt.NDArray[np.uint32]:
        begun = time.thread_time()
        self._move()
        if (known := self._known()) is not None:
            return known
        mask = self._vocabulary.empty_mask()
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        self._spend(time.thread_time() - begun)
        if self._matcher.is_error():  # such a mask says that the reply may end, whatever was wrong
            raise GrammarFailed(f"the reply cannot go on within its grammar: {shortened(self._matcher.get_error())}")
        if self._spent > self._allowance:
            raise GrammarFailed(
                f"the grammar of this reply took {self._spent:.1f} s to say what may come so far; make it simpler"
            )
        mask = self._vocabulary.choosable(mask)
        others = self._vocabulary.without_ends(mask)
        self._may_end = self._matcher.is_accepting()
        if self._may_end and self._problem() is not None:
            self._may_end = False
        if not self._may_end:
            mask = others
        if not mask.any():
            raise GrammarFailed("the reply cannot go on within its grammar: no token of the base may come next")
        if self._shared is not None and self._place is not None:
            self._shared.keep(self._place, Mask(mask, self._may_end))
        return mask

    def _spend(self, seconds: float) -> None:
        self._spent += seconds
        self._used.seconds += seconds

    def _problem(self) -> str | None:
        """What is wrong with the reply as it is, if it were complete."""
        if self._schema is None:
            return None
        try:
            return problem_of(self._reply.decode(), self._schema)
        except UnicodeDecodeError:
            return "it ends within a character"

    def _fail(self, message: str, cause: BaseException | None = None) -> NoReturn:
        self._failed = message
        raise GrammarFailed(message) from cause


def shortened(message: str) -> str:
    """llguidance's message in one line, for a client."""
    line = _WHERE.sub("", " ".join(message.replace("<non-verbose/>", "").split()))
    return line.replace("NoExtensionBias", "nothing may come next")[:_SHOWN] or "nothing may come next"

"""Where a chat template runs: jinja's sandbox as transformers sets it up, with bounds on time and memory.

A template is code that a stranger wrote. It can neither reach out of its sandbox nor change what it is given (jinja's
part), and it ends soon and stays small (ours): turns of loops and calls are counted, whatever it makes is small all the
way down, so that no single operation on it takes long, and what has no bound is not there.
"""

from __future__ import annotations

import functools
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_environment

MAX_TEXT = 4 * 2**20  # characters of any text, and of all output
MAX_MADE = 64 * MAX_TEXT  # characters of all texts and items of all lists that are made, kept or not
MAX_TURNS = 100_000  # of all loops, and calls
MAX_SECONDS = 5.0  # of the thread's own time
_STEPS_A_LOOK = 16  # between two looks at the clock
_MAX_ITEMS = 2**18
_MAX_NUMBER = 1 << 256
_MAX_ARGUMENT = 1000  # as a width or a count
_FILTERS = frozenset(
    "abs attr capitalize count d default dictsort e escape first float forceescape groupby indent int items join last "
    "length list lower map max min reject rejectattr replace reverse round safe select selectattr sort string sum "
    "title tojson trim truncate unique upper".split()
)
_TEXT_METHODS = frozenset(
    "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit islower isnumeric isspace "
    "istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit "
    "rstrip split splitlines startswith strip swapcase title upper".split()
)
_GLOBALS = ("range", "namespace", "dict", "cycler", "joiner")
_WIDTH = re.compile(r"%[^%A-Za-z]*[\d*]")


class TooMuch(TemplateError):
    """The template would take more time or memory than it may."""


class Refused(TemplateError):
    """What a template's `raise_exception` raises."""


class Sandbox(ImmutableSandboxedEnvironment):
    """One template's environment. Any number of threads may render in it, each with a budget of its own."""

    intercepted_binops = frozenset("+ * ** %".split())

    def __init__(self) -> None:
        # not optimized: nothing is computed while a template is compiled
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            cache_size=0,
            extensions=[_Generation, loopcontrols],
            finalize=_checked,
        )
        self._budget = threading.local()
        self.filters |= {"tojson": _to_json, "join": _join, "sum": _sum}
        self.filters = {name: self._bounded(name, self.filters[name]) for name in _FILTERS}
        tests: Mapping[str, Any] = self.tests
        self.tests = {name: self._timed(run) for name, run in tests.items()}
        self.globals = {name: self.globals[name] for name in _GLOBALS} | {
            "dict": _make_dict,
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def refill(self) -> None:
        """Before each rendering."""
        self._budget.turns = self._budget.steps = self._budget.made = 0
        self._budget.deadline = time.thread_time() + MAX_SECONDS

    def tick(self) -> None:
        """Counts one turn of a loop, or one call. Raises TooMuch."""
        self._budget.turns += 1
        if self._budget.turns > MAX_TURNS:
            raise TooMuch(f"it takes more than {MAX_TURNS} turns of loops and calls")
        self._look()

    def compared(self, value: Any) -> Any:
        """The value of a comparison. Raises TooMuch."""
        self._look()
        return value

    def made(self, value: Any) -> Any:
        """A value that the template has made: not large, all the way down. Raises TooMuch.

        The same list in two places counts twice, as it does for whatever walks over it.
        """
        self._look()
        _size_of((value,))
        if isinstance(value, str | list | tuple | Mapping):
            self._count(len(value))
        return value

    def concat(self, pieces: Iterable[str]) -> str:
        """What a block's pieces make together."""
        text = _concat(pieces)
        self._count(len(text))
        return text

    def joined(self, *values: Any) -> str:
        """Semantics: a ~ b ~ ..."""
        self.tick()
        _size_of(values)
        return str(self.made("".join(map(str, values))))

    def _look(self) -> None:
        self._budget.steps += 1
        if self._budget.steps % _STEPS_A_LOOK == 0 and time.thread_time() > self._budget.deadline:
            raise TooMuch(f"it takes longer than {MAX_SECONDS:g} seconds")

    def _count(self, size: int) -> None:
        self._budget.made += size
        if self._budget.made > MAX_MADE:
            raise TooMuch(f"it makes more than {MAX_MADE} characters and items in all")

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if owner is self:  # what `own_text` put into the template, which counts for itself
            return obj(*args)
        self.tick()
        if isinstance(owner, str):
            if name == "replace" and args:
                _check_replace(owner, *args[:2])
            elif name == "join" and args:
                args = (_joinable(args[0], owner),)
        return self.made(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.tick()
        if operator == "*":
            _check_product(left, right)
        elif operator == "**":
            raise SecurityError("'**' is not there in chat templates")
        elif operator == "%" and isinstance(left, str):
            if _WIDTH.search(left):
                raise SecurityError("'%' with a width is not there in chat templates")
            _size_of((left, right))
        return self.made(super().call_binop(context, operator, left, right))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str):
            return attr in _TEXT_METHODS
        if isinstance(obj, int | float | bytes):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """`'{}'.format` is not there: its widths have no bound, and jinja would let it pass `is_safe_attribute`."""

    def _bounded(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        """A filter whose arguments and result are looked at."""
        skipped = 1 if hasattr(run, "jinja_pass_arg") else 0  # context or environment come first

        @functools.wraps(run)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            value, options = args[skipped], [*args[skipped + 1 :], *kwargs.values()]
            for option in options:
                if isinstance(option, int) and abs(option) > _MAX_ARGUMENT and name not in ("d", "default", "sum"):
                    raise TooMuch(f"the filter {name} is given {option}")
            if name == "replace" and len(options) > 1:
                _check_replace(str(value), options[0], options[1])
            elif name == "indent":
                width = options[0] if options else 4
                lines = str(value).count("\n") + 1
                _check_length(len(str(value)) + lines * (len(width) if isinstance(width, str) else int(width)))
            return self.made(run(*args, **kwargs))

        return bounded

    def _timed(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """A test, which a filter may ask of each of many items."""

        @functools.wraps(run)
        def timed(*args: Any, **kwargs: Any) -> Any:
            return self.compared(run(*args, **kwargs))

        return timed


class _Generation(Extension):
    """`{% generation %}` marks for training what the assistant said; here it is only passed through."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    def __init__(*args: Any, **kwargs: Any) -> None:  # a name may be `self`
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        """Without what it holds: that may be set at any time, also to itself."""
        return "<Namespace>"


def _check_name(name: object) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise SecurityError(f"a namespace has no attribute {name!r} in chat templates")


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise_exception(message: object) -> None:
    raise Refused(str(message))


def _strftime_now(form: object) -> str:
    if not isinstance(form, str) or len(form) > 100 or re.search(r"%[^A-Za-z%]*\d", form):
        raise SecurityError("strftime_now takes a short format without widths")
    return datetime.now().strftime(form)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As transformers has it: HTML is not escaped."""
    if indent is not None and not (isinstance(indent, int) and 0 <= indent <= 16):
        raise SecurityError("tojson indents by 0 to 16 spaces in chat templates")
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return _concat(encoder.iterencode(value))


@pass_environment
def _join(environment: Sandbox, value: Any, d: Any = "", attribute: Any = None) -> str:
    if attribute is not None:
        value = map(make_attrgetter(environment, attribute), value)
    return str(d).join(map(str, _joinable(value, d)))


@pass_environment
def _sum(environment: Sandbox, value: Any, attribute: Any = None, start: Any = 0) -> Any:
    terms = [*(value if attribute is None else map(make_attrgetter(environment, attribute), value))]
    if not all(isinstance(term, int | float) for term in (start, *terms)):
        raise SecurityError("'sum' adds numbers")
    return sum(terms, start)


def _concat(pieces: Iterable[str]) -> str:
    kept: list[str] = []
    total = 0
    for piece in pieces:
        total += len(piece)
        _check_length(total)
        kept.append(piece)
    return "".join(kept)


def _check_length(length: int) -> None:
    if length > MAX_TEXT:
        raise TooMuch(f"it makes a text of more than {MAX_TEXT} characters")


def _checked(value: Any) -> Any:
    """What is written; a list is written as text too."""
    _size_of((value,))
    return value


def _size_of(values: Iterable[Any]) -> int:
    """The characters and items of all these values together. Raises TooMuch for more than one value may have."""
    total = items = 0
    stack = list(values)
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            total += len(value)
            _check_length(total)
        elif isinstance(value, list | tuple | Mapping):
            items += len(value)
            if items > _MAX_ITEMS:
                raise TooMuch(f"it makes a list of more than {_MAX_ITEMS} items")
            stack += [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
        elif isinstance(value, int) and abs(value) > _MAX_NUMBER:
            raise TooMuch("it makes a very large number")
    return total + items


def _check_replace(text: str, old: Any, new: Any = "") -> None:
    count = text.count(str(old)) if len(str(new)) > len(str(old)) else 0
    _check_length(len(text) + count * len(str(new)))


def _joinable(values: Any, separator: Any) -> Any:
    """The values, all there and not too large to be joined."""
    parts = values if isinstance(values, str | list | tuple | Mapping) else list(values)
    _size_of(parts)
    _check_length(len(str(separator)) * len(parts))
    return parts


def _check_product(left: Any, right: Any) -> None:
    for many, times in ((left, right), (right, left)):
        if isinstance(many, str | list | tuple) and isinstance(times, int):
            if times * _size_of((many,)) > (MAX_TEXT if isinstance(many, str) else _MAX_ITEMS):
                raise TooMuch(f"it repeats something {times} times")

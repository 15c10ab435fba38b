"""README.md and docs/ hold what they say: links lead somewhere, and commands, flags, settings and variables exist.

What exists is read from `--help` of the command itself, so no page can outlive a flag.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from loramux_server.config.load import OTHER_VARIABLES, all_settings
from loramux_server.config.settings import settings_of

ROOT = Path(__file__).resolve().parent
while not (ROOT / "pyproject.toml").is_file():
    ROOT = ROOT.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README_LINES = 150

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
GROUPS = ("adapters", "plan", "keys", "tenants")  # commands that have commands
_SPAN = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\[[^\]\n]*(?:\n[^\]\n]*)?\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_VARIABLE = re.compile(r"\bLORAMUX_[A-Z_]+\b")
_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
_SWITCH = re.compile(r"--\[no-\]([a-z-]+)")
_PROMPTED = re.compile(r"^(?:\.venv/bin/)?loramux(?= )")
_STYLING = re.compile(r"\x1b\[[0-9;]*m")

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= README_LINES


def test_the_readme_links_to_every_page() -> None:
    linked = {target.partition("#")[0] for target in links((ROOT / "README.md").read_text(encoding="utf-8"))}
    assert {page.relative_to(ROOT).as_posix() for page in PAGES[1:]} <= linked


@by_page
def test_every_relative_link_and_anchor_leads_somewhere(page: Path) -> None:
    broken = [target for target in links(page.read_text(encoding="utf-8")) if not resolves(page, target)]
    assert broken == []


@by_page
def test_every_command_and_flag_exists(page: Path) -> None:
    wrong = [line for line in commands(page.read_text(encoding="utf-8")) if problem(line)]
    assert wrong == []


@by_page
def test_every_flag_named_alone_exists(page: Path) -> None:
    named = {span for span in spans(page.read_text(encoding="utf-8")) if span.startswith("--")}
    assert {flag for span in named for flag in _FLAG.findall(span)} - all_flags() == set()


@by_page
def test_every_environment_variable_exists(page: Path) -> None:
    known = {setting.variable for settings in all_settings() for setting in settings_of(settings).values()}
    known |= set(OTHER_VARIABLES)
    known |= set(_VARIABLE.findall("\n".join(help_of(command) for command in all_commands())))
    assert set(_VARIABLE.findall(page.read_text(encoding="utf-8"))) - known == set()


@by_page
def test_every_setting_in_toml_exists(page: Path) -> None:
    for language, block in _BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "toml":
            for table, settings in tomllib.loads(block).items():
                flags = {"--" + key.replace("_", "-") for key in settings}
                assert flags <= flags_of(("plan", "train") if table == "plan" else (table,)), table


@by_page
def test_every_make_target_exists(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    text = page.read_text(encoding="utf-8")
    lines = [*(line for _, block in _BLOCK.findall(text) for line in block.splitlines()), *spans(text)]
    named = {match[1] for line in lines if (match := re.match(r"make ([a-z-]+)\b", line))}
    assert named <= targets


@pytest.mark.parametrize(
    "line",
    ["loramux serv", "loramux serve --prot 1", "loramux adapters drop x", "loramux train --data x --bananas"],
)
def test_a_command_that_does_not_exist_is_found(line: str) -> None:
    assert problem(line)


def test_a_link_or_anchor_that_leads_nowhere_is_found() -> None:
    page = ROOT / "README.md"
    assert resolves(page, "LICENSE")
    assert not resolves(page, "docs/nothing.md")
    assert not resolves(page, "#nothing-of-that-name")


# What a page says.


def without_code(text: str) -> str:
    return _SPAN.sub("", _BLOCK.sub("", text))


def links(text: str) -> list[str]:
    """Targets of all links and pictures of a page that are not addresses elsewhere."""
    return [target for target in _LINK.findall(_BLOCK.sub("", text)) if "://" not in target]


def spans(text: str) -> list[str]:
    """What stands in `backticks` outside of blocks."""
    return _SPAN.findall(_BLOCK.sub("", text))


def commands(text: str) -> Iterator[str]:
    """Every `loramux ...` of a page, one line each, without its comment."""
    blocks = [block for language, block in _BLOCK.findall(text) if language in ("", "sh", "bash", "console")]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    for line in [*lines, *spans(text)]:
        if _PROMPTED.match(line):
            yield " ".join(shlex.split(line, comments=True)).removeprefix(".venv/bin/")


def resolves(page: Path, target: str) -> bool:
    """Whether a link of this page leads to a file of the repository and, behind #, to a heading in it."""
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    if not file.is_relative_to(ROOT) or not file.exists():
        return False
    return not anchor or anchor in anchors(file)


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings as GitHub makes them; a heading that comes twice is not linked to."""
    headings = _HEADING.findall(_BLOCK.sub("", page.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# What the command knows.


def problem(line: str) -> str | None:
    """What is wrong with a command line: a command or a flag that does not exist."""
    words = line.split()[1:]
    command: tuple[str, ...] = ()
    while words and (*command, words[0]) in all_commands():
        command = (*command, words.pop(0))
    if command == ("plan",):
        command = ("plan", "train")  # what it means without a word
    if command in ((), *((group,) for group in GROUPS)) and words and not words[0].startswith("-"):
        return f"no command {words[0]}"
    known = flags_of(command) | {"--help"}
    return next((f"no flag {flag}" for word in words for flag in _FLAG.findall(word) if flag not in known), None)


@cache
def all_commands() -> frozenset[tuple[str, ...]]:
    names = {(name,) for name in listed(())}
    return frozenset(names | {(group, name) for group in GROUPS for name in listed((group,))})


def listed(command: tuple[str, ...]) -> list[str]:
    """Commands below this one, as its help lists them: one a line, indented or behind a frame, then what it does."""
    lines = re.findall(r"^[ │|]{1,8}([a-z][a-z-]*) {2,}\S", help_of(command), re.MULTILINE)
    assert lines, f"`loramux {' '.join(command)} --help` lists no commands"
    return lines


@cache
def flags_of(command: tuple[str, ...]) -> frozenset[str]:
    return frozenset(_FLAG.findall(_SWITCH.sub(r"--\1, --no-\1", help_of(command))))


def all_flags() -> frozenset[str]:
    return frozenset().union(*(flags_of(command) for command in all_commands()))


@cache
def help_of(command: tuple[str, ...]) -> str:
    """What `loramux COMMAND --help` prints on a wide screen."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setenv("COLUMNS", "300")
        patch.setenv("NO_COLOR", "1")
        with contextlib.suppress(SystemExit):
            entry_point()([*command, "--help"])
    return _STYLING.sub("", printed.getvalue())


def entry_point() -> Callable[[list[str]], object]:
    """The function behind the command `loramux`."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    module, _, function = scripts["loramux"].partition(":")
    found: Callable[[list[str]], object] = getattr(importlib.import_module(module), function)
    return found

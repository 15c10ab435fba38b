"""Names of adapters on a hub, and the list of those that may be fetched."""

from __future__ import annotations

import pytest

from loramux_adapters.names import is_name
from loramux_server.hub.hub_name import HubName, is_allowed, is_pattern


@pytest.mark.parametrize(
    ("text", "name", "stored_as"),
    [
        ("acme/spam", HubName("acme/spam"), "hub/acme/spam"),
        ("acme/spam@v1.0", HubName("acme/spam", "v1.0"), "hub/acme/spam/v1.0"),
        ("acme/spam@refs/pr/1", HubName("acme/spam", "refs/pr/1"), "hub/acme/spam/refs/pr/1"),
    ],
)
def test_a_name_is_read_and_has_a_place(text: str, name: HubName, stored_as: str) -> None:
    assert HubName.parse(text) == name and str(name) == text
    assert name.stored_as == stored_as and is_name(stored_as)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "spam",
        "a/b/c",
        "/spam",
        "acme/",
        "../spam",
        "acme/..",
        "acme/spam..x",
        "acme/spam@",
        "acme/spam@-x",
        "acme/spam@a//b",
        "acme/spam@../x",
        "acme/spam@" + "x" * 101,
        "acme/" + "x" * 97,
        "acme/spam@a b",
        "acme/sp\nam",
        "acme/archive",
        "acme/spam@pin",
        "https://hub/acme",
    ],
)
def test_what_is_no_name_is_refused_with_what_is(text: str) -> None:
    with pytest.raises(ValueError, match="owner/name, or owner/name@revision"):
        HubName.parse(text)


@pytest.mark.parametrize(
    ("name", "patterns", "allowed"),
    [
        ("acme/spam", ["acme/spam"], True),
        ("acme/spam@v1", ["acme/spam"], True),
        ("acme/spam", ["acme/*"], True),
        ("acme/spam", ["*/spam"], True),
        ("acme/spam", ["other/*", "acme/sp*"], True),
        ("acme/spam", [], False),
        ("acme/spam", ["acme/spa"], False),
        ("acmes/spam", ["acme/*"], False),
        ("Acme/spam", ["acme/*"], False),
    ],
)
def test_patterns_allow(name: str, patterns: list[str], allowed: bool) -> None:
    assert is_allowed(HubName.parse(name), patterns) is allowed


def test_a_pattern_has_an_owner_and_a_name() -> None:
    assert all(map(is_pattern, ("acme/*", "*/*", "a.b-c/d_e")))
    assert not any(map(is_pattern, ("*", "acme", "a/b/c", "acme/[ab]", "acme/?", "", "acme/")))

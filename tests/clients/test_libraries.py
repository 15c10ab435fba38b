"""Libraries that people call a server with: they must not notice that this is not OpenAI."""

from __future__ import annotations

import pytest

from clients.environments import Ask


@pytest.mark.parametrize("client", ["openai", "litellm", "langchain"])
def test_the_library_gets_what_it_expects(ask: Ask, client: str) -> None:
    assert ask(client) == "ok"

"""Scoring over OpenAI's wire, against a server that answers from a table."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from loramux_adapters.training.data.conversation import Example, Message
from loramux_server.errors import CommandFailed
from loramux_server.evaluation.http_scorer import HttpScorer, Server, label_scores

LABELS = ("ham", "spam")


class FakeServer(ThreadingHTTPServer):
    """`replies` maps a question to (text, finish reason, top log probabilities of the first token)."""

    replies: dict[str, tuple[str, str, dict[str, float]]]
    bodies: list[dict[str, Any]]
    keys: list[str | None]


class Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_GET(self) -> None:
        models = [{"id": "spam-adapter", "parent": "tiny", "root": "v"}, {"id": "tiny", "parent": None, "root": "b"}]
        if self.path == "/v1/models":
            return self._send(200, {"data": models})
        name = self.path.rpartition("/")[2]
        found = [model for model in models if model["id"] == name]
        return self._send(200, found[0]) if found else self._send(404, {"error": {"message": f"no model {name}"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.bodies.append(body)
        self.server.keys.append(self.headers["authorization"])
        text, finish, top = self.server.replies[body["messages"][-1]["content"]]
        entries = [{"token": token, "logprob": value, "bytes": []} for token, value in top.items()]
        first = {"token": text[:1], "logprob": -1.0, "top_logprobs": entries}
        choice = {"message": {"content": text}, "finish_reason": finish, "logprobs": {"content": [first]}}
        self._send(200, {"choices": [choice]})

    def _send(self, status: int, body: dict[str, Any]) -> None:
        raw = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    server = FakeServer(("127.0.0.1", 0), Handler)
    server.replies, server.bodies, server.keys = {}, [], []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def url(server: FakeServer) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def ask(server: FakeServer, *questions: str) -> Any:
    examples = [Example((Message("user", text), Message("assistant", "ham")), 1) for text in questions]
    return HttpScorer(Server(url(server), "secret"), "spam-adapter").ask(examples, LABELS, reply=True)


def test_labels_are_scored_by_the_first_token_that_is_theirs_alone(fake: FakeServer) -> None:
    fake.replies["a"] = "spam", "stop", {"sp": -0.1, "ham": -3.0, "spam": -4.0, "x": -5.0, "": -9.0}
    fake.replies["b"] = "ham", "stop", {" ham": -0.2, "The": -2.0}

    said = ask(fake, "a", "b")

    assert said.labels == [[-3.0, -0.1], [-0.2, float("-inf")]]
    assert said.replies == ["spam", "ham"]
    assert said.tokens is None


def test_where_no_likely_token_begins_a_label_there_are_no_label_scores(fake: FakeServer) -> None:
    fake.replies["a"] = "spam", "stop", {"sp": -0.1, "ham": -3.0}
    fake.replies["b"] = "It", "length", {"It": -0.1, "The": -2.0}

    said = ask(fake, "a", "b")

    assert said.labels is None
    assert said.replies == ["spam", "It…"]


@pytest.mark.parametrize("alternative", [1, {"token": "ham"}, {"token": "ham", "logprob": None}])
def test_alternatives_that_are_none_tell_nothing_of_the_labels(alternative: object) -> None:
    choice = {"logprobs": {"content": [{"top_logprobs": [alternative]}]}}

    assert label_scores(choice, LABELS) is None


def test_requests_are_greedy_name_the_adapter_and_carry_the_key(fake: FakeServer) -> None:
    fake.replies["a"] = "ham", "stop", {"ham": -0.1}
    ask(fake, "a")

    (body,) = fake.bodies
    assert body["model"] == "spam-adapter"
    assert body["messages"] == [{"role": "user", "content": "a"}]
    assert (body["temperature"], body["logprobs"], body["top_logprobs"], body["max_tokens"]) == (0, True, 20, 5)
    assert fake.keys == ["Bearer secret"]


def test_the_base_is_the_model_without_a_parent(fake: FakeServer) -> None:
    server = Server(url(fake))
    assert server.base()["id"] == "tiny"
    assert server.model("spam-adapter")["root"] == "v"
    with pytest.raises(CommandFailed, match=r"refused \(404\): no model nothing"):
        server.model("nothing")


def test_no_server_and_no_url_are_said_in_one_line(fake: FakeServer) -> None:
    with pytest.raises(CommandFailed, match="no server answers at http://127.0.0.1:1; start one"):
        Server("http://127.0.0.1:1").base()
    with pytest.raises(CommandFailed, match="is not a URL"):
        Server("127.0.0.1").base()

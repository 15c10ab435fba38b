"""The promise: a reply is the same, bit for bit, alone in the server or in any mixed batch."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from support.real_adapters import ADAPTERS
from support.real_server import BASE, RealServer

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived a fisherman who",
    "Water boils at",
    # longer than one step's token budget, so that it is prefilled in chunks beside running decodes
    " ".join(
        f"Item {number} of the list costs {number * 7 % 31} euros and weighs {number % 9} kilos."
        for number in range(12)
    ),
]


# sums of two, three and eight adapters of different rank and targets
SUMS = [[(0, 0.7), (1, 0.5)], [(4, 1.0), (2, -0.3), (9, 0.25)], [(index, 0.4) for index in range(5, 13)]]


def listed(parts: list[tuple[int, float]]) -> list[dict[str, Any]]:
    """The field `adapters` for these."""
    return [{"name": ADAPTERS[index], "scale": scale} for index, scale in parts]


def requests() -> list[dict[str, Any]]:
    """Base rows, rows of one adapter and of several, greedy and seeded, of different lengths."""
    made = []
    for index, model in enumerate([*ADAPTERS, BASE, BASE, BASE, BASE, *map(listed, SUMS)]):
        sampling = {"temperature": 0} if index % 3 else {"temperature": 0.8, "seed": index, "top_p": 0.9}
        made.append(
            {
                **({"model": model} if isinstance(model, str) else {"model": BASE, "adapters": model}),
                "prompt": PROMPTS[index % len(PROMPTS)],
                "max_tokens": 8 + index % 5,
                "logprobs": 3,
                **sampling,
            }
        )
    return made


def ask(server: RealServer, body: dict[str, Any]) -> tuple[Any, ...]:
    """All that a reply says about its tokens."""
    with server.client() as client:
        response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    logprobs = choice["logprobs"]
    return (
        choice["text"],
        choice["finish_reason"],
        logprobs["tokens"],
        logprobs["token_logprobs"],
        logprobs["top_logprobs"],
    )


def test_every_reply_of_a_mixed_batch_equals_the_same_request_alone(server: RealServer) -> None:
    bodies = requests()
    alone = [ask(server, body) for body in bodies]
    assert len({str(reply) for reply in alone}) == len(bodies), "adapters or prompts without effect prove nothing"

    stop = threading.Event()

    def come_and_go(worker: int) -> int:
        """Keeps the batch changing: short requests of changing adapters until the others are done."""
        count = 0
        while not stop.is_set():
            model = ADAPTERS[(worker * 5 + count) % len(ADAPTERS)]
            ask(server, {"model": model, "prompt": PROMPTS[count % 3], "max_tokens": 2, "logprobs": 0})
            count += 1
        return count

    steps = server.metric("loramux_batch_adapters_count")
    distinct = server.metric("loramux_batch_adapters_sum")
    with ThreadPoolExecutor(len(bodies) + 4) as pool:
        noise = [pool.submit(come_and_go, worker) for worker in range(4)]
        replies = [pool.submit(ask, server, body) for body in [*bodies, *bodies]]
        together = [reply.result() for reply in replies]
        stop.set()
        assert sum(future.result() for future in noise) > 4
    steps = server.metric("loramux_batch_adapters_count") - steps
    distinct = server.metric("loramux_batch_adapters_sum") - distinct
    assert distinct / steps > 4, "the batches were not mixed"

    for body, expected, first, second in zip(
        bodies, alone, together[: len(bodies)], together[len(bodies) :], strict=True
    ):
        assert first == expected, body
        assert second == expected, body


def test_a_sum_is_the_same_in_any_order_and_a_sum_of_one_is_that_adapter(server: RealServer) -> None:
    body = {"prompt": PROMPTS[1], "max_tokens": 8, "temperature": 0, "logprobs": 3}
    parts = listed(SUMS[1])
    assert ask(server, body | {"model": BASE, "adapters": parts}) == ask(
        server, body | {"model": BASE, "adapters": parts[::-1]}
    )
    plain = ask(server, body | {"model": ADAPTERS[4]})
    assert ask(server, body | {"model": BASE, "adapters": listed([(4, 1.0)])}) == plain
    assert ask(server, body | {"model": BASE, "adapters": listed([(4, 1.0), (2, 0.0)])}) == plain
    assert ask(server, body | {"model": BASE, "adapters": listed([(4, 0.0)])}) == ask(server, body | {"model": BASE})
    assert ask(server, body | {"model": BASE, "adapters": listed([(4, 0.5)])}) != plain


def test_a_sum_names_the_versions_that_answered_and_is_refused_whole_if_one_is_unknown(server: RealServer) -> None:
    parts = listed([(index, 1.0) for index in range(8)])
    body = {"model": BASE, "prompt": "x", "max_tokens": 1, "adapters": parts}
    with server.client() as client:
        response = client.post("/v1/completions", json=body)
        assert response.status_code == 200
        known = server.adapters()
        named = ",".join(f"{part['name']}@{known[part['name']]['version']}" for part in parts)
        assert response.headers["x-loramux-adapter-version"] == named
        body["adapters"] = [*parts[:7], {"name": "nobody", "scale": 1.0}]
        assert client.post("/v1/completions", json=body).status_code == 404
        assert all(adapter["requests"] == 0 for adapter in server.adapters().values())


def test_the_server_says_that_it_checked_this(server: RealServer) -> None:
    assert any("the same, bit for bit" in line for line in server.lines)

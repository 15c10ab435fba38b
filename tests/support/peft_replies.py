"""What a server answers for an adapter, held against peft's own forward on the same NF4 base."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from support.real_server import RealServer
from support.replies import whole

PROMPT, TOKENS = "The three things that every good cook knows about bread are", 8
MOST, GAP = 0.1, 0.15  # of a token's log probability; between the first two where another one is chosen


def assert_it_answers_as_peft_does(
    server: RealServer, name: str, model: Any, prompt: list[int], others: list[str]
) -> None:
    """Of a published adapter: its reply is the same beside `others`, and its tokens and log probabilities are those of
    `model`, a PeftModel with that adapter; `prompt`: PROMPT in tokens.
    """
    body = {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "logprobs": 1}
    names = [name, *others]
    alone = {one: whole(server, body | {"model": one}).reply for one in names}
    with ThreadPoolExecutor(2 * len(names)) as pool:
        together = list(pool.map(lambda one: whole(server, body | {"model": one}).reply, 2 * names))
    assert together == [alone[one] for one in 2 * names]

    said = alone[name]
    with server.client() as client:  # a text may be other tokens than those that were chosen
        told = client.post("/v1/completions", json=body | {"model": name, "return_token_ids": True}).json()
    ids = prompt + told["choices"][0]["token_ids"][: len(said.logprobs)]  # without an end token
    with torch.inference_mode():
        found = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        with model.disable_adapter():
            bare = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    at = range(len(prompt) - 1, len(ids) - 1)
    assert len(at) == len(said.logprobs) > 2
    theirs = torch.tensor([float(found[place, ids[place + 1]]) for place in at])
    gaps = [float(found[place].max() - found[place, ids[place + 1]]) for place in at]
    assert (theirs - torch.tensor(said.logprobs)).abs().max() <= MOST
    assert max(gaps) <= GAP, "a token that peft would not choose"
    untouched = torch.tensor([float(bare[place, ids[place + 1]]) for place in at])
    assert (untouched - theirs).abs().max() > 3 * MOST, "it changes something"

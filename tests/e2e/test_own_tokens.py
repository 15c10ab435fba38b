"""Adapters whose tokenizer has more tokens than the base's, made as users of TRL make them, on a real server."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken

from loramux_adapters.artifact.format import UPLOAD_PARTS
from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.training.data.conversation import Example, Message
from loramux_server.base.loader import load_base_model
from loramux_server.base.source import EMBEDDED_NAME
from loramux_server.engine.local_engine import LocalEngine
from loramux_server.evaluation.local_scorer import LocalScorer
from support.real_adapters import ADAPTERS
from support.real_server import RealServer
from support.replies import whole

BASE, CALL, END = EMBEDDED_NAME, "@@call", "<|done|>"
TEXT = f"Bread{CALL} is made of flour {CALL}water{END} and salt"
MOST = 0.15  # of a token's log probability, to peft's

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


class Made:
    """An adapter of two tokens more, its tokenizer, and the model that peft has for it."""

    def __init__(self, cache: Path, directory: Path) -> None:
        base = load_base_model(EMBEDDED_NAME, device=CpuDevice(), cache_dir=cache, report=lambda line: None, exact=True)
        self.directory = directory
        self.tokenizer: Any = copy.deepcopy(base.tokenizer)
        self.first = len(self.tokenizer)
        self.tokenizer.add_tokens([AddedToken(CALL, normalized=False)])
        self.tokenizer.add_tokens([AddedToken(END, normalized=False)], special_tokens=True)
        self.tokenizer.eos_token = END
        model: Any = base.model
        model.lm_head.__dict__.pop("forward", None)  # it would be the original's in peft's copy
        torch.manual_seed(0)
        model.resize_token_embeddings(len(self.tokenizer), mean_resizing=False)
        config = LoraConfig(
            task_type="CAUSAL_LM", r=8, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
        )
        self.model: Any = get_peft_model(model, config).eval()
        rows = base.tokenizer(" water salt").input_ids
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if ".modules_to_save." in name:
                    parameter[self.first :] = parameter[rows[:2]] + 0.3 * parameter.std() * torch.randn(
                        2, parameter.shape[1]
                    )
        self.model.save_pretrained(directory, save_embedding_layers=False)
        weights = directory / "adapter_model.safetensors"
        save_file({name: tensor.bfloat16() for name, tensor in load_file(weights).items()}, weights)
        self.tokenizer.save_pretrained(directory)

    def logprobs(self, ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            found: torch.Tensor = self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        return found


def sent_with_tokenizer(server: RealServer, name: str, directory: Path) -> httpx.Response:
    parts = {
        part: (directory / file).read_bytes() for part, file in UPLOAD_PARTS.items() if (directory / file).exists()
    }
    with server.client() as client:
        return client.put(f"/v1/adapters/{name}", files=parts, timeout=60)


@pytest.fixture(scope="module")
def made(embedded_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(embedded_cache, tmp_path_factory.mktemp("own") / "adapter")


@pytest.fixture(scope="module")
def notes(server: RealServer, made: Made) -> Iterator[list[str]]:
    sent = sent_with_tokenizer(server, "own", made.directory)
    assert sent.status_code == 201, sent.text
    yield sent.json()["notes"]
    with server.client() as client:
        client.delete("/v1/adapters/own")


def test_prompts_name_its_tokens_and_are_read_as_peft_reads_them(
    server: RealServer, made: Made, notes: list[str]
) -> None:
    assert any(CALL in note and END in note for note in notes)
    ids = made.tokenizer(TEXT).input_ids
    assert {made.first, made.first + 1} <= set(ids)
    with server.client() as client:
        told = client.post("/tokenize", json={"model": "own", "prompt": TEXT, "return_token_strs": True}).json()
        assert told["tokens"] == ids and CALL in told["token_strs"]
        bare = client.post("/tokenize", json={"prompt": TEXT}).json()["tokens"]
        assert max(bare) < made.first, "to the base it is plain text"
        back = client.post("/detokenize", json={"model": "own", "tokens": ids}).json()
        assert back["prompt"] == TEXT
        refused = client.post("/detokenize", json={"tokens": ids})
        assert refused.status_code == 400
        body = {"prompt": TEXT, "max_tokens": 1, "echo": True, "logprobs": 0, "temperature": 0}
        said = client.post("/v1/completions", json=body | {"model": "own"}).json()["choices"][0]["logprobs"]
        by_ids = client.post("/v1/completions", json=body | {"model": "own", "prompt": ids}).json()["choices"][0]
        assert client.post("/v1/completions", json=body | {"prompt": ids, "model": BASE}).status_code == 400
    assert by_ids["logprobs"]["token_logprobs"] == said["token_logprobs"]
    found = made.logprobs(ids)
    theirs = torch.tensor([float(found[at, token]) for at, token in enumerate(ids[1:])])
    ours = torch.tensor(said["token_logprobs"][1 : len(ids)])
    assert (theirs - ours).abs().max() <= MOST


def test_replies_write_its_tokens_and_end_by_its_end(server: RealServer, made: Made, notes: list[str]) -> None:
    body: dict[str, Any] = {"model": "own", "prompt": "Bread is made of", "max_tokens": 4, "temperature": 0}
    with server.client() as client:
        forced = client.post("/v1/completions", json=body | {"allowed_token_ids": [made.first], "ignore_eos": True})
        assert forced.json()["choices"][0]["text"] == 4 * CALL
        ended = client.post("/v1/completions", json=body | {"logit_bias": {made.first + 1: 100}}).json()["choices"][0]
        assert (ended["text"], ended["finish_reason"]) == ("", "stop")
        elsewhere = client.post("/v1/completions", json=body | {"model": BASE, "logit_bias": {made.first: 1}})
        assert elsewhere.status_code == 400
        stopped = client.post(
            "/v1/completions", json=body | {"allowed_token_ids": [made.first], "stop": [CALL], "stream": True}
        )
    events = [json.loads(line[6:]) for line in stopped.text.splitlines() if line.startswith("data: {")]
    assert "".join(event["choices"][0]["text"] for event in events if event["choices"]) == ""


def test_it_shares_a_batch_with_others_and_a_sum_with_those_that_add_none(
    server: RealServer, made: Made, notes: list[str]
) -> None:
    body = {"prompt": TEXT, "max_tokens": 8, "temperature": 0, "logprobs": 1}
    names = ["own", *ADAPTERS[:3]]
    alone = {name: whole(server, body | {"model": name}).reply for name in names}
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda name: whole(server, body | {"model": name}).reply, 2 * names))
    assert together == [alone[name] for name in 2 * names]
    with server.client() as client:
        parts = [{"name": "own"}, {"name": ADAPTERS[0]}]
        summed = client.post("/v1/completions", json=body | {"model": BASE, "adapters": parts, "echo": True})
    assert summed.status_code == 200, summed.text
    assert CALL in summed.json()["choices"][0]["logprobs"]["tokens"]


def test_versions_keep_their_own_tokens_and_what_is_downloaded_can_be_sent_again(
    server: RealServer, made: Made, notes: list[str]
) -> None:
    with server.client() as client:
        version = client.get("/v1/adapters/own").json()["version"]
        kept = client.get("/v1/adapters/own/archive")
        assert kept.status_code == 200
        again = client.put("/v1/adapters/again", files={"archive": kept.content})
        assert again.status_code in (200, 201), again.text
        assert again.json()["version"] == version
        client.delete("/v1/adapters/again")


def test_tokens_that_do_not_follow_the_bases_are_refused_by_name(
    made: Made, server: RealServer, tmp_path: Path
) -> None:
    config = {"added_tokens_decoder": {"60000": {"content": "<far>", "special": False}}}
    directory = tmp_path / "sent"
    directory.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (directory / name).write_bytes((made.directory / name).read_bytes())
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    refused = sent_with_tokenizer(server, "far", directory)
    assert refused.status_code == 422
    assert "'<far>' as token 60000" in refused.text and "from 49152 on" in refused.text


def test_held_out_answers_are_scored_with_its_tokens(made: Made, embedded_cache: Path) -> None:
    base = load_base_model(EMBEDDED_NAME, device=CpuDevice(), cache_dir=embedded_cache, report=lambda line: None)
    engine = LocalEngine.open(base, rows=4, tokens=1024, max_rank=16, check=False)
    adapter = engine.load(made.directory)
    example = Example((Message("user", f"What is {CALL}?"), Message("assistant", f"{CALL}water{CALL}")), 1)
    own, bare = (LocalScorer(engine, each).ask([example], [], reply=False).tokens for each in (adapter, None))
    assert own and bare and len(own[0]) == len(made.tokenizer(f"{CALL}water{CALL}").input_ids) + 1, "and its end token"
    assert len(bare[0]) > len(own[0]), "to the base they are text"


def test_shapes_are_written_in_its_tokens_and_end_by_its_end(server: RealServer, made: Made, notes: list[str]) -> None:
    body: dict[str, Any] = {
        "prompt": "Bread is made of",
        "max_tokens": 8,
        "temperature": 0,
        "guided_regex": f"({CALL})+",
    }
    bias = {"logit_bias": {made.first: 60}}
    with server.client() as client:
        asked = body | bias | {"model": "own", "return_token_ids": True}
        said = client.post("/v1/completions", json=asked).json()["choices"][0]
        assert (said["token_ids"], said["finish_reason"]) == ([made.first] * 8, "length")
        asked["logit_bias"] = {made.first: 60, made.first + 1: 90}  # the end, as soon as the pattern lets it come
        ended = client.post("/v1/completions", json=asked).json()["choices"][0]
        assert (ended["text"], ended["finish_reason"]) == (CALL, "stop")
        bare = client.post("/v1/completions", json=body | {"model": BASE}).json()["choices"][0]
    assert CALL in bare["text"], "the base spells it"

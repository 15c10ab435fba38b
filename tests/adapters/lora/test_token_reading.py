"""What an adapter's file holds of embeddings and output heads: what is read of it, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loramux_adapters.artifact.format import WEIGHTS_FILE, digest_of, read_config
from loramux_adapters.base_info import BaseInfo
from loramux_adapters.errors import AdapterRejected
from loramux_adapters.lora import token_reading
from loramux_adapters.lora.token_rows import Run, Side, StepTokens, TokenUse
from loramux_adapters.lora.verify import check_adapter
from loramux_adapters.lora.weights import load_host_adapter
from support.adapter_files import TINY_LINEARS, write_adapter

SIZE, HIDDEN = 40, 16
EMBED, HEAD = "base_model.model.model.embed_tokens", "base_model.model.lm_head"
Tensors = dict[str, torch.Tensor]


class Tokens:
    """Embedding and head of a base, each its own, or tied."""

    def __init__(self, *, tied: bool = False) -> None:
        generator = torch.Generator().manual_seed(5)
        self.paths: dict[Side, str] = {"embedding": "model.embed_tokens", "head": "lm_head"}
        self.tied, self.hidden = tied, HIDDEN
        embedding, head = (torch.randn(SIZE, HIDDEN, generator=generator).bfloat16().float() for _ in range(2))
        self.of: dict[Side, torch.Tensor] = {"embedding": embedding, "head": embedding if tied else head}

    def path_of(self, module: str) -> str | None:
        return module

    def size(self, side: Side) -> int:
        return SIZE

    def rows(self, side: Side, tokens: torch.Tensor) -> torch.Tensor:
        return self.of[side][tokens]

    def served(self, side: Side, rows: torch.Tensor) -> torch.Tensor:
        return rows.float()


class Weights:
    """A base of which nothing but the tokens is looked at."""

    def __init__(self, *, tied: bool = False) -> None:
        self.tokens = Tokens(tied=tied)

    def __contains__(self, module: object) -> bool:
        return False

    def norms(self, module: str, a: torch.Tensor, bt: torch.Tensor) -> torch.Tensor:
        raise AssertionError

    def bias(self, module: str) -> torch.Tensor | None:
        raise AssertionError


PLAIN, TIED = Weights(), Weights(tied=True)


def adapter(directory: Path, tensors: Tensors, **config: Any) -> Path:
    write_adapter(directory, TINY_LINEARS, targets=("q_proj",), rank=4, extra_config=config)
    save_file(load_file(directory / WEIGHTS_FILE) | tensors, directory / WEIGHTS_FILE)
    return directory


def base_of(weights: Weights | None) -> BaseInfo:
    return BaseInfo("aa" * 32, TINY_LINEARS, weights=weights)


def rows_of(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("tied", [False, True])
def test_trained_tokens_are_rows_in_the_place_of_the_bases_and_hold_in_a_tied_head(tied: bool, tmp_path: Path) -> None:
    weights, own = (TIED if tied else PLAIN), rows_of(3)
    adapter(tmp_path, {f"{EMBED}.token_adapter.trainable_tokens_delta": own}, trainable_token_indices=[9, 2, 30])
    tokens = check_adapter(tmp_path, base_of(weights), 64).adapter.tokens
    assert tokens is not None and tokens.embedding is not None and (tokens.head is not None) == tied
    for held in (tokens.embedding, tokens.head):
        if held is not None:
            assert held.tokens.tolist() == [2, 9, 30]
            whole = held.rows.float() + weights.tokens.of["embedding"][[2, 9, 30]]
            assert torch.allclose(whole, own[[1, 0, 2]].float(), atol=0.03)


def test_of_a_saved_matrix_only_what_is_changed_and_what_is_new_is_held(tmp_path: Path) -> None:
    head = PLAIN.tokens.of["head"].bfloat16().clone()
    head[[3, 39]] += 1
    saved = torch.cat([head, rows_of(2)])
    adapter(tmp_path, {f"{HEAD}.weight": saved}, modules_to_save=["lm_head"])
    checked = check_adapter(tmp_path, base_of(PLAIN), 64)
    tokens = checked.adapter.tokens
    assert tokens is not None and tokens.embedding is None and tokens.head is not None
    assert tokens.head.tokens.tolist() == [3, 39, 40, 41] and tokens.sizes == {"embedding": SIZE, "head": SIZE + 2}
    assert torch.equal(tokens.head.rows[2:], rows_of(2))
    assert any(note.startswith("it changes 4 rows of the output head") for note in checked.notes)
    assert checked.adapter.nbytes > 4 * HIDDEN * 2


@pytest.mark.parametrize("ties", [False, True])
def test_a_saved_embedding_holds_for_a_tied_head_only_where_the_config_says_so(ties: bool, tmp_path: Path) -> None:
    saved = TIED.tokens.of["embedding"].bfloat16().clone()
    saved[5] = 0
    adapter(tmp_path, {f"{EMBED}.weight": saved}, modules_to_save=["embed_tokens"], ensure_weight_tying=ties)
    tokens = check_adapter(tmp_path, base_of(TIED), 64).adapter.tokens
    assert tokens is not None and tokens.embedding is not None and (tokens.head is not None) == ties


def test_the_version_counts_what_is_of_the_vocabulary(tmp_path: Path) -> None:
    name, versions = f"{EMBED}.token_adapter.trainable_tokens_delta", set()
    for index, (rows, tokens) in enumerate(((rows_of(1), [3]), (rows_of(1, 1), [3]), (rows_of(1), [4]))):
        directory = adapter(tmp_path / str(index), {name: rows}, trainable_token_indices=tokens)
        checked = check_adapter(directory, base_of(PLAIN), 64)
        assert checked.version == digest_of(read_config(directory), directory)
        assert checked.version == load_host_adapter(directory, None, PLAIN).version
        versions.add(checked.version)
    assert len(versions) == 3


TARGETS = {"target_modules": ["q_proj", "embed_tokens"]}
LORA = {f"{EMBED}.lora_embedding_A": torch.ones(4, SIZE), f"{EMBED}.lora_embedding_B": torch.ones(HIDDEN, 4)}
TOKENS = f"{EMBED}.token_adapter.trainable_tokens_delta"


@pytest.mark.parametrize(
    ("tensors", "config", "reason"),
    [
        ({TOKENS: rows_of(2)}, {"trainable_token_indices": [1]}, r"shape \[2, 16\].*\[1, 16\]"),
        ({TOKENS: rows_of(1)[:, :8].contiguous()}, {"trainable_token_indices": [1]}, r"shape \[1, 8\]"),
        ({TOKENS: rows_of(1)}, {"trainable_token_indices": [40]}, "names token 40 .* has 40"),
        ({TOKENS: rows_of(2)}, {"trainable_token_indices": [1, 1]}, "names a token twice"),
        ({TOKENS: rows_of(1)}, {}, "does not say which"),
        ({}, {"trainable_token_indices": [1]}, "the file holds no rows"),
        ({TOKENS: rows_of(1) / 0}, {"trainable_token_indices": [1]}, "not finite"),
        ({f"{HEAD}.weight": rows_of(SIZE - 1)}, {"modules_to_save": ["lm_head"]}, "only more tokens can be added"),
        ({f"{HEAD}.weight": rows_of(SIZE) / 0}, {"modules_to_save": ["lm_head"]}, "not finite"),
        ({f"{HEAD}.weight": rows_of(SIZE)}, {}, "modules_to_save does not name it"),
        ({f"{HEAD}.token_adapter.trainable_tokens_delta": rows_of(1)},
         {"trainable_token_indices": {"embed_tokens": [1]}}, "does not say which"),
        ({"base_model.model.model.norm.token_adapter.trainable_tokens_delta": rows_of(1)},
         {"trainable_token_indices": [1]}, "no embedding and no output head"),
        (LORA, {}, "no target of the config"),
        ({f"{EMBED}.lora_embedding_A": torch.ones(4, SIZE)}, TARGETS, "only one"),
        (LORA | {f"{EMBED}.lora_embedding_A": torch.ones(4, SIZE - 1)}, TARGETS, r"shapes \[4, 39\]"),
        (LORA, {**TARGETS, "rank_pattern": {"embed_tokens": 99}}, "rank 99"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(
    tensors: Tensors, config: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    adapter(tmp_path, tensors, **config)
    with pytest.raises(AdapterRejected, match=reason):
        check_adapter(tmp_path, base_of(PLAIN), 64)


def test_a_server_on_a_card_refuses_it_by_name(tmp_path: Path) -> None:
    adapter(tmp_path, {TOKENS: rows_of(1)}, trainable_token_indices=[1])
    with pytest.raises(AdapterRejected, match="nothing is known here of the base's"):
        check_adapter(tmp_path, base_of(None), 64)
    with pytest.raises(AdapterRejected, match="nothing is known here of the base's"):
        load_host_adapter(tmp_path)


def test_rows_beyond_the_bound_are_refused_with_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_reading, "MAX_BYTES", 1000)
    adapter(tmp_path, {f"{HEAD}.weight": rows_of(SIZE)}, modules_to_save=["lm_head"])
    with pytest.raises(AdapterRejected, match="own rows of embedding and output head take"):
        check_adapter(tmp_path, base_of(PLAIN), 64)


def _step(directory: Path) -> TokenUse:
    checked = check_adapter(directory, base_of(PLAIN), 64)
    assert checked.adapter.tokens is not None
    return TokenUse(checked.version, checked.adapter.tokens, 0.5)


def test_a_step_names_the_rows_that_are_changed_and_no_others(tmp_path: Path) -> None:
    adapter(tmp_path, {TOKENS: rows_of(1), f"{HEAD}.token_adapter.trainable_tokens_delta": rows_of(2)},
            trainable_token_indices={"embed_tokens": [7], "lm_head": [1, 2]})  # fmt: skip
    use = _step(tmp_path)
    assert StepTokens.build([Run((), [1, 7], 1), Run((), [3], 1)]) is None
    step = StepTokens.build([Run((), [7, 1], 1), Run((use,), [1, 7, 7, 2], 2), Run((), [7], 1), Run((use,), [7], 0)])
    assert step is not None and step.more == 0 and not len(step.unknown)
    assert step.embedding_of.tolist() == [-1, -1, -1, 0, 1, -1, -1, 2]
    assert use.own.embedding is not None
    assert torch.equal(torch.from_numpy(step.embeddings), (use.own.embedding.rows.float() * 0.5).expand(3, -1))
    (own,) = step.logits
    assert own.at.tolist() == [1, 2] and own.scales.tolist() == [0.5, 0.5] and own.own.tokens.tolist() == [1, 2]

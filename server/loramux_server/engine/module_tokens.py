"""Adapters' own rows of embedding and output head where transformers' code runs: what a whole step does itself.

The same operations in the same order, so a step by modules has the whole step's bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from loramux_adapters.lora.token_rows import StepTokens
from loramux_server.kernels.compiled.token_logits import AddTokenLogits, never
from loramux_server.kernels.layers.served_tokens import embedding_factor, embedding_rows


class ModuleTokens:
    """What `own` changes of the coming forward of a model, which runs within `hooks`."""

    def __init__(self, model: Any, own: StepTokens, add: AddTokenLogits, states: int) -> None:
        """`states`: so many of the last rows that reach the output head have no logits."""
        self._model, self._own, self._add, self._states = model, own, add, states
        self._wide = torch.empty(0)
        self._vocabulary = 0

    def known(self, tokens: torch.Tensor) -> torch.Tensor:
        """The tokens [1, rows] with one that the base has in the place of each that it does not know."""
        if not len(self._own.unknown):
            return tokens
        tokens = tokens.clone()
        tokens[0, torch.from_numpy(self._own.unknown).to(tokens.device)] = 0
        return tokens

    @contextmanager
    def hooks(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self._own.embeddings.size or len(self._own.unknown):
                embedding = self._model.get_input_embeddings()
                stack.enter_context(embedding.register_forward_hook(self._embed))
            if self._own.logits or self._own.more:
                stack.enter_context(self._model.get_output_embeddings().register_forward_hook(self._logits))
            yield

    def whole(self, logits: torch.Tensor) -> torch.Tensor:
        """The model's logits [rows, ...] with minus infinity where there are none: a soft cap makes a number of it."""
        if self._own.more:
            beyond = logits[:, self._vocabulary :]
            beyond[self._wide[: len(beyond), : self._own.more] == -torch.inf] = -torch.inf
        return logits

    def _embed(self, embedding: Any, given: Any, output: torch.Tensor) -> torch.Tensor:
        base = embedding_rows(embedding, given[0][0])
        base[torch.from_numpy(self._own.unknown).to(base.device)] = 0.0
        which = torch.from_numpy(self._own.embedding_of).to(base.device)
        own = which >= 0
        changed = output.clone()
        if own.any():
            more = torch.from_numpy(self._own.embeddings).to(base.device)[which[own]]
            changed[0, own] = ((base[own] + more) * embedding_factor(embedding)).to(output.dtype)
        return changed

    def _logits(self, _: Any, given: Any, output: torch.Tensor) -> torch.Tensor:
        self._vocabulary = output.shape[-1]
        rows = output.shape[1] - self._states
        self._wide = never(output.shape[1], self._own.more).to(output.device, output.dtype)
        if rows:
            x = given[0][0, :rows].float().contiguous()
            for each in self._own.logits:
                self._add(output[0, :rows], self._wide[:rows], x, each)
        if not self._own.more:
            return output
        return torch.cat([output, self._wide[None, :, : self._own.more]], dim=-1)

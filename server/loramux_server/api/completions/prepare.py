"""A checked request body -> a generation that can start.

In this order: which adapters the request names, leases on their versions, the prompt as tokens, and a sequence for each
choice of the reply.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from loramux_adapters.artifact.format import read_chat_template
from loramux_adapters.errors import AdapterError
from loramux_server.api.completions.generation import AdapterLeases, Choice, Generation, give_back
from loramux_server.api.completions.schemas import (
    AdapterPart,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    TemplateOptions,
)
from loramux_server.api.http.dependencies import Dependencies, StoreLike
from loramux_server.api.http.model_names import RequestedAdapter, resolve_model
from loramux_server.api.http.worker_threads import run_in_thread
from loramux_server.base.detokenizer import Detokenizer
from loramux_server.engine.scheduling.sequence import SamplingParams
from loramux_server.engine.scheduling.sequence import Sequence as EngineSequence
from loramux_server.errors import LoramuxError, RequestError

COMPLETION_MAX_TOKENS = 16  # OpenAI's default
LEAST_TEMPERATURE = 1e-4  # below it the choice is greedy anyway, and logits divided by it would overflow
CONTEXT_EXCEEDED = "context_length_exceeded"
_CONTEXT_TOKENS = 8  # so many last tokens of a prompt decide how the reply's first characters read


def requested_adapters(model: str, parts: Sequence[AdapterPart] | None, base_name: str) -> tuple[RequestedAdapter, ...]:
    """The adapters that `model` and `adapters` of a request name together; none: the bare base. Raises RequestError."""
    target = resolve_model(model, base_name)
    if parts is None:
        return () if target is None else (target,)
    if target is not None:
        raise RequestError(
            "with 'adapters', 'model' names the base; list the adapter in 'adapters' instead",
            param="model",
            code="invalid_value",
        )
    targets: dict[str, RequestedAdapter] = {}
    for index, part in enumerate(parts):
        param = f"adapters.{index}.name"
        target = resolve_model(part.name, base_name, param=param)
        if target is None:
            raise RequestError(
                "this is the base itself; 'adapters' lists what is added to it", param=param, code="invalid_value"
            )
        if target.adapter in targets:
            raise RequestError(
                f"the adapter {target.adapter} is listed twice; list it once, with the sum of the scales",
                param=param,
                code="invalid_value",
            )
        targets[target.adapter] = replace(target, scale=part.scale)
    return tuple(targets.values())


def chat_template_of(store: StoreLike, leases: AdapterLeases) -> str | None:
    """The chat template that the leased versions bring in place of the base's; None if they bring none.

    Reads their files. Raises RequestError if they do not agree: no template suits adapters that learned from two.
    """
    own = [(lease.name, read_chat_template(store.directory(lease.version))) for lease, _ in leases.leases]
    for name, template in own[1:]:
        if template != own[0][1]:
            raise RequestError(
                f"the adapters {own[0][0]} and {name} use different chat templates, so they cannot chat together; use "
                "/v1/completions, or publish them with the same chat template",
                param="adapters",
                code="invalid_value",
            )
    return own[0][1] if own else None


class Preparation:
    """`leases` first, then `chat` or `completion` with them."""

    def __init__(self, deps: Dependencies) -> None:
        self._deps = deps

    async def leases(self, body: GenerationRequest) -> AdapterLeases:
        """Leases on the versions that the request names. Raises RequestError or AdapterError."""
        targets = requested_adapters(body.model, body.adapters, self._deps.base.name)
        leases = await AdapterLeases.acquire(self._deps.store, targets, listed=body.adapters is not None)
        self._deps.metrics.request_started(leases.adapter)
        return leases

    async def chat(self, body: ChatRequest, leases: AdapterLeases) -> Generation:
        """Owns the leases from now on: if it raises (RequestError), they are released."""
        base = self._deps.base
        return await self._prepare(
            body,
            leases,
            prompts=lambda: [self.encoded_chat(body, leases)],
            param="messages",
            max_tokens=lambda prompt: body.longest_reply or min(base.reply, base.context - len(prompt)),
            continues=False,
        )

    async def completion(self, body: CompletionRequest, leases: AdapterLeases) -> Generation:
        """Owns the leases from now on: if it raises (RequestError), they are released."""
        return await self._prepare(
            body,
            leases,
            prompts=lambda: map(self.encoded, body.prompt),
            param="prompt",
            max_tokens=lambda prompt: body.max_tokens or COMPLETION_MAX_TOKENS,
            continues=True,
        )

    async def _prepare(
        self,
        body: GenerationRequest,
        leases: AdapterLeases,
        *,
        prompts: Callable[[], Iterable[list[int]]],
        param: str,
        max_tokens: Callable[[list[int]], int],
        continues: bool,
    ) -> Generation:
        """`prompts` may take long and runs in a worker thread; `continues`: the reply continues the prompt's text."""
        started = time.monotonic()
        outcome = "abort"
        try:
            # Each is checked before the next is encoded: the first that is too long ends it.
            encoded = await run_in_thread(lambda: [self._limited(prompt, max_tokens, param) for prompt in prompts()])
            identity = uuid.uuid4().hex
            choices = []
            for index, (prompt, limit) in enumerate(encoded):
                sequence = self._sequence(f"{identity}-{index}", prompt, limit, body, leases)
                choices.append(Choice(index, sequence, self._detokenizer(body, prompt if continues else ())))
        except BaseException as error:
            if isinstance(error, Exception):
                outcome = "rejected" if isinstance(error, LoramuxError | AdapterError) else "error"
            await give_back(self._deps.metrics, leases, outcome, started)
            raise
        return Generation(
            self._deps.engine,
            self._deps.metrics,
            leases,
            choices,
            started=started,
            timeout=self._deps.limits.request_seconds,
        )

    def _sequence(
        self, identity: str, prompt: list[int], max_tokens: int, body: GenerationRequest, leases: AdapterLeases
    ) -> EngineSequence:
        temperature = 1.0 if body.temperature is None else body.temperature
        params = SamplingParams(
            temperature=temperature if temperature >= LEAST_TEMPERATURE else 0.0,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=max(0, body.top_k or 0),
            min_p=body.min_p or 0.0,
            seed=body.seed,
            max_tokens=max_tokens,
            logprobs=body.alternatives,
            stop_token_ids=frozenset() if body.ignore_eos else self._deps.tokenizer.stop_ids,
        )
        return EngineSequence(identity, prompt, params, leases.uses(), adapter=leases.adapter)

    def _detokenizer(self, body: GenerationRequest, context: Sequence[int]) -> Detokenizer:
        tokenizer = self._deps.tokenizer
        return Detokenizer(
            tokenizer.decode, stop=body.stop, skip=tokenizer.special_ids, context=context[-_CONTEXT_TOKENS:]
        )

    def encoded_chat(self, body: TemplateOptions, leases: AdapterLeases) -> list[int]:
        """Messages as tokens, by the base's template or the adapters'. Raises RequestError.

        In a worker thread: it reads files, and may take long.
        """
        self._check_characters(sum(len(message.content) for message in body.messages), "messages")
        return self._deps.tokenizer.encode_chat(
            [message.for_template for message in body.messages],
            chat_template=chat_template_of(self._deps.store, leases),
            template_kwargs=body.template_variables,
            add_generation_prompt=body.opens_turn,
        )

    def encoded(self, prompt: str | list[int]) -> list[int]:
        """A prompt as tokens. Raises RequestError; in a worker thread, since it may take long."""
        if isinstance(prompt, str):
            self._check_characters(len(prompt), "prompt")
            return self._deps.tokenizer.encode(prompt, special=self._deps.special_in_prompts)
        self.check_token_ids(prompt, "prompt")
        return prompt

    def check_token_ids(self, tokens: Sequence[int], param: str) -> None:
        """Raises RequestError for an id that is no token."""
        vocab_size = self._deps.tokenizer.vocab_size
        if tokens and (min(tokens) < 0 or max(tokens) >= vocab_size):
            raise RequestError(f"'{param}': token ids must be 0 to {vocab_size - 1}", param=param, code="invalid_value")

    def _check_characters(self, count: int, param: str) -> None:
        """Refuses a text that cannot fit, before the tokenizer spends seconds on it."""
        context, longest = self._deps.base.context, self._deps.tokenizer.longest_token
        if count > context * longest:
            raise RequestError(
                f"the context holds {context} tokens of at most {longest} characters each, {context * longest} "
                f"characters in all, and the prompt has {count}; shorten it",
                param=param,
                code=CONTEXT_EXCEEDED,
            )

    def _limited(self, prompt: list[int], max_tokens: Callable[[list[int]], int], param: str) -> tuple[list[int], int]:
        """A prompt that fits, and the most tokens of its reply."""
        context, limit = self._deps.base.context, max_tokens(prompt)
        if not prompt:
            raise RequestError(f"'{param}': no tokens are left of it", param=param, code="invalid_value")
        if len(prompt) >= context:
            raise RequestError(
                f"the context holds {context} tokens and the prompt alone has {len(prompt)}; shorten it to at most "
                f"{context - 1}",
                param=param,
                code=CONTEXT_EXCEEDED,
            )
        if len(prompt) + limit > context:
            raise RequestError(
                f"the context holds {context} tokens; the prompt has {len(prompt)} and max_tokens is {limit}: "
                "shorten one of them",
                param="max_tokens",
                code=CONTEXT_EXCEEDED,
            )
        return prompt, limit

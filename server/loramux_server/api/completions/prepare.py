"""A checked request body -> a generation that can start.

In this order: which adapters the request names, leases on their versions, the prompt as tokens, and a sequence for each
choice of the reply.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from loramux_adapters.artifact.format import read_chat_template
from loramux_adapters.errors import AdapterError
from loramux_server.access.caller import Caller
from loramux_server.api.completions.conversation import as_turns
from loramux_server.api.completions.request.adapter_defaults import RequestDefaults, same_of_all
from loramux_server.api.completions.request.chat import ChatRequest, TemplateOptions
from loramux_server.api.completions.request.completion import CompletionRequest
from loramux_server.api.completions.request.generation import AdapterPart, GenerationRequest
from loramux_server.api.completions.request.shapes import AskedShape
from loramux_server.api.completions.running.choice import Choice, Echo
from loramux_server.api.completions.running.generation import Generation, give_back
from loramux_server.api.completions.running.leases import AdapterLeases
from loramux_server.api.completions.running.reading import Reading
from loramux_server.api.completions.sampling import check_token_ids, sampling_of, seed_of
from loramux_server.api.http.dependencies import Dependencies, TokenizerLike
from loramux_server.api.http.model_names import RequestedAdapter, resolve_model
from loramux_server.api.http.worker_threads import run_in_thread
from loramux_server.base.detokenizer import Detokenizer
from loramux_server.engine.scheduling.grammar import Grammar
from loramux_server.engine.scheduling.sequence import Sequence as EngineSequence
from loramux_server.errors import LoramuxError, RequestError
from loramux_server.metrics.metrics import Metrics
from loramux_server.tools.history import for_template

COMPLETION_MAX_TOKENS = 16  # OpenAI's default
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


def chat_template_of(leases: AdapterLeases) -> str | None:
    """The chat template that the leased versions bring in place of the base's; None if they bring none.

    Reads their files. Raises RequestError if they do not agree: no template suits adapters that learned from two.
    """
    own = [(name, read_chat_template(directory)) for name, directory in leases.directories()]
    return same_of_all(
        own,
        "use different chat templates, so they cannot chat together; use /v1/completions, or publish them with the "
        "same chat template",
    )


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a request.

    Attributes:
        tokens: what the base reads.
        text: as it was sent; None if it came as tokens, or was put together or cut here.
        reading: how its replies are read; None if they are text and nothing else.
    """

    tokens: list[int]
    text: str | None = None
    reading: Reading | None = None


@dataclass(frozen=True, slots=True)
class PromptPlan:
    """What a route makes of a request's body.

    Attributes:
        prompts: may take long, and raises RequestError.
        param: that they come from.
        max_tokens: of the reply to a prompt of these tokens.
        room: for a reply, that a prompt which is cut leaves.
        continues: the reply continues the prompt's text.
        echoes: the reply begins with the prompt.
        fills_in: the reply is what stands in front of the prompt's end, and stops where that begins.
    """

    prompts: Callable[[TokenizerLike], Iterable[Prompt]]
    param: str
    max_tokens: Callable[[list[int]], int]
    room: int
    continues: bool = False
    echoes: bool = False
    fills_in: bool = False


@contextmanager
def refusals_counted(metrics: Metrics) -> Iterator[None]:
    """Counts a request that is refused before it holds anything."""
    try:
        yield
    except (LoramuxError, AdapterError):
        metrics.request_refused()
        raise


class Preparation:
    """`leases` first, then `chat` or `completion` with them."""

    def __init__(self, deps: Dependencies) -> None:
        self._deps = deps

    async def leases(self, caller: Caller, model: str, adapters: Sequence[AdapterPart] | None) -> AdapterLeases:
        """Leases on the versions that a request names. Raises RequestError or AdapterError."""
        targets = requested_adapters(model, adapters, self._deps.base.name)
        seat = await self._deps.rates.begin(caller)
        try:
            await self._deps.fetched(targets)
            store = self._deps.visible(caller)
            leases = await AdapterLeases.acquire(
                store, targets, self._deps.tokenizer.vocab_size, listed=adapters is not None, seat=seat
            )
        except BaseException:
            seat.end()
            raise
        self._deps.metrics.request_started(leases.adapter)
        return leases

    def tokenizer(self, leases: AdapterLeases) -> TokenizerLike:
        """The base's, with what the adapters add to it. In a worker thread: the first time may take a second."""
        return self._deps.tokenizer.with_tokens(leases.own_tokens)

    async def chat(self, body: ChatRequest, leases: AdapterLeases) -> Generation:
        """Owns the leases from now on: if it raises (RequestError), they are released."""
        base, own = self._deps.base, leases.defaults

        def longest_reply(prompt: list[int]) -> int:
            room = own.context(base.context) - len(prompt)
            return body.longest_reply or own.longest_reply(body, room) or min(base.reply, room)

        plan = PromptPlan(
            prompts=lambda tokenizer: [self.encoded_chat(body, leases, tokenizer)],
            param="messages",
            max_tokens=longest_reply,
            room=body.longest_reply or 1,
            continues=bool(body.continue_final_message),
        )
        return await self._prepare(body, leases, plan)

    async def completion(self, body: CompletionRequest, leases: AdapterLeases) -> Generation:
        """Owns the leases from now on: if it raises (RequestError), they are released."""
        own = leases.defaults

        def longest_reply(prompt: list[int]) -> int:
            if body.max_tokens is not None:
                return body.max_tokens
            return own.longest_reply(body, own.context(self._deps.base.context) - len(prompt)) or COMPLETION_MAX_TOKENS

        plan = PromptPlan(
            prompts=lambda tokenizer: (self._completion_prompt(body, prompt, tokenizer) for prompt in body.prompt),
            param="prompt",
            max_tokens=longest_reply,
            room=COMPLETION_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
            continues=not body.suffix,
            echoes=bool(body.echo),
            fills_in=bool(body.suffix),
        )
        return await self._prepare(body, leases, plan)

    async def _prepare(self, body: GenerationRequest, leases: AdapterLeases, plan: PromptPlan) -> Generation:
        started = time.monotonic()
        outcome = "abort"
        try:
            choices = await run_in_thread(self._choices, body, leases, plan)
            firsts = [choice.sequence for choice in choices if choice.sequence.shares_prompt_with is None]
            await leases.seat.read(sum(len(sequence.prompt) for sequence in firsts))
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
            kept=body.replies if body.candidates > body.replies else None,
        )

    def _choices(self, body: GenerationRequest, leases: AdapterLeases, plan: PromptPlan) -> list[Choice]:
        """Prompt by prompt, all replies to each. Raises RequestError."""
        own = leases.defaults
        body = own.filled(body)
        tokenizer = self.tokenizer(leases)
        params = sampling_of(body, tokenizer)
        if plan.fills_in and tokenizer.infill is not None:
            params = replace(params, stop_token_ids=params.stop_token_ids | tokenizer.infill.end_ids)
        # Each is checked before the next is encoded: the first that is too long ends it.
        prompts = [
            self._limited(self._cut(prompt, body, plan.room, own), body, plan, own)
            for prompt in plan.prompts(tokenizer)
        ]
        own_ends = frozenset() if body.ignore_eos else tokenizer.stop_ids
        named_stops = frozenset(body.stop_token_ids or ()) - own_ends
        identity = uuid.uuid4().hex
        choices: list[Choice] = []
        for prompt, limit in prompts:
            of_prompt = replace(params, max_tokens=limit)
            if not limit and params.prompt_logprobs is None:  # nothing but the prompt's text is wanted
                of_prompt = replace(of_prompt, prompt_logprobs=0, prompt_logprobs_from=len(prompt.tokens))
            echo = _echo(prompt, body.alternatives, tokenizer) if plan.echoes else None
            asked = body.shape if prompt.reading is None else prompt.reading.shape(body.shape)
            first = f"{identity}-{len(choices)}"
            for place in range(body.candidates):
                sequence = EngineSequence(
                    f"{identity}-{len(choices)}",
                    prompt.tokens,
                    replace(
                        of_prompt,
                        seed=seed_of(params.seed, place),
                        grammar=self._grammar(asked, prompt.reading, leases),
                    ),
                    leases.uses(),
                    adapter=leases.adapter,
                    shares_prompt_with=first if place else None,
                    tenant=leases.seat.tenant,
                    weight=leases.seat.limits.weight,
                    priority=leases.seat.limits.priority,
                    cache_group=leases.cache_group(body.cache_salt),
                )
                choices.append(
                    Choice(
                        len(choices),
                        sequence,
                        _detokenizer(body, prompt, tokenizer, continues=plan.continues),
                        named_stops=named_stops,
                        shows_stop=bool(body.include_stop_str_in_output),
                        echo=echo,
                        reader=None if prompt.reading is None else prompt.reading.reader(),
                    )
                )
        return choices

    def _grammar(self, asked: AskedShape | None, reading: Reading | None, leases: AdapterLeases) -> Grammar | None:
        """Of one reply alone, since it follows what was chosen so far. Raises RequestError."""
        if asked is None:
            return None
        try:
            return self._deps.grammars.of(asked.shape, asked.param, leases.own_tokens)
        except RequestError as error:
            if reading is None or asked.param != "tools":
                raise
            raise reading.blamed(error) from error

    def _completion_prompt(self, body: CompletionRequest, prompt: str | list[int], tokenizer: TokenizerLike) -> Prompt:
        """Raises RequestError."""
        if body.suffix:
            return Prompt(self._infill(prompt, body.suffix, tokenizer))
        around = body.add_special_tokens is not False
        return Prompt(self.encoded(prompt, tokenizer, around=around), prompt if isinstance(prompt, str) else None)

    def _infill(self, prompt: str | list[int], suffix: str, tokenizer: TokenizerLike) -> list[int]:
        """The prompt that asks for what stands between a text and a suffix. Raises RequestError."""
        special = self._deps.special_in_prompts
        if tokenizer.infill is None:
            raise RequestError(
                "'suffix': this base has no tokens for filling in; it can only go on behind a text",
                param="suffix",
                code="unsupported_value",
            )
        if isinstance(prompt, str):
            self._check_characters(len(prompt) + len(suffix), "suffix", tokenizer)
            before = tokenizer.encode(prompt, special=special, around=False)
        else:
            self._check_characters(len(suffix), "suffix", tokenizer)
            before = self.encoded(prompt, tokenizer)
        after = tokenizer.encode_piece(suffix, special=special)
        begin = tokenizer.encode("", special=special)
        return begin[:1] + tokenizer.infill.prompt(before, after)

    def _cut(self, prompt: Prompt, body: GenerationRequest, room: int, own: RequestDefaults) -> Prompt:
        """The prompt without what is more than the request lets it have."""
        if (most := body.truncate_prompt_tokens) is None:
            return prompt
        if most == -1:
            most = max(0, own.context(self._deps.base.context) - room)
        if len(prompt.tokens) <= most:
            return prompt
        kept = prompt.tokens[:most] if body.truncation_side == "right" else prompt.tokens[len(prompt.tokens) - most :]
        return Prompt(kept, reading=prompt.reading)

    def encoded_chat(self, body: TemplateOptions, leases: AdapterLeases, tokenizer: TokenizerLike) -> Prompt:
        """Messages as tokens, by the base's template or the adapters'. Raises RequestError.

        In a worker thread: it reads files, and may take long.
        """
        calling = body.calling
        tools = () if calling is None else calling.tools
        self._check_characters(sum(message.characters for message in body.messages), "messages", tokenizer)
        self._check_characters(
            sum(len(tool.description) + len(str(tool.parameters)) for tool in tools), "tools", tokenizer
        )
        template = chat_template_of(leases)
        conventions = tokenizer.conventions(template)
        turns, described = for_template(conventions, as_turns(body.messages), tools)
        tokens = tokenizer.encode_chat(
            turns,
            chat_template=template,
            template_kwargs=body.template_variables | described,
            add_generation_prompt=body.opens_turn,
            continue_final_message=bool(body.continue_final_message),
        )
        reasoning = conventions.reasoning
        end = tokenizer.decode(tokens[-_CONTEXT_TOKENS:], special=True)
        is_thinking = reasoning is not None and reasoning.opened_by(end)
        return Prompt(tokens, reading=Reading(conventions, calling, is_thinking))

    def encoded(
        self, prompt: str | list[int], tokenizer: TokenizerLike, param: str = "prompt", *, around: bool = True
    ) -> list[int]:
        """A prompt as tokens; `around`: with those that the base expects around a text.

        Raises RequestError; in a worker thread, since it may take long.
        """
        if isinstance(prompt, str):
            self._check_characters(len(prompt), param, tokenizer)
            return tokenizer.encode(prompt, special=self._deps.special_in_prompts, around=around)
        check_token_ids(prompt, param, tokenizer)
        return prompt

    def _check_characters(self, count: int, param: str, tokenizer: TokenizerLike) -> None:
        """Refuses a text that cannot fit, before the tokenizer spends seconds on it."""
        context, longest = self._deps.base.context, tokenizer.longest_token
        if count > context * longest:
            raise RequestError(
                f"the context holds {context} tokens of at most {longest} characters each, {context * longest} "
                f"characters in all, and the prompt has {count}; shorten it",
                param=param,
                code=CONTEXT_EXCEEDED,
            )

    def _limited(
        self, prompt: Prompt, body: GenerationRequest, plan: PromptPlan, own: RequestDefaults
    ) -> tuple[Prompt, int]:
        """A prompt that fits, and the most tokens of its reply."""
        context, whose = own.context(self._deps.base.context), own.whose_context(self._deps.base.context)
        length, limit = len(prompt.tokens), plan.max_tokens(prompt.tokens)
        if not length:
            raise RequestError(f"'{plan.param}': no tokens are left of it", param=plan.param, code="invalid_value")
        longest = context - 1 if limit else context
        if length > longest:
            raise RequestError(
                f"{whose} holds {context} tokens and the prompt alone has {length}; shorten it to at most {longest}",
                param=plan.param,
                code=CONTEXT_EXCEEDED,
            )
        if length + limit > context:
            raise RequestError(
                f"{whose} holds {context} tokens; the prompt has {length} and max_tokens is {limit}: "
                "shorten one of them",
                param="max_tokens",
                code=CONTEXT_EXCEEDED,
            )
        if (body.min_tokens or 0) > limit:
            raise RequestError(
                f"'min_tokens' is {body.min_tokens}, and the reply has at most {limit}",
                param="min_tokens",
                code="invalid_value",
            )
        return prompt, limit


def _detokenizer(body: GenerationRequest, prompt: Prompt, tokenizer: TokenizerLike, *, continues: bool) -> Detokenizer:
    shown = frozenset() if prompt.reading is None else prompt.reading.shown_ids
    skip = frozenset() if body.skip_special_tokens is False else tokenizer.special_ids - shown
    return Detokenizer(
        tokenizer.decode if skip == tokenizer.special_ids else partial(tokenizer.decode, special=True),
        stop=body.stop,
        skip=skip,
        context=prompt.tokens[-_CONTEXT_TOKENS:] if continues else (),
        min_tokens=body.min_tokens or 0,
        include_stop=bool(body.include_stop_str_in_output),
    )


def _echo(prompt: Prompt, alternatives: int | None, tokenizer: TokenizerLike) -> Echo:
    """A prompt's text, and where its tokens begin in it, counted from its end: what a base expects around a text
    stands before it.
    """
    detokenizer = Detokenizer(partial(tokenizer.decode, special=True))
    parts, offsets = [], []
    for token in prompt.tokens:
        offsets.append(detokenizer.position)
        parts.append(detokenizer.add(token))
    decoded = "".join(parts) + detokenizer.flush()
    text = decoded if prompt.text is None else prompt.text
    before = len(decoded) - len(text)
    return Echo(text, [max(0, offset - before) for offset in offsets], alternatives)

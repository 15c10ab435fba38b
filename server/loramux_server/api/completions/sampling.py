"""The options of a checked request -> how the engine chooses tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from loramux_server.api.completions.request.generation import GenerationRequest
from loramux_server.api.http.dependencies import TokenizerLike
from loramux_server.engine.scheduling.sequence import SamplingParams
from loramux_server.errors import RequestError

LEAST_TEMPERATURE = 1e-4  # below it the choice is greedy anyway, and logits divided by it would overflow
MAX_BAD_TOKENS = 8192  # of all bad words together


def sampling_of(body: GenerationRequest, tokenizer: TokenizerLike) -> SamplingParams:
    """What all replies have in common: all but their lengths, their grammars, and seeds of further replies to a prompt.

    Encodes texts: in a worker thread. Raises RequestError: an id is outside the vocabulary.
    """
    temperature = 1.0 if body.temperature is None else body.temperature
    biases = body.logit_bias or ()
    check_token_ids([token for token, _ in biases], "logit_bias", tokenizer)
    allowed = tuple(dict.fromkeys(body.allowed_token_ids or ()))
    check_token_ids(allowed, "allowed_token_ids", tokenizer)
    stops = frozenset(body.stop_token_ids or ())
    check_token_ids([*stops], "stop_token_ids", tokenizer)
    return SamplingParams(
        temperature=temperature if temperature >= LEAST_TEMPERATURE else 0.0,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(0, body.top_k or 0),
        min_p=body.min_p or 0.0,
        seed=body.seed,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        logit_bias=tuple((token, bias) for token, bias in biases if bias),
        allowed_token_ids=allowed or None,
        bad_words=tuple(_bad_words(body.bad_words or (), tokenizer)),
        min_tokens=body.min_tokens or 0,
        # The best of several replies is told by its log probabilities, even if nobody asked for them.
        logprobs=0 if body.candidates > body.replies and body.alternatives is None else body.alternatives,
        prompt_logprobs=body.scored_prompt,
        stop_token_ids=stops if body.ignore_eos else stops | tokenizer.stop_ids,
    )


def check_token_ids(tokens: Sequence[int], param: str, tokenizer: TokenizerLike) -> None:
    """Raises RequestError for an id that is no token."""
    vocab_size = tokenizer.vocab_size
    if tokens and (min(tokens) < 0 or max(tokens) >= vocab_size):
        raise RequestError(f"'{param}': token ids must be 0 to {vocab_size - 1}", param=param, code="invalid_value")


def seed_of(seed: int | None, place: int) -> int | None:
    """The seed of one of several replies to a prompt: the first has the request's own, as if it were alone.

    The others' are digests of it and their place, so that no seed nearby gives the same replies in another order.
    """
    if seed is None or not place:
        return seed
    digest = hashlib.blake2b(f"{seed}/{place}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def _bad_words(words: Sequence[str], tokenizer: TokenizerLike) -> Iterator[tuple[int, ...]]:
    """Each word as it begins a text and as it follows a space, once: a tokenizer writes them differently.

    As in vLLM, spaces before a word do not count, and the form with a space is left out where it is not the same word
    with another first token (with one token more, what it forbade would be a space).
    """
    total = 0
    for word in dict.fromkeys(words):
        bare = tokenizer.encode(word.lstrip(), special=False, around=False)
        spaced = tokenizer.encode(" " + word.lstrip(), special=False, around=False)
        if not bare:
            raise RequestError(f"'bad_words': no tokens are left of {ascii(word)}", param="bad_words")
        total += len(bare) + len(spaced)
        if total > MAX_BAD_TOKENS:
            raise RequestError(f"'bad_words': all of them together may have {MAX_BAD_TOKENS} tokens", param="bad_words")
        yield tuple(bare)
        if len(spaced) == len(bare) and spaced[0] != bare[0]:
            yield tuple(spaced)

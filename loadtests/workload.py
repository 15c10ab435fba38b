"""What is asked: prompts, their lengths, and which adapter each request names. One seed gives one list of requests."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

# How requests spread over adapters, in the words of punica's benchmarks.
POPULARITIES = {
    "distinct": "each request names another adapter than the one before it, in turn",
    "uniform": "each request draws its adapter, all equally likely",
    "zipf": "each request draws its adapter, the k-th with a weight of 1/k^exponent",
    "identical": "all requests name the same adapter",
    "skewed": "half of the requests name one hot adapter, the others take the rest in turn",
}

_SUBJECTS = (
    "the old gardener",
    "a young engineer",
    "the captain",
    "my neighbour",
    "a quiet student",
    "the baker",
)
_VERBS = ("looked for", "talked about", "drew a map of", "repaired", "wrote a letter about", "remembered")
_OBJECTS = (
    "the wooden bridge",
    "a broken clock",
    "the long winter",
    "a small boat",
    "the station",
    "a blue lamp",
)
_PLACES = ("near the river", "behind the school", "in the mountains", "at the market", "on the island", "by the window")
_TIMES = (
    "in the morning",
    "after the rain",
    "late at night",
    "on May Day",
    "before supper",
    "every Sunday",
)


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a run. `adapter` None asks the bare base."""

    index: int
    prompt: str
    adapter: str | None
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """A recipe for requests.

    Attributes:
        adapters: names to choose from; empty sends every request to the base.
        popularity: one of POPULARITIES.
        base_share: part of the requests, 0 to 1, that go to the bare base although there are adapters.
        prompt_words: fewest and most words of a prompt, drawn evenly; a word is 1.1 to 1.3 tokens for usual tokenizers.
        shared_words: with so many words all prompts begin alike; they come on top of `prompt_words`.
        max_tokens: of every reply.
    """

    adapters: tuple[str, ...] = ()
    popularity: str = "distinct"
    zipf_exponent: float = 1.0
    base_share: float = 0.0
    prompt_words: tuple[int, int] = (20, 40)
    shared_words: int = 0
    max_tokens: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.popularity not in POPULARITIES:
            raise ValueError(f"popularity {self.popularity!r} is not one of {', '.join(POPULARITIES)}")
        if not 0.0 <= self.base_share <= 1.0:
            raise ValueError(f"base_share {self.base_share} is not between 0 and 1")
        if not 1 <= self.prompt_words[0] <= self.prompt_words[1]:
            raise ValueError(f"prompt_words {self.prompt_words} are not fewest and most, from 1")

    def requests(self, count: int) -> list[Request]:
        """The first `count` requests; a longer list begins with a shorter one."""
        adapters = choose_adapters(self.popularity, self.adapters, count, self.seed, self.zipf_exponent)
        rng = random.Random(f"{self.seed}:requests")
        shared = make_prompt(-1, self.shared_words, random.Random(f"{self.seed}:shared")) if self.shared_words else ""
        requests = []
        for index, adapter in enumerate(adapters):
            words = rng.randint(*self.prompt_words)
            to_base = rng.random() < self.base_share
            prompt = make_prompt(index, words, random.Random(f"{self.seed}:prompt:{index}"))
            prompt = f"{shared}\n{prompt}" if shared else prompt
            requests.append(Request(index, prompt, None if to_base else adapter, self.max_tokens))
        return requests


def choose_adapters(
    popularity: str, adapters: tuple[str, ...], count: int, seed: int, zipf_exponent: float = 1.0
) -> list[str | None]:
    """One adapter name per request, [count]; all None where there are no adapters."""
    if not adapters:
        return [None] * count
    rng = random.Random(f"{seed}:popularity")
    if popularity == "identical":
        return [adapters[0]] * count
    if popularity == "distinct":
        return list(itertools.islice(itertools.cycle(adapters), count))
    if popularity == "skewed":
        others = itertools.cycle(adapters[1:] or adapters)
        return [adapters[0] if index % 2 == 0 else next(others) for index in range(count)]
    exponent = zipf_exponent if popularity == "zipf" else 0.0
    weights = [(place + 1) ** -exponent for place in range(len(adapters))]
    return [rng.choices(adapters, weights)[0] for _ in range(count)]


def make_prompt(index: int, words: int, rng: random.Random) -> str:
    """Plain text of exactly `words` words that begins with its number, so that no two prompts share a prefix."""
    text = f"{index + 1}. Here is a long story about many things:".split()
    while len(text) < words:
        parts = [rng.choice(choices) for choices in (_TIMES, _SUBJECTS, _VERBS, _OBJECTS, _PLACES)]
        sentence = " ".join(parts)
        text += f"{sentence[0].upper()}{sentence[1:]}.".split()
    return " ".join(text[:words])


def adapter_ranks(ranks: tuple[int, ...], count: int) -> list[int]:
    """The rank of each adapter: the given ranks in turn, [count]."""
    return list(itertools.islice(itertools.cycle(ranks), count))

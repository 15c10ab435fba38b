"""Examples as tokens: the prompt as the server renders it, then what the assistant is to learn to say, end included."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from loramux_adapters.chat.encoder import ChatTemplate, TextEncoder
from loramux_adapters.errors import DataError, TemplateFailed, TokenizerMissing
from loramux_adapters.training.data.batches import Row
from loramux_adapters.training.data.examples import Example, ExampleSet, LineError, Message, Skipped, refusal

MARGIN = 16  # tokens that stay at either end of a user's message when its middle is cut


@dataclass(frozen=True, slots=True)
class Rendered:
    """A file's examples as rows.

    Attributes:
        rows: one for each of `examples`, in that order.
        examples: those that gave a row.
        skipped: those that did not.
    """

    rows: tuple[Row, ...]
    examples: tuple[Example, ...]
    skipped: tuple[Skipped, ...]

    @property
    def cut_rows(self) -> int:
        """Rows that were too long and lost tokens."""
        return sum(row.cut > 0 for row in self.rows)

    @property
    def cut_tokens(self) -> int:
        """Tokens that truncation took away from all rows."""
        return sum(row.cut for row in self.rows)


class Renderer:
    """Turns conversations into tokens exactly as the server does, and marks those to learn.

    As there, what is said never becomes a special token: the text of a conversation holds marks for the chat template's
    own (`ChatTemplate`).
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        *,
        stop_ids: Iterable[int] = (),
        chat_template: str | None = None,
        encoder: TextEncoder | None = None,
    ) -> None:
        """
        Args:
            stop_ids: further tokens that the server ends a reply at, beside the tokenizer's own end token.
            chat_template: what an adapter brings in place of the base's.
            encoder: of this tokenizer and these tokens, where there is one already.
        Raises:
            DataError: the base has no fast tokenizer, or no token that ends a reply.
            TemplateFailed: the template is none.
        """
        stop_ids = [*stop_ids]
        try:
            self._encoder = encoder or TextEncoder(tokenizer, stop_ids)
        except TokenizerMissing as error:
            raise DataError(f"{error}; use a base that has one") from error
        self.max_length = max_length
        eos = tokenizer.eos_token_id
        self.end_ids = frozenset(int(token) for token in [*stop_ids, eos] if token is not None)
        if not self.end_ids:
            raise DataError("the base names no token that ends a reply (eos_token), so an answer could not end")
        self.eos_id = int(eos) if eos is not None else min(self.end_ids)
        self._template: ChatTemplate | None = self._encoder.template(chat_template)
        added = tokenizer.added_tokens_decoder  # their text is one token wherever it stands, so text can be searched
        self._end_texts = tuple(str(added[token]) for token in sorted(self.end_ids) if token in added)

    @property
    def has_template(self) -> bool:
        """Whether the base can chat; if not, it can learn pairs of prompt and completion alone, as plain text."""
        return self._template is not None

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids that the server runs for these messages, up to where the assistant's answer begins.

        Raises:
            DataError: the base has no chat template, or its template refuses these messages.
        """
        return self._ids(self._chat_text(messages, 0, generate=True))

    def prompt_of(self, example: Example) -> list[int]:
        """The ids before the example's last answer, whatever their number. Raises DataError."""
        if example.is_pair and not self.has_template:
            return self._ids(_plain_prompt(example), special=True)
        return self._ids(self._chat_text(example.prompt, example.line, generate=True))

    def render(self, example: Example) -> Row:
        """The example's tokens. Of one that is too long, the middle of the user's messages goes; the answer stays.

        Raises:
            LineError: it cannot be rendered as the server would, or nothing to learn is left of it.
        """
        plain = example.is_pair and not self.has_template
        text, spans, closed = self._plain(example) if plain else self._chat(example)
        start, end = spans[-1]
        prompt = self._ids(text[:start], special=plain)
        ids = self._ids(text[:end], special=plain)
        if ids[: len(prompt)] != prompt or len(ids) == len(prompt):
            # a token would reach over the border: the server's prompt ends there, so the answer's tokens start anew
            ids = prompt + self._ids(text[start:end])
        if not closed:
            ids.append(self.eos_id)
        learn = [False] * len(prompt) + [True] * (len(ids) - len(prompt))
        for earlier in spans[:-1]:
            first, last = (self._tokens_before(text[:border], prompt, example.line) for border in earlier)
            learn[first:last] = [True] * (last - first)
        if len(ids) <= self.max_length:
            return Row(tuple(ids), tuple(learn))
        return self._shorten(ids, learn, self._cuttable(text[:start], example, special=plain), example.line)

    def render_set(self, examples: ExampleSet, *, skip_bad: bool = False) -> Rendered:
        """All examples of a file.

        Args:
            skip_bad: leave out those that cannot be rendered, with their reasons, instead of refusing the file.
        Raises:
            DataError: some cannot be rendered, or none is left.
        """
        rows: list[Row] = []
        kept: list[Example] = []
        skipped: list[Skipped] = []
        for example in examples.examples:
            try:
                rows.append(self.render(example))
                kept.append(example)
            except LineError as error:
                skipped.append(Skipped(error.line, error.reason))
        if skipped and not (skip_bad and rows):
            raise refusal(examples.path, skipped, len(examples.examples))
        return Rendered(tuple(rows), tuple(kept), tuple(skipped))

    def _plain(self, example: Example) -> tuple[str, list[tuple[int, int]], bool]:
        """As `_chat`, for a base that cannot chat: prompt and completion as they are."""
        self._refuse_ends(example)
        prompt = _plain_prompt(example)
        return prompt + example.answer, [(len(prompt), len(prompt) + len(example.answer))], False

    def _chat(self, example: Example) -> tuple[str, list[tuple[int, int]], bool]:
        """The conversation's text, where each answer starts and ends in it, and whether the last has its end token.

        An answer starts where the server would let the assistant begin. Raises LineError.
        """
        self._refuse_ends(example)
        messages, line = example.messages, example.line
        text = self._chat_text(messages, line, generate=False)
        spans: list[tuple[int, int]] = []
        closed = False
        for number, message in enumerate(messages):
            if message.role != "assistant":
                continue
            before = self._chat_text(messages[:number], line, generate=True)
            if not text.startswith(before):
                raise LineError(
                    line,
                    f"does not keep the prompt of message {number + 1} in the base's chat template: what the server "
                    "would show before that answer is not how the whole conversation begins; "
                    "use prompt and completion, or split the conversation",
                )
            end, closed = self._end_of(message.content, text, len(before), line)
            spans.append((len(before), end))
        return text, spans, closed

    def _chat_text(self, messages: Sequence[Message], line: int, *, generate: bool) -> str:
        """Raises LineError."""
        if self._template is None:
            raise LineError(
                line, "is a conversation, but this base has no chat template; write lines of 'prompt' and 'completion'"
            )
        plain = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self._template.text(plain, generate=generate)
        except TemplateFailed as error:
            raise LineError(line, f"is refused by the base's chat template: {error}") from error

    def _end_of(self, answer: str, text: str, start: int, line: int) -> tuple[int, bool]:
        """Where the answer that starts here ends, and whether the template has put an end token there.

        The end token counts only right behind the answer: some templates close the user's turns alone, or with a token
        that the server does not stop at. Raises LineError.
        """
        rest = text[start:]
        said_last = answer.strip().splitlines()[-1].strip()
        assert self._template is not None
        own = [self._template.own(end) for end in self._end_texts]
        ends = [(rest.find(end), -len(end)) for end in own if end in rest]
        if ends:
            at, length = min(ends)
            if rest[:at].rstrip().endswith(said_last):
                return start + at - length, True
        at = rest.find(answer.strip())
        if at < 0:
            raise LineError(line, "has an answer that the base's chat template changes; it could not be learned as is")
        return start + at + len(answer.strip()), False

    def _refuse_ends(self, example: Example) -> None:
        """Raises LineError."""
        for message in example.messages:
            for end in self._end_texts:
                if message.role == "assistant" and end in message.content:
                    raise LineError(
                        example.line, f"has {end} inside an answer; the end token is added on its own, take it out"
                    )

    def _tokens_before(self, text: str, whole: list[int], line: int) -> int:
        """How many tokens this beginning of the conversation has. Raises LineError if they are not those of `whole`."""
        ids = self._ids(text)
        if whole[: len(ids)] != ids:
            raise LineError(
                line,
                "has an earlier answer whose tokens merge with those around it, so the server would see others; "
                "take white space off its start and end, or split the conversation",
            )
        return len(ids)

    def _cuttable(self, prompt: str, example: Example, *, special: bool) -> list[tuple[int, int]]:
        """Token ranges that may be cut: the users' messages without their margins."""
        offsets = self._offsets(prompt, special=special)
        ranges = []
        position = 0
        for message in example.prompt:
            start = prompt.find(message.content.strip(), position)
            if start < 0:
                continue
            position = start + len(message.content.strip())
            if message.role == "user":
                inside = [index for index, (first, last) in enumerate(offsets) if start <= first < last <= position]
                if len(inside) > 2 * MARGIN:
                    ranges.append((inside[MARGIN], inside[-MARGIN]))
        return ranges

    def _shorten(self, ids: list[int], learn: list[bool], ranges: list[tuple[int, int]], line: int) -> Row:
        """Raises LineError if nothing to learn is left."""
        excess = len(ids) - self.max_length
        if excess > sum(last - first for first, last in ranges) and learn.index(True) <= self.max_length // 2:
            ranges = []  # the answers alone are too long: a mutilated prompt would not save them
        gone: set[int] = set()
        for first, last in sorted(ranges, key=lambda span: span[0] - span[1]):
            take = min(excess - len(gone), last - first)
            middle = first + (last - first - take) // 2
            gone |= set(range(middle, middle + take))
        kept = [index for index in range(len(ids)) if index not in gone][: self.max_length]
        if not any(learn[index] for index in kept[1:]):
            raise LineError(
                line,
                f"has {learn.index(True)} tokens before the answer, so none of it fits into max_length "
                f"{self.max_length}; raise max_length or shorten the prompt",
            )
        return Row(tuple(ids[index] for index in kept), tuple(learn[index] for index in kept), cut=len(ids) - len(kept))

    def _ids(self, text: str, *, special: bool = False) -> list[int]:
        """`special`: the text of a prompt without a template, and with what the base expects around it."""
        if special:
            return self._encoder.encode(text)
        return self._encoder.tokens.encode(text, around=False) if self._template is None else self._template.ids(text)

    def _offsets(self, text: str, *, special: bool) -> Sequence[tuple[int, int]]:
        if special or self._template is None:
            return self._encoder.tokens.offsets(text, marked=False, around=special)
        return self._template.offsets(text)


def _plain_prompt(example: Example) -> str:
    """Raises LineError: a system message has no place in plain text."""
    if len(example.prompt) != 1:
        raise LineError(example.line, "has a system message, but this base has no chat template; leave it out")
    return example.prompt[0].content

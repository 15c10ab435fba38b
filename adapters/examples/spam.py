"""Makes train.jsonl and held.jsonl of SMS Spam: `python adapters/examples/spam.py --out DIR`.

The held-out messages keep the share of spam that the collection has; the training file has more, by default 3 in 10.
With one spam message in eight, most steps would see one or two, and the adapter would learn to answer "ham".
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Iterator
from pathlib import Path

from fetch_data import SMS_SPAM, FetchFailed, default_cache, fetch
from labelled import Labelled, clean, mix, shares, split, without_copies, write_jsonl

LABELS = ("ham", "spam")
QUESTION = "Is this message spam or ham?"


def ask(text: str) -> list[dict[str, str]]:
    """The conversation that asks for the label of one message."""
    return [{"role": "user", "content": f"{QUESTION}\n\n{text}"}]


def read(path: Path) -> Iterator[Labelled]:
    """The messages of sms-spam.csv (columns index, spam, text).

    The file was made by a program that took a quotation mark in a message for the start of a quoted field: 8 of its
    4,837 rows hold up to 316 more messages, each on a line of its own as `label<TAB>text`. They count like the others.
    """
    for row in csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"), newline="")):
        first, *swallowed = row["text"].split("\n")
        yield Labelled(clean(first), LABELS[int(row["spam"])])
        for line in swallowed:
            label, _, text = line.partition("\t")
            if label not in LABELS:
                raise ValueError(f"{path.name}: {line[:40]!r} is neither a message nor a part of one")
            yield Labelled(clean(text), label)


def main() -> int:
    """Writes the two files and says what is in them."""
    parser = argparse.ArgumentParser(description="Make train.jsonl and held.jsonl of the SMS Spam collection.")
    parser.add_argument("--out", type=Path, required=True, help="directory to write into")
    parser.add_argument("--seed", type=int, default=0, help="of the split and the order (%(default)s)")
    parser.add_argument("--held-share", type=float, default=0.2, help="share of each class held out (%(default)s)")
    parser.add_argument("--spam-share", type=float, default=0.3, help="of the training file; 0: natural (%(default)s)")
    parser.add_argument(
        "--size", type=int, default=3200, help="training examples; 0: as many as there are (%(default)s)"
    )
    args = parser.parse_args()
    try:
        messages = list(read(fetch(default_cache())[SMS_SPAM]))
    except FetchFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    kept = without_copies((message for message in messages if message.text), ask)
    train, held = split(kept, held_share=args.held_share, seed=args.seed)
    mixed = mix(train, label="spam", share=args.spam_share, size=args.size, seed=args.seed)
    write_jsonl(args.out / "train.jsonl", mixed, ask)
    write_jsonl(args.out / "held.jsonl", held, ask)
    print(f"messages in the collection: {shares(messages)}")
    print(f"copies and near copies left out: {len(messages) - len(kept):,}; kept {shares(kept)}")
    print(f"{args.out / 'held.jsonl'}: {shares(held)}; always answering ham is right that often")
    print(f"{args.out / 'train.jsonl'}: {shares(mixed)} of {len(set(mixed)):,} different ones")
    return 0


if __name__ == "__main__":
    sys.exit(main())

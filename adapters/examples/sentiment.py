"""Makes train.jsonl and held.jsonl for the sentiment of four kinds of text.

    python adapters/examples/sentiment.py --out DIR

The texts are those that VADER was measured on; 20 people rated each from -4 to 4. The sign of the mean is the label.
Texts rated nearer to zero than --threshold are left out: there even the raters did not agree on the sign.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from fetch_data import AMAZON, MOVIES, NYT, TWEETS, FetchFailed, default_cache, fetch
from labelled import Labelled, clean, shares, split, without_copies, write_jsonl

DOMAINS = {"tweets": TWEETS, "movies": MOVIES, "amazon": AMAZON, "nyt": NYT}
QUESTION = "Is this text positive or negative?"


def ask(text: str) -> list[dict[str, str]]:
    """The conversation that asks for the label of one text."""
    return [{"role": "user", "content": f"{QUESTION}\n\n{text}"}]


def read(path: Path, threshold: float) -> Iterator[Labelled]:
    """The texts of a *_GroundTruth.txt: a header, then `id<TAB>mean rating<TAB>text` a line, CRLF, quotes as they are.

    Ids like 12_3 are the third sentence of the review or article 12, which is the group.
    """
    for line in path.read_bytes().decode("utf-8").split("\n")[1:]:  # not splitlines: U+2028 and the like are text
        if line:
            name, rating, text = line.split("\t")
            if abs(float(rating)) >= threshold:
                label = "positive" if float(rating) > 0 else "negative"
                yield Labelled(clean(text), label, name.split("_")[0] if "_" in name else "")


def main() -> int:
    """Writes the two files of each domain and says what is in them."""
    parser = argparse.ArgumentParser(description="Make train.jsonl and held.jsonl of the VADER texts.")
    parser.add_argument("--out", type=Path, required=True, help="directory to write into, one folder for each domain")
    parser.add_argument("--domain", choices=[*DOMAINS, "all"], default="all", help="(%(default)s)")
    parser.add_argument("--threshold", type=float, default=0.5, help="least distance of a rating from 0 (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the split and the order (%(default)s)")
    parser.add_argument("--held-share", type=float, default=0.2, help="share of each class held out (%(default)s)")
    args = parser.parse_args()
    try:
        paths = fetch(default_cache())
    except FetchFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for domain in DOMAINS if args.domain == "all" else [args.domain]:
        rated = list(read(paths[DOMAINS[domain]], args.threshold))
        kept = without_copies((text for text in rated if text.text), ask)
        train, held = split(kept, held_share=args.held_share, seed=args.seed)
        write_jsonl(args.out / domain / "train.jsonl", train, ask)
        write_jsonl(args.out / domain / "held.jsonl", held, ask)
        print(f"{domain}: {len(rated):,} texts rated {args.threshold} or further from 0; copies left out:", end=" ")
        print(len(rated) - len(kept))
        print(f"  {args.out / domain / 'held.jsonl'}: {shares(held)}")
        print(f"  {args.out / domain / 'train.jsonl'}: {shares(train)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Asks one server the same question under several models at the same time, and shows the replies as they came.

    python docs/images/answering.py                                   # of the server on 127.0.0.1:8000
    python docs/images/answering.py --svg docs/images/answering.svg   # and draws README's picture from these replies

It needs a server that has the example adapters, such as `make serve` starts, and the packages httpx and rich.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.syntax import Syntax
from rich.terminal_theme import TerminalTheme
from rich.text import Text

COLUMNS = 92  # as wide as a README's picture may be with letters that are still read easily
COLORS = ("cyan", "yellow", "magenta", "green", "blue")
THEME = TerminalTheme(
    (22, 27, 34),
    (230, 237, 243),
    [(72, 79, 88), (255, 123, 114), (86, 211, 100), (227, 179, 65), (121, 192, 255), (210, 168, 255), (118, 227, 234),
     (177, 186, 196)],
)  # fmt: skip
# Fonts of the reader's own: a picture inside a page may not fetch any.
FONTS = 'ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace'
SVG = """\
<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg" role="img">
<title>One question, answered at once by the base and by its adapters</title>
<style>
.{unique_id}-matrix, .{unique_id}-title {{ font-family: FONTS; }}
.{unique_id}-matrix {{ font-size: {char_height}px; line-height: {line_height}px; }}
.{unique_id}-title {{ font-size: 16px; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" />
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
""".replace("FONTS", FONTS)


async def ask(client: httpx.AsyncClient, model: str, question: str, max_tokens: int) -> str:
    """One greedy reply; an ellipsis where `max_tokens` cut it. Raises httpx.HTTPError."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
        "temperature": 0,
    }
    response = await client.post("/v1/chat/completions", json=body)
    response.raise_for_status()
    choice = response.json()["choices"][0]
    text: str = choice["message"]["content"].strip()
    return text if choice["finish_reason"] == "stop" else f"{text} …"


async def ask_all(url: str, models: list[str], question: str, max_tokens: int) -> tuple[list[str], list[str]]:
    """What each model is, and its reply; every request is sent before the first reply is there."""
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        adapters = {adapter["name"]: adapter for adapter in (await client.get("/v1/adapters")).json()["data"]}
        replies = await asyncio.gather(*(ask(client, model, question, max_tokens) for model in models))
    return [kind_of(adapters.get(model)) for model in models], replies


def kind_of(adapter: dict[str, Any] | None) -> str:
    return "the base" if adapter is None else f"an adapter of {adapter['bytes'] / 1e6:.1f} MB"


def show(console: Console, models: list[str], question: str, kinds: list[str], replies: list[str]) -> None:
    messages = json.dumps([{"role": "user", "content": question}])
    parts: list[RenderableType] = [
        Text.assemble(("POST /v1/chat/completions", "bold"), (f"   {len(models)} requests at the same time", "white")),
        Syntax(f'"messages": {messages}', "json", theme="ansi_dark", background_color="default"),
    ]
    for model, kind, reply, color in zip(models, kinds, replies, COLORS, strict=False):
        name = Text.assemble(('"model": ', "white"), (f'"{model}"', f"bold {color}"), (f"   {kind}", "white"))
        parts += ["", name, Padding(Text(reply), (0, 0, 0, 2))]
    console.print(Padding(Group(*parts), (1, 2, 1, 2)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--models", nargs="+", default=["smollm2-135m-instruct", "pirate", "json"], metavar="MODEL")
    parser.add_argument("--question", default="What is gravity?")
    parser.add_argument("--max-tokens", type=int, default=60)
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write the picture here too")
    args = parser.parse_args()
    kinds, replies = asyncio.run(ask_all(args.url, args.models, args.question, args.max_tokens))
    show(Console(), args.models, args.question, kinds, replies)
    if args.svg is not None:
        canvas = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
        show(canvas, args.models, args.question, kinds, replies)
        svg = canvas.export_svg(title="one base, three ways to answer", theme=THEME, code_format=SVG, unique_id="a")
        args.svg.write_text("\n".join(line.rstrip() for line in svg.splitlines()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

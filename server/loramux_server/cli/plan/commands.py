"""`loramux plan`: what a training or a server will take, before it is started. Without a word it plans a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loramux_server.cli import frame
from loramux_server.plain_text import shortened

COMMANDS = {
    "train": ("Say how much memory a training will take (the default).", "training"),
    "serve": ("Say what a server takes on a card, before one is rented.", "serving"),
}


class _Plans(frame.Commands):
    """`loramux plan --rank 16` is `loramux plan train --rank 16`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        is_named = bool(args) and (not args[0].startswith("-") or args[0] in ("-h", "--help"))
        parsed: list[str] = super().parse_args(ctx, args if is_named else ["train", *args])
        return parsed

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        word = args[0]
        is_base = "/" in word or word.endswith(".gguf") or Path(word).is_dir()
        if is_base and self.get_command(ctx, word) is None:
            shown = shortened(word)
            ctx.fail(
                f"{shown} is no command; a base is planned for by `loramux plan serve {shown}` (what a server takes) "
                f"or `loramux plan train --base {shown}` (what a training takes)"
            )
        return super().resolve_command(ctx, args)


app = frame.new_app(
    "Say what a training or a server will take, before it is started; only a base's config is read.",
    cls=_Plans,
    epilog="""\
Examples:

    loramux plan --base Qwen/Qwen2.5-7B-Instruct --rank 16 --batch 8 --seq 512
    loramux plan serve Qwen/Qwen3-8B --card 24GiB --adapters 50 --rank 16""",
)
for _name, (_help, _module) in COMMANDS.items():
    frame.later(app, _name, _help, f"loramux_server.cli.plan.{_module}")

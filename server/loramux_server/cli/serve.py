"""`loramux serve`: its settings; the serving process is imported when these are right, since that takes its time."""

from __future__ import annotations

import sys

import typer

from loramux_server.cli.frame import configure_logging
from loramux_server.cli.options import settings_app
from loramux_server.config.environment import no_bars
from loramux_server.config.serve import ServeConfig
from loramux_server.repeated_log import OneLineASecond


def run(config: ServeConfig, ctx: typer.Context) -> int:
    """Run the server: one NF4 base model, any number of adapters, OpenAI's API."""
    configure_logging(config.log_level, OneLineASecond(sys.stderr))
    no_bars()
    from loramux_server.serving.process import serve

    return serve(config)


app = settings_app(
    ServeConfig,
    run,
    epilog="""\
Examples:

    loramux serve
    loramux serve --preload my-adapters --port 8080 --max-num-seqs 64
    LORAMUX_API_KEY=... LORAMUX_ADMIN_KEY=... loramux serve --host 0.0.0.0

LORAMUX_API_KEY is the key to use the server, LORAMUX_ADMIN_KEY the one to manage adapters; without it the first does
both. They may stand in the file too, as api_key and admin_key, but are never flags.""",
)

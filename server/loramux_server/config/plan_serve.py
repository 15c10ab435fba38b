"""Everything that can be set for `loramux plan serve`: what a server is told of sizes, and the cards in question."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from loramux_server.config.settings import setting
from loramux_server.config.shared import FindsBase
from loramux_server.config.sizes import AsksForSizes
from loramux_server.errors import ConfigError


class PlanServeConfig(FindsBase, AsksForSizes):
    """Settings of one plan. It reads the server's own table, so that a server can be planned by its file."""

    table = "serve"

    card: str = setting(
        "8GiB,16GiB,24GiB,80GiB",
        "cards to plan for, with commas between them: the memory that one is sold with, or a name such as RTX 4090, "
        "H100, T4",
        group="What is planned",
    )
    adapters: int | None = setting(
        None,
        "adapters that are to lie on the card at the same time; the others wait in host memory (the server's "
        "--host-cache-mib)",
        group="What is planned",
        between=(1, 1 << 20),
        unset="what a quarter of the memory for adapters and KV cache holds",
    )
    rank: int = setting(
        16, "LoRA rank of these, on every layer", group="What is planned", between=(1, 4096), also=("-r", "--lora-rank")
    )

    @model_validator(mode="after")
    def _serves_the_rank(self) -> Self:
        if self.rank > self.max_lora_rank:
            raise ConfigError(
                f"--rank {self.rank} is more than the server takes, --max-lora-rank {self.max_lora_rank}; lower the "
                "one or raise the other"
            )
        return self

"""Everything an operator can set for `loramux serve`.

A value comes from, first that has one: the flag, the environment variable, the [serve] table of the config file, the
default. Keys have no flag, since a command line is visible to every user of the machine.
"""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from loramux_server.access.access_file import has_keys
from loramux_server.config.settings import setting
from loramux_server.config.shared import MACHINE, RunsBase, split
from loramux_server.config.sizes import AsksForSizes
from loramux_server.errors import ConfigError
from loramux_server.hub.hub_name import PREFIX, is_pattern
from loramux_server.wire.pace import Pace

_ORIGIN = re.compile(r"https?://(?:[A-Za-z0-9._-]+|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?|null")
_HOST_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,252}[A-Za-z0-9_])?")
SERVED_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,254}")


class ServeConfig(RunsBase, AsksForSizes):
    """Settings of one server."""

    table = "serve"

    served_model_name: str | None = setting(
        None,
        "name under which clients ask for the base; letters, digits and ._/-",
        group=MACHINE,
        unset="derived from --base",
    )

    adapter_dir: Path = setting(
        Path("adapters-store"), "directory of the adapter store; made if it is missing", group="Adapters"
    )
    preload: Path | None = setting(
        None,
        "directory whose subdirectories (NAME, or ORG/NAME) are adapters to publish at start, except for names that "
        "can be served already",
        group="Adapters",
    )
    watch_dir: Path | None = setting(
        None,
        "directory whose subdirectories (NAME, or ORG/NAME) are published under their names, now and whenever one "
        "changes; one that disappears unregisters nothing",
        group="Adapters",
    )
    watch_seconds: float = setting(
        2.0, "how often --watch-dir is looked at, in seconds", group="Adapters", between=(0, 3600)
    )
    lora_path_root: Path | None = setting(
        None,
        "directory below which vLLM's load_lora_adapter may load",
        group="Adapters",
        unset="no such call",
    )
    hub_adapters: str | None = setting(
        None,
        "repositories on the model hub whose adapters are fetched when a request first names one as hub:owner/name or "
        "hub:owner/name@revision, such as acme/support,acme/lora-*; where the hub is, and the token for it, "
        "huggingface_hub's variables say (HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE)",
        group="Adapters",
        unset="nothing is fetched",
    )
    keep_versions: int = setting(
        2, "versions that each adapter keeps, to go back to", group="Adapters", between=(1, 1000)
    )
    max_upload_mib: int = setting(1024, "largest upload, in MiB", group="Adapters", between=(1, 1 << 20))
    proof_tokens: int = setting(
        6,
        "most tokens of a step for trying out uploads beside the requests; fewer keep replies smoother, uploads slower",
        group="Adapters",
        between=(1, 1024),
    )
    proof_timeout: float = setting(
        60.0,
        "longest the trial of an upload may stand still, in seconds; then it is refused for now, and so is one that "
        "takes 30 times as long in all",
        group="Adapters",
        between=(1, 86400),
    )
    host_cache_mib: int = setting(
        1024, "host memory for adapters that are not on the device, in MiB", group="Adapters", between=(1, 1 << 22)
    )

    host: str = setting("127.0.0.1", "address to listen on; any but loopback needs a key", group="Network")
    port: int = setting(8000, "port to listen on; 0 takes a free one", group="Network", between=(0, 65535))
    request_timeout: float = setting(
        600.0,
        "longest a request may take from arrival to its last token, in seconds",
        group="Network",
        between=(1, 86400),
    )
    header_timeout: float = setting(
        20.0,
        "longest from a connection, or a request's first byte, to the end of its header, in seconds",
        group="Network",
        between=(1, 3600),
    )
    keep_alive_timeout: int = setting(
        75,
        "how long a connection may wait for its next request, in seconds; longer than clients keep theirs",
        group="Network",
        between=(1, 86400),
    )
    stall_timeout: float = setting(
        30.0,
        "a body that comes, or is taken, more slowly than --min-body-rate is given up after so many seconds",
        group="Network",
        between=(1, 3600),
    )
    min_body_rate: int = setting(
        16, "slowest that a body may go, in either direction, in KiB a second", group="Network", between=(1, 1 << 20)
    )
    upload_timeout: float = setting(
        1800.0,
        "longest that the files of an upload may take to arrive, in seconds",
        group="Network",
        between=(1, 86400),
    )
    max_connections: int | None = setting(
        None,
        "most connections that have requests at the same time; a few more are kept for health, metrics and managing "
        "adapters",
        group="Network",
        between=(1, 1 << 20),
        unset="what the limit on open files leaves, at most 16384",
    )
    cors_origins: str | None = setting(
        None,
        "web pages that may use this server from a browser, such as https://chat.example.com; several with commas "
        "between them, * is every page",
        group="Network",
    )
    allowed_hosts: str | None = setting(
        None,
        "further names, such as host.docker.internal, under which requests without a key may address this machine",
        group="Network",
        unset="localhost and loopback addresses",
    )
    shutdown_timeout: float = setting(
        30.0, "how long running replies may go on after SIGTERM, in seconds", group="Network", between=(0, 86400)
    )

    max_waiting: int = setting(
        256, "most requests that wait; the next one is told to come back (503)", group="Capacity", between=(1, 1 << 20)
    )
    default_max_tokens: int | None = setting(
        None,
        "longest reply in a chat that names no max_tokens; what fits into --max-model-len, if that is less",
        group="Capacity",
        between=(1, 1 << 20),
        unset="what fits on a CPU; on a card what lets 16 such requests run at a time, at least 1024",
    )

    special_tokens_in_messages: bool = setting(
        False,
        "let text in chat messages become special tokens; then whoever writes a message can write other turns of the "
        "conversation",
        group="Prompts",
    )
    special_tokens_in_prompts: bool = setting(
        True,
        "let text in prompts of /v1/completions become special tokens; they often hold a conversation that was put "
        "together elsewhere",
        group="Prompts",
    )

    log_level: Literal["debug", "info", "warning", "error"] = setting(
        "info", "least severe messages to log; debug adds one line per HTTP request", group="Operation"
    )
    watchdog_timeout: float = setting(
        60.0, "a step that takes longer makes /health answer 503, in seconds", group="Operation", between=(1, 86400)
    )
    metrics_adapter_labels: int = setting(
        100,
        "adapters that get a metrics label of their own; the rest count as `other`",
        group="Adapters",
        between=(0, 10000),
    )
    api_key: str | None = setting(None, "key that requests must carry", group="Keys", secret=True)
    admin_key: str | None = setting(
        None,
        "key for adapter management, and for all else; without it the API key manages too",
        group="Keys",
        secret=True,
    )

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if not self.base or not self.host:
            raise ConfigError("--base and --host must not be empty")
        if self.served_model_name is not None and not SERVED_NAME.fullmatch(self.served_model_name):
            raise ConfigError(
                "--served-model-name must start with a letter or digit and hold only letters, digits and ._/-, "
                f"not {self.served_model_name!r} (`:` and `@` separate a base, an adapter and a version)"
            )
        if self.watch_seconds < 0.1:
            raise ConfigError(f"--watch-seconds must be at least 0.1, not {self.watch_seconds}")
        for origin in self.cors_origin_list:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"--cors-origins lists pages as scheme://host or scheme://host:port, without a path, not {origin!r}"
                )
        if self.hub_adapter_list and f"{self.served_model_name}:" == PREFIX:
            raise ConfigError(
                f"--served-model-name {self.served_model_name} does not go with --hub-adapters: {PREFIX} begins the "
                "names of adapters on the hub"
            )
        for pattern in self.hub_adapter_list:
            if not is_pattern(pattern):
                raise ConfigError(
                    f"--hub-adapters lists repositories as owner/name, with * for any characters, not {pattern!r}"
                )
        for name in self.allowed_host_list:
            if not _HOST_NAME.fullmatch(name):
                raise ConfigError(f"--allowed-hosts lists names of this machine, without a port, not {name!r}")
        for variable, key in (("LORAMUX_API_KEY", self.api_key), ("LORAMUX_ADMIN_KEY", self.admin_key)):
            if key is not None and not re.fullmatch(r"[!-~]+", key):
                raise ConfigError(
                    f"{variable} must be printable ASCII without spaces, and not empty; unset it to have none"
                )
        if self.api_key is None and not is_loopback(self.host) and not has_keys(self.adapter_dir):
            raise ConfigError(
                f"refuses to start without a key: --host {self.host} can be reached from other machines; make one with "
                "`loramux keys create`, set LORAMUX_API_KEY, or listen on 127.0.0.1"
            )
        return self

    @property
    def pace(self) -> Pace:
        """How slow clients may be."""
        return Pace(self.stall_timeout, self.min_body_rate * 1024)

    @property
    def cors_origin_list(self) -> list[str]:
        return split(self.cors_origins)

    @property
    def hub_adapter_list(self) -> list[str]:
        return split(self.hub_adapters)

    @property
    def allowed_host_list(self) -> list[str]:
        return split(self.allowed_hosts)


def is_loopback(host: str) -> bool:
    """True only for `localhost` and addresses that no other machine can reach. Any other name counts as reachable."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False

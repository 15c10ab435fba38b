"""What libraries would put on the terminal stays away from it; what is ours, and their errors, do not."""

from __future__ import annotations

import subprocess
import sys

import pytest

from support.real_server import clean_environment

SCRIPT = """
import logging, sys, warnings
from loramux_server.cli.frame import configure_logging
from loramux_server.config.environment import quiet_libraries

configure_logging("info")
quiet_libraries()
import tqdm
import tqdm.auto
from huggingface_hub.utils import logging as hub_logging, tqdm as hub_tqdm
from transformers.utils import logging as transformers_logging

bars = [tqdm.tqdm, tqdm.auto.tqdm, hub_tqdm, transformers_logging.tqdm]
for bar in bars:
    for _ in bar(range(3), desc="FOREIGN bar"):
        pass
warnings.warn("FOREIGN warning")
hub_logging.get_logger("huggingface_hub.file_download").warning("FOREIGN advice")
transformers_logging.get_logger("transformers.modeling_utils").warning("FOREIGN advice")
transformers_logging.get_logger("transformers.modeling_utils").warning_advice("FOREIGN advice")
logging.getLogger("matplotlib.font_manager").warning("FOREIGN advice")
logging.getLogger("datasets").warning("FOREIGN advice")
logging.getLogger("some.library").error("an error of a library")
logging.getLogger("loramux_adapters.training").info("OURS at info")
logging.getLogger("loramux_server.base").warning("OURS at warning")
print("OURS on stdout")
"""


@pytest.fixture(scope="module")
def told() -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=clean_environment(), timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_foreign_bars_warnings_and_advice_do_not_reach_the_terminal(told: tuple[str, str]) -> None:
    stdout, stderr = told

    assert "FOREIGN" not in stdout + stderr
    assert "%|" not in stderr  # a bar of tqdm's


def test_our_own_lines_and_errors_of_libraries_do(told: tuple[str, str]) -> None:
    stdout, stderr = told

    assert stdout == "OURS on stdout\n"
    assert [line.partition("loramux_")[2] or line[24:] for line in stderr.splitlines()] == [
        "ERROR some.library: an error of a library",
        "adapters.training: OURS at info",
        "server.base: OURS at warning",
    ]


def test_no_library_draws_a_bar_into_our_lines() -> None:
    script = (
        "import sys\n"
        "from loramux_server.config.environment import no_bars\n"
        "no_bars()\n"
        "from tqdm import tqdm; from tqdm.auto import tqdm as auto; from huggingface_hub.utils import tqdm as hub\n"
        "for bar in (tqdm, auto, hub):\n"
        "    assert list(bar(range(3), file=sys.stderr)) == [0, 1, 2]\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=clean_environment())
    assert (done.returncode, done.stderr) == (0, "")

from __future__ import annotations

import io
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from loramux_adapters.errors import StoreUnavailable
from loramux_server.cli import adapters as cli_adapters
from loramux_server.cli import frame, train
from loramux_server.cli import main as cli
from loramux_server.cli.options import settings_app
from loramux_server.config.load import all_settings
from loramux_server.config.plan import PlanConfig
from loramux_server.config.serve import ServeConfig
from loramux_server.config.settings import Settings, settings_of
from loramux_server.errors import BaseModelError, ConfigError
from loramux_server.serving import process

ROOT = Path(__file__).parents[3]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def usage_error(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a wrong command line leaves on stderr."""
    assert cli.main(argv, {}) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return err


def help_text(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main([*argv, "--help"], {}) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "mentioned"),
    [
        ([], ["serve", "adapters", "version", "--version"]),
        (["serve"], ["--config", "LORAMUX_API_KEY", "[serve]"]),
        (["adapters"], ["push", "pull", "list", "show", "rm", "LORAMUX_ADMIN_KEY"]),
        (["adapters", "push"], ["DIR", "--name", "--validate-only", "--url", "LORAMUX_URL"]),
        (["adapters", "pull"], ["NAME", "DIR"]),
        (["adapters", "list"], ["--json"]),
        (["adapters", "show"], ["NAME", "--json"]),
        (["adapters", "rm"], ["NAME"]),
        (["version"], ["versions"]),
    ],
)
def test_every_level_explains_itself(argv: list[str], mentioned: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    text = help_text(argv, capsys)

    assert [word for word in mentioned if word not in text] == []


def test_help_has_a_short_flag_at_every_level(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (
        [],
        ["serve"],
        ["train"],
        ["adapters"],
        ["adapters", "push"],
        ["plan"],
        ["plan", "serve"],
        ["version"],
    ):
        assert cli.main([*argv, "-h"], {}) == 0
        assert capsys.readouterr().out == help_text(argv, capsys)


@pytest.mark.parametrize("settings", all_settings(), ids=lambda settings: settings.table)
def test_help_names_every_setting_with_its_default_but_offers_no_flag_for_a_secret(
    settings: type[Settings], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = help_text(["plan", "train"] if settings.table == "plan" else [settings.table], capsys)

    assert max(map(len, text.splitlines())) < 100
    words = " ".join(text.split())
    for setting in settings_of(settings).values():
        flag = f"--[no-]{setting.flag[2:]}" if setting.kind is bool else setting.flag
        assert bool(re.search(rf" {re.escape(flag)} ", words)) != setting.secret
        assert all(re.search(rf" {flag}[ ,;)]", words) for flag in setting.also)
        assert not setting.secret or setting.variable in words
        assert setting.secret or f"{setting.group}:" in words
        if setting.default not in (None, True, False) and setting.kind is not float:
            assert re.search(rf"[(;] ?default: {re.escape(str(setting.default))}\)", words)
    assert f"    loramux {settings.table}" in text  # an example, as it would be typed


@pytest.mark.parametrize("settings", all_settings(), ids=lambda settings: settings.table)
@pytest.mark.parametrize("columns", ["80", "100"])
def test_help_on_a_terminal_cuts_no_flag(
    settings: type[Settings], columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(sys, "stdout", Terminal())
    cli.main([settings.table, "--help"], {})
    assert isinstance(sys.stdout, Terminal)

    assert "…" not in sys.stdout.getvalue()


def test_help_leaves_a_command_as_it_was() -> None:
    command = get_command(train.app)
    context = command.make_context("train", [], resilient_parsing=True)
    command.get_help(context)

    assert any("--lr" in param.opts for param in command.get_params(context))


def test_help_on_a_terminal_is_drawn_and_says_the_same(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "stdout", Terminal())
    cli.main(["serve", "--help"], {})
    assert isinstance(sys.stdout, Terminal)
    drawn = re.sub(r"\x1b\[[0-9;]*m", "", sys.stdout.getvalue())

    assert "─ Network ─" in drawn and "(default: 8000)" in drawn and "[serve] table" in drawn
    assert max(map(len, drawn.splitlines())) == 100


def test_wrong_command_lines_are_usage_errors_that_say_what_was_meant(capsys: pytest.CaptureFixture[str]) -> None:
    assert usage_error([], capsys) == "loramux: missing command; see `loramux --help`\n"
    assert usage_error(["sevre"], capsys) == "loramux: there is no command sevre; did you mean serve?\n"
    base = usage_error(["plan", "./base"], capsys)
    assert "`loramux plan serve ./base`" in base and "`loramux plan train --base ./base`" in base
    assert "there is no command sreve" in usage_error(["plan", "sreve"], capsys)
    unknown = usage_error(["serve", "--prot", "1"], capsys)
    assert unknown == "loramux: unknown argument --prot; did you mean --port?\n"
    assert "unknown argument --jsn; did you mean --json?" in usage_error(["adapters", "list", "--jsn"], capsys)
    keys = "loramux: unknown argument --api-key; did you mean LORAMUX_API_KEY?\n"
    assert usage_error(["serve", "--api-key", "k"], capsys) == usage_error(["serve", "--api-key=k"], capsys) == keys
    assert usage_error(["adapters"], capsys) == "loramux: missing command; see `loramux adapters --help`\n"
    missing = "loramux: missing argument 'DIR|REPO'; see `loramux adapters push --help`\n"
    assert usage_error(["adapters", "push"], capsys) == missing
    assert usage_error(["serve", "--port", "x"], capsys) == "loramux: --port must be a whole number, not 'x'\n"


@pytest.mark.parametrize("argv", [["serve", "--port"], ["adapters", "rm"], ["adapters"], ["serve", "--base"], []])
def test_a_word_of_any_length_leaves_an_error_that_can_be_read(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for word in ("9" * 5000, "x/" * 2500, "--" + "y" * 5000, "a b" * 2000):
        assert 40 < len(usage_error([*argv, word], capsys)) < 700


def test_a_path_that_is_too_long_for_the_system_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--preload", "9" * 5000], {}) == 2
    assert len(capsys.readouterr().err) < 500


def test_what_a_terminal_would_obey_is_shown_as_an_escape(capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("\x1b[31mred", "\x1b]0;title\x07", "\u202eesrever", "\x9b31m", "a\nloramux: b", "\udcff"):
        for argv in (["serve", "--base", word], ["adapters", word], ["serve", f"--{word}"], ["adapters", "push", word]):
            cli.main(argv, {})
            out, err = capsys.readouterr()
            assert out == "" and err.count("\n") == 1 and err.removesuffix("\n").isprintable()


@pytest.mark.parametrize("columns", [60, 100])
def test_errors_are_broken_at_words_on_a_terminal_and_nowhere_else(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    argv = ["serve", "--served-model-name", "a b"]
    whole = usage_error(argv, capsys)
    assert len(whole) > 100
    monkeypatch.setattr(sys, "stderr", Terminal())
    cli.main(argv, {})
    assert isinstance(sys.stderr, Terminal)
    lines = sys.stderr.getvalue().splitlines()
    assert len(lines) > 1 and max(map(len, lines)) <= columns
    assert " ".join(line.strip() for line in lines) == whole.strip()


def test_a_flag_may_not_be_shortened(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown argument --max-num" in usage_error(["serve", "--max-num", "8"], capsys)


def test_the_versions_of_everything_can_be_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["version"], {}) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"loramux {cli.version()}"
    assert [line.split()[0] for line in lines[1:]] == ["python", *cli.REPORTED]

    assert cli.main(["--version"], {}) == 0
    assert capsys.readouterr().out == f"loramux {cli.version()}\n"


def test_serve_gets_the_config_that_flags_environment_and_file_make(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c.toml").write_text("[serve]\nmax_waiting = 5\n")
    served: list[ServeConfig] = []

    def serve(config: ServeConfig) -> int:
        served.append(config)
        return 0

    monkeypatch.setattr(process, "serve", serve)

    code = cli.main(["serve", "--port", "0", "--config", str(tmp_path / "c.toml")], {"LORAMUX_THREADS": "2"})

    assert code == 0
    assert served == [ServeConfig(port=0, max_waiting=5, threads=2)]


def test_of_a_switch_given_both_ways_the_last_counts() -> None:
    seen: list[bool] = []

    def show(config: PlanConfig, ctx: typer.Context) -> int:
        seen.append(config.gradient_checkpointing)
        return 0

    on, off = "--gradient-checkpointing", "--no-gradient-checkpointing"
    app = settings_app(PlanConfig, show)
    for argv in ([on], [off], [on, off], [off, on], [on, off, on]):
        frame.call(app, "plan", argv, {})

    assert seen == [True, False, False, True, True]


def failing(error: BaseException) -> Callable[[ServeConfig], int]:
    def serve(config: ServeConfig) -> int:
        raise error

    return serve


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("--port must be from 0 to 65535"), 2, "loramux: --port must be from 0 to 65535\n"),
        (BaseModelError("no such base"), 1, "loramux: no such base\n"),
        (StoreUnavailable("the disk is full"), 1, "loramux: the disk is full\n"),
        (KeyboardInterrupt(), 130, "loramux: interrupted\n"),
    ],
)
def test_an_error_becomes_one_line_and_an_exit_code(
    error: BaseException, code: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(process, "serve", failing(error))

    assert cli.main(["serve"], {}) == code
    assert capsys.readouterr().err == line


def test_an_error_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "serve", failing(ZeroDivisionError()))

    with pytest.raises(ZeroDivisionError):
        cli.main(["serve"], {})


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    script = "import sys; from loramux_server.cli.main import main; sys.exit(main(['version']))"
    reading = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "server"), str(ROOT / "adapters")])},
    )
    assert reading.stdout is not None
    reading.stdout.close()
    _, stderr = reading.communicate(timeout=20)

    assert (reading.returncode, stderr) == (1, b"")


def test_the_command_line_is_parsed_without_importing_anything_heavy() -> None:
    heavy = "{'torch', 'transformers', 'fastapi', 'uvicorn', 'pydantic', 'rich.console'}"
    script = f"import sys, loramux_server.cli.main; print({heavy} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "server"), str(ROOT / "adapters")])},
    )

    assert done.stdout == "set()\n"


def test_what_clients_sent_stays_one_line_of_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    frame.configure_logging("info")
    try:
        logging.getLogger("loramux_server.test").warning("refused: %s", "\x1b[2Jx\n2026-01-01 INFO forged")
        try:
            raise ValueError("\x1b[2J")
        except ValueError:
            logging.getLogger("loramux_server.test").exception("failed")
    finally:
        logging.basicConfig(level=logging.WARNING, handlers=[], force=True)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("refused: \\x1b[2Jx\\n2026-01-01 INFO forged")
    assert lines[-1] == "ValueError: \\x1b[2J" and all(line.isprintable() for line in lines)


WRONG = [
    ["adapters", "push", "no-such-directory"], ["adapters", "push", ".", "--name", "bad name"],
    ["adapters", "show", "a:b"], ["adapters", "list", "--jsn"], ["adapters", "backup"],
    ["adapters", "restore", "a", "b"],
    ["serve", "--port", "x"], ["serve", "--prot", "1"], ["serve", "--base", "no-such-base"], ["sevre"],
]  # fmt: skip


@pytest.mark.parametrize("argv", WRONG, ids=" ".join)
def test_what_is_wrong_is_told_before_libraries_are_imported(argv: list[str]) -> None:
    heavy = "{'torch', 'transformers', 'fastapi', 'httpx'}"
    script = f"import sys; from loramux_server.cli.main import main; c = main(); print(c, {heavy} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script, *argv],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "server"), str(ROOT / "adapters")])},
    )
    assert done.stdout in ("1 set()\n", "2 set()\n") and done.stderr.startswith("loramux: ")


def test_adapters_talks_to_where_serve_listens_by_default() -> None:
    assert cli_adapters.DEFAULT_URL == f"http://{ServeConfig().host}:{ServeConfig().port}"

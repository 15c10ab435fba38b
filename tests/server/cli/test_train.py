from __future__ import annotations

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.errors import AdapterError, CheckpointError, DataError, InvalidAdapterName
from loramux_adapters.training.recipe import Recipe
from loramux_adapters.training.run.run_dir import RunDirectory
from loramux_adapters.training.run.trace import EpochRecord, StepRecord
from loramux_adapters.training.run.trainer import Plan
from loramux_server.base.loader import load_base_model
from loramux_server.cli import finish
from loramux_server.cli import train as cli_train
from loramux_server.cli import train_run as cli_train_run
from loramux_server.cli.frame import call
from loramux_server.cli.train_data import read_material
from loramux_server.cli.train_run import Progress
from loramux_server.client import upload_check
from loramux_server.client.adapters import AdaptersClient
from loramux_server.client.connection import ServerReply
from loramux_server.config.finish import FinishConfig
from loramux_server.config.load import load
from loramux_server.config.train import TrainConfig
from loramux_server.errors import CommandFailed, ConfigError
from loramux_server.serving.startup import Stages
from support.tiny_models import CHAT_TEMPLATE, save_tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[3]
WORDS = "free prize win cash claim meet lunch tomorrow home thanks see call later the a now".split()


def examples(path: Path, count: int, *, seed: int, labels: tuple[str, ...] = ("ham", "spam")) -> Path:
    draw = random.Random(seed)
    lines = []
    for index in range(count):
        text = " ".join(draw.choice(WORDS) + str(draw.randrange(1000)) for _ in range(6))
        lines.append(json.dumps({"prompt": text, "completion": labels[index % len(labels)]}) + "\n")
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("train") / "tiny-base")


@pytest.fixture
def where(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with data, and an evaluation that takes no time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli_train, "configure_logging", lambda level: None)  # it takes pytest's own handlers away
    monkeypatch.setattr(cli_train, "_finish", lambda config, run, *, skip_bad: 0)
    monkeypatch.setattr(upload_check, "check_upload", lambda url, key, name: None)
    examples(tmp_path / "train.jsonl", 24, seed=1)
    examples(tmp_path / "held.jsonl", 6, seed=2)
    return tmp_path


@pytest.fixture
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_train_run, "load_base_model", lambda *_, **__: pytest.fail("the base is loaded"))


def run(argv: list[str], environ: Mapping[str, str] | None = None) -> int:
    return call(cli_train.app, "loramux train", argv, environ or {})


def arguments(base: Path, *more: str) -> list[str]:
    given = ["--data", "train.jsonl", "--eval-data", "held.jsonl", "--name", "spam", "--base", str(base)]
    return [*given, "--cache-dir", "cache", "--batch-size", "8", "--dropout", "0.1", "--rank", "4", *more]


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(**({"data": Path("train.jsonl"), "name": "spam"} | changes))


# settings


def test_the_defaults_are_the_recipes_own() -> None:
    assert config().recipe() == Recipe()


def test_every_field_of_the_recipe_can_be_set() -> None:
    given = {
        field.name: value
        for field in fields(Recipe)
        for value in [
            {"target_modules": "q_proj, v_proj", "rslora": True, "gradient_checkpointing": True}.get(field.name)
        ]
        if value is not None
    } | {"rank": 16, "alpha": 8.0, "dropout": 0.1, "init": "loftq", "learning_rate": 1e-4, "schedule": "linear"}
    given |= {"warmup": 0.2, "weight_decay": 0.1, "epochs": 2.0, "max_steps": 7, "batch_size": 4, "accumulation": 2}
    given |= {"max_length": 64, "max_grad_norm": 0.5, "batching": "shuffle", "seed": 5, "save_dtype": "float32"}

    recipe = config(**given).recipe()

    assert recipe.target_modules == ("q_proj", "v_proj") and recipe.rslora and recipe.gradient_checkpointing
    unchanged = {field.name for field in fields(Recipe) if getattr(recipe, field.name) == getattr(Recipe(), field.name)}
    assert unchanged == {"quantize"}
    assert config(quantize="none").recipe().quantize == "none"


def test_flag_environment_and_file_go_together_in_this_order(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('[train]\ndata = "a.jsonl"\nname = "n"\nrank = 4\nalpha = 2\nseed = 1\n')

    found = load(
        TrainConfig, {"rank": "16"}, {"LORAMUX_RANK": "32", "LORAMUX_ALPHA": "64", "LORAMUX_PORT": "8000"}, str(file)
    )

    assert (found.data, found.name, found.rank, found.alpha, found.seed) == (Path("a.jsonl"), "n", 16, 64.0, 1)


def test_a_name_with_a_slash_is_one_directory_below_the_runs() -> None:
    assert load(TrainConfig, {"data": "a.jsonl", "name": "org/spam"}, {}).run_dir == Path("adapters-trained/org--spam")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": None}, "--data is needed"),
        ({"name": None}, "--name is needed"),
        ({"name": "a:b"}, "--name 'a:b'"),
        ({"name": "x" * 256}, "1 to 255 characters"),
        ({"rank": 0}, "--rank must be from 1 to 1024, not 0"),
        ({"alpha": 0.0}, "--alpha must be positive"),
        ({"learning_rate": 3.0}, "--learning-rate must be between 0 and 1"),
        ({"accumulation": 32}, "--accumulation must be from 1 to batch_size"),
        ({"init": "pissa"}, "--init must be one of default, loftq"),
        ({"init": "loftq", "quantize": "none"}, "loftq makes up for what NF4 lost"),
        ({"labels": "ham"}, "--labels must name two or more"),
        ({"labels": "ham,ham", "eval_data": Path("h")}, "--labels must name two or more different"),
        ({"labels": "ham,spam"}, "--eval-data"),
        ({"upload": "127.0.0.1:8000"}, "--upload '127.0.0.1:8000' is not a URL such as http://127.0.0.1:8000"),
        ({"upload": "http://there", "quantize": "none"}, "refuses an adapter of --quantize none"),
        ({"csv_prompt": "text"}, "both --csv-prompt and --csv-completion"),
        ({"csv_prompt": "a", "csv_completion": "b", "csv_labels": "x"}, "labels must look like"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_with_what_can(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**changes)

    assert said in str(caught.value)


def test_what_other_tools_call_a_setting_is_taken_too(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[TrainConfig] = []

    def read(config: TrainConfig, **switches: bool) -> None:
        asked.append(config)
        raise DataError("read")

    monkeypatch.setattr("loramux_server.cli.train_data.read_material", read)
    monkeypatch.setattr(cli_train, "configure_logging", lambda level: None)
    given = ["--train-data", "d", "--name", "n", "--lr", "3e-4", "-r", "4", "--lora-alpha", "8", "--output-dir", "o"]
    given += ["--num-train-epochs", "2", "--batch", "4", "--max-seq-length", "64", "--lora-dropout", "0.1"]
    given += ["--lr-scheduler-type", "linear", "--warmup-ratio", "0.1"]
    with pytest.raises(DataError):
        run(given)

    recipe = asked[0].recipe()
    assert (asked[0].data, asked[0].run_dir) == (Path("d"), Path("o"))
    assert (recipe.learning_rate, recipe.rank, recipe.alpha, recipe.epochs) == (3e-4, 4, 8.0, 2.0)
    assert (recipe.batch_size, recipe.max_length, recipe.dropout) == (4, 64, 0.1)
    assert (recipe.schedule, recipe.warmup) == ("linear", 0.1)


def test_switches_and_permissions_need_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[bool, bool, bool]] = []

    def read(config: TrainConfig, *, skip_bad: bool, allow_overlap: bool) -> None:
        asked.append((config.rslora, skip_bad, allow_overlap))
        raise DataError("read")

    monkeypatch.setattr("loramux_server.cli.train_data.read_material", read)
    monkeypatch.setattr(cli_train, "configure_logging", lambda level: None)
    for switches in (["--rslora", "--skip-bad"], ["--no-rslora", "--allow-overlap"], []):
        with pytest.raises(DataError):
            run(["--data", "d", "--name", "n", *switches], {"LORAMUX_RSLORA": "yes"})

    assert asked == [(True, True, False), (False, False, True), (True, False, False)]


def test_the_help_explains_what_is_asked_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0

    text = " ".join(capsys.readouterr().out.split())
    for said in (
        "goes on when the same command is given again",
        "--overwrite",
        "--dry-run",
        "--data FILE --name NAME",
        "ham,spam",
    ):
        assert said in text


# data


@pytest.mark.parametrize(
    ("labels", "wanted", "said"),
    [
        (("ham", "spam", "egg"), "ham,spam", r"line 3: the answer 'egg' is none of --labels ham, spam"),
        (("ham",), "ham,spam", r"train.jsonl holds no example that is answered 'spam'"),
    ],
)
def test_answers_must_go_with_the_labels(where: Path, labels: tuple[str, ...], wanted: str, said: str) -> None:
    examples(where / "train.jsonl", 12, seed=3, labels=labels)

    with pytest.raises(DataError, match=said):
        read_material(config(eval_data=Path("held.jsonl"), labels=wanted), skip_bad=False, allow_overlap=False)


def test_held_out_examples_that_are_trained_on_are_refused_unless_allowed(where: Path) -> None:
    (where / "held.jsonl").write_bytes((where / "train.jsonl").read_bytes())
    asked = config(eval_data=Path("held.jsonl"))

    with pytest.raises(DataError, match="--allow-overlap"):
        read_material(asked, skip_bad=False, allow_overlap=False)
    assert len(read_material(asked, skip_bad=False, allow_overlap=True).overlaps) == 24


def test_a_csv_file_can_be_held_out_against_a_jsonl_file(where: Path) -> None:
    (where / "held.csv").write_text("text,spam\ncompletely different words here,1\n")
    asked = config(eval_data=Path("held.csv"), csv_prompt="text", csv_completion="spam", csv_labels="0=ham,1=spam")

    held = read_material(asked, skip_bad=False, allow_overlap=False).held

    assert held is not None and held.examples[0].answer == "spam"


def test_what_is_wrong_with_the_data_is_said_before_anything_heavy_is_imported(where: Path) -> None:
    script = (
        "import sys\n"
        "from loramux_server.cli import frame, train\n"
        "from loramux_adapters.errors import DataError\n"
        "try:\n"
        "    frame.call(train.app, 'train', ['--data', 'nothing.jsonl', '--name', 'spam'], {})\n"
        "except DataError as error:\n"
        "    print(error, {'torch', 'transformers', 'peft', 'matplotlib'} & set(sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "server"), str(ROOT / "adapters")])},
    )

    assert "nothing.jsonl cannot be read" in done.stdout and done.stdout.endswith("set()\n"), done.stderr
    assert not (where / "adapters-trained").exists()


# the whole command


def test_a_run_shows_what_it_does_and_leaves_an_adapter(
    where: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments(base, "--epochs", "2", "--labels", "ham,spam")) == 0

    text = capsys.readouterr().out
    for said in (
        "data      train.jsonl: 24 examples",
        "held out  held.jsonl: 6 examples",
        "none of them is in the training data",
        "MiB in NF4; ",
        "of them trainable: ",
        "for the optimizer",
        "steps     6 of 8 examples, 2.00 epochs",
        "before training: held-out loss",
        "epoch 1 (step 3/6): training loss",
        "epoch 2 (step 6/6): training loss",
        "| held-out loss",
        "trained in 0:0",
        "loramux adapters push adapters-trained/spam/adapter --name spam",
    ):
        assert said in text, said
    made = where / "adapters-trained" / "spam"
    assert {path.name for path in made.iterdir()} == {".lock", "adapter", "curves.png", "log.jsonl"}
    card = json.loads((made / "adapter" / "card.json").read_text())
    assert card["name"] == "spam" and card["data"]["rows"] == 24 and card["held_out"]["rows"] == 6
    assert card["training"]["steps"] == 6 and card["recipe"]["rank"] == 4
    config_file = json.loads((made / "adapter" / "adapter_config.json").read_text())
    assert config_file["loramux_base_id"] == card["loramux_base_id"]
    assert oct((made / "adapter" / "adapter_model.safetensors").stat().st_mode)[-3:] == "644"


def test_a_finished_run_is_refused_unless_it_may_be_overwritten(
    where: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = arguments(base, "--max-steps", "1")
    assert run(asked) == 0
    (where / "adapters-trained" / "spam" / "mine.txt").write_text("keep me")

    with pytest.raises(CommandFailed, match="finished run; give --overwrite"):
        run(asked)
    assert run([*asked, "--overwrite", "--seed", "1"]) == 0

    card = json.loads((where / "adapters-trained" / "spam" / "adapter" / "card.json").read_text())
    assert card["recipe"]["seed"] == 1
    assert (where / "adapters-trained" / "spam" / "mine.txt").read_text() == "keep me"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_makes_a_checkpoint_and_the_same_command_goes_on(
    where: Path, base: Path, number: signal.Signals, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = arguments(base, "--epochs", "2")
    assert run([*asked, "--out", "unharmed"]) == 0
    before = signal.getsignal(number)
    show = Progress.step

    def interrupted(self: Progress, record: StepRecord) -> None:
        show(self, record)
        if record.step == 4:
            signal.raise_signal(number)

    monkeypatch.setattr(Progress, "step", interrupted)
    assert run([*asked, "--out", "stopped"]) == 130
    said = capsys.readouterr().out
    assert "stopping after this step; the checkpoint will be in stopped/checkpoints; press Ctrl-C again" in said
    assert "stopped after step 4 of 6; the same command goes on from there" in said
    assert signal.getsignal(number) is before
    monkeypatch.setattr(Progress, "step", show)

    with pytest.raises(CheckpointError, match="rank was 4, is 8"):
        run([*asked, "--out", "stopped", "--rank", "8"])
    assert run([*asked, "--out", "stopped"]) == 0

    assert "goes on from the checkpoint of step 4 of 6" in capsys.readouterr().out
    weights = [
        (where / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("unharmed", "stopped")
    ]
    assert weights[0] == weights[1]


def test_a_dry_run_shows_the_plan_and_trains_nothing(
    where: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments(base, "--dry-run")) == 0

    text = capsys.readouterr().out
    assert "steps     3 of 8 examples" in text and "nothing was trained" in text


def tree(directory: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
    }


@pytest.mark.parametrize("warm", [False, True], ids=["with an empty cache", "with a cache"])
def test_a_dry_run_leaves_nothing_behind(
    where: Path, base: Path, warm: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    home, temporary = where / "home", tmp_path_factory.mktemp("temporary")
    environ = {"HOME": str(home), "TMPDIR": str(temporary), "PATH": os.environ["PATH"]}
    environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "server"), str(ROOT / "adapters")])
    if warm:
        load_base_model(str(base), device=CpuDevice(), cache_dir=home / ".cache" / "loramux", report=lambda line: None)
    before = tree(where)
    given = ["--data", "train.jsonl", "--name", "spam", "--base", str(base), "--rank", "4", "--dry-run"]
    command = [sys.executable, "-m", "loramux_server", "train", *given]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=120)

    assert done.returncode == 0, done.stderr
    assert "nothing was trained, and nothing is left behind" in done.stdout
    assert ("reading the base as it was packed before" in done.stdout) == warm
    assert tree(where) == before
    assert not list(temporary.glob("loramux*"))  # PyTorch makes an empty directory of its own there


def test_without_held_out_examples_the_run_says_so(where: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [word for word in arguments(base, "--max-steps", "1") if word not in ("--eval-data", "held.jsonl")]
    assert run(asked) == 0

    text = capsys.readouterr().out
    assert "held out  nothing: without --eval-data nobody can say" in text
    assert "held-out loss" not in text


@pytest.mark.parametrize(
    ("more", "error", "said"),
    [
        (("--max-length", "30"), DataError, "--max-length|max_length"),
        (("--name", "tiny-base"), InvalidAdapterName, "base's own name"),
        (("--target-modules", "no_such"), AdapterError, "no_such"),
        (("--device", "cuda"), ConfigError, "--device cuda"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_base_is_loaded(
    where: Path, base: Path, nothing_loaded: None, more: tuple[str, ...], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        run(arguments(base, *more))

    assert not list(where.glob("adapters-trained/*"))


def test_a_token_without_an_embedding_is_named_before_the_base_is_loaded(
    where: Path, tmp_path: Path, nothing_loaded: None
) -> None:
    base = save_tiny_model(tmp_path / "narrow")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<x{number}>" for number in range(100)])
    tokenizer.chat_template = "<x99>" + CHAT_TEMPLATE
    tokenizer.save_pretrained(base)
    with pytest.raises(CommandFailed, match="'<x99>' is token 357 .* 0 to 319 only"):
        run(arguments(base))


def test_two_runs_do_not_share_a_directory(where: Path, base: Path) -> None:
    with RunDirectory(where / "busy").owned(), pytest.raises(AdapterError, match="another process trains"):
        run(arguments(base, "--out", "busy"))


def test_the_finishing_process_is_told_all_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = config(
        eval_data=Path("held.csv"), labels="ham,spam", csv_prompt="text", csv_completion="y", threads=2, base="hub/one"
    )

    command = cli_train.finish_command(asked, RunDirectory(Path("run")), skip_bad=True)
    bare = cli_train.finish_command(config(), RunDirectory(Path("run")), skip_bad=False)

    assert command[:3] == ["-m", "loramux_server.cli.finish", "run"]
    given: dict[str, Any] = {}

    def finished(run_dir: Path, settings: FinishConfig, stages: Stages, *, cache_dir: Path, skip_bad: bool) -> None:
        given.update(settings.model_dump(), skip_bad=skip_bad, run_dir=run_dir)

    monkeypatch.setattr(finish, "finish", finished)
    assert finish.main(command[2:], {}) == 0
    assert (given["run_dir"], given["base"], given["eval_data"], given["train_data"]) == (
        Path("run"),
        "hub/one",
        Path("held.csv"),
        Path("train.jsonl"),
    )
    assert (given["labels"], given["csv_prompt"], given["threads"], given["skip_bad"]) == ("ham,spam", "text", 2, True)
    assert bare[2:] == ["run", "--base", TrainConfig(data=Path("d"), name="n").base, "--device", "auto"]


class Server:
    """Stands for a running server; remembers what was pushed."""

    pushed: list[tuple[str, str | None, str, list[str]]] = []

    def __init__(self, *, full: bool = False) -> None:
        self._full = full

    def push(self, client: AdaptersClient, name: str, directory: Path, **options: Any) -> ServerReply:
        if self._full:
            raise CommandFailed("the server refused (507): the disk is full")
        self.pushed = [(client.url, client.key, name, sorted(path.name for path in directory.iterdir()))]
        return ServerReply(201, {"outcome": "created"})


def test_a_done_adapter_is_uploaded_with_the_admins_key(
    where: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Server()
    monkeypatch.setattr(AdaptersClient, "push", lambda *args, **options: server.push(*args, **options))

    code = run(arguments(base, "--max-steps", "1", "--upload", "http://there"), {"LORAMUX_ADMIN_KEY": "k"})

    assert code == 0
    files = ["README.md", "adapter_config.json", "adapter_model.safetensors", "card.json"]
    assert server.pushed == [("http://there", "k", "spam", files)]
    uploading, uploaded = capsys.readouterr().out.partition("uploaded to http://there: spam created")[:2]
    assert uploaded and "uploading to http://there; the server tries it" in uploading


@pytest.mark.parametrize("broken", [OSError("no more files"), InvalidAdapterName("not this one"), KeyboardInterrupt()])
def test_however_an_upload_ends_the_last_line_says_how_to_do_it(
    where: Path,
    base: Path,
    broken: BaseException,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def push(*args: object, **options: object) -> ServerReply:
        raise broken

    monkeypatch.setattr(AdaptersClient, "push", push)

    assert run(arguments(base, "--max-steps", "1", "--upload", "http://there")) != 0
    last = "loramux adapters push adapters-trained/spam/adapter --name spam --url http://there"
    assert capsys.readouterr().out.rstrip().endswith(last)
    with pytest.raises(CommandFailed, match=f"finished run.*To upload it: {last}"):
        run(arguments(base, "--max-steps", "1", "--upload", "http://there"))


def test_a_server_with_another_base_is_known_before_the_base_is_loaded(
    where: Path, base: Path, nothing_loaded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload_check, "check_upload", lambda url, key, name: "f" * 64)

    with pytest.raises(CommandFailed, match=r"holds another base \(id f{12}\) than --base"):
        run(arguments(base, "--upload", "http://there"))
    assert not list(where.glob("adapters-trained/**/log.jsonl"))


def test_an_interrupted_evaluation_says_what_is_left_to_do(
    where: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_train, "_finish", interrupted)

    assert run(arguments(base, "--max-steps", "1")) == 130
    text = capsys.readouterr().out
    assert "interrupted; the adapter is saved in adapters-trained/spam/adapter, but not everything was done" in text
    assert "evaluate  python -m loramux_server.cli.finish adapters-trained/spam" in text
    assert "upload    loramux adapters push adapters-trained/spam/adapter --name spam\n" in text


def test_the_finishing_process_gets_ctrl_c_and_is_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = (
        "import pathlib, signal, sys, time\n"
        "def stop(*_):\n"
        f"    pathlib.Path({str(tmp_path / 'stopped')!r}).touch()\n"
        "    sys.exit(130)\n"
        "signal.signal(signal.SIGINT, stop)\n"
        f"pathlib.Path({str(tmp_path / 'started')!r}).touch()\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(cli_train, "finish_command", lambda *_, **__: ["-c", script])

    def interrupt() -> None:
        while not (tmp_path / "started").exists():
            time.sleep(0.01)
        signal.pthread_kill(main, signal.SIGINT)

    main = threading.get_ident()
    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        cli_train._finish(config(), RunDirectory(tmp_path), skip_bad=False)
    assert (tmp_path / "stopped").exists()


def test_a_refused_upload_or_a_failed_evaluation_loses_nothing(
    where: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Server(full=True)
    monkeypatch.setattr(AdaptersClient, "push", lambda *args, **options: server.push(*args, **options))
    monkeypatch.setattr(cli_train, "_finish", lambda config, run, *, skip_bad: 1)

    assert run(arguments(base, "--max-steps", "1", "--upload", "http://there")) == 1

    text = capsys.readouterr().out
    assert "the adapter is saved but NOT uploaded: the server refused (507)" in text
    assert text.splitlines()[-2:] == [
        "It is NOT uploaded yet. What is trained and evaluated is kept; this uploads it:",
        "          loramux adapters push adapters-trained/spam/adapter --name spam --url http://there",
    ]
    assert (where / "adapters-trained" / "spam" / "adapter" / "adapter_model.safetensors").is_file()


# progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def record(step: int, *, loss: float = 0.5, seconds: float = 2.0) -> StepRecord:
    return StepRecord(step, step / 10, loss, 0.9, 16, 500, 1e-3, 1.0, seconds)


def plan(first: int) -> Plan:
    return Plan(
        steps=20,
        first=first,
        steps_per_epoch=10,
        tokens_per_epoch=5000,
        learned_per_epoch=160,
        left_out=0,
        passed_over=(),
    )


def progress(stream: io.StringIO, *, seconds_between: float) -> Progress:
    times = iter(range(10_000))
    shown = Progress(
        stream, Path("run") / "checkpoints", memory=lambda: 900 << 20, clock=lambda: next(times) * seconds_between
    )
    shown.started(plan(0))
    return shown


def plain(stream: io.StringIO) -> str:
    """What was written, without colours and movements of the cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())


@pytest.mark.parametrize(
    ("evaluates", "first", "said"),
    [
        (True, 0, "stopping; nothing is learned yet;"),
        (False, 0, "stopping after this step; the checkpoint will be in run/checkpoints;"),
        (True, 3, "stopping after this step; the checkpoint will be in run/checkpoints;"),
        (True, 10, "stopping in this evaluation, which is made anew; the checkpoint will be in run/checkpoints;"),
    ],
)
def test_a_signal_before_the_first_step_is_answered_with_what_happens(evaluates: bool, first: int, said: str) -> None:
    stream = io.StringIO()
    shown = Progress(stream, Path("run") / "checkpoints", memory=lambda: 0, evaluates=evaluates)
    shown.started(plan(first))
    shown.stopping()

    assert stream.getvalue().splitlines()[-1].startswith(said)


def test_a_terminal_gets_a_bar_below_the_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    shown = progress(stream, seconds_between=1.0)

    shown.epoch(EpochRecord(0, 0.0, None, None, 2.5, 0.125, 3.0))
    for step in range(1, 6):
        shown.step(record(step))
    shown.line("a line")
    shown.end()

    text = plain(stream)
    assert text.startswith("before training: held-out loss 2.5000, 12.5% of tokens right\n")
    assert "a line\n" in text and text.endswith("\n")
    assert re.search(
        r"━  25% step 5/20  loss 0\.500 .*250 tokens/s  900 MiB  0:36 left", text
    )  # 15 steps, 2 evaluations
    assert stream.getvalue().endswith("\x1b[?25h")  # the cursor is back


@pytest.mark.parametrize("columns", [60, 72, 80, 90, 200])
def test_the_time_left_is_on_every_terminal_that_is_wide_enough(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Terminal()
    shown = progress(stream, seconds_between=1.0)
    shown.step(record(5))
    shown.end()

    line = plain(stream).splitlines()[-1].rstrip()
    assert len(line) <= columns
    assert line.endswith("0:30 left") == (columns >= 80)
    assert ("━" in line) == (columns >= 80)


def test_a_file_gets_a_line_now_and_then() -> None:
    stream = io.StringIO()
    shown = progress(stream, seconds_between=10.0)

    for step in range(1, 21):
        shown.step(record(step))
    shown.epoch(EpochRecord(20, 2.0, 0.5, 0.9, None, None, 0.0))

    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines[:-1]] == [
        "1/20",
        "4/20",
        "7/20",
        "10/20",
        "13/20",
        "16/20",
        "19/20",
        "20/20",
    ]
    assert lines[-1] == "epoch 2 (step 20/20): training loss 0.5000, 90.0% of tokens right"
    assert "\r" not in stream.getvalue()

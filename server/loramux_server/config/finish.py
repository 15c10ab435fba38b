"""What can be set for the last act of `loramux train`, which is a process of its own and is told by flags."""

from __future__ import annotations

from pathlib import Path

from loramux_server.config.settings import setting
from loramux_server.config.shared import LabelledExamples, RunsBase


class FinishConfig(RunsBase, LabelledExamples):
    """Settings of the evaluation and the fingerprint that end a training."""

    table = "finish"  # in no file

    eval_data: Path | None = setting(
        None, "held-out examples; without them there is no evaluation", group="Data", unset="no evaluation"
    )
    train_data: Path | None = setting(
        None, "training examples: majority baseline, overfitting", group="Data", unset="not looked at"
    )

"""What the scores mean, in words: is the adapter worth having, and what do its numbers hide?"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum

from loramux_adapters.evaluation.bootstrap import Difference
from loramux_adapters.evaluation.evaluated import Evaluation, Level, Remark, Role, ScoreComparison
from loramux_adapters.evaluation.scores import LabelScores

ACCURACY = "accuracy"  # a comparison beside that of the headline
CLOSE = 0.02  # at most this far below the reference is good
FAR = 0.05  # further below it than this is bad
CLOSE_LOSS, FAR_LOSS = 0.02, 0.1  # the same for loss, in nats per token
GAP = 0.05  # between training and held-out examples
LOSS_GAP = 0.2  # the same for loss, in nats per token
HIDING = 0.10  # recall of the rarest label this far below accuracy is hidden by it
RARE = 0.35  # a label with at most this share of the examples is rare
FEW = 30  # examples of a label that leave its scores wide open


def judge(evaluation: Evaluation) -> tuple[Remark, ...]:
    """Everything there is to say, worst first."""
    remarks = [*_all(evaluation)]
    order = [Level.BAD, Level.WARNING, Level.GOOD, Level.NOTE]
    return tuple(sorted(remarks, key=lambda remark: order.index(remark.level)))


def _all(evaluation: Evaluation) -> Iterator[Remark]:
    yield from _against_base(evaluation)
    yield from _against_majority(evaluation)
    for role in (Role.REFERENCE, Role.OTHER):
        for comparison in evaluation.comparisons:
            if comparison.role is role and comparison.score != ACCURACY:
                yield _against_adapter(evaluation, comparison)
    if evaluation.from_gguf and (evaluation.find(Role.REFERENCE) or evaluation.quantize == "none"):
        yield Remark(
            Level.NOTE,
            "This base comes from a GGUF file: its 16-bit weights, and so the 16-bit reference, are dequantized 4-bit "
            "ones already. The difference to it shows what NF4 lost on top of that, not against the original weights.",
        )
    scores = evaluation.adapter.labelled
    if scores is not None:
        yield from _of_labels(evaluation, scores)
    yield from _gap(evaluation)


class Standing(Enum):
    """Where a score is, beside another."""

    BETTER = "better"  # surely
    PERHAPS_BETTER = "perhaps better"  # as far as these examples tell
    EQUAL = "equal"  # or so close that it does not matter
    PERHAPS_WORSE = "perhaps worse"
    WORSE = "worse"


def standing(gain: Difference, close: float) -> Standing:
    """What a difference means; more is better.

    Args:
        close: a difference that chance may have made and that is no larger than this is none.
    """
    if gain.is_significant:
        return Standing.BETTER if gain.value > 0 else Standing.WORSE
    if abs(gain.value) <= close:
        return Standing.EQUAL
    return Standing.PERHAPS_BETTER if gain.value > 0 else Standing.PERHAPS_WORSE


def _against_base(evaluation: Evaluation) -> Iterator[Remark]:
    comparison = evaluation.compared(Role.BASE)
    if comparison is None:
        return
    shown, few = _shown(comparison), _too_few(evaluation)
    more = "More or better training data, or more steps"
    match standing(_gain(comparison), _close(comparison)):
        case Standing.BETTER:
            yield Remark(Level.GOOD, f"Better than the bare base: {shown}.")
        case Standing.PERHAPS_BETTER:
            yield Remark(Level.WARNING, f"Perhaps better than the bare base, but {few}: {shown}.")
        case Standing.EQUAL:
            yield Remark(Level.BAD, f"No gain over the bare base: {shown}. {more}.")
        case Standing.PERHAPS_WORSE:
            yield Remark(Level.BAD, f"Below the bare base, though {few}: {shown}. {more}.")
        case Standing.WORSE:
            yield Remark(Level.BAD, f"WORSE than the bare base: {shown}. Do not use this adapter.")


def _against_majority(evaluation: Evaluation) -> Iterator[Remark]:
    majority = evaluation.find(Role.MAJORITY)
    comparison = evaluation.compared(Role.MAJORITY, ACCURACY)
    if majority is None or comparison is None:
        return
    shown, few = _shown(comparison), _too_few(evaluation)
    always = f"always answering {_label(majority.name.partition(': ')[2])}"
    match standing(_gain(comparison), CLOSE):
        case Standing.BETTER:
            return
        case Standing.PERHAPS_BETTER:
            yield Remark(Level.WARNING, f"Perhaps more accurate than {always}, but {few}: {shown}.")
        case Standing.EQUAL:
            yield Remark(Level.BAD, f"No more accurate than {always}: {shown}.")
        case Standing.PERHAPS_WORSE:
            yield Remark(Level.BAD, f"Below {always}, though {few}: {shown}.")
        case Standing.WORSE:
            yield Remark(Level.BAD, f"LESS accurate than {always}: {shown}.")


def _too_few(evaluation: Evaluation) -> str:
    return f"{evaluation.examples:,} held-out examples are too few to be sure"


def _close(comparison: ScoreComparison) -> float:
    return CLOSE if comparison.score != "loss" else CLOSE_LOSS


def _against_adapter(evaluation: Evaluation, comparison: ScoreComparison) -> Remark:
    """A reference, or a further adapter: within `CLOSE` is good, beyond `FAR` is bad."""
    what = "the 16-bit reference" if comparison.role is Role.REFERENCE else comparison.other
    gain, shown = _gain(comparison), _shown(comparison)
    close, far = (CLOSE, FAR) if comparison.score != "loss" else (CLOSE_LOSS, FAR_LOSS)
    unit = "points" if comparison.score != "loss" else "nats"
    scale = 100 if comparison.score != "loss" else 1
    sure = "" if comparison.difference.is_significant else " The difference is within what chance does."
    if gain.is_significant and gain.value > 0:
        return Remark(Level.GOOD, f"Better than {what}: {shown}.")
    if gain.value > close:
        return Remark(Level.GOOD, f"No worse than {what}, perhaps better: {shown}.{sure}")
    if gain.value >= -close:
        return Remark(Level.GOOD, f"As good as {what} (within {close * scale:g} {unit}): {shown}.{sure}")
    if gain.value >= -far:
        return Remark(Level.WARNING, f"Weaker than {what}: {shown}.{sure}")
    return Remark(Level.BAD, f"Much weaker than {what} (more than {far * scale:g} {unit}): {shown}.{sure}")


def _of_labels(evaluation: Evaluation, scores: LabelScores) -> Iterator[Remark]:
    rarest = scores.rarest
    share = rarest.support / scores.examples
    hidden = scores.accuracy.value - rarest.recall.value
    if share <= RARE and hidden >= HIDING:
        yield Remark(
            Level.BAD,
            f"Accuracy of {scores.accuracy.value:.1%} hides that only {rarest.recall.value:.1%} of "
            f"{_label(rarest.label)} is found (95 % interval {rarest.recall.low:.1%} to {rarest.recall.high:.1%}): it "
            f"is {share:.1%} of the examples.",
        )
    silent = [each.label for each in scores.classes if each.support and not each.predicted]
    if silent:
        yield Remark(Level.BAD, f"Never answers {', '.join(map(_label, silent))}.")
    absent = [each.label for each in scores.classes if not each.support]
    if absent:
        yield Remark(
            Level.WARNING,
            f"No held-out answer is {', '.join(map(_label, absent))}, so nothing is known of it; add such examples.",
        )
    few = [each for each in scores.classes if 0 < each.support < FEW]
    if few:
        counts = ", ".join(f"{_label(each.label)} {each.support}" for each in few)
        yield Remark(Level.WARNING, f"Few held-out examples of {counts}: the intervals are wide.")
    generated, chosen = evaluation.adapter.by_generation, evaluation.adapter.by_logprob
    if generated is not None and generated.unlabelled:
        share = generated.unlabelled / generated.examples
        level = Level.BAD if share > FAR else Level.WARNING
        yield Remark(level, f"{share:.1%} of the replies ({generated.unlabelled}) are none of the labels.")
    if generated is not None and chosen is not None:
        apart = chosen.headline.value - generated.headline.value
        if apart > CLOSE:
            yield Remark(
                Level.WARNING,
                f"{chosen.headline_name} is {100 * apart:.1f} points lower in replies than by log probability: clients "
                "see the replies.",
            )


def _gap(evaluation: Evaluation) -> Iterator[Remark]:
    gap, count = evaluation.gap, evaluation.train_examples
    if gap is None:
        return
    if not evaluation.labels:
        what, far = f"{gap.value:.3f} nats per token lower loss", gap.value >= LOSS_GAP
        bounds = f"95 % interval {gap.low:.3f} to {gap.high:.3f}"
    else:
        what, far = f"{100 * gap.value:.1f} points better", gap.value >= GAP
        bounds = f"95 % interval {100 * gap.low:.1f} to {100 * gap.high:.1f}"
    if far and gap.low > 0:
        yield Remark(
            Level.BAD,
            f"Overfitting: {what} on {count} training examples than on held-out ones ({bounds}). Fewer epochs, a lower "
            "rank, dropout, or more data.",
        )
    elif far:
        yield Remark(
            Level.WARNING,
            f"Perhaps overfitting: {what} on {count} training examples than on held-out ones ({bounds}), which are too "
            "few to be sure.",
        )
    else:
        yield Remark(
            Level.NOTE, f"No sign of overfitting: {what} on {count} training examples than on held-out ones ({bounds})."
        )


def _gain(comparison: ScoreComparison) -> Difference:
    """The difference with its sign turned so that more is better."""
    found = comparison.difference
    return found if comparison.score != "loss" else Difference(-found.value, -found.high, -found.low, found.p)


def _shown(comparison: ScoreComparison) -> str:
    found = comparison.difference
    p = f"p < {0.001:g}" if found.p < 0.001 else f"p = {found.p:.3f}"
    if comparison.score == "loss":
        return f"loss {found.value:+.3f} nats per token (95 % interval {found.low:+.3f} to {found.high:+.3f}, {p})"
    return (
        f"{comparison.score} {100 * found.value:+.1f} points "
        f"(95 % interval {100 * found.low:+.1f} to {100 * found.high:+.1f}, {p})"
    )


def _label(label: str) -> str:
    return f'"{label}"'

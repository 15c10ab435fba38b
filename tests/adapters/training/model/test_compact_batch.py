"""What of a batch goes through the model: nothing after the last learned token, a common beginning once."""

from __future__ import annotations

from loramux_adapters.training.data.batches import Row, TokenBatch
from loramux_adapters.training.model.compact_batch import CompactBatch


def row(ids: list[int], learn: list[int]) -> Row:
    return Row(tuple(ids), tuple(place in learn for place in range(len(ids))))


def test_what_follows_the_last_learned_token_is_cut_off() -> None:
    batch = TokenBatch.of([row([1, 2, 3, 4, 5], [2]), row([6, 7, 8], [2])])
    compact = CompactBatch.of(batch, share=True)
    assert compact.ids.tolist() == [1, 2, 6, 7]
    assert compact.positions.tolist() == [0, 1, 0, 1]
    assert compact.labels.tolist() == [3, 8]
    assert compact.learned.tolist() == [1, 3]
    assert (compact.rows.shared, compact.rows.lengths) == (0, (2, 2))


def test_what_all_rows_begin_with_comes_once() -> None:
    batch = TokenBatch.of([row([9, 8, 1, 2, 3], [3, 4]), row([9, 8, 5, 6], [3])])
    compact = CompactBatch.of(batch, share=True)
    assert compact.ids.tolist() == [9, 8, 1, 2, 5]
    assert compact.positions.tolist() == [0, 1, 2, 3, 2]
    assert compact.labels.tolist() == [2, 3, 6]
    assert compact.learned.tolist() == [2, 3, 4]
    assert (compact.rows.shared, compact.rows.lengths) == (2, (2, 1))


def test_nothing_is_shared_unless_asked_and_never_in_a_batch_of_one() -> None:
    rows = [row([9, 8, 1, 2], [3]), row([9, 8, 5, 6], [3])]
    assert CompactBatch.of(TokenBatch.of(rows), share=False).rows.shared == 0
    assert CompactBatch.of(TokenBatch.of(rows[:1]), share=True).rows.shared == 0


def test_a_token_at_which_a_loss_is_taken_is_never_shared() -> None:
    same = row([9, 8, 7, 6], [2, 3])
    compact = CompactBatch.of(TokenBatch.of([same, same]), share=True)
    assert (compact.rows.shared, compact.rows.lengths) == (1, (2, 2))
    assert compact.labels.tolist() == [7, 6, 7, 6]


def test_a_row_without_learned_tokens_is_left_out_and_a_batch_of_them_is_empty() -> None:
    silent = row([1, 2, 3], [])
    compact = CompactBatch.of(TokenBatch.of([silent, row([4, 5], [1])]), share=True)
    assert (compact.ids.tolist(), compact.rows.lengths) == ([4], (1,))
    nothing = CompactBatch.of(TokenBatch.of([silent]), share=True)
    assert (nothing.ids.numel(), nothing.rows.lengths) == (0, ())

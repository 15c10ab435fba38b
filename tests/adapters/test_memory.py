"""Mappings: as large as asked for, zeros, and at a huge page where these were asked for."""

from __future__ import annotations

import pytest

from loramux_adapters.memory import mapping

HUGE = 2 << 20


@pytest.mark.parametrize("nbytes", [0, 1, HUGE - 1, HUGE, HUGE + 1, 3 * HUGE])
@pytest.mark.parametrize("huge_pages", [False, True])
def test_a_mapping_is_exactly_as_large_as_was_asked_for(nbytes: int, huge_pages: bool) -> None:
    made = mapping(nbytes, huge_pages=huge_pages)
    assert made.numel() == nbytes and made.untyped_storage().nbytes() == max(1, nbytes)
    assert not made.any()
    made.fill_(7)
    if huge_pages and nbytes >= HUGE:
        assert made.data_ptr() % HUGE == 0

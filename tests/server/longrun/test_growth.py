from __future__ import annotations

import threading
from pathlib import Path

from loramux_server.longrun.growth import bytes_in, growth_told


def test_what_is_written_meanwhile_is_told(tmp_path: Path) -> None:
    (tmp_path / "before").write_bytes(bytes(1000))
    told: list[int] = []
    enough = threading.Event()

    def tell(count: int) -> None:
        told.append(count)
        if count:
            enough.set()

    with growth_told(tmp_path, tell, every=0.01):
        (tmp_path / "below").mkdir()
        (tmp_path / "below" / "new").write_bytes(bytes(300))
        assert enough.wait(5)

    assert told[-1] == 300
    assert bytes_in(tmp_path) == 1300
    assert bytes_in(tmp_path / "not there") == 0

"""Eight ranks at once, a master that is late and a segment that is later still: all come up.

One round; `python -m tests.store.race 50` runs fifty in a row.
"""

from __future__ import annotations

from tests.store.race import run


def test_all_ranks_come_up_beside_a_master_that_starts_late_and_a_segment_that_comes_later_still() -> None:
    done = run()
    assert done.survived, "\n".join(report["said"] for report in done.reports)
    assert max(report["attempts"] for report in done.reports) > 1, "nobody met the race"

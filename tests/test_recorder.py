"""The recorder: pushes reach the journal in few transactions, and outlast one that is stuck."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DataError, OperationalError

from acceptance.kit import wait_for
from httptrading.brokers import recorder as recorder_module
from httptrading.brokers.journal import Journal
from httptrading.brokers.recorder import Recorder
from httptrading.errors import Busy
from httptrading.model import Fill, Order, OrderReport

ID, OTHER = "RecorderInstance1", "RecorderInstance2"
PATIENCE = 60.0


class Broken(Journal):
    """A journal whose writes fail as a database makes them fail."""

    failure: Exception | None = None
    odd = ""  # an order id that is not taken

    def _join(self, connection: sa.Connection, instance_id: str, *rest: Any) -> None:
        reports = rest[0]
        if self.failure is not None:
            raise self.failure
        if self.odd and any(report.order.order_id == self.odd for report in reports):
            raise DataError("INSERT", {}, ValueError("too long"))
        super()._join(connection, instance_id, *rest)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Broken]:
    with closing(Broken(f"sqlite:///{tmp_path / 'journal.sqlite'}")) as journal:
        yield journal


@pytest.fixture
def recorder(journal: Broken) -> Iterator[Recorder]:
    recorder = Recorder(journal)
    recorder.start()
    yield recorder
    recorder.stop(PATIENCE)


def push(
    recorder: Recorder, order_id: str, instance_id: str = ID, **fields: Any
) -> threading.Event:
    """The event is set when it has been written."""
    written = threading.Event()
    report = OrderReport(replace(Order(order_id, "USD", 10), **fields))
    recorder.reports(instance_id, (report,), 0.0, written.set)
    return written


def known(journal: Journal, instance_id: str = ID) -> set[str]:
    return {row.order_id for row in journal.orders(instance_id, open_=None, since=None, limit=1000)}


def test_a_storm_costs_few_transactions(journal: Broken, recorder: Recorder) -> None:
    commits: list[Any] = []
    gate = threading.Event()
    journal._database._commits.post(lambda connection: gate.wait(PATIENCE))
    sa.event.listen(journal._database._writer, "commit", commits.append)
    told = [push(recorder, str(number % 50), filled_qty=number // 50) for number in range(500)]
    gate.set()
    assert all(written.wait(PATIENCE) for written in told)
    assert len(commits) < 20
    rows = journal.orders(ID, open_=None, since=None, limit=1000)
    assert len(rows) == 50 and all(row.order.filled_qty == 9 for row in rows)


def test_a_stuck_journal_gets_them_later(journal: Broken, recorder: Recorder) -> None:
    journal.failure = OperationalError("INSERT", {}, OSError("disk full"))
    outcomes: list[str] = []

    def write() -> None:
        if journal.failure is not None:
            raise Busy("disk full", retry_after=1)
        outcomes.append("written")

    ended = threading.Event()
    told = [push(recorder, str(number)) for number in range(3)]
    recorder.outcome(ID, write, ended.set, lambda: None)
    assert not told[0].wait(0.8) and known(journal) == set()
    journal.failure = None
    assert all(written.wait(PATIENCE) for written in told) and ended.wait(PATIENCE)
    assert known(journal) == {"0", "1", "2"} and outcomes == ["written"]


def test_an_odd_push_takes_no_other_with_it(journal: Broken, recorder: Recorder) -> None:
    journal.odd = "odd"
    gate = threading.Event()
    journal._database._commits.post(lambda connection: gate.wait(PATIENCE))
    push(recorder, "before")
    odd = push(recorder, "odd")
    ended, dropped = threading.Event(), threading.Event()
    recorder.outcome(ID, lambda: None, ended.set, dropped.set)
    after = push(recorder, "after")
    gate.set()
    assert after.wait(PATIENCE)
    assert known(journal) == {"before", "after"} and not odd.is_set()
    assert ended.is_set() and not dropped.is_set()


def test_accounts_whose_pushes_come_together_keep_their_own(journal: Broken) -> None:
    recorder = Recorder(journal)
    for number, instance_id in enumerate((ID, OTHER, ID)):
        push(recorder, str(number), instance_id)
        fill = Fill("1", str(number), 10, 200, datetime.now(UTC))
        recorder.fills(instance_id, (fill,))
    recorder.start()
    recorder.stop(PATIENCE)
    assert (known(journal), known(journal, OTHER)) == ({"0", "2"}, {"1"})
    told = {(one, id_) for one in "012" for id_ in (ID, OTHER) if journal.fills(id_, one)}
    assert told == {("0", ID), ("1", OTHER), ("2", ID)}


def test_an_old_push_is_not_taken_for_as_young_as_one_beside_it(journal: Broken) -> None:
    """Or it would reopen what has ended since, as only a much later word of the broker does."""
    recorder = Recorder(journal)
    journal.record(ID, [OrderReport(Order("1", "USD", 10, is_canceled=True))])
    push(recorder, "1")
    later = (OrderReport(Order("2", "USD", 10)),)
    recorder.reports(ID, later, time.time() + 1e6, lambda: None)
    recorder.start()
    recorder.stop(PATIENCE)
    assert known(journal) == {"1", "2"}
    row = journal.by_order_id(ID, "1")
    assert row is not None and row.order.is_canceled


def test_an_outcome_that_cannot_be_recorded_is_looked_for(recorder: Recorder) -> None:
    tries: list[str] = []

    def write() -> None:
        tries.append("")
        raise ValueError("no text for this database")

    ended, dropped = threading.Event(), threading.Event()
    recorder.outcome(ID, write, ended.set, dropped.set)
    assert dropped.wait(PATIENCE) and not ended.is_set()
    assert len(tries) == 1


class Counted(Recorder):
    """It remembers how much it wrote at a time."""

    def __init__(self, journal: Journal) -> None:
        super().__init__(journal)
        self.sizes: list[int] = []

    def _record(self, mine: list[Any]) -> None:
        self.sizes.append(len(mine))
        super()._record(mine)


def test_what_comes_soon_after_is_written_with_it(
    journal: Broken, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder_module, "GATHER", 10 * PATIENCE)
    recorder = Counted(journal)
    recorder.start()
    first = push(recorder, "1")
    wait_for(recorder._queue.empty, "the first to be taken up")
    second = push(recorder, "2")
    recorder.stop(PATIENCE)  # which it does not wait out
    assert first.is_set() and second.is_set() and recorder.sizes == [2]


def test_too_many_pushes_are_dropped_but_no_outcome(
    journal: Broken, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder_module, "MOST_WAITING", 2)
    recorder, ended = Recorder(journal), threading.Event()
    for number in range(4):
        push(recorder, str(number))
    recorder.outcome(ID, lambda: None, ended.set, lambda: None)
    recorder.start()
    recorder.stop(PATIENCE)
    assert known(journal) == {"0", "1"} and ended.is_set()


def test_the_end_writes_what_has_come(journal: Broken) -> None:
    recorder = Counted(journal)
    told = [push(recorder, str(number)) for number in range(1200)]
    recorder.start()
    recorder.stop(PATIENCE)
    assert all(written.is_set() for written in told)
    assert recorder.sizes == [500, 500, 200]


def test_the_end_does_not_wait_for_a_stuck_journal(journal: Broken) -> None:
    journal.failure = OperationalError("INSERT", {}, OSError("disk full"))
    recorder = Recorder(journal)
    recorder.start()
    written = push(recorder, "1")
    recorder.stop(PATIENCE)
    assert not recorder._thread.is_alive() and not written.is_set()

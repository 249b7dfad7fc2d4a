"""A scan from the horizon misses no row, in whatever order transactions begin, write, commit and end."""

from __future__ import annotations

from hypothesis import settings, strategies
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from idempotency.outbox._horizon import Horizon


class Transactions(RuleBasedStateMachine):
    """PostgreSQL as far as it matters here: numbers of transactions, numbers of rows, and what a snapshot shows."""

    def __init__(self) -> None:
        super().__init__()
        self.horizon = Horizon()
        self.next_number = 1
        self.next_seq = 1
        self.open: dict[int, list[int]] = {}
        self.committed: set[int] = set()
        self.in_hand: tuple[list[int], int | None, int] | None = None

    @rule()
    def begin(self) -> None:
        self.open[self.next_number] = []
        self.next_number += 1

    @precondition(lambda self: self.open)
    @rule(data=strategies.data())
    def emit(self, data: strategies.DataObject) -> None:
        self.open[data.draw(strategies.sampled_from(sorted(self.open)))].append(self.next_seq)
        self.next_seq += 1

    @precondition(lambda self: self.open)
    @rule(data=strategies.data(), commits=strategies.booleans())
    def end(self, data: strategies.DataObject, commits: bool) -> None:
        rows = self.open.pop(data.draw(strategies.sampled_from(sorted(self.open))))
        self.committed.update(rows if commits else ())

    @precondition(lambda self: self.in_hand is None)
    @rule(limit=strategies.integers(1, 4))
    def scan(self, limit: int) -> None:
        found = sorted(seq for seq in self.committed if seq > self.horizon.floor)[:limit]
        if found:
            self.horizon.seen(found[-1])
            end = found[-1] if len(found) == limit else None
            self.in_hand = found, end, min(self.open, default=self.next_number)

    @precondition(lambda self: self.in_hand is not None)
    @rule(published=strategies.integers(0, 4), asked=strategies.booleans())
    def settle(self, published: int, asked: bool) -> None:
        assert self.in_hand is not None
        found, end, oldest_open = self.in_hand
        self.in_hand = None
        remaining = found[published:]
        self.committed -= set(found[:published])
        self.horizon.done(remaining[0] - 1 if remaining else end, oldest_open)
        if published or asked:
            self.horizon.begun(self.next_number)
            self.next_number += 1

    @rule(seq=strategies.integers(0, 20))
    def go_back(self, seq: int) -> None:
        self.horizon.go_back(seq)

    @invariant()
    def nothing_is_below_the_floor(self) -> None:
        to_come = {seq for rows in self.open.values() for seq in rows}
        assert all(seq > self.horizon.floor for seq in self.committed | to_come)


Transactions.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestHorizon = Transactions.TestCase


def test_the_floor_follows_what_is_published_when_transactions_are_short() -> None:
    horizon = Horizon()
    for seq in range(1, 100):
        horizon.seen(seq)
        horizon.done(None, 10 * seq - 1)
        horizon.begun(10 * seq)
    # The last row is not proven yet: a transaction that was open in the last snapshot may have a lower one.
    assert horizon.floor == 98


def test_an_open_transaction_stops_the_floor_at_what_was_seen_before_it_began() -> None:
    horizon = Horizon()
    horizon.seen(5)
    horizon.begun(100)
    for seq in range(6, 50):
        horizon.seen(seq)
        horizon.done(None, 101)
        horizon.begun(100 + seq)
    assert horizon.floor == 5


def test_a_row_counts_only_when_all_transactions_of_lower_numbers_have_ended() -> None:
    horizon = Horizon()
    horizon.seen(2)
    horizon.begun(3)
    horizon.done(None, 2)
    assert horizon.floor == 0
    horizon.done(None, 3)
    assert horizon.floor == 2

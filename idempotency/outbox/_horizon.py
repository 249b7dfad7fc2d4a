"""From where the table of messages must be scanned, so that a row that is committed late is never skipped."""

from __future__ import annotations


class Horizon:
    """The place up to which nothing can be found any more: rows of a higher ``seq`` only are read.

    A sequence gives out its numbers in order, but transactions commit in any order: a row of a lower ``seq`` may appear
    after one of a higher ``seq``. On PostgreSQL a transaction that emits gets its own number before its rows get
    theirs (see ``emitted_at``). So, once a row was *seen*, and a transaction was *begun* afterwards: every row of a
    lower ``seq`` is of a transaction of a lower number. A scan that runs when all transactions below that number have
    ended sees all of these rows.

    Without it, every scan would begin at the first row, and pass all the rows that are deleted, and that a long query
    keeps the database from cleaning away.
    """

    def __init__(self) -> None:
        self.floor = 0
        self._seen = 0
        self._complete = 0
        self._mark: tuple[int, int] | None = None

    def seen(self, seq: int) -> None:
        """Note a row that was read."""
        self._seen = max(self._seen, seq)

    @property
    def needs_number(self) -> bool:
        """Return whether the floor cannot be raised further before :meth:`begun` is called."""
        return self._mark is None and self._seen > self._complete

    def begun(self, number: int) -> None:
        """Note the number of a transaction that began after everything that was :meth:`seen`."""
        # One mark at a time: a later one would need later transactions to end.
        if self.needs_number:
            self._mark = (self._seen, number)

    def done(self, up_to: int | None, oldest_open: int) -> None:
        """Raise the floor after a scan from it, of which nothing is to be done up to ``up_to``.

        ``up_to`` None: nothing in the whole table. ``oldest_open``: the number of the oldest transaction that was open,
        in the snapshot of that scan.
        """
        if self._mark is not None and oldest_open >= self._mark[1]:
            self._complete, self._mark = self._mark[0], None
        self.floor = max(self.floor, self._complete if up_to is None else min(up_to, self._complete))

    def go_back(self, seq: int) -> None:
        """Lower the floor: rows after ``seq`` that were passed over are to be read."""
        self.floor = min(self.floor, seq)

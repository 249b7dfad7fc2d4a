"""The figures of streams as text."""

from __future__ import annotations

from collections.abc import Iterator

from streams import HISTORY, LONG, SHORT, WRITERS, Amount, Rates, loads, measure
from streams_peer import Peer

_ROW = "{:<20}{:>12}{:>8}{:>14}{:>8}{:>9}"
HEAD = "\n".join(
    (
        "",
        f"Streams on PostgreSQL: events a second that {WRITERS} threads append, one in a transaction, and that one",
        f"reads from the first on, where there are {HISTORY} and more, and their ratio to those of eventsourcing where",
        "it is installed. A projection applies them by a function that does nothing.",
        "",
        _ROW.format("", "appends/s", "ratio", "catch-up/s", "ratio", "goal"),
    )
)


def rows(url: str, name: str, amount: Amount) -> Iterator[str]:
    """Measure, and yield the lines."""
    measured = list(measure(url, name, amount))
    peer = next((each for each in measured if each.name == Peer.name), None)
    for each in measured:
        yield _row(each, None if each is peer else peer)
    rates = {each.name: each.catch_up for each in measured}
    by = [rates["projection" + driver] / rates["streams" + driver] for driver in ("", ", asyncpg")]
    yield f"\na projection catches up at {by[0]:.2f} of the rate of reading, by asyncpg {by[1]:.2f}, goal >= 0.60"
    short, long = loads(url, f"{name}_loads", amount)
    yield (
        f"\nload of a stream of {SHORT} events {short * 1e3:.2f} ms, of {LONG + SHORT} events with a snapshot"
        f" {long * 1e3:.2f} ms, ratio {long / short:.2f}, goal <= 2.00"
    )


def _row(rates: Rates, peer: Rates | None) -> str:
    ratios = [f"{a / b:.2f}" if a else "" for a, b in zip(rates[1:], peer[1:], strict=True)] if peer else ["", ""]
    appends = f"{rates.appends:.0f}" if rates.appends else ""
    goal = ">= 3.00" if peer else ""
    return _ROW.format(rates.name, appends, ratios[0], f"{rates.catch_up:.0f}", ratios[1], goal).rstrip()

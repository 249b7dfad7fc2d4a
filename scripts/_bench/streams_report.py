"""The figures of streams as text."""

from __future__ import annotations

from collections.abc import Iterator

from streams import LONG, SHORT, WRITERS, Amount, Rates, loads, measure

_ROW = "{:<16}{:>12}{:>8}{:>14}{:>8}{:>9}"
HEAD = "\n".join(
    (
        "",
        f"Streams on PostgreSQL: events a second that {WRITERS} threads append, one in a transaction, and that one",
        "reads from the first on, and their ratio to those of eventsourcing where it is installed.",
        "",
        _ROW.format("", "appends/s", "ratio", "catch-up/s", "ratio", "goal"),
    )
)


def rows(url: str, name: str, amount: Amount) -> Iterator[str]:
    """Measure, and yield the lines."""
    ours, *others = measure(url, name, amount)
    yield _row(ours, others[0] if others else None)
    for each in others:
        yield _row(each, None)
    short, long = loads(url, f"{name}_loads", amount)
    yield (
        f"\nload of a stream of {SHORT} events {short * 1e3:.2f} ms, of {LONG + SHORT} events with a snapshot"
        f" {long * 1e3:.2f} ms, ratio {long / short:.2f}, goal <= 2.00"
    )


def _row(rates: Rates, peer: Rates | None) -> str:
    ratios = [f"{a / b:.2f}" for a, b in zip(rates[1:], peer[1:], strict=True)] if peer else ["", ""]
    goal = ">= 3.00" if peer else ""
    return _ROW.format(rates.name, f"{rates.appends:.0f}", ratios[0], f"{rates.catch_up:.0f}", ratios[1], goal).rstrip()

"""The figures of a consumer as text."""

from __future__ import annotations

from collections.abc import Sequence

from messages import BARE, ONE, PREFETCH, THREE, Rate, Rates
from report import ratio

_MESSAGES = "{:<20}" + "{:>8}{:>6}{:>7}{:>7}{:>7} |" * 2
_MESSAGES_HEAD = "\n".join(
    (
        "",
        f"Messages per second of one aio-pika consumer, prefetch {PREFETCH}, at their first and at a second delivery,",
        "with effects in PostgreSQL; their ratios to the bare handler, which is one INSERT in a transaction, and to",
        "claim, INSERT and completion by hand, in one transaction and in three. µs: processor time of the consumer",
        "per message, which other work on the machine moves least.",
        "",
        _MESSAGES.format("", *("first", "µs", "/bare", "/one", "/three"), *("replay", "µs", "/bare", "/one", "/three")),
    )
)


def messages_table(all_rates: Sequence[Rates]) -> str:
    """Format the throughput of every way to consume messages."""
    by_name = {rates.name: rates for rates in all_rates}
    bare, one, three = (by_name[name] for name in (BARE, ONE, THREE))
    rows = [_MESSAGES_HEAD]
    for rates in all_rates:
        first = _message_fields(rates.first, bare.first, one.first, three.first)
        replay = _message_fields(rates.replay, bare.first, one.replay, three.replay)
        rows.append(_MESSAGES.format(rates.name, *first, *replay))
    return "\n".join(rows)


def _message_fields(rate: Rate | None, *floors: Rate | None) -> list[str]:
    if rate is None:
        return ["-"] * (2 + len(floors))
    ratios = (ratio(rate.per_second, floor and floor.per_second) for floor in floors)
    return [f"{rate.per_second:.0f}", f"{rate.processor:.0f}", *ratios]

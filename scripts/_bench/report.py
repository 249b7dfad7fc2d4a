"""The figures as text."""

from __future__ import annotations

import telemetry
from calls import Throughput, Trips
from encryption import Added
from overhead import Overhead
from purge_load import BesidePurge
from record_size import RecordSize
from subjects import RESULT
from table_size import Costs
from throughput import CONCURRENCY

NOISE = "Microseconds are indicative: other work on the machine moves them. The ratios are of one interleaved run."

_LABEL = "{:<15}"
_OVERHEAD = _LABEL + "{:>8}{:>8} |{:>7}{:>7}{:>10} |{:>7}{:>7}{:>10} |{:>9}"
OVERHEAD = "\n".join(
    (
        "",
        "One request at a time: µs over the bare application, and their ratio to raw round trips of the same client",
        "(first execution: two, replay: one) that send the same commands as the store, or the cheapest there is (GET,",
        "SELECT 1). Commands: those of an out-of-scope request, a first execution, a replay.",
        "",
        _OVERHEAD.format(
            "", "out of", "no key", "first", "/same", "/cheapest", "replay", "/same", "/cheapest", "commands"
        ),
        _OVERHEAD.format("", "scope", *[""] * 8),
    )
)
OVERHEAD_TARGETS = _OVERHEAD.format("at most", "3", "", "", "1.30", "", "", "1.40", "", "0/2/1")

_THROUGHPUT = _LABEL + "{:>9}{:>9}" * len(CONCURRENCY)
THROUGHPUT = "\n".join(
    (
        "",
        "Throughput with so many requests at a time, as a ratio to a bare Starlette application.",
        "",
        _LABEL.format("") + "".join(f"{concurrency:>18}" for concurrency in CONCURRENCY),
        _THROUGHPUT.format("", *("first", "replay") * len(CONCURRENCY)),
    )
)

_TABLE = _LABEL + "{:>10} |" + "{:>8}{:>8} |" * 5
TABLE = "\n".join(
    (
        "",
        "One verb against the number of records, in µs (purge: per row), and its ratio to the same beside 1,000,",
        "measured at the same time. Logged: the bytes that a claim and its completion write to the server's log.",
        "",
        _TABLE.format("", "records", "claim", "", "complete", "", "replay", "", "purge", "", "logged", ""),
    )
)
TABLE_TARGETS = _TABLE.format("at most", "", *("", "x1.50") * 3, *[""] * 4)

_PURGE = _LABEL + "{:>10}{:>8} |{:>9}{:>9} |{:>9}{:>9} |{:>9}{:>9}{:>8}"
PURGE = "\n".join(
    (
        "",
        "Live claims beside a purge of expired records from the largest table, in µs: median and p99 without it, the",
        "same once more, with it; and the ratio of the last p99 to the mean of the other two.",
        "",
        _PURGE.format("", "purged", "in s", "without", "p99", "again", "p99", "with", "p99", "ratio"),
    )
)
PURGE_TARGETS = _PURGE.format("at most", *[""] * 8, "1.10")

RECORD = "\nBytes per record, by what the server stores them for; at most 400 above the result.\n"

_CALLS = "{:<25}{:>10} |{:>10}{:>10}{:>8}{:>10}{:>8}"
CALLS = "\n".join(
    (
        "",
        "Calls per second, with so many at a time: an INSERT under idempotent(session=), which is one transaction with",
        "its record, and its ratio to the same claim, INSERT and completion by hand, in one transaction, which is all",
        "that this machine allows, and in three, to which it is to be at least 1.60.",
        "",
        _CALLS.format("", "at a time", "joined", "one", "ratio", "three", "ratio"),
    )
)

_ENCRYPTION = "{:<20}{:>9}{:>9}{:>11}"
ENCRYPTION = "\n".join(
    (
        "",
        "A replay of 1 KiB: µs without encryption, and the ratios to it of the same once more, and with encryption.",
        "",
        _ENCRYPTION.format("", "µs", "again", "encrypted"),
    )
)
ENCRYPTION_TARGETS = _ENCRYPTION.format("at most", "", "", "1.15")


def encryption_row(added: Added) -> str:
    """Format what encryption adds on one store."""
    return _ENCRYPTION.format(added.name, f"{added.plain:.0f}", f"{added.again:.3f}", f"{added.encrypted:.3f}")


_TELEMETRY = "{:<20}{:>9}{:>9}{:>12}{:>13}{:>9}"
TELEMETRY = "\n".join(
    (
        "",
        "A replay: µs without telemetry, and the ratios to it of the same once more, with Prometheus, and with",
        "OpenTelemetry where the trace is sampled out, and where it is sampled and exported nowhere.",
        "",
        _TELEMETRY.format("", "µs", "again", "prometheus", "sampled out", "sampled"),
    )
)
TELEMETRY_HTTP = "\n".join(
    (
        "",
        "The same over HTTP, one uvicorn worker and a client with one connection: µs that the client waits, and below",
        "it µs of processor time of the server, which other work on the machine moves less.",
        "",
    )
)
TELEMETRY_TARGETS = _TELEMETRY.format("at most, over HTTP", "", "", "1.10", "1.10", "1.10")


def telemetry_row(added: telemetry.Added) -> str:
    """Format what telemetry adds on one store."""
    ratios = [f"{added.ratios[name]:.3f}" for name in ("again", "prometheus", "sampled out", "sampled")]
    return _TELEMETRY.format(added.name, f"{added.plain:.0f}", *ratios)


def overhead_row(cost: Overhead) -> str:
    """Format one store's overhead."""
    first, replay = cost.first, cost.replay
    return _OVERHEAD.format(
        cost.name,
        f"{cost.out_of_scope:.2f}",
        f"{cost.no_key:.2f}",
        f"{first:.0f}",
        ratio(first, cost.same_first),
        ratio(first, cost.cheapest and 2 * cost.cheapest),
        f"{replay:.0f}",
        ratio(replay, cost.same_replay),
        ratio(replay, cost.cheapest),
        "-" if cost.commands is None else "/".join(map(str, cost.commands)),
    )


def throughput_row(name: str, ratios: dict[int, tuple[float, float]]) -> str:
    """Format one store's throughput."""
    return _THROUGHPUT.format(name, *(f"{ratio:.2f}" for pair in ratios.values() for ratio in pair))


def calls_row(name: str, cost: Throughput | Trips) -> str:
    """Format the throughput of calls in a transaction, or the duration of one on Redis."""
    if isinstance(cost, Throughput):
        figures = [f"{cost.joined:.0f}"]
        for rate in (cost.one, cost.three):
            figures += [f"{rate:.0f}", f"{cost.joined / rate:.2f}"]
        return _CALLS.format(cost.name, cost.concurrency, *figures)
    calls = {"of a store opened by URL": cost.opened, "of a store given a client": cost.given}
    return "\n".join(
        (
            f"{name}: a blocking call, beside two raw round trips (at most 1.30): the same scripts "
            f"{cost.scripts:.0f} µs, GET {cost.gets:.0f} µs",
            *(
                f"  {whose} {call:.0f} µs, ratios {call / cost.scripts:.2f} and {call / cost.gets:.2f}"
                for whose, call in calls.items()
            ),
        )
    )


def table_row(name: str, costs: Costs) -> str:
    """Format what verbs cost at one size."""
    fields = [name, f"{costs.size:,}"]
    for cost in (costs.claim, costs.complete, costs.replay, costs.purge, costs.logged):
        fields += ["-", ""] if cost is None else [f"{cost.large:.1f}", f"x{cost.large / cost.small:.2f}"]
    return _TABLE.format(*fields)


def purge_row(name: str, cost: BesidePurge) -> str:
    """Format what a purge costs live claims."""
    waits = [f"{took:.0f}" for wait in (cost.quiet, cost.again, cost.busy) for took in (wait.median, wait.p99)]
    compared = 2 * cost.busy.p99 / (cost.quiet.p99 + cost.again.p99)
    return _PURGE.format(name, f"{cost.purged:,}", f"{cost.seconds:.0f}", *waits, f"{compared:.2f}")


def record_row(name: str, size: RecordSize) -> str:
    """Format the bytes of a record."""
    parts = " + ".join(f"{number:.0f} {part}" for part, number in size.parts.items())
    return f"{_LABEL.format(name)}{parts}: {size.above_result:.0f} above a result of {len(RESULT)}"


def ratio(value: float, floor: float | None) -> str:
    return "-" if floor is None else f"{value / floor:.2f}"

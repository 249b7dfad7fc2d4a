"""The figures of sagas as text."""

from __future__ import annotations

from collections.abc import Sequence

from saga import PEER, Cost

_ROW = "{:<10}{:>8}{:>10}{:>8}{:>8}{:>12}{:>9}{:>12}{:>8}"
HEAD = "\n".join(
    (
        "",
        "Sagas on PostgreSQL: workflows of five small steps a second, by one worker process, and their ratio to those",
        "of DBOS where it is installed. Of one workflow: statements, commits, and the time of the worker's processor.",
        "Other work on the machine moves the ratio of that less than the one of workflows a second.",
        "",
        _ROW.format("", "at once", "a second", "ratio", "goal", "statements", "commits", "processor", "ratio"),
    )
)


def saga_rows(costs: Sequence[Cost]) -> str:
    """Format the costs of workflows of which the same number ran at once."""
    peer = next((each for each in costs if each.kind == PEER), None)
    return "\n".join(_row(each, None if each is peer else peer) for each in costs)


def _row(cost: Cost, peer: Cost | None) -> str:
    return _ROW.format(
        cost.kind,
        cost.at_once,
        f"{cost.per_second:.0f}",
        f"{cost.per_second / peer.per_second:.2f}" if peer else "",
        ">= 2.00" if peer else "",
        f"{cost.statements:.1f}",
        f"{cost.commits:.1f}",
        f"{cost.processor:.0f} us",
        f"{cost.processor / peer.processor:.2f}" if peer else "",
    ).rstrip()

"""The figures of sagas as text."""

from __future__ import annotations

from collections.abc import Sequence

from saga import PEER, Cost

_ROW = "{:<10}{:>8}{:>10}{:>8}{:>8}{:>12}{:>9}{:>12}"
HEAD = "\n".join(
    (
        "",
        "Sagas on PostgreSQL: workflows of five small steps a second, by one worker process, and their ratio to those",
        "of DBOS where it is installed. Of one workflow: statements, commits, and the time of the worker's processor.",
        "",
        _ROW.format("", "at once", "a second", "ratio", "goal", "statements", "commits", "processor"),
    )
)


def saga_rows(costs: Sequence[Cost]) -> str:
    """Format the costs of workflows of which the same number ran at once."""
    peer = next((each.per_second for each in costs if each.kind == PEER), None)
    return "\n".join(_row(each, peer) for each in costs)


def _row(cost: Cost, peer: float | None) -> str:
    compared = peer is not None and cost.kind != PEER
    return _ROW.format(
        cost.kind,
        cost.at_once,
        f"{cost.per_second:.0f}",
        f"{cost.per_second / peer:.2f}" if compared and peer else "",
        ">= 2.00" if compared else "",
        f"{cost.statements:.1f}",
        f"{cost.commits:.1f}",
        f"{cost.processor:.0f} us",
    )

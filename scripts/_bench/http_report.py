"""The figures over HTTP as text."""

from __future__ import annotations

from http_run import BARE, KINDS, Case, Figures, Results

_HTTP_SIDE = " |{:>7}{:>11}{:>6}{:>8}{:>8}"
_HTTP = "{:<20}" + _HTTP_SIDE * 2 + " |{:>9}"
_HTTP_GOALS = {
    **{f"{store} no key": 0.99 for store in ("Redis", "PostgreSQL", "memory", "SQLite", "MariaDB/MySQL")},
    "Redis first": 0.55,
    "Redis replay": 0.90,
    "PostgreSQL first": 0.45,
    "PostgreSQL replay": 0.85,
}
_HTTP_GOALS_AT = 16
HTTP = "\n".join(
    (
        "",
        "Requests per second over HTTP, as a ratio to a bare Starlette application in the same round: median, and the",
        "middle half of the rounds. CPU: the same ratio of the processor time of the server, which other work on the",
        "machine moves less. Latencies in ms: medians of the rounds. The floor has two round trips of redis-py or",
        "asyncpg for a first execution, one for a replay, and nothing else. Each server is one uvicorn worker (uvloop,",
        "httptools) on one core; the load comes from another.",
    )
)


def http_table(results: Results) -> str:
    """Format the figures with one number of connections."""
    goals = _HTTP_GOALS if results.connections == _HTTP_GOALS_AT else {}
    figures = results.figures
    stores = dict.fromkeys(case.store for case in figures if case != BARE)
    bare = figures[BARE]
    rows = [
        _HTTP.format(f"{results.connections} connections", *[""] * 5, "floor", *[""] * 4, "at least"),
        _HTTP.format("", *("ratio", "half", "CPU", "p50", "p99") * 2, ""),
        _HTTP.format(BARE.name, "", f"{bare.rate:,.0f}/s", "", f"{bare.p50:.2f}", f"{bare.p99:.2f}", *[""] * 6),
    ]
    for case in (Case(store, kind) for store in stores for kind in KINDS):
        floor = figures.get(Case(case.store, case.kind, floor=True))
        goal = goals.get(case.name)
        rows.append(
            _HTTP.format(
                case.name, *_http_side(figures[case]), *_http_side(floor), "" if goal is None else f"{goal:.2f}"
            )
        )
    return "\n".join(("", *rows, f"The load process used at most {results.busy:.0%} of its core."))


def _http_side(figures: Figures | None) -> tuple[str, ...]:
    if figures is None:
        return "-", "", "", "", ""
    low, high = figures.quartiles
    ratios = f"{figures.ratio:.2f}", f"{low:.2f}-{high:.2f}", f"{figures.cpu_ratio:.2f}"
    return *ratios, *(f"{latency:.{1 if latency >= 100 else 2}f}" for latency in (figures.p50, figures.p99))

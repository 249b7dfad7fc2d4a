"""Interleaved measuring: every round runs every case once, so that a slow moment of the machine affects all of them.

The order differs from round to round, since each case changes the caches and servers for the next one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from inspect import isawaitable
from random import Random
from statistics import median
from time import perf_counter_ns
from typing import Any


@dataclass(frozen=True)
class Case:
    """``run`` is timed, on each of ``repeat`` arguments that ``prepare`` made; ``check`` gets them afterwards.

    What ``prepare`` returns is awaited first, if it can be.
    """

    name: str
    prepare: Callable[[], Any]
    run: Callable[[Any], Awaitable[Any]]
    check: Callable[[Any], None] = lambda _: None
    repeat: int = 1


async def medians(cases: Sequence[Case], rounds: int, warm_up: int = 20) -> dict[str, float]:
    """Return the median duration of one run of each case, in microseconds."""
    samples: dict[str, list[float]] = {case.name: [] for case in cases}
    random = Random(1)
    for round_ in range(warm_up + rounds):
        for case in random.sample(cases, len(cases)):
            took = await _time(case)
            if round_ >= warm_up:
                samples[case.name].append(took)
    return {name: median(values) for name, values in samples.items()}


async def _time(case: Case) -> float:
    run = case.run
    arguments = [await _prepared(case) for _ in range(case.repeat)]
    started = perf_counter_ns()
    for argument in arguments:
        await run(argument)
    took = perf_counter_ns() - started
    for argument in arguments:
        case.check(argument)
    return took / 1000 / case.repeat


async def _prepared(case: Case) -> Any:
    argument = case.prepare()
    return await argument if isawaitable(argument) else argument

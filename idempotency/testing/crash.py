"""Kill a process at every point of an operation, deliver again, and count the effects.

A scenario is a class (or function) that makes an object with two methods, each of them sync or async:

    class Orders:
        def __init__(self, url: str) -> None:
            self.engine = create_async_engine(url)
            self.session = async_sessionmaker(self.engine)
            self.store = SQLStore(self.engine)

        async def deliver(self, key: str) -> None:
            '''Send a request or message once, as its sender does; raise where the sender would send it again.'''
            await place_order(Message(id=key, item="tea"))

        async def count(self, key: str) -> int:
            '''Read from the ledger how many effects this key has had.'''
            async with self.session() as session:
                return await session.scalar(select(func.count()).where(Order.reference == key))

    print(crash_everywhere(Orders, "postgresql+asyncpg://localhost/shop"))

Two more methods are called where they exist: ``prepare()`` once before all others, to make tables; and
``resolve(key)`` when ``deliver`` raised :class:`~idempotency.errors.OutcomeUnknownError`, to find out what happened
and resolve the key, as an operator does.

Every process makes a scenario of its own, so it uses no connection of another. Import at the top of
the module what deliveries need, and each starts within milliseconds. POSIX only: processes are forked.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Awaitable, Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from idempotency.errors import ConfigurationError
from idempotency.testing._points import crash_point
from idempotency.testing._processes import Job, Trial, main

__all__ = ["Report", "Scenario", "assert_once", "crash_everywhere", "crash_point"]


class Scenario(Protocol):
    """What is tested: see the text of the module for an example and the optional methods."""

    def deliver(self, key: str, /) -> Awaitable[object] | object:
        """Deliver the request or message of this key once; raise where its sender would send it again."""
        ...

    def count(self, key: str, /) -> Awaitable[int] | int:
        """Return how many effects the key has had, over a connection of its own."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The effects that were found. All but ``scenario`` and the numbers are labels at which the owner was ended.

    ``lost``: a delivery succeeded and there is no effect. ``doubled``: there is more than one. ``stuck``: no delivery
    succeeded. ``repeated``: there are two, where ``recorded=`` allows it. ``held``: the outcome was unknown until it
    was resolved. ``missed``: nothing is proven there, as when the owner did not reach it; ``notes`` give the reason.
    """

    scenario: str
    labels: tuple[str, ...]
    expected: int
    found: int
    lost: tuple[str, ...] = ()
    doubled: tuple[str, ...] = ()
    stuck: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    held: tuple[str, ...] = ()
    missed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Return whether every label was reached and nothing was lost, doubled or stuck."""
        return not (self.lost or self.doubled or self.stuck or self.missed)

    def __str__(self) -> str:
        counts = [f"{len(getattr(self, name))} {name}" for name in ("lost", "doubled", "stuck")]
        extra = ("repeated", "held", "missed")
        counts += [f"{len(getattr(self, name))} {name}" for name in extra if getattr(self, name)]
        lines = [
            f"{self.scenario}: {len(self.labels)} labels killed, {self.expected} effects expected,"
            f" {self.found} found, {', '.join(counts)}"
        ]
        for name in ("lost", "doubled", "stuck", *extra):
            lines += [f"  {name}: {label}" for label in getattr(self, name)]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def crash_everywhere(
    scenario: str | Callable[..., Scenario],
    *args: str,
    only: Collection[str] = (),
    recorded: str | None = None,
    pause: float | None = None,
    jobs: int = 4,
    patience: float = 30.0,
) -> Report:
    """Kill a fresh process at every label of ``scenario``, deliver again until that succeeds, and read the ledger.

    ``scenario``: a class or function at the top of a module, or ``"module:name"``, which is called with ``args`` in
    every process. Labels are made by :func:`crash_point`, and before and after every store verb, SQL statement, COMMIT
    and ROLLBACK of the first, undisturbed delivery.
    ``only``: the labels to try, to examine one of them. Default: all.
    ``recorded``: the label from which the effect is recorded. It is for effects outside of the transaction under
    ``on_crash="rerun"``: if the owner is killed before this label, its effect may be there twice. Default None: at no
    label.
    ``pause``: instead of killing the owner, stop it at each label, send duplicates for so many seconds, and continue
    it. Default None: kill it.
    ``jobs``: how many labels are tried at once. Default 4. With ``pause`` on SQLite give 1: a stopped owner may
    hold the lock of the whole file.
    ``patience``: seconds after which a key is stuck if no delivery succeeded; longer than its lease. Default 30.

    Raises :class:`~idempotency.errors.ConfigurationError` for a scenario that cannot be imported, or that fails, or
    has not exactly one effect, when nothing disturbs it.
    """
    name = scenario if isinstance(scenario, str) else _name_of(scenario)
    if ":" not in name or "<locals>" in name:
        raise ConfigurationError(f"a scenario is at the top of a module, or 'module:name', not {name!r}")
    job = Job(scenario=name, args=list(args), only=list(only), jobs=jobs, patience=patience, pause=pause)
    run = subprocess.run(  # noqa: S603 - this very interpreter, and a path of its own
        [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; from {main.__module__} import main; main()"],
        input=json.dumps(asdict(job)),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    if run.returncode != 0 or not lines:
        raise ConfigurationError(f"{name} cannot be proven: see what its process wrote to stderr")
    labels: list[str] = lines[0]
    if unknown := {*only, recorded} - {*labels, None}:
        raise ConfigurationError(f"{unknown} are none of the labels {labels}")
    trials = sorted((Trial(**line) for line in lines[1:]), key=lambda trial: labels.index(trial.label))
    return _report(name, trials, labels[: labels.index(recorded)] if recorded is not None else [])


def assert_once(scenario: str | Callable[..., Scenario], *args: str, **options: Any) -> Report:
    """Fail with the report unless the scenario has one effect per key at every label; as :func:`crash_everywhere`."""
    report = crash_everywhere(scenario, *args, **options)
    if not report.ok:
        raise AssertionError(str(report))
    return report


def _name_of(scenario: Callable[..., Scenario]) -> str:
    module = scenario.__module__
    if module == "__main__":
        script = sys.modules["__main__"]
        spec = getattr(script, "__spec__", None)
        module = spec.name if spec is not None else Path(getattr(script, "__file__", None) or "?").stem
    return f"{module}:{scenario.__qualname__}"


def _report(name: str, trials: list[Trial], unrecorded: list[str]) -> Report:
    tried = [trial for trial in trials if not trial.missed]
    twice = [trial.label for trial in tried if trial.found == 2 and trial.label in unrecorded]
    return Report(
        scenario=name,
        labels=tuple(trial.label for trial in trials),
        expected=len(trials),
        found=sum(trial.found for trial in trials),
        lost=tuple(trial.label for trial in tried if not trial.found and not trial.fault),
        doubled=tuple(trial.label for trial in tried if trial.found > 1 and trial.label not in twice),
        stuck=tuple(trial.label for trial in tried if trial.fault),
        repeated=tuple(twice),
        held=tuple(trial.label for trial in tried if trial.held),
        missed=tuple(trial.label for trial in trials if trial.missed),
        notes=tuple(f"{trial.label}: {note}" for trial in trials if (note := trial.fault or trial.missed)),
    )

"""``idempotency saga COMMAND``: what an operator does with sagas."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from enum import StrEnum
from functools import partial
from typing import Annotated, Any, TypeVar

import typer

from idempotency._cli import show
from idempotency._cli.lookup import open_named, run_on_store
from idempotency._cli.options import AsJson, Names, confirmed, fail, on_store
from idempotency._cli.records import MANY, keeps_sagas
from idempotency._cli.show_saga import print_saga, print_sagas, saga_as_json
from idempotency._cli.sweep import sweep
from idempotency.errors import ConfigurationError
from idempotency.saga import SagaDetail, SagaOperations, SagaView
from idempotency.saga._view import SagaState
from idempotency.stores import AnyStore
from idempotency.stores.base import Finding

T = TypeVar("T")

saga = typer.Typer(help="Go on with sagas, see where they are, and decide about those that are stuck.")
saga.command()(sweep)

Named = Annotated[
    str,
    typer.Argument(metavar="SAGA", help="NAME/KEY, the id or its first 12 digits, or a key alone: reads all sagas."),
]
By = Annotated[str, typer.Option(help="Who decides it, for the record.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


class State(StrEnum):
    """The state of the sagas to list."""

    RUNNING = "running"
    WAITING = "waiting"
    STUCK = "stuck"
    UNDOING = "undoing"
    DONE = "done"
    UNDONE = "undone"


class Outcome(StrEnum):
    """What the operator found out about a step."""

    DONE = "done"
    NOT_DONE = "not-done"


@saga.command("list")
@on_store
def list_(
    name: Annotated[str | None, typer.Option(help="Only sagas of this name.")] = None,
    state: Annotated[State | None, typer.Option(help="Only sagas in this state.")] = None,
    ended: Annotated[bool, typer.Option("--ended", help="Also those that have ended.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="The most sagas to list; the oldest come first.")] = 100,
    as_json: AsJson = False,
    *,
    at: Names,
) -> None:
    """List sagas that have not ended: where each is, why, and what happens next by itself."""
    wanted: SagaState | None = None if state is None else state.value
    found = _run(lambda operations: operations.sagas(name=name, state=wanted, ended=ended, limit=limit), at)
    if as_json:
        show.print_json([saga_as_json(each) for each in found])
    elif not found:
        typer.echo(f"no saga {f'is {wanted}' if wanted else 'is there' if ended else 'goes on'}", err=True)
    else:
        print_sagas(found)


@saga.command()
@on_store
def inspect(
    named: Named,
    values: Annotated[bool, typer.Option("--show", help="Print arguments, results and values of signals too.")] = False,
    as_json: AsJson = False,
    *,
    at: Names,
) -> None:
    """Show where a saga is, and why: its steps, undos, waits, signals and resources."""

    async def look(operations: SagaOperations) -> list[SagaDetail]:
        sagas = await operations.find(named, limit=MANY)
        found = [await operations.inspect(each.name, each.key, show=values) for each in sagas]
        return [each for each in found if each is not None] or _none(named)

    found = _run(look, at)
    if as_json:
        show.print_json([saga_as_json(each) for each in found])
    elif len(found) == 1:
        print_saga(found[0], values=values)
    else:
        print_sagas(found)


@saga.command()
@on_store
def retry(named: Named, *, at: Names) -> None:
    """Let a saga go on now that waits or is stuck. A sweeper of the application runs it."""
    one = _change(named, lambda operations, one: operations.retry(one.name, one.key), at)
    typer.echo(f"{_name(one)} goes on now")


@saga.command()
@on_store
def resolve(
    named: Named,
    step: Annotated[str, typer.Argument(help="The step as inspect shows it, or undo:STEP.")],
    outcome: Annotated[Outcome, typer.Argument(help="done: its effect happened. not-done: it did not.")],
    result: Annotated[str | None, typer.Option(help="done: what the step returned, as JSON; default null.")] = None,
    by: By = "",
    *,
    at: Names,
) -> None:
    """Tell a saga how a step ended whose outcome is unknown; the saga goes on now."""
    value = _json("--result", result)
    one = _change(
        named, lambda operations, one: operations.resolve(one.name, one.key, step, outcome.value, value, by=by), at
    )
    typer.echo(f"{_name(one)} {show.printable(step)} is {outcome.value.replace('-', ' ')}: the saga goes on now")


@saga.command()
@on_store
def compensate(named: Named, yes: Yes = False, *, at: Names) -> None:
    """Fail a saga that no process runs, and undo what it has done, without running its function."""

    async def fail_one(operations: SagaOperations, one: SagaView) -> None:
        _confirm(one, "Fail", yes)
        await operations.compensate(one.name, one.key)

    one = _change(named, fail_one, at)
    typer.echo(f"{_name(one)} has failed, and is undone from now on")


@saga.command()
@on_store
def cancel(named: Named, yes: Yes = False, by: By = "", *, at: Names) -> None:
    """Cancel a saga, also one that runs: it fails at its next step, and is undone."""

    async def cancel_one(operations: SagaOperations, one: SagaView) -> None:
        _confirm(one, "Cancel", yes)
        await operations.cancel(one.name, one.key, by=by)

    typer.echo(f"{_name(_change(named, cancel_one, at))} is cancelled at its next step")


@saga.command()
@on_store
def signal(
    named: Named,
    name: Annotated[str, typer.Argument(metavar="SIGNAL", help="The name of the signal.")],
    value: Annotated[str | None, typer.Option(help="What the saga is given, as JSON; default null.")] = None,
    about: Annotated[str | None, typer.Option(help="What is approved, as JSON, if the saga asks about it.")] = None,
    by: By = "",
    *,
    at: Names,
) -> None:
    """Give a saga a signal, also before it waits for it. The first of a name counts."""
    given, what = _json("--value", value), _json("--about", about)

    async def give(operations: SagaOperations, one: SagaView) -> None:
        if not await operations.signal(one.name, one.key, name, given, by=by, about=what):
            raise ConfigurationError(f"{_name(one)} has a signal {name} already: nothing was changed")

    typer.echo(f"{_name(_change(named, give, at))} has the signal {show.printable(name)}")


async def examine_sagas(opened: AnyStore) -> list[Finding]:
    """Examine the sagas of a store that keeps some."""
    return await SagaOperations(opened).examine() if await keeps_sagas(opened) else []


def _run(work: Callable[[SagaOperations], Awaitable[T]], at: Names) -> T:
    return run_on_store(partial(open_named, sagas=True), lambda opened: work(SagaOperations(opened)), *at)


def _change(named: str, work: Callable[[SagaOperations, SagaView], Awaitable[None]], at: Names) -> SagaView:
    """Do work on the only saga that is meant, and return how it was found."""

    async def change(operations: SagaOperations) -> SagaView:
        found = await operations.find(named, limit=2) or _none(named)
        if len(found) > 1:
            those = ", ".join(map(_name, found))
            raise ConfigurationError(f"several sagas have the key {named}, such as {those}: give NAME/KEY, or the id")
        await work(operations, found[0])
        return found[0]

    return _run(change, at)


def _none(named: str) -> Any:
    raise ConfigurationError(f"there is no saga {named}")


def _confirm(one: SagaView, what: str, yes: bool) -> None:
    if not (yes or confirmed(f"{what} the saga {_name(one)}, so that what it has done is undone?")):
        raise ConfigurationError("not confirmed, nothing was changed; --yes does it without a question")


def _name(one: SagaView) -> str:
    return show.printable(f"{one.name}/{one.key}")


def _json(option: str, text: str | None) -> Any:
    try:
        return None if text is None else json.loads(text)
    except ValueError:
        fail(f"{option} is JSON, such as 5, null or '\"text\"', not {text!r}")

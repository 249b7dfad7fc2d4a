"""What a saga waits for: a time, a signal, a resource. Why it waits is recorded before it waits."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from datetime import timedelta
from time import monotonic
from typing import Any

from idempotency._durations import DAY, LONGEST, seconds
from idempotency._outbox.payload import encode_payload
from idempotency._results.by_annotation import PLAIN, dump, load
from idempotency._sagas.journal import Entry, Leave, Look, Open, Phase, Progress, Put, Saga, saga_id
from idempotency.errors import ConfigurationError, EmitRefusedError, StoreError
from idempotency.saga._effects import Ask, Pause, Program
from idempotency.saga._run import Run, Suspended, body, checked_name, head_of
from idempotency.saga.errors import (
    HeldError,
    SagaError,
    SagaLostError,
    SagaPendingError,
    SagaStuckError,
    SignalTimeoutError,
    ended_error,
    missing_error,
)

SHORT = 1.0
"""Seconds that are waited in the process. For a longer wait the run ends, and another one goes on after it."""

_LOOK = 60.0
"""Seconds until somebody looks again whether a child has ended, at most."""

HELD = "saga:held"
"""The name under which resources are held: each is a saga of its own, owned by the one that holds it."""


def sleep_until(run: Run, name: str, duration: float | timedelta) -> Program[None]:
    """Wait until ``duration`` seconds after the saga came here first."""
    length = seconds("seconds", duration)
    entry_name = run.next_name("sleep", name)
    known = run.entries.get(entry_name)
    if known is not None and known.progress is Progress.DONE:
        return
    run.check()
    if known is None:
        yield from run.write(Entry(name=entry_name, progress=Progress.BEGUN, body=body({"seconds": length})))
        remaining = length
    else:
        remaining = float(head_of(known)["seconds"]) - run.since(known)
    if remaining > SHORT:
        raise Suspended(remaining, {"sleep": name})
    if remaining > 0:
        yield Pause(remaining)
    yield from run.write(Entry(name=entry_name, progress=Progress.DONE, order=run.next_order(), body=body({})))


ABOUT = "#~"
"""What is between the name of a signal and the digest of what it is about. No name has a #, but before a number."""


def await_signal(run: Run, name: str, timeout: float | timedelta | None, about: object) -> Program[Any]:
    """Return the value of the first signal of a name; SignalTimeoutError where none came in time."""
    limit = None if timeout is None else seconds("timeout", timeout)
    entry_name = run.next_name("wait", name)
    digest = digest_of(about)
    signal = signal_of(entry_name.removeprefix("wait:"), digest)
    known = run.entries.get(entry_name)
    if known is None:
        run.check()
        wakes = yield from run.write(
            Entry(name=entry_name, progress=Progress.BEGUN, body=body({"about": digest, "timeout": limit}))
        )
        if wakes != run.wakes:
            yield from look_again(run)
    elif head_of(known)["about"] != digest:
        raise ConfigurationError(
            f"the saga waits for {name!r} about something else: about= must be the same at each run"
        )
    found = run.entries.get(signal)
    if found is None:
        found = yield from _still_waiting(run, name, signal, run.entries[entry_name])
    head = head_of(found)
    if head.get("timeout"):
        raise SignalTimeoutError(f"No signal {name!r} came in time.")
    return head["value"]


def _still_waiting(run: Run, name: str, signal: str, wait: Entry) -> Program[Entry]:
    run.check()
    timeout = head_of(wait)["timeout"]
    remaining = None if timeout is None else timeout - run.since(wait)
    if remaining is None or remaining > 0:
        raise Suspended(DAY if remaining is None else remaining, {"signal": name}, timed=remaining is not None)
    # The first one wins: a signal may come at this moment.
    over = Entry(name=signal, progress=Progress.SKIPPED, body=body({"timeout": True}))
    found: Entry | None = yield Ask(Put(id=run.id, entry=over))
    if found is None:
        raise run.lost_error()
    run.wakes += found.progress is Progress.SKIPPED
    run.note(found)
    return found


def look_again(run: Run) -> Program[None]:
    """Read what came from outside since the run began."""
    asked = monotonic()
    saga: Saga | None = yield Ask(Look(id=run.id))
    if saga is None or saga.row.token != run.token:
        raise run.lost_error()
    run.wakes = run.called = saga.row.wakes
    # Of another entry, this run may have written more since.
    run.read([entry for entry in saga.entries if entry.name not in run.entries], asked)


def give_signal(saga_name: str, key: str, name: str, value: object, by: str, about: object) -> Program[bool]:
    """Give a saga a signal; return whether it is the first of its name."""
    record = saga_id(saga_name, key)
    given = signal_entry(name, value, by, about)
    saga: Saga | None = yield Ask(Look(id=record))
    entries = {} if saga is None else {entry.name: entry for entry in saga.entries}
    wait = entries.get(f"wait:{name}")
    if wait is not None and head_of(wait)["about"] != head_of(given)["about"]:
        raise SagaError(f"The saga waits for {name!r} about something else: nothing was approved.")
    found: Entry | None = yield Ask(Put(id=record, entry=given))
    if found is None:
        raise missing_error(saga_name, key) if saga is None else ended_error(saga_name, key)
    return found.body == given.body


def signal_of(name: str, digest: str) -> str:
    """Return the name of the entry of a signal: one for each thing that it is about.

    So what was given about something else, before anyone asked, is no answer, and takes the place of none.
    """
    return f"signal:{name}{ABOUT}{digest[:16]}" if digest else f"signal:{name}"


def signal_entry(name: str, value: object, by: str, about: object) -> Entry:
    """Return the entry of a signal; ConfigurationError for a name or a value that cannot be recorded."""
    first, mark, number = name.partition("#") if isinstance(name, str) else (name, "", "")
    checked_name(first)
    if mark and not (number.isascii() and number.isdecimal() and number == str(int(number)) and int(number) > 1):
        raise ConfigurationError(f"the second wait for a name is {first}#2, and so on: {name!r} is none")
    try:
        head = {"value": PLAIN.to_json(value), "by": by, "about": digest_of(about)}
        return Entry(name=signal_of(name, head["about"]), progress=Progress.DONE, body=body(head))
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"the value of the signal {name!r} cannot be recorded: give plain JSON") from error


def digest_of(about: object) -> str:
    """Return the digest of what is asked or approved; empty for nothing."""
    if about is None:
        return ""
    try:
        return hashlib.sha256(encode_payload(about) or b"").hexdigest()
    except EmitRefusedError as error:
        raise ConfigurationError("about= cannot be written as JSON: give what names the thing, such as ids") from error


def is_patched(run: Run, name: str) -> Program[bool]:
    """Return whether this saga came here with the changed code first; the answer is recorded."""
    entry_name = run.next_name("patch", name)
    known = run.entries.get(entry_name)
    if known is None:
        run.check()
        # What is recorded and not reached yet comes later: an older code came past this place before.
        old = bool(run.unvisited)
        known = Entry(name=entry_name, progress=Progress.SKIPPED if old else Progress.DONE, body=body({}))
        yield from run.write(known)
    return known.progress is Progress.DONE


def hold_resource(run: Run, resource: str) -> Program[None]:
    """Hold a resource until the saga ends; HeldError where another saga holds it."""
    name = run.next_name("hold", resource)
    by = [run.definition.name, run.key]
    known = run.entries.get(name)
    if known is None:
        run.check()
        # Noted first: what is held by nobody who knows it would be held for ever.
        known = Entry(name=name, progress=Progress.BEGUN, body=body({"token": os.urandom(16).hex()}))
        yield from run.write(known)
    if known.progress is Progress.BEGUN:
        run.check()
        holder = yield from _take(resource, head_of(known)["token"], by)
        held = holder == by
        head = head_of(known) if held else {"holder": holder}
        progress = Progress.DONE if held else Progress.FAILED
        known = Entry(name=name, progress=progress, order=run.next_order(), body=body(head))
        yield from run.write(known)
    if known.progress is Progress.FAILED:
        error = HeldError(f"Another saga holds the resource {resource!r}.")
        saga, key = head_of(known)["holder"]
        error.by = (saga, key)
        raise error


def _take(resource: str, token: str, by: list[str]) -> Program[list[str]]:
    """Take a resource that nobody holds; return who holds it now."""
    request = Open(
        id=saga_id(HELD, resource), name=HELD, key=resource, token=token, lease=LONGEST / 100, input=dump(by)
    )
    held: Saga = yield Ask(request)
    holder: list[str] = load(held.row.input)
    if held.row.token == token or holder == by:
        return holder
    saga: Saga | None = yield Ask(Look(id=saga_id(*holder)))
    if saga is not None and not saga.row.phase.ended:
        return holder
    # The holder has ended, and was interrupted before it let go.
    yield Ask(_letting_go(resource, held.row.token))
    held = yield Ask(request)
    found: list[str] = load(held.row.input)
    return found


def let_go(run: Run) -> Program[None]:
    """Let go of every resource that the saga holds, where the store can be reached."""
    for entry in [entry for name, entry in run.entries.items() if name.startswith("hold:")]:
        if entry.progress is not Progress.FAILED:
            resource = entry.name.removeprefix("hold:").partition("#")[0]
            # Where this fails, the next saga that wants the resource sees that its holder has ended.
            with suppress(StoreError):
                yield Ask(_letting_go(resource, head_of(entry)["token"]))


def _letting_go(resource: str, token: str) -> Leave:
    return Leave(id=saga_id(HELD, resource), token=token, phase=Phase.DONE, due=None, wakes=0)


def waiting_for(child: SagaPendingError | SagaStuckError | SagaLostError) -> Suspended:
    """Return the wait for a child that has not ended."""
    if isinstance(child, SagaLostError):
        return Suspended(SHORT, {"child": child.name, "waits": "another process runs it"})
    due = min(child.retry_after, _LOOK) if isinstance(child, SagaPendingError) else _LOOK
    return Suspended(due, {"child": child.name, "waits": child.reason})

"""What a saga waits for: a time, a signal, a resource. Why it waits is recorded before it waits."""

from __future__ import annotations

import hashlib
from typing import Any

from idempotency._durations import DAY, LONGEST
from idempotency._outbox.payload import encode_payload
from idempotency._results.by_annotation import PLAIN, dump, load
from idempotency._sagas.journal import Entry, Leave, Look, Open, Phase, Progress, Put, Saga, saga_id
from idempotency.errors import ConfigurationError
from idempotency.saga._effects import Ask, Pause, Program
from idempotency.saga._run import Run, Suspended, body, head_of
from idempotency.saga.errors import HeldError, SignalTimeoutError

SHORT = 1.0
"""Seconds that are waited in the process. For longer waits the saga is left, and somebody goes on with it."""

HELD = "saga:held"
"""The name under which resources are held: each is a saga of its own, owned by the one that holds it."""


def sleep_until(run: Run, name: str, seconds: float) -> Program[None]:
    """Wait until ``seconds`` after the saga came here first."""
    entry_name = run.next_name("sleep", name)
    known = run.entries.get(entry_name)
    if known is not None and known.progress is Progress.DONE:
        return
    run.check()
    if known is None:
        yield from run.write(Entry(name=entry_name, progress=Progress.BEGUN, body=body({"seconds": seconds})))
        remaining = seconds
    else:
        remaining = float(head_of(known)["seconds"]) - run.since(known)
    if remaining > SHORT:
        raise Suspended(remaining, {"sleep": name})
    if remaining > 0:
        yield Pause(remaining)
    yield from run.write(Entry(name=entry_name, progress=Progress.DONE, order=run.next_order(), body=body({})))


def await_signal(run: Run, name: str, timeout: float | None, about: object) -> Program[Any]:
    """Return the value of the first signal of a name; SignalTimeoutError where none came in time."""
    entry_name = run.next_name("wait", name)
    signal = f"signal:{entry_name.removeprefix('wait:')}"
    digest = digest_of(about)
    known = run.entries.get(entry_name)
    if known is None:
        run.check()
        known = Entry(name=entry_name, progress=Progress.BEGUN, body=body({"about": digest, "timeout": timeout}))
        wakes = yield from run.write(known)
        if wakes != run.wakes:
            yield from look_again(run)
    elif head_of(known)["about"] != digest:
        raise ConfigurationError(f"the saga waits for {name!r} about something else: about= must not change")
    found = run.entries.get(signal)
    if found is None:
        found = yield from _still_waiting(run, name, signal, known, timeout)
    return _value_of(name, found, digest)


def _still_waiting(run: Run, name: str, signal: str, wait: Entry, timeout: float | None) -> Program[Entry]:
    run.check()
    remaining = None if timeout is None else timeout - run.since(wait)
    if remaining is None or remaining > 0:
        raise Suspended(DAY if remaining is None else remaining, {"signal": name})
    # The first one wins: a signal may come at this moment.
    over = Entry(name=signal, progress=Progress.SKIPPED, body=body({"timeout": True}))
    found: Entry | None = yield Ask(Put(id=run.id, entry=over))
    if found is None:
        raise run.lost_error()
    run.wakes += found.progress is Progress.SKIPPED
    run.note(found)
    return found


def _value_of(name: str, entry: Entry, digest: str) -> Any:
    head = head_of(entry)
    if head.get("timeout"):
        raise SignalTimeoutError(f"No signal {name!r} came in time.")
    if head["about"] != digest:
        raise ConfigurationError(
            f"the signal {name!r} was given for something else than what the saga asks about: nothing was approved"
        )
    return head["value"]


def look_again(run: Run) -> Program[None]:
    """Read what came from outside since the run began."""
    saga: Saga | None = yield Ask(Look(id=run.id))
    if saga is None or saga.row.token != run.token:
        raise run.lost_error()
    run.wakes = run.called = saga.row.wakes
    run.note(*(entry for entry in saga.entries if entry.name not in run.entries))


def signal_entry(name: str, value: object, by: str, about: object) -> Entry:
    """Return the entry of a signal."""
    head = {"value": PLAIN.to_json(value), "by": by, "about": digest_of(about)}
    return Entry(name=f"signal:{name}", progress=Progress.DONE, body=body(head))


def digest_of(about: object) -> str:
    """Return the digest of what is asked or approved; empty for nothing."""
    return "" if about is None else hashlib.sha256(encode_payload(about) or b"").hexdigest()


def is_patched(run: Run, name: str) -> Program[bool]:
    """Return whether this saga came here with the changed code first; the answer is recorded."""
    entry_name = run.next_name("patch", name)
    known = run.entries.get(entry_name)
    if known is None:
        run.check()
        # A step that is recorded and not called yet comes later: an older code came past this place before.
        old = bool(run.unvisited)
        known = Entry(name=entry_name, progress=Progress.SKIPPED if old else Progress.DONE, body=body({}))
        yield from run.write(known)
    return known.progress is Progress.DONE


def hold_resource(run: Run, resource: str) -> Program[None]:
    """Hold a resource until the saga ends; HeldError where another saga holds it."""
    entry_name = f"hold:{resource}"
    if entry_name in run.entries:
        return
    run.check()
    if not isinstance(resource, str) or not 0 < len(resource) <= 200:
        raise ConfigurationError(f"a resource is text of 1 to 200 characters, not {resource!r}")
    # Noted first: what is held by nobody who knows it would be held for ever.
    yield from run.write(Entry(name=entry_name, progress=Progress.BEGUN, body=body({})))
    by = dump([run.definition.name, run.key])
    lease = LONGEST / 100 if run.remaining is None else max(run.remaining, 1.0)
    request = Open(
        id=saga_id(HELD, resource),
        name=HELD,
        key=resource,
        token=_holder(run),
        lease=lease,
        fingerprint=hashlib.sha256(by).digest(),
        input=by,
    )
    held: Saga = yield Ask(request)
    if held.row.token == request.token:
        return
    error = HeldError(f"Another saga holds the resource {resource!r}.")
    name, key = load(held.row.input)
    error.by = (name, key)
    raise error


def let_go(run: Run) -> Program[None]:
    """Let go of every resource that the saga holds."""
    for name in [name for name in run.entries if name.startswith("hold:")]:
        resource = name.removeprefix("hold:")
        leave = Leave(id=saga_id(HELD, resource), token=_holder(run), phase=Phase.DONE, due=None, wakes=0)
        yield Ask(leave)


def _holder(run: Run) -> str:
    return run.id.hex()[:32]

"""The consumer program of both Celery rigs: ``python -m celery -A tests.adapters.rigs.celery_app worker``."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from typing import Any

from celery.backends.base import BaseBackend
from celery.signals import worker_process_init, worker_ready

from idempotency.adapters.celery import idempotent_task
from idempotency.testing._points import CRASH_AT, arm, watch
from tests.adapters.rigs.celery_queue import VISIBILITY, application
from tests.adapters.rigs.orders import OrderLedger, Work

work = Work()
place, extra = work.setting.place, work.setting.extra
store, options = work.open(asynchronous=False)
if "on_refused" in extra:
    options["on_refused"] = extra["on_refused"]
if "wait" in extra:
    options["policy"] = replace(options["policy"], wait=extra["wait"])
visibility = extra.get("visibility", VISIBILITY)
app = application(place, extra["url"], visibility, worker_enable_remote_control=not extra.get("deaf"))


def name(order: dict[str, Any]) -> Any:
    work.ledger.note("named")
    return extra["key"]


class Unsteady(BaseBackend):
    """A result backend that is away until a replay comes."""

    def _store_result(self, *args: Any, **kwargs: Any) -> None:
        if not work.ledger.count("replayed"):
            raise ConnectionError("the result backend is away")


if extra.get("unsteady"):
    app.backend_cls = Unsteady

base = idempotent_task(
    store,
    key=name if "key" in extra else None,
    consumer="billing",
    pause=0.1,
    dead_letter=extra["dead_letter"],
    **options,
)


class Hooked(base):
    def before_start(self, *_: Any) -> None:
        if work.ledger.note("hook") <= extra["hook_fails"]:
            raise ConnectionError("the hook failed")


if extra.get("plain"):
    kind = {"acks_late": True, "reject_on_worker_lost": True}
else:
    kind = {"base": Hooked if "hook_fails" in extra else base}


@app.task(name="bill", time_limit=extra.get("time_limit"), **kind)
def bill(order: dict[str, Any]) -> dict[str, Any]:
    return work.handle_sync(order)


@worker_process_init.connect
def count_over_a_connection_of_its_own(**_: Any) -> None:
    work.ledger = OrderLedger(work.setting)


def die_alone(passed: str) -> None:
    """Kill the child, in which the task runs, and not the worker that started it."""
    if passed == extra["child_dies_at"] and work.ledger.note("killed") <= extra["child_dies"]:
        os.kill(os.getpid(), signal.SIGKILL)


@worker_ready.connect
def look_for_dead_children_often(sender: Any, **_: Any) -> None:
    """Celery does every five seconds."""
    look = getattr(getattr(sender.pool, "_pool", None), "maintain_pool", None)
    if look is not None:
        sender.timer.call_repeatedly(0.1, look)


if label := os.environ.get(CRASH_AT):
    # Not only the child of the process that was started: the machine goes down.
    arm(label, announce=lambda: os.killpg(0, signal.SIGKILL))
elif "child_dies_at" in extra:
    watch(die_alone)

if extra.get("used_before_fork"):
    store.inspect_sync(b"0" * 32)

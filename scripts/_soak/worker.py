"""A worker of scripts/soak: a server whose handlers have countable effects, in every mode of one store."""

from __future__ import annotations

import asyncio
import faulthandler
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

import redis
import uvicorn
from sqlalchemy import Engine, Integer, String, create_engine, delete
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker
from starlette.requests import Request
from starlette.responses import JSONResponse

from _soak.plan import LEASE, TIMEOUT
from idempotency import IdempotencyMiddleware, Operation, Policy, current
from idempotency.consumer import DeadLetter, Done, Failed, Replayed, Retry, idempotent_consumer
from idempotency.errors import IdempotencyError, TransactionError
from idempotency.function import idempotent
from idempotency.stores.redis import RedisStore
from idempotency.stores.sql import SQLStore

ASKED: ContextVar[float] = ContextVar("asked")
"""When the request of the running handler came in. Its claim was not sent earlier."""

STALL = 0.4
THREADS = 8
POLICY = Policy(lease=LEASE, required=True)

# Stores fail on purpose here. What is wrong is counted, or has a traceback.
logging.getLogger("idempotency").setLevel(logging.ERROR)


class Base(DeclarativeBase):
    """The tables of the application."""


class Effect(Base):
    """One effect of one run of a handler. Nothing in the table prevents a second one."""

    __tablename__ = "soak_effect"
    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    operation: Mapped[str] = mapped_column(String(100))
    run: Mapped[str] = mapped_column(String(100))


class OwnError(Exception):
    """The error that a handler raises on purpose."""


class UndoneError(Exception):
    """The error that rolls a savepoint back."""


class Trace:
    """A file that all workers share, outside of the store, with a line for each step of a handler."""

    def __init__(self, path: str, worker: int) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._worker = worker
        self._runs: Counter[str] = Counter()

    def write(self, what: str, key: str = "", run: str = "", **more: Any) -> None:
        line = {"at": time.monotonic(), "worker": self._worker, "what": what, "key": key, "run": run, **more}
        os.write(self._file, json.dumps(line).encode() + b"\n")

    def begin(self, work: dict[str, Any]) -> str:
        """Give a run its name."""
        self._runs[work["key"]] += 1
        run = f"{os.getpid()}-{self._runs[work['key']]}"
        self.write("began", work["key"], run, asked=ASKED.get())
        return run

    def fail(self, when: str, work: dict[str, Any], run: str) -> None:
        """Raise, if this run is to fail at this point."""
        if work["fails"] == when and run.endswith("-1"):
            self.write("raised", work["key"], run)
            raise OwnError(f"failed {when} the effect")


def write_effect(session: Session, work: dict[str, Any], run: str) -> None:
    """Write the effect in the way of the operation's shape; an error of these statements is the application's own."""
    try:
        _write_effect(session, work["shape"], Effect(operation=work["key"], run=run))
    except TransactionError:
        raise
    except Exception as error:
        error.own = True  # type: ignore[attr-defined]
        raise


def _write_effect(session: Session, shape: str, effect: Effect) -> None:
    undone = Effect(operation=effect.operation, run=f"{effect.run} undone")
    if shape == "undone savepoint":
        with suppress(UndoneError), session.begin_nested():
            session.add(undone)
            session.flush()
            raise UndoneError
    if shape in ("rollback", "refuse"):
        session.add(undone)
        session.flush()
        session.rollback()
    if shape == "savepoint":
        with session.begin_nested():
            session.add(effect)
    elif shape != "refuse":
        session.add(effect)
        if shape != "add":
            session.flush()


def operation() -> Operation:
    """Return the operation that runs."""
    running = current()
    assert running is not None
    return running


class Handlers:
    """The handlers of one store, by mode."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.trace = Trace(config["trace"], config["worker"])
        self.engines: list[Any] = []
        url = config["url"]
        if url.startswith("redis"):
            client = redis.Redis.from_url(url, socket_timeout=TIMEOUT)
            self.write: Any = lambda: client.set("soak", 1)
            self.store: Any = RedisStore.from_url(url, timeout=TIMEOUT)
            self.consume: Any = self.consumer(self.leased_message)
            self.modes: dict[str, Any] = {"consumer": self.answer(self.deliver)}
        else:
            self.use_sql(url, config["sync_url"])
        for mode, on_crash in (("leased", "rerun"), ("hold", "hold")):
            policy = Policy(lease=LEASE, required=True, on_crash=on_crash)  # type: ignore[arg-type]
            self.modes[mode] = self.middleware(self.leased, policy)

    def use_sql(self, url: str, sync_url: str) -> None:
        own = create_engine(sync_url, pool_size=1)
        self.write = lambda: write_nothing(own)
        # Isolation as docs/transactions.md asks for it; SQLite has one level only.
        level = {} if "sqlite" in url else {"isolation_level": "READ COMMITTED"}
        engine, sync_engine = create_async_engine(url, **level), create_engine(sync_url, **level)
        self.engines += [engine, sync_engine]
        self.store = SQLStore(engine, timeout=TIMEOUT)
        sync_store = SQLStore(sync_engine, timeout=TIMEOUT)
        sessions, sync_sessions = async_sessionmaker(engine), sessionmaker(sync_engine)
        joined: dict[str, Any] = {"key": lambda work: work["key"], "lock_timeout": TIMEOUT}
        call = idempotent(self.store, session=sessions, name="soak", **joined)(self.joined)
        call_sync = idempotent(sync_store, session=sync_sessions, name="soak-sync", **joined)(self.joined_sync)
        self.consume = self.consumer(self.joined, session=sessions, lock_timeout=TIMEOUT)

        async def in_thread(work: dict[str, Any]) -> tuple[int, dict[str, Any]]:
            return 200, {"run": await asyncio.to_thread(call_sync, work)}

        async def in_loop(work: dict[str, Any]) -> tuple[int, dict[str, Any]]:
            return 200, {"run": await call(work)}

        self.modes = {
            "transactional": self.middleware(self.transactional, POLICY, session=sessions),
            "joined": self.answer(in_loop),
            "joined-sync": self.answer(in_thread),
            "consumer": self.answer(self.deliver),
        }

    def middleware(self, handler: Any, policy: Policy, **options: Any) -> Any:
        app = IdempotencyMiddleware(handler, store=self.store, policy=policy, **options)
        return errors_answered(app)

    def answer(self, call: Any) -> Any:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            status, answer = await call(await Request(scope, receive).json())
            await JSONResponse(answer, status)(scope, receive, send)

        return errors_answered(app)

    def consumer(self, handler: Any, **options: Any) -> Any:
        decorate = idempotent_consumer(
            self.store, consumer="soak", key=lambda work: work["key"], policy=POLICY, **options
        )
        return decorate(handler)

    async def transactional(self, scope: Any, receive: Any, send: Any) -> None:
        work = await Request(scope, receive).json()
        run = await self.joined(work, operation().session)
        refused = work["shape"] == "refuse"
        answer = JSONResponse({"code": "refused"}, 404) if refused else JSONResponse({"run": run}, 201)
        await answer(scope, receive, send)

    async def joined(self, work: dict[str, Any], session: Any) -> str:
        """Write the effect in the session that commits with the record."""
        run = self.trace.begin(work)
        await asyncio.sleep(work["seconds"] / 2)
        self.trace.fail("before", work, run)
        await session.run_sync(write_effect, work, run)
        self.after_effect(work, run)
        await asyncio.sleep(work["seconds"] / 2)
        return run

    def joined_sync(self, work: dict[str, Any], session: Any) -> str:
        """Do the same as :meth:`joined`, in a thread."""
        run = self.trace.begin(work)
        time.sleep(work["seconds"] / 2)
        self.trace.fail("before", work, run)
        write_effect(session, work, run)
        self.after_effect(work, run)
        time.sleep(work["seconds"] / 2)
        return run

    def after_effect(self, work: dict[str, Any], run: str) -> None:
        self.trace.write("effect", work["key"], run, derived=operation().derive("effect"))
        if work["shape"] == "hold":
            operation().hold()
        self.trace.fail("after", work, run)

    async def leased(self, scope: Any, receive: Any, send: Any) -> None:
        run = await self.leased_message(await Request(scope, receive).json())
        await JSONResponse({"run": run}, 201)(scope, receive, send)

    async def leased_message(self, work: dict[str, Any]) -> str:
        """Have an effect outside of the store: a line in the trace."""
        run = self.trace.begin(work)
        await asyncio.sleep(work["seconds"] / 2)
        self.trace.fail("before", work, run)
        self.after_effect(work, run)
        await asyncio.sleep(work["seconds"] / 2)
        return run

    async def deliver(self, work: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Deliver one message, and answer how it is to be settled."""
        match await self.consume.deliver(work):
            case Replayed(_, kept=False):
                return 409, {"code": "completed-not-replayable"}
            case Done(run) | Replayed(run):
                return 200, {"run": run}
            case Retry(_, reason):
                return 503, {"code": f"retry: {reason}"}
            case Failed(error):
                raise error
            case DeadLetter(reason, error):
                return 409, {"code": reason, "error": repr(error)}

    async def debug(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer with what may leak."""
        pools = [getattr(engine, "sync_engine", engine).pool for engine in self.engines]
        answer = {
            "threads": threading.active_count(),
            "files": len(os.listdir("/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd")),
            "in use": sum(abs(pool.checkedout()) for pool in pools if hasattr(pool, "checkedout")),
            "tasks": [described(task.get_coro()) for task in asyncio.all_tasks()],
        }
        await JSONResponse(answer)(scope, receive, send)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.live(receive, send)
        else:
            mode = scope["path"].strip("/")
            await (self.debug if mode == "debug" else self.modes[mode])(scope, receive, send)

    async def live(self, receive: Any, send: Any) -> None:
        """Start and end with the server, as docs/http.md says."""
        await receive()
        loop = asyncio.get_running_loop()
        pool = ThreadPoolExecutor(THREADS)
        loop.set_default_executor(pool)
        watch = loop.create_task(self.watch())
        threading.Thread(target=self.watch_store, daemon=True).start()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        watch.cancel()
        await self.store.aclose()
        for engine in self.engines:
            await engine.dispose() if hasattr(engine, "sync_engine") else engine.dispose()
        await send({"type": "lifespan.shutdown.complete"})

    async def watch(self) -> None:
        """Record when the process stood still: an owner that is paused for any reason may lose its lease."""
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.1)
            if (late := time.monotonic() - before - 0.1) > STALL:
                self.trace.write("stalled", seconds=late)

    def watch_store(self) -> None:
        """Record when the store accepted no write of this worker: then it could not renew a lease either."""
        last = time.monotonic()
        while True:
            time.sleep(0.1)
            with suppress(Exception):
                self.write()
                if (late := time.monotonic() - last - 0.1) > STALL:
                    self.trace.write("waited for the store", seconds=late)
                last = time.monotonic()


def write_nothing(engine: Engine) -> None:
    """Write to the database, without the library."""
    with engine.begin() as connection:
        connection.execute(delete(Effect).where(Effect.id == -1))


def described(coroutine: Any) -> str:
    """Name a coroutine and what it waits in."""
    name, inner = str(getattr(coroutine, "__qualname__", type(coroutine).__name__)), coroutine
    while hasattr(awaited := getattr(inner, "cr_await", None), "cr_await"):
        inner = awaited
    return name if inner is coroutine else f"{name} in {inner.__qualname__}"


def errors_answered(app: Any) -> Any:
    """Answer the errors of ``app`` as a framework does; those that the handler raised on purpose have a code."""

    async def wrapped(scope: Any, receive: Any, send: Any) -> None:
        ASKED.set(time.monotonic())
        try:
            await app(scope, receive, send)
        except IdempotencyError as error:
            await JSONResponse({"code": error.code}, error.status)(scope, receive, send)
        except Exception as error:
            own = isinstance(error, OwnError) or hasattr(error, "own")
            answer = {"code": "own" if own else "not the application's", "error": repr(error)}
            await JSONResponse(answer, 500)(scope, receive, send)
            if not own:
                traceback.print_exception(error)

    return wrapped


def main() -> None:
    """Serve, until the process is ended."""
    config = json.loads(sys.argv[1])
    faulthandler.register(signal.SIGUSR1)
    uvicorn.run(
        Handlers(config),
        host="127.0.0.1",
        port=config["port"],
        log_level="warning",
        timeout_graceful_shutdown=1,
        loop="asyncio",
    )


if __name__ == "__main__":
    main()

"""Make a function a tool of an agent that takes effect once."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

from idempotency._engine.prepare import Prepared, check_name, prepare
from idempotency._results.codec import Codec
from idempotency._signature import bind_arguments, signature_of, wrap_like
from idempotency.errors import ConfigurationError
from idempotency.events import OnEvent
from idempotency.policy import Policy
from idempotency.stores.base import Store, SyncStore
from idempotency.tool._approval import Approvals, Needed
from idempotency.tool._decorated import Decorated, mark
from idempotency.tool._identity import Identity, Intent
from idempotency.tool._run import Tool
from idempotency.tool._run_sync import SyncTool
from idempotency.tool._verify import Verification, check_takes_arguments
from idempotency.tool._verify_sync import SyncVerification

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
    from sqlalchemy.orm import Session, sessionmaker

P = ParamSpec("P")
R = TypeVar("R")

HELD = Policy(on_crash="hold")
"""The default policy of a tool: what may have been done is not run again."""


def idempotent_tool(
    store: Store | SyncStore,
    *,
    name: str | None = None,
    intent: Intent = None,
    ignore: Collection[str] = (),
    session: async_sessionmaker[AsyncSession] | sessionmaker[Session] | None = None,
    verify: Callable[..., Any] | None = None,
    approval: Needed = False,
    policy: Policy = HELD,
    codec: Codec | None = None,
    lock_timeout: float = 5.0,
    on_event: OnEvent = (),
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a tool of an agent take effect once, however often the model, the framework or the network repeats a call.

    A call is identified by the first of these that it has: the key that the caller sent; its *intent*; its *attempt*,
    the id that the framework gives it in a run. An adapter gives the first and the last, by
    :func:`~idempotency.tool.tool_call`. A call that has none is refused.

    ``intent``: the names of the arguments that say what is meant, such as ``("order_id", "amount")``: calls in which
    these are equal are one operation, also after the model planned anew. Or a function that is given the arguments and
    returns a text, or None where they say nothing. Default None.
    All arguments are compared: the same identity with other arguments raises
    :class:`~idempotency.errors.KeyReusedError`. ``ignore``: names of arguments that are not compared, such as the
    context that a framework passes. Default none.
    ``verify``: a function that is called with the same arguments where the outcome is unknown, and awaited where the
    tool is. It returns the result if it finds the effect, or :data:`~idempotency.tool.NOT_DONE` if the effect has not
    happened and cannot happen any more. If it raises, the outcome stays unknown. ``current().derive(...)`` gives the
    same keys in it as in the tool.
    ``approval``: whether a call needs an approval, or a function that is given the arguments and says so: see
    :func:`~idempotency.tool.approve`. Default False.
    ``policy``: default ``Policy(on_crash="hold")``. A call that crashed, was cancelled, or failed with a time-out or a
    lost connection may have had its effect. So its outcome is *unknown*: it is not run again until ``verify``, or an
    operator, has found out what happened. A policy of your own should say so too; with ``on_crash="rerun"`` the tool
    runs again, and its effect may happen twice.
    ``session``: a sessionmaker on the database of ``store``. Effect and record are then one transaction, so that no
    outcome is unknown; ``verify`` is not allowed.
    ``name``, ``codec``, ``lock_timeout`` (seconds, default 5), ``on_event``: see :func:`idempotency.idempotent`. In
    events, the name is that of the function.

    The decorated function raises the errors that :func:`idempotency.idempotent` names, and
    :class:`~idempotency.errors.ApprovalNeededError`; :func:`~idempotency.tool.explain` gives their words for a model.
    Raises :class:`~idempotency.errors.ConfigurationError` at the decoration for what cannot work.
    """
    check_name(name)
    if session is not None and verify is not None:
        raise ConfigurationError("session= and verify= exclude each other: what is rolled back is never unknown")

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        prepared = prepare(
            function,
            store,
            kind="tool",
            name=name,
            key=intent if callable(intent) else None,
            policy=policy,
            codec=codec,
            session=session,
            lock_timeout=lock_timeout,
            on_event=on_event,
        )
        signature = signature_of(function, session)
        if verify is not None:
            check_takes_arguments(verify, signature)
        identity = Identity(prepared.calls, signature, intent, ignore)
        approvals = Approvals(store, prepared.calls, identity, approval, prepared.asynchronous)
        wrapper: Any = _wrapper(function, store, prepared, identity, approvals, verify, session)
        mark(wrapper, Decorated(approvals, intent is not None and (session is not None or policy.on_crash == "hold")))
        wrapper._made = prepared.made
        return cast(Callable[P, R], wrapper)

    return decorate


def _wrapper(
    function: Callable[..., Any],
    store: object,
    prepared: Prepared,
    identity: Identity,
    approvals: Approvals,
    verify: Any,
    session: Any,
) -> Any:
    calls = prepared.calls
    shared: dict[str, Any] = {
        "calls": calls,
        "run": prepared.run,
        "bind": bind_arguments(function, session),
        "identity": identity,
        "approvals": approvals,
        "joined": session is not None,
    }
    if prepared.asynchronous:
        tool = Tool(verification=None if verify is None else Verification(store, calls, verify), **shared)

        async def call(*args: Any, **kwargs: Any) -> Any:
            return await tool.call(args, kwargs)

        return wrap_like(call, function, session)
    sync_tool = SyncTool(verification=None if verify is None else SyncVerification(store, calls, verify), **shared)

    def call_sync(*args: Any, **kwargs: Any) -> Any:
        return sync_tool.call(args, kwargs)

    return wrap_like(call_sync, function, session)

"""The dependencies of a task: opened once its message is found new, and closed before it is recorded as handled."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from functools import cached_property
from typing import Any, get_type_hints

import anyio
from taskiq import Context, TaskiqDepends, TaskiqState
from taskiq_dependencies import DependencyGraph
from taskiq_dependencies.dependency import Dependency
from taskiq_dependencies.graph import FastapiDepends  # type: ignore[attr-defined]

CONTEXT = "idempotency_context"
"""The keyword by which taskiq passes its context."""

_MARKS = (Dependency,) if FastapiDepends is None else (Dependency, FastapiDepends)


def take_dependencies(task: Any, function: Callable[..., Any]) -> Dependencies:
    """Make taskiq pass a task only the arguments of its message and its context; return its dependencies."""
    signature = inspect.signature(task)
    seen = {*signature.parameters, "return"}
    task.__annotations__ = {name: each for name, each in function.__annotations__.items() if name in seen}
    # taskiq does not resolve the annotations of a signature: in one that is made by hand they must not be strings.
    hints, bare = get_type_hints(task, include_extras=True), get_type_hints(task)
    given = [each.replace(annotation=hints.get(name, Any)) for name, each in signature.parameters.items()]
    # Parameters that taskiq does not provide keep their position, so that arguments are parsed by the right annotation.
    hidden = {each.name: _hidden(each, bare) for each in given if _is_dependency(each)}
    shown = [hidden.get(each.name, each) for each in given]
    shown.append(inspect.Parameter(CONTEXT, inspect.Parameter.KEYWORD_ONLY, default=TaskiqDepends(Context)))
    task.__signature__ = signature.replace(parameters=sorted(shown, key=lambda each: each.kind))
    task.__annotations__.update({name: each.annotation for name, each in hidden.items()})
    return Dependencies(signature.replace(parameters=given), hints, bool(hidden))


def _is_dependency(parameter: inspect.Parameter) -> bool:
    marks = (parameter.default, *getattr(parameter.annotation, "__metadata__", ()))
    return any(isinstance(each, _MARKS) for each in marks)


def _hidden(parameter: inspect.Parameter, bare: dict[str, Any]) -> inspect.Parameter:
    default = None if isinstance(parameter.default, _MARKS) else parameter.default
    return parameter.replace(annotation=bare.get(parameter.name, Any), default=default)


class Dependencies:
    """The dependencies of a function: its arguments that are not in the message.

    They are opened and closed here, and not by taskiq: taskiq opens them before it calls the task, and acknowledges the
    message also where that fails. And it closes them after the task, when the message is already recorded as handled.
    """

    def __init__(self, signature: inspect.Signature, hints: dict[str, Any], used: bool) -> None:
        self._signature = signature
        self._hints = hints
        self._used = used

    @cached_property
    def _graph(self) -> DependencyGraph:
        # Resolved at the first message, as in taskiq: a dependency may depend on something that is defined later.
        def target() -> None: ...

        target.__signature__, target.__annotations__ = self._signature, self._hints  # type: ignore[attr-defined]
        return DependencyGraph(target)

    async def give(self, context: Context, work: Callable[[dict[str, Any]], Awaitable[Any]]) -> Any:
        """Do ``work`` with the dependencies open; an error of their opening or closing is a failure of the work."""
        if not self._used:
            return await work({})
        broker = context.broker
        known = {**broker.custom_dependency_context, Context: context, TaskiqState: broker.state}
        opened = self._graph.async_ctx(known, broker.dependency_overrides or None)
        # The label timeout limits the task, and not the closing of its dependencies.
        try:
            result = await work(await opened.resolve_kwargs())
        except BaseException as error:
            with anyio.CancelScope(shield=True):
                await opened.close(type(error), error, error.__traceback__)
            raise
        with anyio.CancelScope(shield=True):
            await opened.close()
        return result

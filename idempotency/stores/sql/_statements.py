"""The SQL of every verb, for PostgreSQL, for MariaDB and MySQL, and for SQLite.

Times are milliseconds since the epoch by the database's clock; parameters are durations. In the templates ``{now}`` is
that clock, and ``{r}`` is the prefix of the columns of a row that is already there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import Dialect, Table, TextClause, text

from idempotency._rules import FORMAT, State
from idempotency._sql.clock import NOW_MS
from idempotency._sql.requirements import DATABASES
from idempotency._sql.send import Compiled
from idempotency.errors import ConfigurationError
from idempotency.stores.base import ListedState
from idempotency.stores.sql._conditions import (
    EXPIRED,
    FREE,
    LAPSED,
    LISTED,
    OURS,
    OWNED,
    RUNNING,
    SANE,
    UNRESOLVED,
    UNTIL,
)
from idempotency.stores.sql._operation_name import HAS_NAMES, NO_NAMES, Names, name_words

_NAMES = "version, state, token, fingerprint, attempt, hold, lease_until_ms, created_ms, now_ms, result"
_FOUND = (
    "{r}version, {r}state, {r}token, {r}fingerprint, {r}attempt, {r}hold, {r}lease_until_ms, {r}created_ms,"
    " {now} AS now_ms, {r}result"
)
_ENTRY = (
    "SELECT id, scope, {key}, version, state, attempt, hold, {now} - created_ms AS age,"
    " lease_until_ms - {now} AS lease_left, expires_ms - {now} AS expires_in, length(result) AS result_size,"
    " {name} AS operation_name FROM {table}"
)
_COLUMNS = (
    "id, scope, {key}, version, state, token, fingerprint, attempt, hold, watched,"
    " created_ms, lease_until_ms, expires_ms"
)
_VALUES = (
    f":id, :scope, :key, {FORMAT}, {State.RUNNING:d}, :token, :fingerprint, 1, :hold, :watched,"
    " {now}, {until}, {now} + :keep"
)

_TAKE = f"""
ON CONFLICT (id) DO UPDATE SET
    scope = excluded.scope, {{key}} = excluded.{{key}},
    version = excluded.version, state = excluded.state, token = excluded.token, fingerprint = excluded.fingerprint,
    attempt = CASE WHEN {EXPIRED} THEN 1 WHEN {{r}}token = :token THEN {{r}}attempt ELSE {{r}}attempt + 1 END,
    hold = excluded.hold, watched = {{r}}watched OR excluded.watched,
    created_ms = CASE WHEN {EXPIRED} THEN {{now}} ELSE {{r}}created_ms END,
    lease_until_ms = {{until}}, expires_ms = {{now}} + :keep, result = NULL{{named_taken}}
WHERE {FREE}
RETURNING {_FOUND}"""

# Into the columns of the name too, where they are written: see _operation_name.py.
_INSERT = f"({_COLUMNS}{{named_columns}})"
_INSERTED = f"{_VALUES}{{named_values}}"

_CLAIM_SQLITE = f"INSERT INTO {{table}} {_INSERT} VALUES ({_INSERTED}) {_TAKE}"
_LOOK = f"SELECT {_FOUND}, {FREE} AS free FROM {{table}} WHERE id = :id"
# It also returns for how long the connection waits for the lock, and a row of NULLs where there is no record.
_LOOK_WAITING = (
    f"SELECT busy.timeout, {_FOUND}, {FREE} AS free FROM pragma_busy_timeout AS busy LEFT JOIN {{table}} ON id = :id"
)

# A statement that the client abandons must not wait in the server for ever. So it sets lock_timeout for itself alone:
# it is a transaction of its own. The setting takes effect for a wait that begins after it.
_BOUND = """bound AS MATERIALIZED (
    SELECT set_config('lock_timeout', '{bound}', TRUE) AS applied
)"""
_BOUNDED = {"from": " FROM bound", "using": " USING bound", "bounded": "bound.applied IS NOT NULL AND "}

# ON CONFLICT locks the row it finds even where its WHERE is false. So nothing is inserted, and nothing locked, where
# the statement already sees a row that the claim does not take. No row is returned when another transaction committed
# after this statement began: then the statement is repeated.
_CLAIM_POSTGRESQL = f"""
WITH {_BOUND}, seen AS (
    SELECT {_FOUND}, {{r}}watched, {FREE} AS free FROM {{table}} AS r WHERE id = :id
), won AS (
    INSERT INTO {{table}} AS r {_INSERT}
    SELECT {_INSERTED} FROM bound WHERE applied IS NOT NULL AND NOT EXISTS (SELECT 1 FROM seen WHERE NOT free) {_TAKE}
){{flag}}
SELECT {_NAMES} FROM won UNION ALL SELECT {_NAMES} FROM seen WHERE NOT free{{flagged}}"""

# In a transaction of the caller, whose lock_timeout is restored. The setting takes effect for a wait that begins after
# it, also within one statement; a statement that fails undoes it. The last line is evaluated last, and returns one row
# in any case: a row of NULLs when the claim has to be repeated.
_CLAIM_BOUNDED = f"""
WITH before AS MATERIALIZED (
    SELECT current_setting('lock_timeout') AS setting
), bound AS MATERIALIZED (
    SELECT setting, set_config('lock_timeout', :wait, TRUE) AS applied FROM before
), seen AS (
    SELECT {_FOUND}, {FREE} AS free FROM {{table}} AS r WHERE id = :id
), won AS (
    INSERT INTO {{table}} AS r {_INSERT}
    SELECT {_INSERTED} FROM bound WHERE applied IS NOT NULL AND NOT EXISTS (SELECT 1 FROM seen WHERE NOT free) {_TAKE}
), found AS (
    SELECT {_NAMES} FROM won UNION ALL SELECT {_NAMES} FROM seen WHERE NOT free
)
SELECT {_NAMES}, set_config('lock_timeout', setting, TRUE) FROM bound LEFT JOIN found ON TRUE"""

# Many claims in one statement. It inserts where there is no row, and reads the others. A row that a claim may take is
# marked as free, and not taken: that claim is sent alone. So the statement locks nothing but what it inserts. It waits
# only where another transaction has inserted the same id and is not committed. LATERAL and LIMIT have the rows read by
# their ids, in the order of the arrays, whatever the statistics of the table are.
CLAIMED_TOGETHER = ("id", "scope", "key", "token", "fingerprint", "hold", "latest", "lease", "keep")
"""The parameters of a claim in a flight of several, of which each is an array, named in the plural."""


def _asked(names: Sequence[str], arrays_too: str = "", names_too: str = "") -> str:
    arrays = ", ".join(f":{name}s" for name in names)
    return f"SELECT * FROM unnest({arrays}{arrays_too}) AS asked({', '.join(names)}{names_too})"


_BOUND_IN_FLIGHT = """bound AS MATERIALIZED (
    SELECT set_config('lock_timeout', :wait, TRUE)
        || set_config('synchronous_commit', COALESCE(:commit, current_setting('synchronous_commit')), TRUE) AS applied
)"""
_CLAIM_TOGETHER = f"""
WITH {_BOUND_IN_FLIGHT}, asked AS MATERIALIZED (
    {_asked(CLAIMED_TOGETHER, "{named_arrays}", "{named_asked}")}
), seen AS MATERIALIZED (
    SELECT r.id, {_FOUND}, {FREE} AS free
    FROM asked CROSS JOIN LATERAL (SELECT * FROM {{table}} AS found WHERE found.id = asked.id LIMIT 1) AS r
), won AS (
    INSERT INTO {{table}} {_INSERT}
    SELECT {_VALUES.format(now="{now}", until=UNTIL).replace(":watched", "FALSE")}{{named_asked_values}}
    FROM bound, asked
    WHERE applied IS NOT NULL AND NOT EXISTS (SELECT 1 FROM seen WHERE seen.id = asked.id)
    ORDER BY asked.id
    ON CONFLICT (id) DO NOTHING RETURNING id
)
SELECT id, {_NAMES}, free FROM seen
UNION ALL SELECT id, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, {{now}}, NULL, FALSE FROM won"""

# Many completions in one statement. A row that is locked is not returned, and its completion is sent alone. The rows
# are updated by ON CONFLICT, and always there to conflict, because they are locked. For an UPDATE that joins them, the
# server may choose to read the whole table, and keep to that choice while the table grows.
COMPLETED_TOGETHER = ("id", "token", "state", "result", "keep")
"""The parameters of a completion in a flight of several, as of a claim."""

_COMPLETE_TOGETHER = f"""
WITH asked AS MATERIALIZED (
    {_asked(COMPLETED_TOGETHER)}
), owned AS MATERIALIZED (
    SELECT r.*, asked.state AS end_state, asked.result AS end_result, asked.keep FROM asked CROSS JOIN LATERAL (
        SELECT {_COLUMNS} FROM {{table}} AS r
        WHERE r.id = asked.id AND r.token = asked.token AND NOT {EXPIRED} AND {SANE}
        FOR NO KEY UPDATE SKIP LOCKED
    ) AS r
), ended AS (
    INSERT INTO {{table}} AS r ({_COLUMNS}, result)
    SELECT {_COLUMNS.replace(" state,", " end_state,").replace("expires_ms", "{now} + keep")}, end_result FROM owned
    ON CONFLICT (id) DO UPDATE SET
        state = excluded.state, result = excluded.result, expires_ms = excluded.expires_ms
    RETURNING r.id, r.watched
)
SELECT id, CASE WHEN watched THEN pg_notify(:channel, encode(id, 'hex')) IS NULL END FROM ended"""

# A watcher may rely on a notification only if the flag was set while the row was still running.
_FLAG = f""", flag AS (
    UPDATE {{table}} SET watched = TRUE FROM bound
    WHERE bound.applied IS NOT NULL AND id = :id AND state = {State.RUNNING:d} AND NOT watched
        AND EXISTS (SELECT 1 FROM seen WHERE NOT free AND NOT watched AND state = {State.RUNNING:d})
    RETURNING 1
)"""
_FLAGGED = f" AND (watched OR state <> {State.RUNNING:d} OR EXISTS (SELECT 1 FROM flag))"

# Assignments are evaluated in their order and see the columns assigned before. The token stores the decision: after
# it is assigned, the claim has won the row if the row's token is ours and the row was expired or running. Once state
# and version are assigned too, OURS says the same in less text, all of which the server reads each time.
_WON = f"(token = :token AND ({EXPIRED} OR ({RUNNING})))"
_CLAIM_MYSQL = f"""
INSERT INTO {{table}} {_INSERT} VALUES ({_INSERTED})
ON DUPLICATE KEY UPDATE
    attempt = CASE WHEN {EXPIRED} THEN 1 WHEN {OURS} THEN attempt WHEN {LAPSED} THEN attempt + 1 ELSE attempt END,
    created_ms = IF({EXPIRED}, VALUES(created_ms), created_ms),
    token = IF({FREE}, VALUES(token), token),
    state = IF({_WON}, VALUES(state), state),
    version = IF({_WON}, VALUES(version), version),
    fingerprint = IF({OURS}, VALUES(fingerprint), fingerprint),
    scope = IF({OURS}, VALUES(scope), scope),
    {{key}} = IF({OURS}, VALUES({{key}}), {{key}}),
    hold = IF({OURS}, VALUES(hold), hold),
    watched = IF({OURS}, watched OR VALUES(watched), watched),
    lease_until_ms = IF({OURS}, VALUES(lease_until_ms), lease_until_ms),
    result = IF({OURS}, NULL, result),
    expires_ms = IF({OURS}, VALUES(expires_ms), expires_ms){{named_taken}}"""

# {from}, {using} and {bounded} refer to the CTE ``bound``, where there is one: it is evaluated before a row is locked.
_RENEW = (
    "UPDATE {table} SET lease_until_ms = {until}, expires_ms = {now} + :keep{from}"
    f" WHERE {{bounded}}{OWNED} AND {RUNNING}"
)
_COMPLETE = (
    "UPDATE {table} SET state = :state, result = :result, expires_ms = {now} + :keep{from}"
    f" WHERE {{bounded}}{OWNED} AND {SANE}"
)
# It need not ask whether the row is expired: the transaction owns it by its lock, or by its token, which another claim
# that found it expired would have replaced.
_COMPLETE_IN = (
    "UPDATE {table} SET state = :state, result = :result, expires_ms = {now} + :keep{from}"
    f" WHERE {{bounded}}id = :id AND token = :token AND {SANE}"
)
_RELEASE = f"DELETE FROM {{table}}{{using}} WHERE {{bounded}}{OWNED} AND {RUNNING}"
_RESOLVE_DONE = (
    f"UPDATE {{table}} SET state = {State.DONE:d}, result = :result, token = :token,"
    f" expires_ms = {{now}} + :keep{{from}} WHERE {{bounded}}id = :id AND {UNRESOLVED}"
)
_RESOLVE_RELEASE = f"DELETE FROM {{table}}{{using}} WHERE {{bounded}}id = :id AND {UNRESOLVED}"
_FORGET = (
    f"DELETE FROM {{table}}{{using}}"
    f" WHERE {{bounded}}id = :id AND NOT {EXPIRED} AND NOT ({RUNNING} AND lease_until_ms > {{now}})"
)

# The time is a subquery: PostgreSQL uses no index for a comparison with a clock that moves during the statement.
_EXPIRED_ROWS = "FROM {table} WHERE {after}expires_ms <= (SELECT {now}) ORDER BY expires_ms LIMIT :limit"
_PURGE = {
    # An array, because a subquery may be planned as a join that reads the whole table. By place, because the pages of
    # the primary key are not in memory when the table is large; a row that is locked remains in its place.
    "postgresql": (
        f"DELETE FROM {{table}} WHERE {{by}} = ANY(ARRAY(SELECT {{by}} {_EXPIRED_ROWS} FOR UPDATE SKIP LOCKED))"
        " RETURNING expires_ms"
    ),
    "mysql": "DELETE FROM {table} WHERE expires_ms <= {now} ORDER BY expires_ms LIMIT :limit",
    "sqlite": f"DELETE FROM {{table}} WHERE id IN (SELECT id {_EXPIRED_ROWS})",
}

# In a table with partitions, rows of several of them have the same place. A view has no places.
_HAS_PLACES = "SELECT relkind = 'r' AND NOT relhassubclass FROM pg_class WHERE oid = CAST(:relation AS regclass)"

# The same statement notifies the watchers, and only if there are any: all commits that notify wait for one lock.
_NOTIFYING = (
    f"WITH {_BOUND}, ended AS ({{statement}} RETURNING watched)"
    " SELECT CASE WHEN watched THEN pg_notify(:channel, :payload) IS NULL END FROM ended"
)

_TYPES = {
    **dict.fromkeys(("id", "fingerprint", "result"), "bytea"),
    **dict.fromkeys(
        ("scope", "key", "token", "channel", "payload", "wait", "commit", "relation", "operation_name"), "text"
    ),
    **dict.fromkeys(("hold", "watched"), "boolean"),
    **dict.fromkeys(("lease", "keep", "latest", "limit", "after"), "bigint"),
    "state": "smallint",
}

SENT_AS_ARRAY = "results"
"""The only array that is sent as one, because in text bytes are twice as long. The others are sent as their text: a
driver takes a microsecond for each value of an array."""


def _cast(name: str) -> str:
    # Each use of a parameter gets its type, because the server would infer it from the first use only.
    if name in _TYPES:
        return f"CAST(:{name} AS {_TYPES[name]})"
    kind = f"{_TYPES[name.removesuffix('s')]}[]"
    return f"CAST(:{name} AS {kind})" if name == SENT_AS_ARRAY else f"CAST(CAST(:{name} AS text) AS {kind})"


class OneByOne(NamedTuple):
    """The statements that each call of a flight on SQLite sends, in the driver's own syntax."""

    look: Compiled
    claim: Compiled
    complete: Compiled


class Statements:
    """The statements of one table in one dialect, made once. ``dialect`` must have connected, to know its server.

    ``lock_wait``: for how many seconds the server may wait for a lock in any of them; :attr:`claim_bounded` gets its
    limit as a parameter or a prefix instead.
    ``claim_looks_first``: a claim first reads by ``look``. So it is on SQLite, because a read takes no lock and writes
    nothing, where an upsert that changes nothing would still rewrite the index.
    ``returns``: the claim returns the row. On MySQL, which has no RETURNING, it is read by ``look`` afterwards.
    ``in_flights``: the statements of flights on PostgreSQL, by their names: those for many calls, in the plural, and
    those for one call, which cost the server less than one for many; elsewhere none.
    ``one_by_one``: the statements of many calls in one transaction, on SQLite; elsewhere None.
    ``purge_resumes``: a purge gets the time from which it searches, and returns the times of what it deleted. It is
    ``purge_by_id`` where ``has_places``, about ``relation``, the quoted name of the table, returns false.
    ``packs``: bytes are sent as :func:`~idempotency.stores.sql._values.packed` makes them.
    ``names``: what is done with the columns of the name of an operation. ``has_names`` asks whether they are there.
    """

    def __init__(self, dialect: Dialect, table: Table, lock_wait: float, names: Names = NO_NAMES) -> None:
        family = "mysql" if dialect.name == "mariadb" else dialect.name
        if family not in NOW_MS:
            raise ConfigurationError(f"the database must be {', '.join(DATABASES.values())}, not {dialect.name}")
        quote = dialect.identifier_preparer
        mariadb = bool(getattr(dialect, "is_mariadb", False))
        self._postgresql = family == "postgresql"
        self._sqlite = family == "sqlite"
        self.packs = family == "mysql"
        self.relation = quote.format_table(table)
        self._words = {"now": NOW_MS[family], "table": self.relation, "key": quote.quote("key")}
        self._words["until"] = UNTIL.format(**self._words)
        # A lock_timeout of 0 would mean to wait for ever.
        self._words["bound"] = f"{max(1, round(lock_wait * 1000))}ms"
        self._words |= _BOUNDED if self._postgresql else dict.fromkeys(_BOUNDED, "")
        self._words |= name_words(names, family, OURS.format(r=""))
        schema = "DATABASE()" if table.schema is None else f"'{table.schema}'"
        self.has_names = self._text(HAS_NAMES[family], literal=f"'{table.name}'", schema=schema)
        # It takes fractions of a second; innodb_lock_wait_timeout takes whole seconds only.
        self._prefix = f"SET STATEMENT max_statement_time={lock_wait:.3f} FOR " if mariadb else ""
        self.claim_looks_first = self._sqlite
        self.returns = family != "mysql" or mariadb
        self.look = self._text(_LOOK)
        self.look_waiting = self._text(_LOOK_WAITING) if self._sqlite else self.look
        self.look_locked = self._text(f"{_LOOK} FOR UPDATE") if family == "mysql" else self.look
        self.claim, self.claim_watched, self.claim_bounded = self._claims(family)
        notifying = _NOTIFYING if self._postgresql else "{statement}"
        plain = f"WITH {_BOUND} {{statement}}" if self._postgresql else "{statement}"
        self.in_flights = self._in_flights(dialect) if self._postgresql else {}
        self.renew = self._bounded(plain, _RENEW)
        self.complete = self._bounded(notifying, _COMPLETE)
        # On SQLite it returns a row for each row it changes, because aiosqlite's execute_fetchall counts none.
        self.complete_in = self._bounded(notifying, f"{_COMPLETE_IN} RETURNING 1" if self._sqlite else _COMPLETE_IN)
        self.one_by_one = self._one_by_one(dialect)
        self.release = self._bounded(notifying, _RELEASE)
        self._make_housekeeping(plain, family)
        number = "CAST(:lease AS SIGNED)" if family == "mysql" else ":lease"
        self.echo = self._text(f"SELECT :result, :key, {number}, :hold, :watched")
        self.probe = self._text(f"INSERT INTO {{table}} ({_COLUMNS}) VALUES ({_VALUES})")
        self.touch = self._text("UPDATE {table} SET attempt = 1 WHERE id = :id")
        self.unprobe = self._text("DELETE FROM {table} WHERE id = :id")

    def _make_housekeeping(self, plain: str, family: str) -> None:
        self.inspect = self._text(f"{_ENTRY} WHERE id = :id AND NOT {EXPIRED}")
        self.unresolved = self._text(f"{_ENTRY} WHERE {UNRESOLVED} ORDER BY created_ms LIMIT :limit")
        self.resolve_done = self._bounded(plain, _RESOLVE_DONE)
        self.resolve_release = self._bounded(plain, _RESOLVE_RELEASE)
        self.forget = self._bounded(plain, _FORGET)
        after = "expires_ms >= :after AND " if self._postgresql else ""
        self.purge = self._text(self._prefix + _PURGE[family], after=after, by="ctid")
        self.purge_by_id = self._text(self._prefix + _PURGE[family], after=after, by="id")
        self.has_places = self._text(_HAS_PLACES)
        # What an older transaction may still see, such as a backup, stays in the index: each batch would read it again.
        self.purge_resumes = self._postgresql
        self.check = self._text(f"SELECT {_COLUMNS}, result FROM {{table}} WHERE 1 = 0")

    def listed(self, state: ListedState | None, *, named: bool) -> TextClause:
        """Return the statement that lists records of a state, or of any; ``named``: of one name of an operation."""
        # MySQL would ignore spaces at the end of a name.
        exactly = "BINARY " if self.packs else ""
        name = f" AND COALESCE({{name}}, '') = {exactly}:operation_name" if named else ""
        return self._text(f"{_ENTRY} WHERE {LISTED[state]} AND NOT {EXPIRED}{name} ORDER BY created_ms LIMIT :limit")

    def _bounded(self, frame: str, statement: str) -> TextClause:
        return self._text(self._prefix + frame.replace("{statement}", statement))

    def _claims(self, family: str) -> tuple[TextClause, TextClause, TextClause]:
        if self._postgresql:
            bare = self._text(_CLAIM_POSTGRESQL, r="r.", flag="", flagged="")
            flag = _FLAG.format(**self._words)
            watched = self._text(_CLAIM_POSTGRESQL, r="r.", flag=flag, flagged=_FLAGGED)
            return bare, watched, self._text(_CLAIM_BOUNDED, r="r.")
        if self._sqlite:
            claim = self._text(_CLAIM_SQLITE)
            return claim, claim, claim
        sql = _CLAIM_MYSQL + (f" RETURNING {_FOUND}" if self.returns else "")
        claim = self._text(self._prefix + sql)
        return claim, claim, self._text(sql)

    def _in_flights(self, dialect: Dialect) -> dict[str, Compiled]:
        # The parameters of a claim are columns here. Those of the flight remain: settings, and arrays, which end in s.
        claims = re.sub(r":(?!wait|commit)(\w+)\b(?<!s)", r"asked.\1", _CLAIM_TOGETHER)
        one = _CLAIM_POSTGRESQL.replace(_BOUND, _BOUND_IN_FLIGHT)
        statements = {
            "claims": self._text(claims, r="r."),
            "claim": self._text(one, r="r.", flag="", flagged=""),
            "completions": self._text(_COMPLETE_TOGETHER, r="r."),
            "completion": self._bounded(_NOTIFYING.replace("'{bound}'", ":wait"), _COMPLETE),
        }
        return {verb: Compiled(statement, dialect) for verb, statement in statements.items()}

    def _one_by_one(self, dialect: Dialect) -> OneByOne | None:
        if not self._sqlite:
            return None
        return OneByOne(*(Compiled(each, dialect) for each in (self.look, self.claim, self.complete)))

    def _text(self, template: str, r: str = "", **words: str) -> TextClause:
        sql = template.format(r=r, **self._words, **words)
        if self._postgresql:
            sql = re.sub(r":(\w+)", lambda name: _cast(name[1]), sql)
        if self.packs:
            sql = re.sub(r":(id|fingerprint|result)\b", r"FROM_BASE64(:\1)", sql)
        return text(sql)

"""What the statements of the journal of sagas have in common, and those that are the same in each database.

In the templates ``{now}`` is the clock of the database in ms, and ``{at}`` what it was when the statement began,
the same wherever it is used. Durations are parameters, in milliseconds too.
``r`` is the row of a saga, and ``e`` one of its entries. A request locks the row first, and changes entries then.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from sqlalchemy import Connection, CursorResult, Dialect, TextClause, text

from idempotency._sagas.journal import FORMAT, Entry, Phase
from idempotency._sql.clock import NOW_MS
from idempotency._sql.requirements import DATABASES
from idempotency.errors import ConfigurationError
from idempotency.stores.sql._saga_fetch import Fetched, may_fetch
from idempotency.stores.sql._saga_table import SagaTables
from idempotency.stores.sql._values import packed

SANE = f"r.version <= {FORMAT}"
EXPIRED = "COALESCE(r.expires_ms <= {now}, FALSE)"
ENDED = f"r.phase IN ({', '.join(f'{phase:d}' for phase in Phase if phase.ended)})"
GOES_ON = f"r.id = :id AND {SANE} AND NOT {EXPIRED} AND NOT {ENDED}"
# Where an amendment is repeated, since its answer was lost, it has emptied the token itself.
_AS_SEEN = (
    "(:seen IS NULL OR (r.attempt = :seen AND (r.token = '' OR CASE WHEN r.owned THEN r.token ELSE '' END = :token)))"
)
_IDLE = "(NOT r.owned OR r.due_ms <= {now})"
_OWNS = f"r.id = :id AND r.token = :token AND r.owned AND {SANE}"
_MINE = "(r.owned AND r.token = :token)"

# Whether Open owns a saga that is there. ``:owns`` is false where it has no lease, ``:records`` where it has no input.
FREE = (
    f"COALESCE(:owns AND {SANE} AND NOT {ENDED} AND (r.fingerprint = :fingerprint OR NOT :records)"
    f" AND (r.due_ms <= {{now}} OR {_MINE}), FALSE)"
)

# An entry is read by one statement with its row, and so in columns of the same types.
_ROW = (
    "r.id, r.name, r.{key}, r.version, r.phase, CASE WHEN r.owned THEN r.token ELSE '' END AS token, r.fingerprint,"
    " r.input, r.attempt, r.crashes, r.wakes, r.reason, r.result, r.due_ms - {now} AS due,"
    " r.deadline_ms - {now} AS deadline, {now} - r.created_ms AS age"
)
_ENTRY = (
    "e.saga_id, e.name, NULL, NULL, e.progress, NULL, NULL, e.body, e.attempt, e.ord, NULL, NULL, NULL,"
    " {at} - e.changed_ms, NULL, {at} - e.began_ms"
)
NOTHING = ", ".join(["NULL"] * 16)
SAGAS = f"SELECT 'saga' AS kind, {_ROW} FROM"
ENTRIES = f"SELECT 'entry', {_ENTRY} FROM {{entries}} AS e WHERE e.saga_id = :id"

COLUMNS = (
    "id, name, {key}, version, phase, token, owned, fingerprint, input, attempt, crashes, wakes, reason, result,"
    " created_ms, due_ms, deadline_ms, expires_ms"
)
VALUES = (
    f":id, :name, :key, {FORMAT}, {Phase.FORWARD:d}, :token, :owns, :fingerprint, :input,"
    " CASE WHEN :owns THEN 1 ELSE 0 END, 0, 0, NULL, NULL, {now}, {now} + :lease, {now} + :deadline, NULL"
)
NEW = tuple(COLUMNS.split(", ")[1:])
"""The columns of a saga that is recorded anew in the row of one that has expired."""

ENTRY_COLUMNS = "saga_id, name, progress, ord, attempt, body, began_ms, changed_ms"
CHANGING = ("progress", "ord", "attempt", "body", "changed_ms")
"""The columns of an entry that is written again."""

# The updates. On MySQL and MariaDB assignments are evaluated in their order, and see the columns assigned before.
TAKE = (
    "UPDATE {sagas} AS r SET"
    f" attempt = r.attempt + CASE WHEN {_MINE} THEN 0 ELSE 1 END,"
    f" crashes = r.crashes + CASE WHEN r.owned AND NOT {_MINE} THEN 1 ELSE 0 END,"
    " token = :token, owned = TRUE, due_ms = {now} + :lease"
)
CALLED = "wakes = r.wakes + 1, due_ms = CASE WHEN r.owned OR r.due_ms <= {now} THEN r.due_ms ELSE {now} END"
_CHANGED = "phase = COALESCE(:phase, r.phase), result = COALESCE(:result, r.result)"


class Update(NamedTuple):
    """An update of the row of a saga: what it assigns, and when."""

    assignments: str
    condition: str


WRITE = Update(
    f"due_ms = {{now}} + :lease, crashes = CASE WHEN :anew THEN 0 ELSE r.crashes END, {_CHANGED}",
    _OWNS,
)
LEAVE = Update(
    "owned = FALSE, crashes = 0, reason = :reason,"
    " due_ms = CASE WHEN :ended THEN NULL WHEN r.wakes <> :wakes THEN {now} ELSE {now} + :due END,"
    f" expires_ms = CASE WHEN :ended THEN {{now}} + :ttl END, {_CHANGED}",
    _OWNS,
)
WAKE = Update(f"crashes = CASE WHEN {_IDLE} THEN 0 ELSE r.crashes END, {CALLED}", GOES_ON)
AMEND = Update(
    "owned = FALSE, token = '', crashes = 0, wakes = r.wakes + 1,"
    f" due_ms = CASE WHEN r.due_ms <= {{now}} THEN r.due_ms ELSE {{now}} END, {_CHANGED}",
    f"{GOES_ON} AND {_IDLE} AND {_AS_SEEN}",
)
STATE = f"r.version, r.owned, r.token = :token AS ours, {EXPIRED} AS expired"
"""What is to be known of a saga that could not be changed."""

LOOK = f"{SAGAS} {{sagas}} AS r WHERE r.id = :id AND NOT {EXPIRED} UNION ALL {ENTRIES}"
# The time is a subquery: PostgreSQL uses no index for a comparison with a clock that moves during the statement.
DUE = (
    f"{SAGAS} {{sagas}} AS r WHERE r.due_ms <= (SELECT {{now}}) AND {SANE} AND (:every OR r.name IN ({{names}}))"
    " ORDER BY r.due_ms LIMIT :limit OFFSET :after"
)
BROWSE = (
    f"{SAGAS} {{sagas}} AS r WHERE NOT {EXPIRED} AND (:every OR r.name IN ({{names}})) AND (:ended OR NOT {ENDED})"
    f" AND (NOT :stuck OR (r.due_ms IS NULL AND NOT {ENDED})) ORDER BY r.created_ms LIMIT :limit"
)

_TYPES = {
    **dict.fromkeys(("id", "fingerprint", "input", "reason", "result", "body"), "bytea"),
    **dict.fromkeys(("name", "without", "key", "token"), "text"),
    **dict.fromkeys(("owns", "records", "anew", "ended", "every", "stuck"), "boolean"),
    **dict.fromkeys(("lease", "deadline", "due", "ttl", "limit", "after"), "bigint"),
    **dict.fromkeys(("wakes", "ord", "attempt", "seen"), "integer"),
    **dict.fromkeys(("phase", "progress"), "smallint"),
}
_PACKED = re.compile(r":((?:id|name|without|body)\d*|fingerprint|input|reason|result)\b")


class Change(NamedTuple):
    """An update of a row, and what is done with its entries if it is changed; those ``without`` are deleted first."""

    update: Update
    values: dict[str, Any]
    entries: Sequence[Entry] = ()
    without: Sequence[str] = ()


class Changed(NamedTuple):
    """Whether a saga was changed; ``state``: its ``wakes`` and the columns of :data:`STATE`, None without a saga."""

    changed: bool
    state: Any


class SagaStatements:
    """The statements over one pair of tables in one dialect, each made at its first use.

    ``row``: the values of one of several entries, with # in place of its number. ``prefix``: what each statement begins
    with. ``words``: what else the templates have in braces.
    """

    def __init__(self, dialect: Dialect, tables: SagaTables, *, row: str, prefix: str = "", **words: str) -> None:
        quote = dialect.identifier_preparer
        self.family = family_of(dialect)
        self._row, self._prefix = row, prefix
        self._words = {
            **words,
            "now": NOW_MS[self.family],
            "at": NOW_MS[self.family].replace("clock_timestamp", "statement_timestamp"),
            "key": quote.quote("key"),
            "sagas": quote.format_table(tables.sagas),
            "entries": quote.format_table(tables.entries),
        }
        self._statement = cache(self._make)
        self._fetched = cache(lambda *given: Fetched(self._statement(*given), dialect))

    def execute(
        self, connection: Connection, template: str, values: Mapping[str, Any], names: int = 0, without: int = 0
    ) -> CursorResult[Any]:
        """Execute a statement, for so many entries or names in ``values``, and so many that are deleted."""
        statement = self._statement(template, names, without)
        return connection.execute(statement, packed(dict(values)) if self._packs else values)

    def rows(
        self, connection: Connection, template: str, values: Mapping[str, Any], names: int = 0, without: int = 0
    ) -> Sequence[Any]:
        """Return the rows of a statement; see :meth:`execute`. Where that is possible, the driver is sent it."""
        found = None
        if may_fetch(connection):
            found = self._fetched(template, names, without).rows(connection, values)
        return self.execute(connection, template, values, names, without).all() if found is None else found

    def named(self, names: Iterable[str], parameter: str = "name") -> dict[str, Any]:
        """Return names as the values of the parameters ``name0``, ``name1`` and so on."""
        return {f"{parameter}{number}": self.stored_name(name) for number, name in enumerate(names)}

    def written(self, entries: Sequence[Entry]) -> dict[str, Any]:
        """Return entries as the values of parameters."""
        values = self.named(entry.name for entry in entries)
        for number, entry in enumerate(entries):
            values[f"progress{number}"] = int(entry.progress)
            values[f"ord{number}"] = entry.order
            values[f"attempt{number}"] = entry.attempt
            values[f"body{number}"] = bytes(entry.body)
        return values

    @property
    def _packs(self) -> bool:
        return self.family == "mysql"

    def stored_name(self, name: str) -> str | bytes:
        """Return a name as its column holds it."""
        return name.encode("utf-8", "surrogatepass") if self._packs else name

    def _make(self, template: str, names: int, without: int) -> TextClause:
        rows = ", ".join(self._row.replace("#", str(number)) for number in range(names))
        sql = template.format(
            **self._words,
            rows=rows.format(**self._words),
            names=_list("name", names),
            without=_list("without", without),
        )
        if self.family == "postgresql":
            # Each use of a parameter gets its type, because the server would infer it from the first use only.
            sql = re.sub(r":(([a-z]+)\d*)", lambda found: f"CAST(:{found[1]} AS {_TYPES[found[2]]})", sql)
        if self._packs:
            sql = _PACKED.sub(r"FROM_BASE64(:\1)", sql)
        return text(self._prefix + sql)


def family_of(dialect: Dialect) -> str:
    """Return the kind of database: ``postgresql``, ``sqlite`` or ``mysql``, which MariaDB is too."""
    family = "mysql" if dialect.name == "mariadb" else dialect.name
    if family not in NOW_MS:
        raise ConfigurationError(f"the database must be {', '.join(DATABASES.values())}, not {dialect.name}")
    return family


def _list(parameter: str, count: int) -> str:
    return ", ".join(f":{parameter}{number}" for number in range(count)) or "NULL"

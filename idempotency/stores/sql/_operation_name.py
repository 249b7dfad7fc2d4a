"""The name of an operation, in two columns that were added to the table of records after its first version.

A process that writes no names, of an earlier release or with ``write_version=1``, takes an expired row for another
operation, and leaves the columns as they are. So the name counts only where the fingerprint beside it is still that of
the row.
"""

from __future__ import annotations

from typing import NamedTuple

COLUMN, FINGERPRINT = "operation_name", "named_fingerprint"


class Names(NamedTuple):
    """What statements do with the columns, which must be there. Where both are False, they may be missing."""

    shown: bool
    written: bool


NO_NAMES = Names(shown=False, written=False)

_BOTH = f"('{COLUMN}', '{FINGERPRINT}')"

HAS_NAMES = {
    "postgresql": (
        "SELECT count(*) = 2 FROM pg_attribute WHERE attrelid = to_regclass(:relation)"
        f" AND attname IN {_BOTH} AND NOT attisdropped AND has_column_privilege(attrelid, attnum, 'SELECT')"
    ),
    "mysql": (
        "SELECT count(*) = 2 FROM information_schema.columns"
        f" WHERE table_schema = {{schema}} AND table_name = {{literal}} AND column_name IN {_BOTH}"
    ),
    # A table that is missing is created with the columns.
    "sqlite": f"SELECT COALESCE(sum(name IN {_BOTH}) = 2, 1) FROM pragma_table_info({{literal}})",
}
"""The statements that ask whether both columns are there, which migrations may add one after the other.

On PostgreSQL, columns on which the user has no rights, which may be granted by column, count as absent.

None of them fails: that could end a caller's transaction."""


def name_words(names: Names, family: str, ours: str) -> dict[str, str]:
    """Return what stands in the statements of claims and of entries for the columns.

    ``ours`` is the condition on MySQL that the claim has taken the row.
    """
    shown = f"CASE WHEN {FINGERPRINT} = fingerprint THEN {COLUMN} END" if names.shown else "NULL"
    written = {
        "named_columns": f", {COLUMN}, {FINGERPRINT}",
        "named_values": f", :{COLUMN}, :fingerprint",
        "named_arrays": f", :{COLUMN}s",
        "named_asked": f", {COLUMN}",
        "named_asked_values": f", asked.{COLUMN}, asked.fingerprint",
        "named_taken": f", {COLUMN} = excluded.{COLUMN}, {FINGERPRINT} = excluded.fingerprint",
    }
    if family == "mysql":
        taken = {COLUMN: f"VALUES({COLUMN})", FINGERPRINT: "fingerprint"}
        written["named_taken"] = "".join(f", {each} = IF({ours}, {new}, {each})" for each, new in taken.items())
    return {"name": shown, **(written if names.written else dict.fromkeys(written, ""))}

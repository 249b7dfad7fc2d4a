"""Statements of other sessions as an operator may see them: without the values in them, and cut."""

from __future__ import annotations

import re

MOST = 200
"""How many characters of a statement are shown."""

# The server may have cut the statement inside of a value, a name or a comment: so each may have no end.
_COMMENT = r"/\*(?:(?!/\*).)*?\*/ | /\*.*"
_NUMBER = r"(?<![\w$])\d[\w.]*"
_POSTGRESQL = re.compile(
    rf"""(?P<name>"[^"]*"?|\$\d+) | (?P<comment>--[^\n]*|{_COMMENT})
    | (?<![\w$])\$(?P<tag>\w*)\$.*?(?:\$(?P=tag)\$|\Z) | '(?:[^']|'')*'? | {_NUMBER}""",
    re.DOTALL | re.VERBOSE,
)
_MYSQL = re.compile(
    rf"""(?P<name>`[^`]*`?) | (?P<comment>--(?=\s|\Z)[^\n]*|\#[^\n]*|{_COMMENT})
    | "(?:[^"]|"")*"? | '(?:[^']|'')*'? | {_NUMBER}""",
    re.DOTALL | re.VERBOSE,
)


def without_values(statement: str, dialect: str) -> str:
    """Return a statement of PostgreSQL or MySQL in one line: a ? in place of each value, no comments, and cut.

    A backslash may escape a quote or not, by the server's settings. So of a statement that has one, nothing is shown
    from the first quote on.
    """
    postgresql = dialect == "postgresql"
    quote = re.search("'" if postgresql else "['\"]", statement)
    if quote is not None and "\\" in statement:
        statement = statement[: quote.end()]
    shown = (_POSTGRESQL if postgresql else _MYSQL).sub(_replaced, statement)
    words = " ".join(shown.split())
    words = words if words.isprintable() else ascii(words)[1:-1]
    return words if len(words) <= MOST else f"{words[: MOST - 3]}..."


def _replaced(found: re.Match[str]) -> str:
    if found["comment"] is not None:
        return " "
    return found[0] if found["name"] is not None else "?"

"""Statements of other sessions are shown without the values in them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from idempotency._sql.statement_text import MOST, without_values


@pytest.mark.parametrize(
    ("dialect", "statement", "shown"),
    [
        (
            "postgresql",
            "SELECT *\n  FROM orders WHERE name = 'Smith' AND total > 12.5e3",
            "SELECT * FROM orders WHERE name = ? AND total > ?",
        ),
        (
            "postgresql",
            """SELECT "o"."2nd" FROM t1 o WHERE a = $1 AND b = 'it''s' -- of 'Smith'""",
            """SELECT "o"."2nd" FROM t1 o WHERE a = $1 AND b = ?""",
        ),
        ("postgresql", "/* Smith */ SELECT $$Smith$$, $a$ Smith $b$ $a$, x'1F' FROM t", "SELECT ?, ?, x? FROM t"),
        ("postgresql", "SELECT 1 /* a /* 'nested */ Smith */", "SELECT ?"),
        ("postgresql", "SELECT a$1$, 'Smith $1$' FROM t", "SELECT a$1$, ? FROM t"),
        ("postgresql", "SELECT 'cut off by the ser", "SELECT ?"),
        ("postgresql", r"SELECT a, E'O\'Smith', 'x' FROM t", "SELECT a, E?"),
        ("postgresql", r"SELECT a \ 2", r"SELECT a \ ?"),
        ("postgresql", "SELECT \x1b[31m", r"SELECT \x1b[?"),
        (
            "mysql",
            """SELECT `a"b` FROM t WHERE c = "Smith" AND d = 'x' # Smith""",
            """SELECT `a"b` FROM t WHERE c = ? AND d = ?""",
        ),
        ("mariadb", "SELECT 5--3, 'a\nSmith' FROM t -- Smith", "SELECT ?--?, ? FROM t"),
        ("mysql", r"""SELECT a, "O\"Smith" """, "SELECT a, ?"),
    ],
)
def test_a_statement_is_shown_without_its_values(dialect: str, statement: str, shown: str) -> None:
    assert without_values(statement, dialect) == shown


def test_a_long_statement_is_cut() -> None:
    shown = without_values("SELECT " + "a, " * 1000 + "b", "postgresql")

    assert (len(shown), shown[-3:]) == (MOST, "...")


NAMES = st.sampled_from(["SELECT", "a", '"b c"', '"it\'s"', "$1", "=", "->>", "--x\n", "/* it's */", "7", "t$q$"])
VALUES = st.text(st.sampled_from("'\"`$q-#/*\\; \n0"), max_size=6).map(lambda text: f"SECRET{text}SECRET")
QUOTED = VALUES.map(lambda text: "'" + text.replace("'", "''") + "'")
DOLLARS = VALUES.filter(lambda text: "$q$" not in text).map(lambda text: f"$q${text}$q$")


@given(st.lists(st.one_of(NAMES, QUOTED, DOLLARS), max_size=8), st.integers(0, 200))
def test_no_value_is_ever_shown(parts: list[str], length: int) -> None:
    """Wherever the server has cut the statement."""
    assert "SECRET" not in without_values(" ".join(parts)[:length], "postgresql")

"""What is counted of a trial, and added up over trials."""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields
from typing import ClassVar, Self


@dataclass(frozen=True)
class Counts:
    """Numbers of what is wrong at the end, and behind them ``ALLOWED`` ones of what is not wrong."""

    ALLOWED: ClassVar[int] = 1

    def __add__(self, other: Self) -> Self:
        return type(self)(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    @property
    def ok(self) -> bool:
        """Return whether nothing is wrong."""
        return not any(astuple(self)[: -self.ALLOWED])

    @property
    def cells(self) -> str:
        """Return the numbers as cells of a table, whose columns are the fields."""
        return "  ".join(f"{value:>{len(each.name)}}" for each, value in zip(fields(self), astuple(self), strict=True))

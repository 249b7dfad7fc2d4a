"""What a function answers that finds out whether an effect has happened."""

from __future__ import annotations

from enum import Enum
from typing import Final


class NotDone(Enum):
    """The type of :data:`NOT_DONE`."""

    NOT_DONE = "not done"


NOT_DONE: Final = NotDone.NOT_DONE
"""What ``verify=`` returns where the effect has not happened and cannot happen any more: it may be run again."""

"""What a store writes of a record: the option ``write_version``.

A new version is written only once all processes can read it. So a release that knows it writes the version before by
default: first all processes run the new release, then ``write_version`` is raised. Each version adds fields that older
readers ignore; the format stored with the record (``_rules.FORMAT``) is therefore the same.
"""

from __future__ import annotations

from idempotency.errors import ConfigurationError

OLDEST = 1
"""The version that is written by default: all that a claim needs."""

WITH_NAMES = 2
"""The name of the operation too."""

MOST_OF_A_NAME = 200
"""Characters of a name that are stored."""


def check_write_version(version: object) -> int:
    """Return a version that can be written; raise :class:`~idempotency.errors.ConfigurationError` for any other."""
    if isinstance(version, bool) or not isinstance(version, int) or not OLDEST <= version <= WITH_NAMES:
        raise ConfigurationError(f"write_version must be {OLDEST} or {WITH_NAMES}, not {version!r}")
    return version


def short_name(name: str) -> str:
    """Return the name of an operation as it is stored: its first 200 characters."""
    return name[:MOST_OF_A_NAME]

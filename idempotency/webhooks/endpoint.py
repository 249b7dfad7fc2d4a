"""Where webhooks go."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from idempotency.errors import ConfigurationError
from idempotency.webhooks._secrets import Signer, signers

# RFC 3986 without the fragment, and without the @ of credentials. In these characters all parsers see the same host.
_URL = re.compile(r"https?://[A-Za-z0-9\-._~:\[\]]+(?:[/?][A-Za-z0-9\-._~:/?@!$&'()*+,;=%]*)?")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One receiver of webhooks.

    ``url``: an absolute http or https URL in ASCII, without a fragment, and without a user or password. ``secrets``:
    what each attempt is signed with, ``whsec_`` or ``whsk_``; while you rotate, the old and the new one. Give each
    endpoint secrets of its own.

    Raises :class:`~idempotency.errors.ConfigurationError`, whose message has no part of the URL and the secrets.
    """

    url: str
    secrets: Sequence[str] = field(repr=False)
    signers: tuple[Signer, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.url, str) or not _URL.fullmatch(self.url) or not _has_host_and_port(self.url):
            raise ConfigurationError(
                "an endpoint has an http or https URL in ASCII, without user, password and fragment"
            )
        object.__setattr__(self, "signers", signers(self.secrets))
        object.__setattr__(self, "secrets", tuple(self.secrets))


def _has_host_and_port(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False

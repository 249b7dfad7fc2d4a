"""What the documents say, checked against the tests they name."""

import re

import pytest

from tests.kit.paths import ROOT


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/clients.md",
        "docs/console.md",
        "docs/cors.md",
        "docs/encryption.md",
        "docs/events.md",
        "docs/fastapi.md",
        "docs/guarantees.md",
        "docs/http.md",
        "docs/messages.md",
        "docs/openapi.md",
        "docs/operations.md",
        "docs/outbox.md",
        "docs/pgbouncer.md",
        "docs/profiles.md",
        "docs/tools.md",
        "docs/sagas.md",
        "docs/startup.md",
        "docs/telemetry.md",
        "docs/transactions.md",
        "docs/webhooks.md",
        "docs/wsgi.md",
    ],
)
def test_every_test_named_in_a_document_exists(page: str) -> None:
    """A claim names the test that shows it, and that test is there."""
    named = set(re.findall(r"\b(test_\w+)\b(?!\.py)", (ROOT / page).read_text()))
    sources = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "idempotency" / "testing").rglob("*.py")]
    defined = {name for path in sources for name in re.findall(r"def (test_\w+)", path.read_text())}

    assert named <= defined


def test_every_link_of_the_readme_leads_somewhere() -> None:
    """Relative links of the README and the documents name files that exist."""
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_file_that_a_contributor_is_sent_to_exists() -> None:
    """By its path from the root, or from the package; of a room's files the name alone is enough."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    paths = set(re.findall(r"`([\w./]+\.(?:py|lua|md|toml))`", text)) - {"x.py", "x_sync.py"}
    names = {path.name for path in (ROOT / "idempotency").rglob("*.py")}

    missing = [path for path in paths if not any((place / path).exists() for place in (ROOT, ROOT / "idempotency"))]

    assert len(paths) > 40
    assert [path for path in missing if path not in names] == []

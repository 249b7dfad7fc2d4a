"""What the documents say, checked against the tests they name."""

import re

import pytest

from tests.kit.paths import ROOT


@pytest.mark.parametrize(
    "page", ["README.md", "docs/guarantees.md", "docs/http.md", "docs/messages.md", "docs/transactions.md"]
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

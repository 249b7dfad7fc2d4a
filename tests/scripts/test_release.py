"""What ``scripts/release`` refuses, and what it says of the files that it builds."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.kit.paths import ROOT
from tests.kit.script_modules import script_modules

DATED = "# Changelog\n\n## [1.2.0] - 2026-11-29\n"


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch) -> Any:
    return script_modules(monkeypatch, ROOT / "scripts")("release")


@pytest.mark.parametrize(
    ("changelog", "changes", "tags", "reason"),
    [
        (DATED, " M README.md", ["v1.2.0"], "there are changes that are not committed"),
        (DATED, "", ["v1.1.0"], "the commit has no tag v1.2.0"),
        ("## [Unreleased] - 1.2.0\n", "", ["v1.2.0"], "CHANGELOG.md has no line '## [1.2.0] - YYYY-MM-DD'"),
        ("## [1x2.0] - 2026-11-29\n", "", ["v1.2.0"], "CHANGELOG.md has no line '## [1.2.0] - YYYY-MM-DD'"),
    ],
)
def test_a_commit_that_is_no_release_is_refused(
    release: Any, changelog: str, changes: str, tags: list[str], reason: str
) -> None:
    """Changes, a missing tag and an undated version are each named."""
    assert release.refusals("1.2.0", changelog, changes, tags) == [reason]


def test_a_tagged_and_dated_commit_is_a_release(release: Any) -> None:
    """A second tag does no harm."""
    assert release.refusals("1.2.0", DATED, "", ["stable", "v1.2.0"]) == []


@pytest.mark.processes
def test_a_release_can_be_built_again_and_says_where_it_comes_from(tmp_path: Path) -> None:
    """Its checksums and its provenance name the files that are there, and its README leads to the repository."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")

    ran = subprocess.run(
        [sys.executable, ROOT / "scripts" / "release.py", tmp_path / "dist", "--rehearse"],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )

    assert ran.returncode == 0, ran.stderr
    [wheel], [sdist] = (tmp_path / "dist").glob("*.whl"), (tmp_path / "dist").glob("*.tar.gz")
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (wheel, sdist)}
    sums = (tmp_path / "dist" / "SHA256SUMS").read_text()
    assert dict(reversed(line.split("  ")) for line in sums.splitlines()) == digests
    statement = json.loads((tmp_path / "dist" / "provenance.json").read_text())
    assert {each["name"]: each["digest"]["sha256"] for each in statement["subject"]} == digests
    [source] = statement["predicate"]["buildDefinition"]["resolvedDependencies"]
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert source["digest"] == {"gitCommit": head.stdout.strip()}
    with zipfile.ZipFile(wheel) as archive:
        [metadata] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        assert re.findall(r"\]\((?!https?://|#)[^)]+\)", archive.read(metadata).decode()) == []

"""Build a release whose origin can be proved: release.py DIRECTORY [--rehearse].

The commit is exported, built twice and compared byte by byte: anybody who has the commit can build the same files.
DIRECTORY then holds the sdist, the wheel, ``SHA256SUMS``, and ``provenance.json``, an in-toto statement with an SLSA
provenance predicate (https://slsa.dev/spec/v1.1/provenance) that names the commit, the tag and the versions of the
tools. The workflow ``release.yml`` signs and uploads them; nothing is uploaded from here.

Refused: changes that are not committed, a commit without the tag of its version, and a version that the changelog
does not date. ``--rehearse`` leaves these three out, for a try on any commit.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from importlib.metadata import version as version_of
from pathlib import Path

ROOT = Path(__file__).parent.parent
TOOLS = ("build", "hatchling", "twine")


def git(*arguments: str) -> str:
    """Return what a command of git prints."""
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def refusals(version: str, changelog: str, changes: str, tags: list[str]) -> list[str]:
    """Say why this commit is no release; empty if it is one."""
    found = []
    if changes:
        found.append("there are changes that are not committed")
    if f"v{version}" not in tags:
        found.append(f"the commit has no tag v{version}")
    if not re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d{{2}}-\d{{2}}$", changelog, re.MULTILINE):
        found.append(f"CHANGELOG.md has no line '## [{version}] - YYYY-MM-DD'")
    return found


def build(commit: str, target: Path) -> list[Path]:
    """Build sdist and wheel of a commit, with the time of the commit in place of the time of the build."""
    with tempfile.TemporaryDirectory() as exported:
        archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(exported, filter="data")
        environment = {**os.environ, "SOURCE_DATE_EPOCH": git("show", "--no-patch", "--format=%ct", commit)}
        command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(target), exported]
        built = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if built.returncode:
            sys.exit(built.stdout + built.stderr)
    return sorted(target.iterdir())


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def provenance(files: list[Path], commit: str, version: str) -> dict[str, object]:
    """Make the statement: which files, of which commit, by which tools."""
    source = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Source"]
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": path.name, "digest": {"sha256": digest(path)}} for path in files],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": f"{source}/blob/v{version}/scripts/release.py",
                "externalParameters": {"tag": f"v{version}"},
                "internalParameters": {"python": sys.version.split()[0], **{tool: version_of(tool) for tool in TOOLS}},
                "resolvedDependencies": [{"uri": f"git+{source}", "digest": {"gitCommit": commit}}],
            },
            "runDetails": {"builder": {"id": os.environ.get("BUILDER_ID", f"{source}/blob/main/scripts/release")}},
        },
    }


def main() -> int:
    """Build, compare, check and describe; return 1 with the reason if this is no release."""
    parser = argparse.ArgumentParser(description="Build a release whose origin can be proved.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--rehearse", action="store_true", help="take any commit, also without tag and date")
    options = parser.parse_args()
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    commit = git("rev-parse", "HEAD")
    if not options.rehearse:
        tags = git("tag", "--points-at", commit).split()
        found = refusals(version, (ROOT / "CHANGELOG.md").read_text(), git("status", "--porcelain"), tags)
        if found:
            print(*(f"release: {each}" for each in found), sep="\n", file=sys.stderr)
            return 1
    options.directory.mkdir(parents=True, exist_ok=True)
    if any(options.directory.iterdir()):
        print(f"release: {options.directory} is not empty", file=sys.stderr)
        return 1
    files = build(commit, options.directory)
    with tempfile.TemporaryDirectory() as again:
        if [digest(path) for path in build(commit, Path(again))] != [digest(path) for path in files]:
            print("release: a second build gave other bytes", file=sys.stderr)
            return 1
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *map(str, files)], check=True)
    sums = "".join(f"{digest(path)}  {path.name}\n" for path in files)
    (options.directory / "SHA256SUMS").write_text(sums)
    statement = json.dumps(provenance(files, commit, version), indent=2)
    (options.directory / "provenance.json").write_text(f"{statement}\n")
    print(sums, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The file of contracts in the user's repository: read, compare, write."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from idempotency.contracts._contracts import Contract, Contracts
from idempotency.contracts._rules import Change, changes_between
from idempotency.contracts._schema import Schema
from idempotency.errors import ConfigurationError

DEFAULT_FILE = "contracts.json"

_FORMAT = 1
_REMOVED = Change("", "removed: what is stored could not be read any more")
_LOWERED = Change("", "version lowered: what is stored in this version could not be read any more")
_REMEDIES = (
    ("arguments of the undo ", "an argument", "give the step another undo"),
    ("result of step ", "a field", "give the step another name"),
    ("arguments of ", "an argument", "declare a saga of another name"),
    ("result of ", "a field", "make a new version with an upcast: codec=Versioned(...)"),
    ("", "a field", "make a new version with an upcast: Versioned(..., version=, upcast=)"),
)
"""How the names of a kind of contracts begin; what may be added to it; and what another form of it needs."""


@dataclass(frozen=True, slots=True)
class Broken:
    """A change of a contract that is not safe, and what to do instead."""

    contract: str
    version: int
    change: Change

    def __str__(self) -> str:
        return f"{self.contract}, version {self.version}: {self.change}. {_remedy(self.contract, self.change)}"


@dataclass(frozen=True, slots=True)
class Checked:
    """What a check has found: what is ``broken``, and what was ``written`` into the file, as ``"NAME, version 1"``."""

    broken: list[Broken]
    written: list[str]


def check(
    contracts: Contracts | Iterable[object], file: str | Path = DEFAULT_FILE, accept: str | None = None
) -> Checked:
    """Compare contracts with every schema in a file, and write the file where all changes are safe.

    A change is safe if code of before it and code of after it read what the other one writes, for every schema that
    the file has of this version (FULL_TRANSITIVE, as registries of schemas name it). Where a change is not, the file
    stays as it is, unless ``accept`` gives a reason: then the file has the new schema in place of the older ones, and
    the reason. What is removed stays in the file, and is compared with when its name comes back.
    Raises :class:`~idempotency.errors.ConfigurationError` for a file that cannot be read.
    """
    if accept is not None and not accept.strip():
        raise ConfigurationError("say why the change is accepted: the reason is written into the file")
    path, known = Path(file), _read(Path(file))
    declared = contracts if isinstance(contracts, Contracts) else Contracts(contracts)
    broken = sorted(_broken(declared, known), key=lambda each: (each.contract, each.version, each.change))
    if broken and accept is None:
        return Checked(broken, [])
    before = json.dumps(known)
    for (contract, version), some in groupby(broken, lambda each: (each.contract, each.version)):
        found = [each.change for each in some]
        schemas = _take(known["contracts"], contract, version) + _take(known["removed"], contract, version)
        if found[0] in (_REMOVED, _LOWERED):
            known["removed"].setdefault(contract, {})[str(version)] = schemas
        changes = [str(each) for each in found]
        entry = {"contract": contract, "version": version, "changes": changes, "reason": accept}
        known["accepted"].append(entry)
    written = [_name(each) for each in declared if _add(known, each)]
    if json.dumps(known) != before:
        _write(path, known)
    return Checked(broken, written)


def _broken(declared: Contracts, known: Any) -> Iterator[Broken]:
    newest = {each.name: each for each in declared}
    for name, versions in known["contracts"].items():
        contract = newest.get(name)
        for version in map(int, versions):
            if contract is None:
                yield Broken(name, version, _REMOVED)
            elif version > contract.version:
                yield Broken(name, version, _LOWERED)
    for contract in declared:
        schemas = [
            schema
            for part in ("contracts", "removed")
            for schema in known[part].get(contract.name, {}).get(str(contract.version), [])
        ]
        for change in {each for old in schemas for each in changes_between(old, contract.schema)}:
            yield Broken(contract.name, contract.version, change)


def _add(known: Any, contract: Contract) -> bool:
    """Write the schema of a contract; return whether that has changed anything."""
    versions = known["contracts"].setdefault(contract.name, {})
    before: list[Schema] = versions.get(str(contract.version), [])
    earlier = _take(known["removed"], contract.name, contract.version) + before
    versions[str(contract.version)] = after = [*(each for each in earlier if each != contract.schema), contract.schema]
    return after != before


def _take(part: Any, contract: str, version: int) -> list[Schema]:
    """Remove the schemas of one version from a part of the file, and return them."""
    versions = part.get(contract, {})
    schemas: list[Schema] = versions.pop(str(version), [])
    if contract in part and not versions:
        del part[contract]
    return schemas


def _name(contract: Contract) -> str:
    return f"{contract.name}, version {contract.version}"


def _remedy(contract: str, change: Change) -> str:
    if change.rule in (_REMOVED.rule, _LOWERED.rule):
        return "Keep it as long as anything of it is stored"
    added, other = next((added, other) for start, added, other in _REMEDIES if contract.startswith(start))
    match change.rule:
        case "optional field made required":
            return "Give the field a default"
        case "required field added":
            return f"Give the field a default, or, if it was renamed, {other}"
        case "required field removed":
            return f"Keep the field, or {other}"
    return f"Add {added} with a default, or {other}"


def _read(path: Path) -> Any:
    if not path.exists():
        return {"format": _FORMAT, "contracts": {}, "removed": {}, "accepted": []}
    try:
        text = path.read_text(encoding="utf-8")
        if "\n<<<<<<< " in text:
            raise ConfigurationError(
                f"{path} has a conflict of git: take the file of the branch that is deployed, and run the check again"
            )
        found = {"removed": {}, **json.loads(text)}
        parts = [type(found[name]) for name in ("contracts", "removed", "accepted")]
        known = found["format"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigurationError(f"{path} is no file of contracts: {error!r}") from error
    if known != _FORMAT or parts != [dict, dict, list]:
        raise ConfigurationError(f"{path} is of format {known!r}, and this release reads format {_FORMAT}")
    return found


def _write(path: Path, known: Any) -> None:
    text = json.dumps(known, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written: {error}") from error

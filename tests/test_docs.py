"""What the documents say, checked against the tests they name."""

import logging
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import typer.main
from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker

from idempotency._cli.commands import app
from idempotency.contracts import Comparison, Progress, compare_sync
from idempotency.contracts.events import log_comparison, log_progress
from idempotency.projections import ProjectionEvent, create_projections_schema_sync, projection
from idempotency.projections.events import log_projection_event
from idempotency.streams import Streams
from tests.kit.paths import ROOT


@dataclass
class Page:
    """An event without any field."""


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/clients.md",
        "docs/console.md",
        "docs/contracts.md",
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
        "docs/projections.md",
        "docs/tools.md",
        "docs/sagas.md",
        "docs/shop.md",
        "docs/startup.md",
        "docs/streams.md",
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


def commands_of(page: Path) -> Iterator[tuple[list[str], bool]]:
    """Give the words of each command on a page, and whether it is one to copy: a line in a block of a shell."""
    text = page.read_text()
    for block in re.findall(r"^ *```(?:sh|console)\n(.*?)^ *```$", text, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.strip().removeprefix("$ "), comments=True)
            for start in (number for number, word in enumerate(words) if word == "idempotency"):
                if all("=" in word for word in words[:start]) or words[start - 1] == "-m":
                    yield words[start + 1 :], True
    for code in re.findall(r"(?<!`)`idempotency\s+([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S)):
        yield shlex.split(code), False


def parsed(words: list[str]) -> tuple[Any, dict[str, Any]]:
    """Parse a command by the parser of the command line; return its definition, and what it is given."""
    command: Any = typer.main.get_command(app)
    while words and hasattr(command, "commands"):
        assert words[0] in command.commands, f"no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    context = command.context_class(command)
    given, extra, _ = command.make_parser(context).parse_args(args=list(words))
    assert not extra, f"not expected: {extra}"
    for parameter in command.params:
        value = given.get(parameter.name)
        if isinstance(value, str) and hasattr(parameter.type, "choices") and not value.isupper():
            parameter.type.convert(value, parameter, context)
    return command, given


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_in_a_document_is_one(page: Path) -> None:
    """It exists, has these options and takes these values; one to copy has all its arguments."""
    for words, is_to_copy in commands_of(page):
        command, given = parsed(words)
        missing = [each.name for each in command.params if each.required and not given.get(each.name)]
        assert not (is_to_copy and missing), f"{words} lacks {missing}"


def test_a_command_that_does_not_exist_is_noticed() -> None:
    """By its name, by an option, by a value, by an argument too many."""
    assert sum(1 for page in PAGES for _ in commands_of(page)) > 40
    for words in ("unresolved", "list --all", "list --state stuck", "doctor now", "outbox schema make"):
        with pytest.raises(Exception, match="no command|No such option|is not|not expected"):
            parsed(words.split())


def test_every_file_that_a_contributor_is_sent_to_exists() -> None:
    """By its path from the root, or from the package; of a room's files the name alone is enough."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    paths = set(re.findall(r"`([\w./]+\.(?:py|lua|md|toml))`", text)) - {"x.py", "x_sync.py"}
    names = {path.name for path in (ROOT / "idempotency").rglob("*.py")}

    missing = [path for path in paths if not any((place / path).exists() for place in (ROOT, ROOT / "idempotency"))]

    assert len(paths) > 40
    assert [path for path in missing if path not in names] == []


@pytest.mark.parametrize(
    ("head", "event", "log", "fields"),
    [
        ("kind", ProjectionEvent, log_projection_event, {"projection": "list", "version": 1}),
        ("kind of `Progress`", Progress, log_progress, {"name": "total", "position": 1, "size": 1}),
        ("kind of `Comparison`", Comparison, log_comparison, {"name": "price", "control_s": 0.0, "candidate_s": 0.0}),
    ],
)
def test_the_page_has_the_events_of_projections_and_contracts(
    head: str, event: Any, log: Callable[[Any], None], fields: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Each kind, with the level at which the log has it."""
    caplog.set_level(logging.DEBUG, "idempotency")
    kinds = get_args(get_type_hints(event)["kind"])
    for kind in kinds:
        log(event(kind=kind, **fields))
    levels = [record.levelname.lower() for record in caplog.records]

    page = (ROOT / "docs/events.md").read_text().partition("## `ProjectionEvent`")[2]
    table = page.partition(f"| {head} | level | meaning |\n|---|---|---|\n")[2].partition("\n\n")[0]

    assert re.findall(r"^\| `([a-z]+)` \| ([a-z]+) \|", table, re.M) == list(zip(kinds, levels, strict=True))


def test_a_hook_of_a_projection_or_a_comparison_takes_the_place_of_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each outcome is given to the hook, and no line is written; without a hook there is one."""
    caplog.set_level(logging.DEBUG, "idempotency")
    engine = create_engine(f"sqlite:///{tmp_path}/shop.db")
    streams, seen = Streams([Page]), list[Any]()
    streams.create_schema_sync(engine)
    create_projections_schema_sync(engine)
    with engine.begin() as connection:
        streams.append_sync(connection, "page-1", [Page()])

    def work(name: str, **hook: Any) -> None:
        @projection(name, version=1, source=streams, session=sessionmaker(engine), **hook)
        def nothing(event: Any, session: Any) -> None: ...

        nothing.catch_up()
        compare_sync(name, lambda: 1, lambda: 1, **hook)

    work("hooked", on_event=seen.append)
    assert ([each.kind for each in seen], caplog.messages) == (["applied", "same"], [])
    work("logged")
    assert [message.partition("=")[0] for message in caplog.messages] == [
        "applied projection",
        "comparison same name",
    ]
    engine.dispose()

"""Check sizes, rooms, probing for attributes, and plain words in the package: check_house.py [DIRECTORY]."""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path

FUNCTION = 40
FILE = 400

MODULES = {"_rules", "_durations", "_hooks", "_signature", "_synchronization"}
ROOMS = {
    *("_brokers", "_cli", "_engine", "_http", "_messages", "_outbox", "_results", "_sagas", "_sql"),
    *("adapters", "client", "contracts", "openapi", "outbox", "projections", "saga", "stores", "streams", "telemetry"),
    *("testing", "tool", "web", "webhooks"),
}

# What hasattr() and getattr() may be used for, by file. A capability of a store is asked by type, in stores/base.py.
PROBES = {
    "_engine/names.py": "inspects modules and functions",
    "_engine/transaction.py": "reads the options of a sessionmaker",
    "_engine/scheduler.py": "os.register_at_fork is missing on Windows",
    "_hooks.py": "inspects functions",
    "_http/*.py": "inspects requests of Starlette, exit stacks of FastAPI, tasks of asyncio and iterables of WSGI",
    "_results/*.py": "inspects annotations and functions",
    "contracts/__init__.py": "imports by name",
    "_signature.py": "inspects functions",
    "_sql/*.py": "inspects objects of SQLAlchemy and of drivers",
    "adapters/*": "inspects objects of frameworks and brokers",
    "client/__init__.py": "imports by name",
    "cli.py": "an exception of click has its own text",
    "_outbox/*": "inspects errors of drivers",
    "outbox/*": "imports by name, and inspects clients of brokers",
    "saga/_undo.py": "inspects functions, and finds them in modules",
    "streams/__init__.py": "imports by name",
    "stores/base.py": "asks which verbs a store has: the only place that does",
    "stores/redis/*": "inspects clients of redis-py",
    "stores/sql/*": "inspects objects of SQLAlchemy and of drivers",
    "tool/*": "inspects functions and dataclasses",
    "testing/*": "imports by name, and looks at what a scenario of the user defines",
}
STORES = {"stores/base.py", "testing/_instrument.py"}
"""Where the attributes of a store itself may be looked at; the second wraps the verbs of each class of stores."""

# How often each word may occur: "kept" as Replayed.kept, "left" in "lease_left", which are public names.
WORDS = {"told": 0, "left": 0, "kept": 8, "turn": 0, "bury": 0, "dress": 0, "lest": 0, "whoever": 0, "whom": 0}
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
_CODELESS = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


@dataclass(frozen=True)
class Source:
    """One file of the package."""

    path: Path
    name: str

    @cached_property
    def text(self) -> str:
        return self.path.read_text()

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(ast.parse(self.text)))

    @cached_property
    def tokens(self) -> list[tokenize.TokenInfo]:
        return list(tokenize.generate_tokens(io.StringIO(self.text).readline))

    @cached_property
    def docstrings(self) -> list[ast.Constant]:
        """Every text that stands alone: docstrings, and what describes a constant."""
        alone = (node.value for node in self.nodes if isinstance(node, ast.Expr))
        return [each for each in alone if isinstance(each, ast.Constant) and isinstance(each.value, str)]


def sources(package: Path) -> list[Source]:
    """List the files of the package."""
    return [Source(path, path.relative_to(package).as_posix()) for path in sorted(package.rglob("*.py"))]


def long_functions(source: Source) -> Iterator[str]:
    """Find functions of too many code lines; docstrings, comments and blank lines do not count."""
    code: set[int] = set()
    for token in source.tokens:
        if token.type not in _CODELESS:
            code.update(range(token.start[0], token.end[0] + 1))
    for text in source.docstrings:
        code.difference_update(range(text.lineno, (text.end_lineno or text.lineno) + 1))
    for node in source.nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = len(code.intersection(range(node.lineno, (node.end_lineno or node.lineno) + 1)))
            if size > FUNCTION:
                yield f"{source.name}:{node.lineno}: {node.name} has {size} code lines; {FUNCTION} are allowed"


def long_files(source: Source) -> Iterator[str]:
    """Find files of too many lines."""
    size = len(source.text.splitlines())
    if size > FILE:
        yield f"{source.name}: has {size} lines; {FILE} are allowed"


def probes(source: Source) -> Iterator[str]:
    """Find hasattr() and getattr() where they are not expected, and those that ask a store anywhere."""
    allowed = any(fnmatch(source.name, pattern) for pattern in PROBES)
    for node in source.nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("hasattr", "getattr"):
            asked = ast.unparse(node.args[0])
            of_store = asked.rpartition(".")[2].lstrip("_") == "store" and source.name not in STORES
            if of_store or not allowed:
                yield f"{source.name}:{node.lineno}: {node.func.id}({asked}, ...): ask by type, or list it in PROBES"


def stray_rooms(package: Path) -> Iterator[str]:
    """Find private modules and packages at the top level that the plan does not have."""
    for path in sorted(package.iterdir()):
        name = path.stem
        private_module = path.suffix == ".py" and name.startswith("_") and not name.startswith("__")
        if (private_module and name not in MODULES) or ((path / "__init__.py").exists() and name not in ROOMS):
            yield f"{path.name}: is not in the plan of the rooms"


def count_words(source: Source) -> Counter[str]:
    """Count the words that are not plain, in docstrings, comments and names."""
    texts = [text.value for text in source.docstrings if isinstance(text.value, str)]
    texts += [token.string for token in source.tokens if token.type in (tokenize.COMMENT, tokenize.NAME)]
    found = (word.lower() for text in texts for word in _WORD.findall(text.replace("lease_left", "")))
    return Counter(word for word in found if word in WORDS)


def main(package: Path) -> int:
    """Print every offence; return 1 if there is one."""
    files = sources(package)
    found = [each for source in files for rule in (long_functions, long_files, probes) for each in rule(source)]
    found += stray_rooms(package)
    words = sum((count_words(source) for source in files), Counter[str]())
    print("words:", ", ".join(f"{word} {words[word]}" for word in WORDS))
    for word, limit in WORDS.items():
        if words[word] > limit:
            places = ", ".join(f"{source.name} {n}" for source in files if (n := count_words(source)[word]))
            found.append(f"the word {word!r} occurs {words[word]} times; {limit} are allowed: {places}")
    for each in found:
        print(each, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(Path(*sys.argv[1:]) if sys.argv[1:] else Path("idempotency")))

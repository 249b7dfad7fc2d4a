"""Build the documentation site from the Markdown files and the docstrings: build_docs.py.

Everything is put together in ``build/docs``: the pages, the README as the first of them, the examples, and a reference
made of the docstrings. ``zensical`` makes HTML of it, in ``build/site``, by ``mkdocs.yml``. The Markdown of each page
lies beside its HTML, and ``llms.txt`` (https://llmstxt.org) lists the pages with one sentence each.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import griffe
import yaml

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "build" / "docs"
SITE = ROOT / "build" / "site"
EXAMPLES = (
    "Each runs by itself, with `python examples/NAME.py`, and is run by the tests. Those below `shop` are one system:"
    " see [A whole shop](../shop.md)."
)

_ROLE = re.compile(r":[a-z]+:`~?(?:[\w.]*\.)?(\w+)`")
_STARS = {griffe.ParameterKind.var_positional: "*", griffe.ParameterKind.var_keyword: "**"}
_LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)(#[^)]*)?\)")


def main() -> int:
    """Build the site; return 1 if a link leads nowhere or the navigation and the pages differ."""
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(ROOT / "docs", PAGES)
    for name, page in (("README", "index"), ("CHANGELOG", "changelog"), ("CONTRIBUTING", "contributing")):
        shutil.copy(ROOT / f"{name}.md", PAGES / f"{page}.md")
    write_examples()
    write_reference()
    write_index("examples", "Examples", EXAMPLES)
    write_index("decisions", "Decisions", "Why things are as they are, and what else was weighed.")
    for page in PAGES.rglob("*.md"):
        page.write_text(with_links_of_the_site(page))
    flaws = [*dead_links(), *strays()]
    if flaws:
        print(*flaws, sep="\n", file=sys.stderr)
        return 1
    built = subprocess.run(["zensical", "build", "--clean", "--strict"], cwd=ROOT, check=False)
    if built.returncode == 0:
        write_markdown_and_llms()
    return built.returncode


def write_examples() -> None:
    """Write a page for each example."""
    (PAGES / "examples").mkdir()
    for path in sorted((ROOT / "examples").rglob("*.py")):
        name = path.relative_to(ROOT / "examples")
        if name.name == "__init__.py":
            continue
        target = PAGES / "examples" / name.with_suffix(".md")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(f"# {name.as_posix()}\n\n```python\n{path.read_text()}```\n")


def write_index(folder: str, title: str, text: str) -> None:
    """Write the list of the pages of a folder, by their headings."""
    pages = sorted((PAGES / folder).rglob("*.md"))
    lines = [f"- [{heading(page)}]({page.relative_to(PAGES / folder).as_posix()})" for page in pages]
    (PAGES / folder / "index.md").write_text(f"# {title}\n\n{text}\n\n" + "\n".join(lines) + "\n")


def heading(page: Path) -> str:
    """Return the first heading of a page."""
    return page.read_text().partition("\n")[0].lstrip("# ")


# The reference.


def write_reference() -> None:
    """Write a page for each public module of the package, of the docstrings of what it offers."""
    package = griffe.load("idempotency", search_paths=[ROOT], resolve_aliases=True, resolve_external=False)
    (PAGES / "reference").mkdir()
    listed = []
    for module in modules_of(package):
        text = "\n".join(page_of(module))
        if text:
            (PAGES / "reference" / f"{module.path}.md").write_text(text)
            listed.append(f"- [`{module.path}`]({module.path}.md): {first_sentence(doc(module))}")
    text = "Each public module, and what it offers, as its docstrings say it."
    (PAGES / "reference" / "index.md").write_text(f"# Reference\n\n{text}\n\n" + "\n".join(listed) + "\n")


def modules_of(module: griffe.Module) -> Iterator[griffe.Module]:
    """List a module and those below it whose names are public."""
    yield module
    for name in sorted(module.modules):
        if not name.startswith("_") and not module.members[name].is_alias:
            yield from modules_of(module.modules[name])


def page_of(module: griffe.Module) -> Iterator[str]:
    """Write the lines of a module's page; none if it offers nothing."""
    offered = [member for name, member in module.members.items() if is_offered(module, name)]
    if not offered:
        return
    yield f"# {module.path}\n\n{doc(module)}\n"
    for member in offered:
        found = member.final_target if member.is_alias else member
        yield from entry(member.name, found, "##")
        if isinstance(found, griffe.Class):
            for name, inner in found.members.items():
                shown = isinstance(inner, griffe.Function | griffe.Attribute) and inner.docstring
                if shown and not name.startswith("_"):
                    yield from entry(f"{member.name}.{name}", inner, "###")


def is_offered(module: griffe.Module, name: str) -> bool:
    """Return whether a module offers a name: by ``__all__``, or defined there with a docstring and no underscore."""
    member = module.members[name]
    if module.exports is not None:
        return name in {str(each) for each in module.exports}
    if name.startswith("_") or isinstance(member, griffe.Module) or (member.is_alias and not is_passed_on(member)):
        return False
    return bool((member.final_target if member.is_alias else member).docstring)


def is_passed_on(member: griffe.Object | griffe.Alias) -> bool:
    """Return whether an import of this package is meant for others: ``from ... import Name as Name``."""
    return member.target_path.startswith("idempotency.") and member.is_public  # type: ignore[union-attr]


def entry(title: str, found: griffe.Object, level: str) -> Iterator[str]:
    """Write one name: its signature and its docstring."""
    yield f"{level} {title}\n"
    if isinstance(found, griffe.Function) and "property" not in found.labels:
        yield f"```python\n{signature(title.rpartition('.')[2], found)}\n```\n"
    elif isinstance(found, griffe.Class) and (made := found.members.get("__init__")) is not None:
        if isinstance(made, griffe.Function):
            yield f"```python\n{signature(title, made)}\n```\n"
    elif isinstance(found, griffe.Attribute) and found.annotation is not None and found.value is not None:
        yield f"```python\n{title.rpartition('.')[2]}: {found.annotation} = {found.value}\n```\n"
    if text := doc(found):
        yield f"{text}\n"


def parameters_of(function: griffe.Function) -> Iterator[str]:
    """Write the parameters of a function, and a star before those that are given by name."""
    by_name = False
    for parameter in function.parameters:
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is griffe.ParameterKind.keyword_only and not by_name:
            by_name = True
            yield "*"
        stars = _STARS.get(parameter.kind, "") if parameter.kind is not None else ""
        by_name = by_name or stars == "*"
        annotation = f": {parameter.annotation}" if parameter.annotation is not None else ""
        equals = " = " if annotation else "="
        # A variadic parameter has a default in griffe, which nobody writes.
        default = f"{equals}{parameter.default}" if parameter.default is not None and not stars else ""
        yield f"{stars}{parameter.name}{annotation}{default}"


def signature(name: str, function: griffe.Function) -> str:
    """Write a signature, one parameter a line where it is long."""
    parts = list(parameters_of(function))
    start = "async def " if "async" in function.labels else "def " if function.name != "__init__" else ""
    returns = f" -> {function.returns}" if function.returns is not None and function.name != "__init__" else ""
    line = f"{start}{name}({', '.join(parts)}){returns}"
    if len(line) <= 100:
        return line
    return f"{start}{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){returns}"


def doc(found: griffe.Object) -> str:
    """Return a docstring as Markdown."""
    text = found.docstring.value if found.docstring is not None else ""
    return _ROLE.sub(r"`\1`", text).replace("``", "`")


# The site.


def with_links_of_the_site(page: Path) -> str:
    """Return the text of a page, in which links lead to pages of the site."""
    below = page.relative_to(PAGES)
    up = "../" * (len(below.parts) - 1)

    def moved(match: re.Match[str]) -> str:
        target, anchor = match[1], match[2] or ""
        origin = "README.md" if below.name == "index.md" and len(below.parts) == 1 else f"docs/{below.as_posix()}"
        if below.name in ("changelog.md", "contributing.md") and len(below.parts) == 1:
            origin = f"{below.stem.upper()}.md"
        path = (ROOT / origin).parent.joinpath(target).resolve()
        if not path.exists() or ROOT not in path.parents:
            return match[0]
        name = path.relative_to(ROOT).as_posix()
        names = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
        name = names.get(name, name.removeprefix("docs/"))
        if name.startswith("examples/"):
            name = f"{name.removesuffix('.py')}.md"
        return f"]({up}{name}{anchor})"

    return _LINK.sub(moved, page.read_text())


def dead_links() -> Iterator[str]:
    """Find links that lead to no file of the site."""
    for page in sorted(PAGES.rglob("*.md")):
        for target, _ in _LINK.findall(_without_code(page.read_text())):
            if not (page.parent / target).exists():
                yield f"{page.relative_to(PAGES)}: {target} is not there"


def _without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$|`[^`\n]+`", "", text, flags=re.MULTILINE | re.DOTALL)


def strays() -> Iterator[str]:
    """Find pages that the navigation does not have, but for those of a folder whose index lists them."""
    listed = set(pages_of(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    for name in sorted(listed):
        if not (PAGES / name).exists():
            yield f"mkdocs.yml: {name} is not there"
    for page in sorted(PAGES.rglob("*.md")):
        name = page.relative_to(PAGES).as_posix()
        if name not in listed and f"{name.partition('/')[0]}/index.md" not in listed:
            yield f"{name}: is not in the navigation of mkdocs.yml"


def pages_of(nav: object) -> Iterator[str]:
    """List the pages of a navigation, or of a part of it."""
    match nav:
        case str():
            yield nav
        case list():
            for each in nav:
                yield from pages_of(each)
        case dict():
            for each in nav.values():
                yield from pages_of(each)


def write_markdown_and_llms() -> None:
    """Put the Markdown of each page beside its HTML, and write ``llms.txt``."""
    for page in PAGES.rglob("*.md"):
        target = SITE / page.relative_to(PAGES)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(page, target)
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    lines = [f"# {config['site_name']}", "", f"> {config['site_description']}", ""]
    for section in config["nav"]:
        for title, nav in section.items():
            lines += [f"## {title}", ""]
            for name in pages_of(nav):
                text = (PAGES / name).read_text()
                lines.append(f"- [{heading(PAGES / name)}]({name}): {first_sentence(text.partition(chr(10))[2])}")
            lines.append("")
    (SITE / "llms.txt").write_text("\n".join(lines))


def first_sentence(text: str) -> str:
    """Return the first sentence of a text in Markdown, on one line."""
    paragraphs = (each.strip() for each in _without_fences(text).split("\n\n"))
    first = next((each for each in paragraphs if each and each[0] not in "#|-"), "")
    return re.split(r"(?<=[.:])\s", " ".join(first.split()), maxsplit=1)[0].rstrip(":")


def _without_fences(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


if __name__ == "__main__":
    sys.exit(main())

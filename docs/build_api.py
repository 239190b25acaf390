"""Write the API reference, `docs/api/*.md`, from the docstrings of the public names.

    python docs/build_api.py

Sources are parsed, not imported, so that every Python writes the same.
"""

import ast
import re
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lora_jax"
Definition = ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign


def pages() -> dict[str, str]:
    """Every page of the reference by the name of its file."""
    packages = sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))
    packages.remove(PACKAGE / "commands")  # the command line is no API
    made = {f"{path.name}.md": page(path) for path in packages}
    return {"README.md": contents(packages), "lora_jax.md": page(PACKAGE), **made}


def contents(packages: list[Path]) -> str:
    rows = [
        f"| [`{name_of(path)}`]({path.name}.md) | {in_row(first_line(docstring(path)))} |"
        for path in [PACKAGE, *packages]
    ]
    return "\n".join(
        [
            "# API reference",
            "",
            "Every public name, one page for a package, from the docstrings"
            " (`python docs/build_api.py`). The examples run as tests.",
            "",
            "| package | what it has |",
            "|---|---|",
            *rows,
            "",
        ]
    )


def page(package: Path) -> str:
    """A package's docstring, its names in a table, and each of them in full."""
    rows, sections = [], []
    for module, name in exports(package):
        home = module if module.is_dir() else module.parent
        if module.is_dir() and name == "":  # a package that this one names
            name = module.name
            rows.append((f"[`{name}`]({name}.md)", first_line(docstring(module))))
        elif home != package and home != PACKAGE:
            _, _, text = definition(*resolved(home, name))
            rows.append((f"[`{name}`]({home.name}.md#{name.lower()})", first_line(text)))
        else:
            node, source, text = definition(module, name)
            rows.append((f"[`{name}`](#{name.lower()})", first_line(text)))
            sections.append("\n".join(entry(name, node, source, text)))
    table = [f"| {name} | {in_row(text)} |" for name, text in rows]
    head = [f"# `{name_of(package)}`", "", *prose(docstring(package)), "| name | what it is |"]
    return "\n".join([*head, "|---|---|", *table, "", *sections])


def name_of(package: Path) -> str:
    return ".".join(package.relative_to(ROOT).parts)


def exports(package: Path) -> Iterator[tuple[Path, str]]:
    """Where each public name is defined, and the name; a package's own is empty."""
    file = package / "__init__.pyi"
    file = file if file.exists() else package / "__init__.py"
    for node in parsed(file).body:
        if isinstance(node, ast.ImportFrom):
            start = [package, package.parent][node.level - 1]
            for alias in node.names:
                if node.module is None:
                    yield start / alias.name, ""
                else:
                    yield module_at(start / node.module.replace(".", "/")), alias.name


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text("utf-8"))


def module_at(path: Path) -> Path:
    return path if path.is_dir() else path.with_suffix(".py")


def resolved(package: Path, name: str) -> tuple[Path, str]:
    """The module that defines a name which a package re-exports."""
    return next(found for found in exports(package) if found[1] == name)


def definition(module: Path, name: str) -> tuple[Definition, str, str]:
    """The node of a name, its module's source, and its documentation."""
    source, body = module.read_text("utf-8"), parsed(module).body
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node, source, ast.get_docstring(node) or ""
        if isinstance(node, ast.ImportFrom) and name in (alias.name for alias in node.names):
            above = module.parents[node.level - 1]
            return definition(module_at(above / (node.module or "").replace(".", "/")), name)
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return node, source, string_of(after)  # type: ignore[return-value]
    raise LookupError(f"{module} defines no {name}")


def entry(name: str, node: Definition, source: str, text: str) -> list[str]:
    """A name's section: signature, documentation, and of a class its fields and methods."""
    lines = [f"## `{name}`", "", *code(signature(node, source)), *prose(text)]
    if not isinstance(node, ast.ClassDef):
        return lines
    fields = [
        f"- `{segment(source, one)}`{': ' if told else ''}{' '.join(told.split())}"
        for one, after in zip(node.body, [*node.body[1:], None], strict=True)
        if isinstance(one, ast.AnnAssign) and not segment(source, one).startswith("_")
        for told in [string_of(after)]
    ]
    lines += [*fields, ""] if fields else []
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
            told = ast.get_docstring(method) or ""
            lines += [f"### `{name}.{method.name}`", "", *code(signature(method, source))]
            lines += prose(told)
    return lines


def signature(node: Definition, source: str) -> str:
    """A definition as it stands in the source, up to its body."""
    if isinstance(node, ast.Assign | ast.AnnAssign):
        return segment(source, node)
    named = [segment(source, one) for one in node.decorator_list]
    decorators = [f"@{name}" for name in named if not name.startswith("_")]
    lines = source.splitlines()[node.lineno - 1 : node.body[0].lineno - 1]
    head = textwrap.dedent("\n".join(lines))
    return "\n".join([*decorators, head])


def segment(source: str, node: ast.AST) -> str:
    return ast.get_source_segment(source, node) or ""


def string_of(node: ast.AST | None) -> str:
    """The text of a string that stands by itself, as documentation of what precedes it."""
    value = node.value if isinstance(node, ast.Expr) else None
    is_text = isinstance(value, ast.Constant) and isinstance(value.value, str)
    return str(value.value) if is_text else ""


def docstring(package: Path) -> str:
    file = package / "__init__.py"
    return ast.get_docstring(parsed(file)) or ""


def first_line(text: str) -> str:
    return text.partition("\n")[0]


def in_row(text: str) -> str:
    return text.replace("|", "\\|")


def code(text: str) -> list[str]:
    return ["```python", text, "```", ""]


def prose(text: str) -> list[str]:
    """A docstring in Markdown: its sections in bold, arguments as a list, examples as code."""
    lines = []
    for title, body in sections_of(text):
        if not title:
            lines += [body, ""]
        elif title == "Example":
            lines += ["**Example**", "", *code(body)]
        elif title in ("Args", "Raises"):
            lines += [f"**{title}**", "", *entries(body), ""]
        else:
            lines += [f"**{title}**: {body if title == 'Returns' else ' '.join(body.split())}", ""]
    return lines


def sections_of(text: str) -> Iterator[tuple[str, str]]:
    """(title, body) of a Google-style docstring; what stands before the first has no title."""
    # What belongs to a title is indented; the source of an idea is a paragraph.
    pattern = (
        r"^(Args|Returns|Yields|Raises|Example):(.*(?:\n(?:[ ]+.*)?)*)|^(Source):\n?((?:.+\n?)*)"
    )
    at = 0
    for match in re.finditer(pattern, text, re.MULTILINE):
        if before := text[at : match.start()].strip("\n"):
            yield "", before
        first, _, rest = (match[2] or match[4]).partition("\n")
        yield match[1] or match[3], f"{first.strip()}\n{textwrap.dedent(rest)}".strip()
        at = match.end()
    if after := text[at:].strip("\n"):
        yield "", after


def entries(body: str) -> Iterator[str]:
    """`name: what it is`, each with its further lines, as a list."""
    for match in re.finditer(r"^(\S[^:\n]*):(.*(?:\n[ ]+.*)*)", body, re.MULTILINE):
        names = ", ".join(f"`{name.strip()}`" for name in match[1].split(","))
        yield f"- {names}: {' '.join(match[2].split())}"


if __name__ == "__main__":
    folder = ROOT / "docs" / "api"
    folder.mkdir(parents=True, exist_ok=True)
    written = pages()
    for old in folder.glob("*.md"):
        if old.name not in written:
            old.unlink()
    for name, text in written.items():
        (folder / name).write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    print(f"{folder}: {len(written)} pages")

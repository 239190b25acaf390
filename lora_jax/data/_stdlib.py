"""Real instruction rows from the running Python's own standard library.

Every function with a docstring gives one row: its source without the docstring in, the
docstring's first sentence out.  Nothing is imported or run: the files are parsed.
"""

import ast
import functools
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

INSTRUCTION = "Say in one sentence what this Python function does."
HELD_OUT_SHARE = 10
"""One module in this many is held out, chosen by a hash of its name."""
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings",
            "__pycache__", "lib2to3"}  # fmt: skip


def is_held_out(module: str) -> bool:
    """Whether a module (by its top-level name) is kept for evaluation, in every Python alike.

    Example:
        >>> is_held_out("json.decoder") == is_held_out("json.encoder")
        True
    """
    top = module.partition(".")[0]
    return hashlib.sha256(top.encode()).digest()[0] % HELD_OUT_SHARE == 0


def stdlib_modules() -> Iterator[tuple[str, str]]:
    """Yield (dotted name, source) of the standard library's modules, sorted by name.

    Left out: tests, character tables, and whatever is not valid UTF-8.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED.intersection(parts) or "config-" in parts[0]:
            continue
        try:
            yield ".".join(p for p in parts if p != "__init__") or parts[0], path.read_text("utf-8")
        except (UnicodeDecodeError, OSError):
            continue


def docstring_rows(
    held_out: bool, *, max_source: int = 700, max_summary: int = 160
) -> list[dict[str, str]]:
    """Rows of `instruction`, `input`, `output` (and `module`), without repeats.

    Their order is drawn by a hash, so that the first few are a fair sample.  Modules copy from
    each other: a held-out row whose function or sentence stands in any other module is left out.

    Args:
        held_out: Rows of the held-out modules, or of all the others.
        max_source: Longest function source kept, in characters.
        max_summary: Longest first sentence kept, in characters.

    Example:
        >>> row = docstring_rows(held_out=False)[0]
        >>> sorted(row), row["instruction"] == INSTRUCTION
        (['input', 'instruction', 'module', 'output'], True)
    """
    seen, rows = set(), []
    if held_out:
        seen = {text for name, *texts in _documented() if not is_held_out(name) for text in texts}
    for module, code, summary in _documented():
        if is_held_out(module) != held_out:
            continue
        repeated = code in seen or summary in seen
        seen |= {code, summary}
        if not repeated and len(code) <= max_source and len(summary) <= max_summary:
            rows.append(
                {"instruction": INSTRUCTION, "input": code, "output": summary, "module": module}
            )
    return sorted(rows, key=lambda row: hashlib.sha256(row["input"].encode()).digest())


def natural_prompt(source: str) -> str:
    """A function's source up to where its docstring stands: the summary's natural place.

    Example:
        >>> natural_prompt("def f(x):\\n    return x")
        'def f(x):\\n    \"\"\"'
    """
    function = ast.parse(source).body[0]
    body = function.body[0]  # type: ignore[attr-defined]
    header = "\n".join(source.split("\n")[: body.lineno - 1])
    header = header or source[: body.col_offset].rstrip()
    return f'{header}\n    """'


@functools.cache
def _documented() -> tuple[tuple[str, str, str], ...]:
    """(module, source without docstring, first sentence) of every documented function."""
    return tuple(
        (module, *found)
        for module, source in stdlib_modules()
        for found in _documented_functions(source)
    )


def _documented_functions(source: str) -> Iterator[tuple[str, str]]:
    """Yield (source without docstring, first sentence) of each documented function."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    lines = source.split("\n")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and len(node.body) > 1:
            summary = _first_sentence(ast.get_docstring(node) or "")
            if summary:
                yield _without_docstring(lines, node), summary


def _without_docstring(lines: list[str], node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    docstring, indent = node.body[0], node.col_offset
    before = lines[node.lineno - 1 : docstring.lineno - 1]
    kept = before + lines[docstring.end_lineno : node.end_lineno]
    return "\n".join(line[indent:] if not line[:indent].strip() else line for line in kept).strip()


def _first_sentence(docstring: str) -> str:
    """The first sentence of at least three words, or nothing."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    match = re.match(r"(.+?[.!?])(\s|$)", paragraph)
    sentence = match[1] if match else paragraph
    plain = sentence and not re.search(r">>>|->|[{}|<]|:param|\w\(.*\) -", sentence)
    return sentence if plain and len(sentence.split()) >= 3 else ""

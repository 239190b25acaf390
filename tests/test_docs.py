"""What the pages say holds: blocks run, commands, links, anchors and names are there."""

import importlib.util
import re
import shlex
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from lora_jax.cli import main
from tests.pages import PAGES, ROOT, Reader, blocks, check_data

LANGUAGES = {"python", "sh", "console", "json", "jsonl", "yaml", "text"}
"""`console` is what needs hardware or a network, `text` what a program shows."""
CHEAP = {"README.md", "CONTRIBUTING.md", "SECURITY.md", "your_own_module.md"}
"""Pages that take a few seconds; the others are read by `./lora test --all`."""
WITH_TORCH = ("torch", "peft", "transformers", "bitsandbytes")


def slow_unless_cheap(page: Path):
    marks = [] if page.name in CHEAP else [pytest.mark.slow]
    marks += [pytest.mark.oracle] if page.name == "coming_from_peft.md" else []
    return pytest.param(page, id=page.name, marks=marks)


@pytest.mark.parametrize("page", [slow_unless_cheap(page) for page in PAGES])
def test_page_runs(page: Path, tmp_path, monkeypatch, request):
    for name in WITH_TORCH if page.name == "coming_from_peft.md" else ():
        pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    reader = Reader(tmp_path, lambda: request.getfixturevalue("quickstart_run"))
    try:
        reader.read(page)
    finally:
        reader.close()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_say_what_they_are(page: Path):
    if page.parent.name == "docs":
        assert page.read_text("utf-8").count("\n") <= 150
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{page.name}:{block.line}"
        check_data(block)


def lora_commands():
    """The words of each command, shown on a line of its own or between backticks."""
    for page in PAGES:
        for number, line in enumerate(page.read_text("utf-8").splitlines(), 1):
            shown = re.findall(r"`(\./lora [^`]+)`", line)
            if match := re.match(r"\s*(?:\$ )?(?:[A-Z_]+=\S+ )*(\./lora .*)", line):
                shown.append(match[1].rstrip("\\ "))
            for command in shown:
                words = tuple(shlex.split(command + "'" * (command.count("'") % 2), comments=True))
                if words[1] not in ("test", "install") and not words[1].isupper():
                    yield pytest.param(words[1:], id=f"{page.name}:{number}")


@pytest.mark.parametrize("words", list(lora_commands()))
def test_command_exists(words, capsys):
    name = []
    for word in words[:2]:
        if not re.fullmatch(r"[a-z]+", word):
            break
        name.append(word)
    with pytest.raises(SystemExit) as end:
        main([*name, "--help"])
    shown = capsys.readouterr()
    assert end.value.code in (0, None), shown.err
    flags = {word.partition("=")[0] for word in words if re.match(r"--[a-z-]+$", word)}
    assert all(flag in shown.out for flag in flags), shown.out


def markdown_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "-co", "--exclude-standard", "*.md"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [file for file in files or PAGES if file.is_file()]


def prose(page: Path) -> str:
    """A page without its blocks of code and what stands between backticks."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", re.sub(r"^    .*$", "", text, flags=re.M))


def anchors(page: Path) -> set[str]:
    """Of every heading, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    seen: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return found


@pytest.mark.parametrize("page", markdown_files(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    found = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"", prose(page))
    for link in (one or other for one, other in found):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="the pages are not part of this copy")
def test_the_api_reference_is_current():
    spec = importlib.util.spec_from_file_location("build_api", ROOT / "docs" / "build_api.py")
    build_api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build_api)
    folder = ROOT / "docs" / "api"
    kept = {path.name: path.read_text("utf-8") for path in folder.glob("*.md")}
    made = {name: text.rstrip("\n") + "\n" for name, text in build_api.pages().items()}
    assert kept == made, "python docs/build_api.py writes it anew"

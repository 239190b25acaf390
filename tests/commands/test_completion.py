"""The scripts of `./lora completion`, in the shells that they are for."""

import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest

from lora_jax.cli import main

pytest.importorskip("shtab")
# What is typed, and some of what is offered, the last word of each alone.
OFFERED = [
    ("./lora tr", {"train"}),
    ("lora data ", {"show", "make"}),
    ("lora train --lora.r", {"--lora.r", "--lora.rank_pattern"}),
    ("./lora train --quant.format ", {"nf4", "fp4", "int4", "int8"}),
    ("lora merge --dtype b", {"bfloat16"}),
    ("lora evaluate --train.", {"--train.loss_chunk"}),
    ("lora serve --adapter-", {"--adapter-root", "--adapter-slots"}),
    ("./lora train conf", {"config.yaml"}),
]
NOT_OFFERED = [("lora evaluate --train.", "--train.steps"), ("lora chat --", "--lora.r")]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory) -> Path:
    """The three scripts, beside a file and a folder to complete."""
    directory = tmp_path_factory.mktemp("completion")
    (directory / "config.yaml").touch()
    patch = pytest.MonkeyPatch()
    for shell in ("bash", "zsh", "fish"):
        with open(directory / f"lora.{shell}", "w") as file, patch.context() as context:
            context.setattr("sys.stdout", file)
            main(["completion", shell])
    return directory


def run(shell: str, *words: str, folder: Path) -> str:
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    made = subprocess.run(
        [shell, *words], cwd=folder, capture_output=True, text=True, check=True, timeout=60
    )
    return made.stdout


def bash(typed: str, scripts: Path) -> list[str]:
    """What bash offers, asked as its own completion is."""
    ask = textwrap.dedent("""\
        source lora.bash
        COMP_LINE=$1 COMP_POINT=${#1}
        read -ra COMP_WORDS <<<"$1"
        [[ $1 == *" " ]] && COMP_WORDS+=("")
        COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
        name=$(complete -p lora | sed 's/.*-F \\([^ ]*\\).*/\\1/')
        "$name" lora "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
        printf '%s\\n' "${COMPREPLY[@]}"
        """)
    return run("bash", "--norc", "-c", ask, "bash", typed, folder=scripts).split()


def fish(typed: str, scripts: Path) -> list[str]:
    out = run("fish", "-N", "-c", f"source lora.fish; complete -C '{typed}'", folder=scripts)
    return [line.split("\t")[0] for line in out.splitlines()]


@pytest.mark.parametrize("offers", [bash, fish])
def test_what_is_offered(offers, scripts):
    for typed, wanted in OFFERED:
        assert wanted <= set(offers(typed, scripts)), typed
    for typed, unwanted in NOT_OFFERED:
        assert unwanted not in offers(typed, scripts), typed


def test_zsh_completes_what_is_typed(scripts):
    """Typed into a zsh of its own, which writes down the line after Tab."""
    ask = textwrap.dedent("""\
        zmodload zsh/zpty
        zpty typed zsh -f -i
        zpty -w typed 'cp lora.zsh _lora; fpath+=$PWD; autoload -U compinit && compinit -u -D'
        zpty -w typed 'tell() { print -r -- "$BUFFER" >>told; BUFFER= }'
        zpty -w typed 'zle -N tell && bindkey "^X" tell && : >told'
        repeat 600; do [[ -e told ]] && break; sleep 0.05; done
        for line in "$@"; do zpty -n -w typed "$line"$'\\t'$'\\x18'; done
        repeat 600; do [[ $(wc -l <told) -ge $# ]] && break; sleep 0.05; done
        zpty -d typed
        cat told
        """)
    typed = ["./lora quickst", "lora train --lora.lora_dr", "lora merge --dtype bf", "lora data sh"]
    out = run("zsh", "-f", "-c", ask, "zsh", *typed, folder=scripts)
    assert [line.split()[-1] for line in out.splitlines()] == [
        "quickstart", "--lora.lora_dropout", "bfloat16", "show",
    ]  # fmt: skip

"""Every command's help: complete, narrow, with examples that are taken as they stand."""

import re
import shlex

import pytest

from lora_jax.cli import _config_keys, _overrides, main
from lora_jax.commands import COMMANDS, SECTIONS, parsers
from lora_jax.commands._completion import config_keys


@pytest.mark.parametrize("name", ["", "data", *COMMANDS])
def test_help_fits_a_terminal(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        main([*name.split(), "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert not [line for line in out.splitlines() if len(line) > 80]
    assert "examples:\n  ./lora " in out or not name


def test_the_list_of_commands_is_whole(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = re.findall(r"^  (\w+(?: \w+)?)  ", capsys.readouterr().out, re.M)
    assert listed == list(COMMANDS)


def test_every_argument_has_a_help():
    parser, made = parsers()
    for name, own in made.items():
        assert not [action.dest for action in own._actions if not action.help], name
    assert [action.help for action in parser._actions if action.dest == "version"]


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_are_taken(name):
    parser, made = parsers()
    known = {f"--{key}" for key, _ in config_keys(SECTIONS)}
    for example in COMMANDS[name].examples:
        words = shlex.split(example, comments=True)
        if words[0] != "./lora" or name == "test":  # whose words are for pytest
            continue
        words = words[1 : next((i for i, w in enumerate(words) if w in "<>|"), None)]
        keys, others = _config_keys(words)
        options, rest = parser.parse_known_args(others)
        assert options.name == name
        set_keys = _overrides(made[name], [*rest, *keys], COMMANDS[name].sections)
        assert {word for word in set_keys if word.startswith("--")} <= known


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert re.fullmatch(r"lora_jax \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_a_command_that_the_script_does_itself(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["install", "eval"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: install: is done by the script ./lora")

"""Talking to a model: what is printed, remembered and forgotten, on a terminal and from a file."""

import io
import re
import sys

import jax
import pytest

from lora_jax import LoraConfig, init_adapter
from lora_jax._chat import Chat, named_adapters
from lora_jax._errors import InputError
from lora_jax._speaker import Speaker
from lora_jax.adapters import save_adapter
from lora_jax.cli import main
from lora_jax.data import Message
from lora_jax.models import SamplingParams, StreamedText, load_pretrained

INTERRUPT = "<Ctrl-C>"


class Keyboard(io.StringIO):
    """Lines that somebody types, one of which may be Ctrl-C."""

    terminal = True

    def isatty(self) -> bool:
        return self.terminal

    def readline(self, *args) -> str:
        line = super().readline(*args)
        if line.rstrip() == INTERRUPT:
            raise KeyboardInterrupt
        return line


@pytest.fixture(scope="module")
def adapters(base_dir, tmp_path_factory):
    """Two adapters, as files of PEFT."""
    base = load_pretrained(base_dir)
    config = LoraConfig(r=2, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)
    make = jax.jit(lambda key, params: init_adapter(key, params, config, layouts=base.layouts))
    folders = {}
    for number, name in enumerate(("red", "blue")):
        folder = tmp_path_factory.mktemp(name) / "adapter"
        adapter = make(jax.random.key(number), base.params)
        save_adapter(folder, adapter, config, layouts=base.layouts)
        folders[name] = str(folder)
    return folders


@pytest.fixture
def chat(base_dir, monkeypatch, capsys):
    """Run `./lora chat` on lines; gives its output, and what it said on stderr."""

    def run(*lines, terminal=False, words=(), new="8"):
        keyboard = Keyboard("".join(f"{line}\n" for line in lines))
        keyboard.terminal = terminal
        monkeypatch.setattr(sys, "stdin", keyboard)
        monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
        main(["chat", str(base_dir), "--max-new-tokens", new, *words])
        return capsys.readouterr()

    return run


def said(out: str) -> str:
    """What a terminal shows, without colors."""
    return re.sub(r"\x1b\[\d*m", "", out)


def generated(capsys, base_dir, prompt, *words):
    main(
        ["generate", "--model", str(base_dir), "--prompt", prompt, "--max-new-tokens", "8", *words]
    )
    return capsys.readouterr().out


def test_lines_of_a_file_get_answers_and_nothing_else(chat, base_dir, capsys):
    out, err = chat("one two", "", "/reset", "one two", "/exit", "never read")
    alone = generated(capsys, base_dir, "one two")
    assert out == alone * 2 and "forgotten" in err


def test_a_conversation_goes_on_from_what_was_said(chat, base_dir, capsys):
    out, _ = chat("one two", "seven")
    first = generated(capsys, base_dir, "one two").removesuffix("\n")
    both = generated(capsys, base_dir, f"one two{first}</s>\nseven")
    assert out == f"{first}\n{both}"


def test_a_terminal_is_told_more(chat):
    out, err = chat("one two", "/adapter", "/nonsense", "/syst", "/help", "//x", terminal=True)
    shown = said(out)
    assert shown.startswith("/help shows what else there is\n> ")
    assert re.search(r"8 tokens, [\d.]+ tokens/s, cut off by --max-new-tokens\n> ", shown)
    assert "* none\n> " in shown and "/reset            forget what was said" in shown
    assert "\x1b[2m8 tokens" in out
    assert "error: /nonsense: unknown; /help lists what there is" in err
    assert "(did you mean '/system'?)" in err
    assert shown.count("cut off by --max-new-tokens") == 2  # `//x` was said, not done


def test_adapters_are_changed_by_name(chat, adapters, base_dir, capsys):
    words = [
        word for name, folder in adapters.items() for word in ("--adapter", f"{name}={folder}")
    ]
    lines = ["one two", "/adapter blue", "/reset", "one two", "/adapter none", "/reset", "one two"]
    out, err = chat(*lines, "/adapter blu", words=words)
    expected = [
        generated(capsys, base_dir, "one two", "--adapter", folder) for folder in adapters.values()
    ]
    expected.append(generated(capsys, base_dir, "one two"))
    assert out == "".join(expected) and len(set(expected)) == 3
    assert "talking through blue" in err
    assert "error: /adapter: no 'blu' (did you mean 'blue'?); there are none, red, blue" in err


def test_adapters_are_named_by_their_folder(adapters):
    assert named_adapters(["runs/mine/adapter", "x=runs/b", "runs/c=d"]) == {
        "mine": "runs/mine/adapter", "x": "runs/b", "c=d": "runs/c=d",
    }  # fmt: skip
    with pytest.raises(InputError, match="the name 'a' is taken; give another by NAME=DIR"):
        named_adapters(["a=x", "a=y"])


def test_an_adapter_that_is_not_there_is_told_of_at_once(chat, capsys):
    with pytest.raises(SystemExit):
        chat("one", words=["--adapter", "nowhere"])
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: nowhere") and err.count("\n") == 1


def test_ctrl_c_stops_the_answer_alone(chat, monkeypatch):
    def tired(self):
        yield next(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(StreamedText, "__iter__", tired)
    out, err = chat("one", INTERRUPT, "two", terminal=True)
    assert len(re.findall(r"> .*\n\d tokens?, stopped\n", said(out))) == 2
    assert "/exit or Ctrl-D leaves" in out and err == ""


def test_ctrl_c_ends_a_chat_that_reads_a_file(chat, capsys):
    with pytest.raises(SystemExit) as stop:
        chat("one", INTERRUPT)
    assert stop.value.code == 130


@pytest.fixture(scope="module")
def speaker(base_dir):
    return Speaker.load(str(base_dir), None, None)


def test_the_oldest_messages_are_forgotten_when_the_context_is_full(speaker):
    chat = Chat(speaker, {}, system="one", sampling=SamplingParams(seed=0), max_new_tokens=8)
    dropped, answers = [], []
    for number in range(12):
        answer, count = chat.say(f"{number} two three four five")
        dropped.append(count)
        answers.append("".join(answer))
        chat.heard(answer)
        assert len(answer.completion.tokens) <= 8
    assert dropped[:2] == [0, 0] and sum(dropped) % 2 == 0 and sum(dropped) > 4
    assert [turn.role for turn in chat.turns] == ["user", "assistant"] * (len(chat.turns) // 2)
    assert [t.content for t in chat.turns[1::2]] == answers[-len(chat.turns) // 2 :]
    turns = list(chat.turns)
    with pytest.raises(InputError, match="exceeds the model's 128 positions"):
        chat.say("one " * 500)
    assert chat.turns == turns


def test_flags_reach_the_draw(chat):
    warm = ["--temperature", "1.5", "--seed", "4"]
    first, again, other = (
        chat("one two", words=words).out for words in (warm, warm, [*warm[:2], "--seed", "5"])
    )
    assert first == again != other
    greedy = chat("one two").out
    assert chat("one two", words=[*warm, "--top-k", "1"]).out == greedy
    stop = greedy[1:3]
    assert chat("one two", words=["--stop", stop]).out == greedy[: greedy.find(stop)] + "\n"


def test_the_system_message_comes_first(speaker):
    chat = Chat(speaker, {}, sampling=SamplingParams(seed=0), max_new_tokens=4)
    assert chat.command("/system You are two.") == "the system message is set"
    answer, _ = chat.say("one")
    expected = speaker.prompt([Message("system", "You are two."), Message("user", "one")])
    plain = speaker.answer(expected, max_new_tokens=4, sampling=SamplingParams())
    assert "".join(answer) == "".join(plain)
    assert chat.command("/system") == "there is no system message" and chat.system == ""
    with pytest.raises(EOFError):
        chat.command("/exit")

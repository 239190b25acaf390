"""A conversation with a model, in a terminal or line by line from a file."""

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ._errors import InputError, nearest
from ._speaker import Speaker
from .data import Message
from .models import SamplingParams, StreamedText

HELP = """\
/adapter          show the adapters; /adapter NAME talks through one of them, none is the base
/system TEXT      say first who the model is to be; without a text, take that back
/reset            forget what was said
/exit             leave, as Ctrl-D does; Ctrl-C stops an answer
//TEXT            say /TEXT"""


class Chat:
    """What has been said, through which adapter, and how answers are drawn.

    Args:
        base: The model without an adapter.
        adapters: Directories of adapters by name; the first is talked through.
        template: How conversations are laid out, whatever the adapter says.
        system: A message of the system that comes first.
        sampling: How tokens are chosen; each answer takes the next seed.
        max_new_tokens: Tokens of an answer at most.
        stop: Texts that end an answer.
        cache_dtype: As in `models.generate`.
    """

    def __init__(
        self,
        base: Speaker,
        adapters: Mapping[str, str],
        *,
        template: str | None = None,
        system: str = "",
        sampling: SamplingParams,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        cache_dtype: str | None = None,
    ) -> None:
        self.adapters = dict(adapters)
        self.name = next(iter(adapters), "none")
        self.template, self.system = template, system
        self.turns: list[Message] = []
        self._stop, self._most, self._cache_dtype = stop, max_new_tokens, cache_dtype
        self._sampling = sampling
        self._speakers = {"none": base}
        self.speaker()  # A directory that is wrong is told of before anything is said.

    def speaker(self) -> Speaker:
        """The model through the adapter of the moment, read when it is first needed."""
        if self.name not in self._speakers:
            made = self._speakers["none"].adapted(self.adapters[self.name], self.template)
            self._speakers[self.name] = made
        return self._speakers[self.name]

    def say(self, text: str) -> tuple[StreamedText, int]:
        """Say something; gives the answer, and how many of the oldest messages were dropped.

        Raises:
            InputError: if what was said is too long by itself; then it was not said.
        """
        speaker = self.speaker()
        kept = [*self.turns, Message("user", text)]
        room = min(self._most, speaker.positions // 2)
        prompt = self._prompt(kept)
        while len(prompt) + room > speaker.positions and len(kept) > 1:
            answered = next((n for n, turn in enumerate(kept) if turn.role == "assistant"), 0)
            kept = kept[answered + 1 :]
            prompt = self._prompt(kept)
        dropped = len(self.turns) + 1 - len(kept)
        answer = speaker.answer(
            prompt,
            max_new_tokens=max(min(self._most, speaker.positions - len(prompt)), 1),
            sampling=self._sampling,
            stop=self._stop,
            cache_dtype=self._cache_dtype,
        )
        self.turns = kept
        seed = self._sampling.seed
        assert isinstance(seed, int)
        self._sampling = dataclasses.replace(self._sampling, seed=(seed + 1) % 2**63)
        return answer, dropped

    def heard(self, answer: StreamedText) -> None:
        """Remember an answer, as far as it came."""
        self.turns.append(Message("assistant", answer.completion.text))

    def command(self, line: str) -> str:
        """Do what a line that begins with a slash says; gives what to show.

        Raises:
            InputError: if there is no such command or adapter.
            EOFError: to leave.
        """
        name, _, rest = line.partition(" ")
        if name not in COMMANDS:
            raise InputError(f"{name}: unknown{nearest(name, COMMANDS)}; /help lists what there is")
        return COMMANDS[name](self, rest.strip())

    def _prompt(self, turns: Sequence[Message]) -> list[int]:
        first = [Message("system", self.system)] if self.system else []
        return self.speaker().prompt([*first, *turns])


def _adapter(chat: Chat, name: str) -> str:
    names = ["none", *chat.adapters]
    if not name:
        return "\n".join(f"{'*' if own == chat.name else ' '} {own}" for own in names)
    if name not in names:
        raise InputError(
            f"/adapter: no {name!r}{nearest(name, names)}; there are {', '.join(names)}"
        )
    before, chat.name = chat.name, name
    try:
        chat.speaker()
    except InputError:
        chat.name = before
        raise
    return f"talking {'without an adapter' if name == 'none' else f'through {name}'}"


def _system(chat: Chat, text: str) -> str:
    chat.system = text
    return "the system message is set" if text else "there is no system message"


def _reset(chat: Chat, rest: str) -> str:
    chat.turns = []
    return "what was said is forgotten"


def _leave(chat: Chat, rest: str) -> str:
    raise EOFError


COMMANDS: Mapping[str, Callable[[Chat, str], str]] = {
    "/adapter": _adapter,
    "/system": _system,
    "/reset": _reset,
    "/help": lambda chat, rest: HELP,
    "/exit": _leave,
}


def converse(chat: Chat) -> None:
    """Read lines until their end, and print the answers.

    On a terminal answers come as they are made, Ctrl-C stops one, and notes are dim; elsewhere
    nothing but answers is printed, and notes go to stderr.
    """
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    note = _dim if terminal else lambda text: print(text, file=sys.stderr, flush=True)
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (lines can be edited, and earlier ones called back)
        note("/help shows what else there is")
    while True:
        try:
            line = input("> " if terminal else "").strip()
            if line.startswith("/") and not line.startswith("//"):
                note(chat.command(line))
            elif line:
                _answer(chat, line.removeprefix("/") if line[0] == "/" else line, note, terminal)
        except InputError as error:  # The next line may be better.
            print(f"error: {error}", file=sys.stderr, flush=True)
        except EOFError:
            break
        except KeyboardInterrupt:
            if not terminal:
                raise
            note("\n/exit or Ctrl-D leaves")


def _answer(chat: Chat, line: str, note: Callable[[str], None], terminal: bool) -> None:
    answer, dropped = chat.say(line)
    if dropped:
        note(f"the context is full: the oldest {dropped} messages are forgotten")
    begun, first = time.perf_counter(), 0
    try:
        for piece in answer:
            print(piece, end="", flush=True)
            if not first:
                begun, first = time.perf_counter(), len(answer.completion.tokens)
    except KeyboardInterrupt:
        if not terminal:
            raise
    seconds = time.perf_counter() - begun
    print(flush=True)
    chat.heard(answer)
    if terminal:
        done = answer.completion
        count = len(done.tokens)
        speed = f", {(count - first) / seconds:.1f} tokens/s" if count > first else ""
        ends = {"stop": "", "length": ", cut off by --max-new-tokens", None: ", stopped"}
        note(f"{count} tokens{speed}{ends[done.finish_reason]}")


def _dim(text: str) -> None:
    plain = "NO_COLOR" in os.environ
    print(text if plain else f"\x1b[2m{text}\x1b[0m", flush=True)


def named_adapters(words: Sequence[str]) -> dict[str, str]:
    """Directories by name, from words such as `legal=DIR` or `DIR` alone.

    Raises:
        InputError: if two have one name.

    Example:
        >>> named_adapters(["legal=runs/a/adapter", "runs/poems/adapter"])
        {'legal': 'runs/a/adapter', 'poems': 'runs/poems/adapter'}
    """
    named: dict[str, str] = {}
    for word in words:
        name, equals, directory = word.partition("=")
        if not equals or os.sep in name:
            path = Path(word)
            directory = word
            name = path.name if path.name != "adapter" else path.absolute().parent.name
        if name in named or name == "none":
            raise InputError(
                f"--adapter {word}: the name {name!r} is taken; give another by NAME=DIR"
            )
        named[name] = directory
    return named

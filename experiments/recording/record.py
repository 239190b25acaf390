"""Run a command in a terminal of its own and draw what it showed as an animated SVG.

    python experiments/recording/record.py docs/pictures/quickstart.svg ./lora quickstart

Needs `pyte`, which keeps the screen. Waiting is cut to 0.6 seconds at a time; the caption
says how long the command took. Without animation, or where it is not wanted, the end is shown.
"""

import argparse
import dataclasses
import fcntl
import html
import os
import pty
import select
import shlex
import struct
import termios
import time
from itertools import groupby
from pathlib import Path

import pyte

COLUMNS, ROWS = 100, 36
CHARACTER, LINE, MARGIN = 8.4, 18, 14
LONGEST, SHORTEST, LAST = 0.6, 0.25, 8.0
"""Seconds that a screen stays at most, at least, and at the end."""
FRAMES = 60
COLORS = {
    "red": "#ff7b72", "green": "#7ee787", "brown": "#e3b341", "blue": "#79c0ff",
    "magenta": "#d2a8ff", "cyan": "#56d4dd", "black": "#8b949e", "brightblack": "#8b949e",
}  # fmt: skip
Line = tuple[tuple[str, str, bool], ...]
"""Runs of a line that look alike: text, colour, bold."""


@dataclasses.dataclass(frozen=True)
class Frame:
    """A screen, and the second at which it was seen."""

    second: float
    lines: tuple[Line, ...]


def record(command: list[str], every: float) -> list[Frame]:
    """What a command shows, looked at when it has written and some time has gone by."""
    screen = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.ByteStream(screen)
    stream.feed(f"\x1b[1m$ {shlex.join(command)}\x1b[0m\r\n".encode())
    child, terminal = pty.fork()
    if child == 0:
        os.environ |= {"TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": str(ROWS)}
        os.execvp(command[0], command)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    begin = time.monotonic()
    frames = [Frame(0.0, lines_of(screen))]
    while (written := read(terminal, every)) is not None:
        stream.feed(written)
        now = time.monotonic() - begin
        if lines_of(screen) != frames[-1].lines and now - frames[-1].second >= every:
            frames.append(Frame(now, lines_of(screen)))
    frames.append(Frame(time.monotonic() - begin, lines_of(screen)))
    _, status = os.waitpid(child, 0)
    if status:
        raise SystemExit(f"{shlex.join(command)}: ended with {os.waitstatus_to_exitcode(status)}")
    return frames


def read(terminal: int, patience: float) -> bytes | None:
    """What was written within that time; None at the end."""
    if not select.select([terminal], [], [], patience)[0]:
        return b""
    try:
        return os.read(terminal, 1 << 16) or None
    except OSError:  # Linux says so where a pty has ended
        return None


def lines_of(screen: pyte.Screen) -> tuple[Line, ...]:
    return tuple(
        runs([screen.buffer[row][column] for column in range(COLUMNS)]) for row in range(ROWS)
    )


def runs(characters: list[pyte.screens.Char]) -> Line:
    parts = groupby(characters, key=lambda c: (COLORS.get(c.fg, color_of(c.fg)), c.bold))
    found = [("".join(c.data for c in part), *looks) for looks, part in parts]
    while found and not found[-1][0].strip():
        found.pop()
    return tuple(found)


def color_of(name: str) -> str:
    """Of the 256 colours pyte tells the hexadecimal; others look like plain text."""
    return f"#{name}" if len(name) == 6 and not name.isalpha() else ""


def thinned(frames: list[Frame]) -> list[Frame]:
    """At most so many, the first and the last among them."""
    stride = -(-len(frames) // FRAMES)
    return [*frames[:-1:stride], frames[-1]]


def draw(frames: list[Frame], title: str) -> str:
    """The screens as a strip below one another, of which an animation shows one at a time."""
    used = max(row + 1 for frame in frames for row, line in enumerate(frame.lines) if line)
    width, height = COLUMNS * CHARACTER + 2 * MARGIN, used * LINE + 2 * MARGIN
    gone = [b.second - a.second for a, b in zip(frames, frames[1:], strict=False)]
    stays = [min(max(x, SHORTEST), LONGEST) for x in gone] + [LAST]
    total, at, keys = sum(stays), 0.0, []
    for number, stay in enumerate(stays):
        keys.append(f"{100 * at / total:.2f}%{{transform:translateY({-number * height:g}px)}}")
        at += stay
    last = f"translateY({-(len(frames) - 1) * height:g}px)"
    keys.append(f"100%{{transform:{last}}}")
    names: dict[Line, str] = {}
    strip = []
    for number, frame in enumerate(frames):
        for row, line in enumerate(frame.lines[:used]):
            if line:
                name = names.setdefault(line, f"l{len(names)}")
                y = number * height + MARGIN + (row + 0.75) * LINE
                strip.append(f'<use href="#{name}" y="{y:g}"/>')
    defined = "\n".join(f'<text id="{name}">{spans(line)}</text>' for line, name in names.items())
    caption = f"{title} ({frames[-1].second:.0f} s, waiting cut short)"
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height + 26:g}" \
role="img" aria-label="{html.escape(caption)}">
<style>
text {{font: 14px ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace; fill: #e6edf3;
white-space: pre}}
.b {{font-weight: bold}} .caption {{fill: #8b949e; font-size: 12px}}
.strip {{transform: {last}; animation: play {total:.1f}s step-end infinite}}
@media (prefers-reduced-motion: reduce) {{.strip {{animation: none}}}}
@keyframes play {{{"".join(keys)}}}
</style>
<defs>
<clipPath id="screen"><rect width="{width:g}" height="{height:g}"/></clipPath>
{defined}
</defs>
<rect width="{width:g}" height="{height + 26:g}" rx="8" fill="#0d1117"/>
<g clip-path="url(#screen)"><g class="strip">
{"".join(strip)}
</g></g>
<text class="caption" x="{MARGIN}" y="{height + 14:g}">{html.escape(caption)}</text>
</svg>
"""


def spans(line: Line) -> str:
    """Each run where its first character stands, so that a font's widths do not add up."""
    at, parts = 0, []
    for text, color, bold in line:
        looks = (f' fill="{color}"' if color else "") + (' class="b"' if bold else "")
        if text.strip():
            place = f'x="{MARGIN + at * CHARACTER:g}" textLength="{len(text) * CHARACTER:g}"'
            parts.append(f"<tspan {place}{looks}>{html.escape(text)}</tspan>")
        at += len(text)
    return "".join(parts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", type=Path)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    parser.add_argument("--every", type=float, default=0.5, help="seconds between two looks")
    options = parser.parse_args()
    shown = thinned(record(options.command, options.every))
    options.picture.write_text(draw(shown, shlex.join(options.command)), encoding="utf-8")
    size = options.picture.stat().st_size
    print(f"{options.picture}: {len(shown)} screens, {size / 1e3:.0f} kB")

"""Messages to lines of segments: Markdown that grows, coloured tokens, what people typed. rich, but no Textual.

An answer grows ten times a second and may be long: blocks that are complete are rendered once, only the last one again.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import ClassVar

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import CodeBlock, Heading, Markdown
from rich.segment import Segment
from rich.style import Style
from rich.syntax import Syntax
from rich.text import Text
from rich.theme import Theme

Line = list[Segment]
Runs = Sequence[tuple[str, str]]

#: C0 and DEL as the pictures Unicode has for them, C1 as "not a character"; direction marks and soft hyphens vanish:
#: they would move what stands after them, or take no cell where we counted one
_CLEAN = {
    **{code: 0x2400 + code for code in range(32) if code not in (9, 10)},
    0x7F: 0x2421,
    **dict.fromkeys(range(128, 160), 65533),
    **dict.fromkeys([0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xAD, 0xFEFF]),
    **dict.fromkeys(range(55296, 57344), 65533),
}
_THEME = Theme(
    {
        "markdown.code": "bold cyan",
        "markdown.h1": "bold underline",
        "markdown.h2": "bold underline",
        "markdown.h3": "bold",
        "markdown.item.bullet": "bold yellow",
        "markdown.item.number": "bold yellow",
        "markdown.link": "underline blue",
        "markdown.link_url": "blue",
        "markdown.block_quote": "italic",
    }
)
#: how the origin of a token is shown; the second style is for screens without colour
KIND_STYLES = {
    "accepted": ("green", "underline"),
    "corrected": ("bold yellow", "reverse"),
    "plain": ("", ""),
}
MOST_USER_LINES = 30


def clean(text: str) -> str:
    """`text` with nothing in it that a terminal would obey."""
    return text.replace("\r\n", "\n").translate(_CLEAN)


class _LeftHeading(Heading):
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.justify = "left"
        yield self.text


class _Code(CodeBlock):
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code = str(self.text).rstrip()
        yield Syntax(code, self.lexer_name, theme=self.theme, word_wrap=True, padding=(0, 1))


class _Markdown(Markdown):
    """rich's, with HTML shown as the text it is, and headings at the left."""

    elements: ClassVar = {
        **Markdown.elements,
        "heading_open": _LeftHeading,
        "fence": _Code,
        "code_block": _Code,
    }

    def __init__(self, text: str, code_theme: str) -> None:
        super().__init__(text, code_theme=code_theme, hyperlinks=False)
        self.parsed = PARSER.parse(text)


#: blocks that a blank line does not end
OPEN_ENDED = ("bullet_list_open", "ordered_list_open", "code_block")
PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])


@dataclass(frozen=True)
class Look:
    """How lines are made. width: cells; plain: there are no colours; tokens: colour by origin, without Markdown."""

    width: int
    code_theme: str = "monokai"
    plain: bool = False
    tokens: bool = False


class Renderer:
    """rich, rendering to lines of segments of one look."""

    def __init__(self, look: Look) -> None:
        self.look = look
        width = max(1, look.width)
        self._console = Console(
            file=io.StringIO(),
            width=width,
            force_terminal=True,
            color_system="truecolor",
            theme=_THEME,
            legacy_windows=False,
        )
        self._options = self._console.options.update(width=width, height=None)

    def markdown(self, text: str) -> list[Line]:
        """One block; lines without its blank edges."""
        lines = self._console.render_lines(_Markdown(text, self.look.code_theme), self._options, pad=False)
        return _without_blank_edges(lines)

    def text(self, text: Text) -> list[Line]:
        text.expand_tabs(4)
        return self._console.render_lines(text, self._options, pad=False)

    def runs(self, runs: Runs) -> list[Line]:
        """Text in pieces of one origin each."""
        text = Text()
        for kind, piece in runs:
            text.append(piece, KIND_STYLES[kind][self.look.plain])
        return self.text(text)


def _without_blank_edges(lines: list[Line]) -> list[Line]:
    def blank(line: Line) -> bool:
        return not any(segment.text.strip() or (segment.style and segment.style.bgcolor) for segment in line)

    first = next((i for i, line in enumerate(lines) if not blank(line)), len(lines))
    last = next((i for i in range(len(lines) - 1, -1, -1) if not blank(lines[i])), -1)
    return lines[first : last + 1]


class Growing:
    """Lines of a Markdown text that only ever gets longer."""

    def __init__(self, renderer: Renderer) -> None:
        self._render = renderer
        self._frozen = 0  # characters whose blocks are complete
        self._done: list[Line] = []
        self._tail: list[Line] = []

    @property
    def lines(self) -> list[Line]:
        return [*self._done, *self._tail]

    def update(self, text: str) -> None:
        """The text is now `text`, which begins with what it was."""
        tail = text[self._frozen :]
        starts = _block_starts(tail)
        for begin, end in pairwise(starts):
            self._done += [*self._render.markdown(tail[begin:end]), []]
        if len(starts) > 1:
            self._frozen += starts[-1]
            tail = tail[starts[-1] :]
        self._tail = self._render.markdown(tail) if tail.strip() else []


def _block_starts(text: str) -> list[int]:
    """Characters at which the top-level blocks of a Markdown text begin, 0 first.

    A block whose first line is not complete is left to the one before it: "#" begins a heading, "#x" goes on with a table.
    Not after a blank line, which ends everything but lists and indented code.
    """
    blocks = [t for t in PARSER.parse(text) if t.level == 0 and t.map and t.nesting >= 0]
    # by "\n" alone, as markdown-it counts: str.splitlines knows more line ends
    offsets = [0, *(at + 1 for at, character in enumerate(text) if character == "\n")]
    starts = [0]
    for before, block in pairwise(blocks):
        assert block.map is not None
        begin = offsets[block.map[0]]
        ended = text[:begin].endswith("\n\n") and before.type not in OPEN_ENDED
        if ended or block.map[0] + 1 < len(offsets):
            starts.append(begin)
    return starts


@dataclass
class Turn:
    """A message on the screen.

    role:  user, assistant or note (something the program says)
    runs:  an answer's text by origin, for coloured tokens; () where that is not known (a loaded conversation)
    ended: why an answer ended early, "" otherwise
    """

    role: str
    text: str = ""
    runs: Runs = ()
    ended: str = ""
    _look: Look | None = field(default=None, repr=False)
    _growing: Growing | None = field(default=None, repr=False)
    _seen: tuple[int, int, str] = field(default=(-1, -1, ""), repr=False)
    _lines: list[Line] = field(default_factory=list, repr=False)

    def lines(self, look: Look, renderer: Renderer) -> list[Line]:
        """Its lines in this look, rendered again only where something changed."""
        now = (len(self.text), len(self.runs), self.ended)
        if look != self._look:
            self._look, self._growing, self._seen = look, None, (-1, -1, "")
        if now != self._seen:
            self._seen = now
            self._lines = self._render(look, renderer)
        return self._lines

    def _render(self, look: Look, renderer: Renderer) -> list[Line]:
        if self.role == "assistant":
            lines = self._answer(look, renderer)
            return [*lines, *_dim(f"({self.ended})")] if self.ended else lines
        if self.role == "user":
            return _quoted(renderer.text(Text(_cut(clean(self.text)), "bold")))
        return renderer.text(Text(clean(self.text), "dim italic"))

    def _answer(self, look: Look, renderer: Renderer) -> list[Line]:
        if look.tokens and self.runs:
            return renderer.runs([(kind, clean(piece)) for kind, piece in self.runs])
        if self._growing is None:
            self._growing = Growing(renderer)
        self._growing.update(clean(self.text))
        return self._growing.lines


def _cut(text: str) -> str:
    lines = text.split("\n")
    if len(lines) <= MOST_USER_LINES and len(text) <= 80 * MOST_USER_LINES:
        return text
    shown = "\n".join(lines[:MOST_USER_LINES])[: 80 * MOST_USER_LINES]
    return f"{shown}\n… {len(text) - len(shown)} more characters"


def _dim(text: str) -> list[Line]:
    return [[Segment(text, Style(dim=True, italic=True))]]


def _quoted(lines: list[Line]) -> list[Line]:
    return [[Segment("▌ ", Style(color="cyan", bold=True)), *line] for line in lines]


class Transcript:
    """All turns as one column of lines."""

    def __init__(self) -> None:
        self.turns: list[Turn] = []
        self._renderer = Renderer(Look(80))
        self._offsets: list[int] = [0]
        self._parts: list[list[Line]] = []
        #: of the last turn, the first line that the last `layout` changed
        self.first_changed = 0

    def layout(self, look: Look) -> int:
        """Bring the lines up to date; returns how many there are."""
        if look != self._renderer.look:
            self._renderer = Renderer(look)
        before = self._parts[-1] if self._parts else []
        self._parts = [turn.lines(look, self._renderer) for turn in self.turns]
        self._offsets = list(accumulate((len(part) + 1 for part in self._parts), initial=0))
        last = self._parts[-1] if self._parts else []
        same = next(
            (i for i, (a, b) in enumerate(zip(before, last, strict=False)) if a is not b), min(len(before), len(last))
        )
        self.first_changed = (self._offsets[-2] if self._parts else 0) + same
        return max(0, self._offsets[-1] - 1)

    def line(self, y: int) -> Line:
        """Line `y`; [] between turns and outside."""
        index = bisect_right(self._offsets, y) - 1
        if not 0 <= index < len(self._parts):
            return []
        part, row = self._parts[index], y - self._offsets[index]
        return part[row] if row < len(part) else []

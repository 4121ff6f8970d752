"""The parts of the window that know no Textual, and the engine's readers that it shows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scripted import ByteTokenizer

from dspark_cli.backends.errors import BadInput, DsparkError
from dspark_cli.engine.conversation import Conversation
from dspark_cli.engine.live import BUCKET_MS, Block, Live, Race
from dspark_cli.engine.rounds import Round, Times
from dspark_cli.engine.spans import Spans
from dspark_cli.engine.stats import Stats
from dspark_cli.tui import draw, words
from dspark_cli.tui.budget import LONGEST_S, SHORTEST_S, Budget
from dspark_cli.tui.commands import COMMANDS, parse
from dspark_cli.tui.display import Growing, Look, Renderer, Transcript, Turn, clean
from dspark_cli.tui.history import History
from dspark_cli.tui.opening import Cancelled, Progress, Stage

SOURCES = (
    *(
        "# Head\n",
        "word ",
        "**bold** ",
        "\n\n",
        "\n",
        "- item\n",
        "1. one\n",
        "```python\n",
        "x = 1\n",
        "```\n",
        "> q\n",
    ),
    *(
        "| a | b |\n|---|---|\n| 1 | 2 |\n",
        "    indented\n",
        "<div>\n",
        "***\n",
        "`",
        "~~~\n",
        "日本 ",
        "\u2028",
        "[l](u) ",
    ),
)
PIECES = st.lists(st.sampled_from(SOURCES), max_size=30)
WORDS = st.characters(exclude_categories=["Cs"], exclude_characters="\r")


def plain(lines: list) -> list[str]:
    return ["".join(segment.text for segment in line).rstrip() for line in lines]


@settings(max_examples=40, deadline=None)
@given(PIECES)
@example(["| a | b |\n|---|---|\n| 1 | 2 |\n", "#", "x\n"])
@example(["| a | b |\n|---|---|\n| 1 | 2 |\n", "\u2028", "# Head\n"])
def test_markdown_that_grew_is_markdown_at_once(pieces: list[str]) -> None:
    growing, text = Growing(Renderer(Look(40))), ""
    for piece in pieces:
        text += piece
        growing.update(text)
    whole = Growing(Renderer(Look(40)))
    whole.update(text)
    assert plain(growing.lines) == plain(whole.lines)


@settings(max_examples=150, deadline=None)
@given(st.text())
def test_nothing_that_a_terminal_would_obey_is_left(text: str) -> None:
    cleaned = clean(text)
    assert not any(
        (ord(c) < 32 and c not in "\t\n") or 0x7F <= ord(c) < 0xA0 or 0xD800 <= ord(c) < 0xE000 for c in cleaned
    )
    cleaned.encode("utf-8")
    assert clean(cleaned) == cleaned


def test_html_and_markup_are_shown_as_text() -> None:
    growing = Growing(Renderer(Look(60)))
    growing.update("<b>hi</b> [red]x[/red]\n\n<script>alert(1)</script>")
    shown = "\n".join(plain(growing.lines))
    assert "<b>hi</b> [red]x[/red]" in shown
    assert "<script>alert(1)</script>" in shown


def test_a_transcript_finds_its_lines_and_renders_again_only_what_changed() -> None:
    transcript = Transcript()
    transcript.turns = [Turn("user", "one\ntwo"), Turn("assistant", "first\n\nsecond")]
    assert transcript.layout(Look(30)) == 6
    assert plain([transcript.line(y) for y in range(-1, 8)]) == [
        "",
        "▌ one",
        "▌ two",
        "",
        "first",
        "",
        "second",
        "",
        "",
    ]
    transcript.turns[1].text += " and third"
    transcript.layout(Look(30))
    assert transcript.first_changed == 5, "the first paragraph was complete"


def test_long_questions_are_cut_on_the_screen_only() -> None:
    turn = Turn("user", "line\n" * 5000)
    lines = plain(turn.lines(Look(40), Renderer(Look(40))))
    assert len(lines) < 40
    assert "more characters" in lines[-1]


# -- commands, keys, history -------------------------------------------------------------------------------------------


def test_commands_messages_and_typing_errors() -> None:
    command, argument = parse("/policy fixed:4") or (None, "")
    assert command is not None
    assert (command.name, argument) == ("policy", "fixed:4")
    assert parse("/TEMP 0.5")[0].name == "temperature"  # type: ignore[index]
    for message in ("/usr/bin/env is what?", "hello", "/ 2", "/2 + 2", "what is /help", "/new\nline"):
        assert parse(message) is None
    with pytest.raises(BadInput, match="unknown command /halp"):
        parse("/halp")


def test_every_command_is_implemented_and_no_key_is_taken_twice() -> None:
    from dspark_cli.tui.app import ChatApp

    keys = [key for command in COMMANDS for key in command.keys]
    assert len(keys) == len(set(keys))
    assert all(callable(getattr(ChatApp, f"do_{command.name}")) for command in COMMANDS)


def test_history_outlives_the_program_and_a_damaged_file(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "history.jsonl"
    first = History(file)
    first.add("one\nline two")
    first.add("two")
    first.add("two")
    first.add("x" * 100_000)
    file.write_text(file.read_text() + '{"no": "string"}\nbroken\n')
    again = History(file)
    assert again.entries == ["one\nline two", "two"]
    assert [again.older("draft"), again.older(""), again.older("")] == ["two", "one\nline two", None]
    assert [again.newer(), again.newer(), again.newer()] == ["two", "draft", None]
    file.write_bytes(b"\xff\xfe")
    assert History(file).entries == []


def test_the_budget_slows_drawing_down_to_its_share() -> None:
    cpu = iter([0.0, 0.004, 0.008, 0.108, 0.110, 0.112])
    budget = Budget(share=0.02, cpu=lambda: next(cpu))
    budget.spent()
    assert budget.interval == pytest.approx(0.01 / 0.02), "a guess, before anything was drawn"
    for _ in range(2):
        budget.spent()
    assert SHORTEST_S <= budget.interval < 0.5
    budget.spent()
    assert budget.interval == LONGEST_S, "0.1 s of drawing"
    budget.spent()
    assert budget.interval == LONGEST_S, "one cheap drawing does not undo it"


def test_loading_is_told_now_and_then_and_ends_when_cancelled() -> None:
    told: list[object] = []
    now, cancelled = [0.0], [False]
    progress = Progress(told.append, lambda: cancelled[0], clock=lambda: now[0])
    progress.expect(2, 100, 20)
    progress.begin("model.gguf", 80, 0)
    for _ in range(10):
        progress.advance("model.gguf", 1)
        now[0] += 0.03
    shares = [stage.share for stage in told if isinstance(stage, Stage)]
    assert shares[0] == 0.2
    assert 2 <= len(shares) <= 5
    cancelled[0] = True
    with pytest.raises(Cancelled):
        progress.advance("model.gguf", 1)


# -- figures -----------------------------------------------------------------------------------------------------------


def made(tokens: int, *, drafted: int = 0, verified: int = 0, ms: float = 10.0, parked: str | None = None) -> Round:
    times = Times(verify=ms)
    return Round(0, tuple(range(tokens)), "", drafted, verified, tokens - 1, times=times, parked=parked)


def test_now_is_the_last_second_and_the_answer_is_all_of_it() -> None:
    live = Live.of([made(1, ms=100.0)] * 20 + [made(5, drafted=4, verified=4, ms=50.0)] * 20)
    assert live.now.decode_tok_s == pytest.approx(100.0)
    assert live.stats.decode_tok_s == pytest.approx(120 / 3.0)
    assert live.now.rounds == 20
    assert live.doing == "speculating"


def test_the_course_has_a_point_per_bucket_and_gaps_where_nothing_was_checked() -> None:
    half = BUCKET_MS / 2
    live = Live.of([made(1, ms=half)] * 2 + [made(3, drafted=4, verified=4, ms=half)] * 2)
    assert list(live.points) == [None, 0.5]
    assert list(live.blocks) == [Block(4, 4, 2)] * 2


@pytest.mark.parametrize(
    ("rounds", "doing"),
    [
        ([], "plain"),
        ([made(1)], "silent"),
        ([made(1, drafted=3)], "unverified"),
        ([made(1, drafted=3, parked="0.8x expected")], "parked"),
        ([made(2, drafted=3, verified=2), made(1)], "speculating"),
    ],
)
def test_what_speculation_does_is_said_in_words(rounds: list[Round], doing: str) -> None:
    live = Live.of(rounds)
    assert live.doing == doing
    assert words.explain(live, "lookup", "auto")
    if doing == "parked":
        assert words.explain(live, "lookup", "auto").startswith("0.8x expected. Guessing did not pay")
    assert words.doing(live, None, "off") == "plain decoding"
    assert "No drafter" in words.explain(live, None, "off")


def test_plain_decoding_is_compared_over_the_same_time() -> None:
    """A machine that gets slower by half meanwhile: neither faster nor slower than plain."""
    live = Live()
    for ms in (10.0, 20.0):
        for _ in range(10):
            live.add(made(1, ms=ms), ms)
    assert live.plain_tok_s == pytest.approx(live.stats.decode_tok_s)
    assert Live.of([made(1)]).plain_tok_s is None


def test_where_tokens_came_from() -> None:
    spans = Spans(ByteTokenizer())
    spans.add(Round(0, tuple("Hé".encode()[:2]), prefill_tokens=3))
    rest = "é".encode()[1]
    spans.add(Round(0, (rest, ord("a"), ord("b")), drafted=4, verified=3, accepted=2))
    spans.add(Round(0, (ord("c"), ord("d")), drafted=1, verified=1, accepted=1, finish="stop"))
    assert spans.runs == [("plain", "H"), ("accepted", "éa"), ("corrected", "b"), ("accepted", "c"), ("plain", "d")]


def test_a_race_in_words() -> None:
    fast, slow = Stats.of([made(4, ms=20.0)]), Stats.of([made(1, ms=10.0)] * 4)
    same = Race(fast, slow, None)
    assert same.ratio == pytest.approx(2.0)
    assert words.race_result(same) == "2.00x plain, identical"
    assert "near-tie" in words.race_verdict(Race(fast, slow, 7, 0.01), 0.2, comparable=True)
    assert "part at token 7 (logits 3.000 apart)" in words.race_verdict(Race(fast, slow, 7, 3.0), 0.2, comparable=True)
    assert "only the speeds" in words.race_verdict(Race(fast, slow, 0, 3.0), 0.2, comparable=False)
    assert words.race_result(Race(Stats(), Stats(), None)) == "too short to compare"


def test_drawings() -> None:
    assert draw.bar(0.5, 4).plain == "██  "
    assert draw.bar(7.0, 4).plain == "████"
    assert draw.bar(0.03, 4).plain == "▏   "
    assert draw.sparkline([0.0, None, 1.0], 5).plain == "  ▁·█"
    assert draw.block_squares(Block(6, 3, 1), 8).plain == "■□□···  "
    assert [text.plain for text in draw.fold("one two three four", 8, 2)] == ["one two", "three…"]


# -- conversations -----------------------------------------------------------------------------------------------------

TEXTS = st.lists(
    st.one_of(
        st.text(WORDS),
        st.sampled_from(
            ["**user**", "\\**user**\n\n**assistant**\n", "\n\n", "a\n\n**system**\n\nb\n", "\\\\**user**"]
        ),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=100, deadline=None)
@given(
    texts=TEXTS,
    system=st.one_of(st.none(), st.text(WORDS, min_size=1)),
)
@pytest.mark.parametrize("suffix", [".json", ".md"])
def test_a_saved_conversation_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], system: str | None, suffix: str
) -> None:
    file = tmp_path_factory.getbasetemp() / f"talk{suffix}"
    roles = ["user", "assistant"] * 3
    talk = Conversation(system, [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)])
    talk.save(file)
    assert Conversation.load(file) == talk


def test_regenerating_and_editing_a_conversation() -> None:
    talk = Conversation("be kind")
    assert talk.take_back() is None
    talk.ask("one")
    talk.answered("1")
    talk.ask("two")
    talk.answered("2")
    assert talk.last_answer == "2"
    assert talk.drop_answer()
    assert talk.waiting
    assert talk.take_back() == "two"
    assert talk.messages[-1]["content"] == "1"
    talk.reset()
    assert talk.all_messages() == [{"role": "system", "content": "be kind"}]


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.json", b"{", "is not JSON"),
        ("a.json", b"[]", "holds no messages"),
        ("a.json", b"3", "no list of messages"),
        ("a.json", b'[{"role": "robot", "content": "x"}]', "message 1 has the role 'robot'"),
        ("a.json", b'[{"role": "user", "content": "x"}, {"role": "user"}]', "message 2 has no text"),
        ("a.json", b'[{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]', "only the first"),
        ("a.json", b"[" * 100_000, "nested too deeply"),
        ("a.md", b"just text", "holds no messages"),
        ("a.md", b"\xff\xfe", "not UTF-8: byte 0xff at 0"),
    ],
)
def test_files_that_are_no_conversations(tmp_path: Path, name: str, data: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DsparkError, match=says):
        Conversation.load(tmp_path / name)


def test_a_conversation_of_other_programs_and_windows(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('\ufeff{"messages": [{"role": "user", "content": "x", "name": "me"}]}')
    assert Conversation.load(tmp_path / "a.json").messages == [{"role": "user", "content": "x"}]
    (tmp_path / "a.md").write_bytes(b"**user**\r\n\r\nhello\r\nthere\r\n")
    assert Conversation.load(tmp_path / "a.md").messages == [{"role": "user", "content": "hello\nthere"}]
    talk = Conversation(None, [{"role": "user", "content": "half a pair \ud800"}])
    talk.save(tmp_path / "b.json")
    assert Conversation.load(tmp_path / "b.json").messages[0]["content"] == "half a pair ?"


def test_the_core_imports_no_textual() -> None:
    modules = "budget commands decoder display draw history opening watching words closing"
    code = f"import sys\nfor name in {modules.split()!r}: __import__('dspark_cli.tui.' + name)\n"
    code += "assert 'textual' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr.decode()

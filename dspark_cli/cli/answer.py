"""Printing an answer as it comes, and its statistics afterwards. Readers of rounds: nothing is computed here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer

from dspark_cli.engine.answer import Answer, as_json

if TYPE_CHECKING:
    from dspark_cli.engine.rounds import Round
    from dspark_cli.engine.session import Session
    from dspark_cli.engine.watch import Watch

__all__ = ["Answer", "as_json", "end_line", "print_stats", "stream"]


def stream(rounds: Iterator[Round], answer: Answer, *, echo: bool = True, watch: Watch | None = None) -> None:
    """Read `rounds` to their end into `answer`; with `echo` the text goes to stdout as it comes.

    watch: warns on stderr, after the answer, about a drafter that never helps.
    """
    warning: str | None = None
    try:
        for item in rounds:
            answer.add(item)
            warning = warning or (watch.add(item) if watch else None)
            if echo and item.text:
                sys.stdout.write(item.text)
                sys.stdout.flush()
    finally:
        rounds.close()  # type: ignore[attr-defined]
        if echo and answer.text and not answer.text.endswith("\n"):
            end_line()
        if warning:
            typer.secho(warning, fg="yellow", err=True)


def end_line() -> None:
    """A newline after the answer, unless nobody reads it any more."""
    try:
        sys.stdout.write("\n")
        sys.stdout.flush()
    except BrokenPipeError:
        pass


def print_stats(session: Session, answer: Answer) -> None:
    """A short block on stderr: speed, what drafting brought, where the time went."""
    stats, info = answer.stats, session.target.info
    lines = [
        f"{info.name} {info.format} on {info.device}, {stats.tokens} tokens"
        f" ({answer.finish or 'interrupted'}), prompt {stats.prompt_tokens}",
        f"speed     {stats.decode_tok_s:.1f} tok/s decoding, {stats.prefill_tok_s:.0f} tok/s prefill",
    ]
    if session.drafter is not None:
        lines += _drafting(session, answer)
    parts = {"draft": stats.draft_ms, "verify": stats.verify_ms, "inject": stats.inject_ms, "own": stats.own_ms}
    total = sum(parts.values()) or 1.0
    split = ", ".join(f"{name} {ms / total:.0%}" for name, ms in parts.items() if ms / total >= 0.005)
    lines.append(f"time      {stats.decode_s:.2f} s: {split}")
    for line in lines:
        typer.secho(line, dim=True, err=True)


def _drafting(session: Session, answer: Answer) -> list[str]:
    stats = answer.stats
    drafter = session.drafter
    assert drafter is not None
    lines = [
        f"drafter   {drafter.name}, policy {session.policy}: {stats.drafted} drafted, {stats.verified} verified, "
        f"{stats.accepted} accepted ({stats.acceptance_rate:.0%})",
        f"accepted  {stats.accepted_length:.2f} tokens per round over {stats.rounds} rounds",
    ]
    if stats.survival:
        shown = "  ".join(f"{i}: {rate:.0%}" for i, rate in enumerate(stats.survival[:8], start=1))
        lines.append(f"survival  {shown}")
    if answer.parked:
        lines.append(f"parked    {answer.parked} ({stats.parked_share:.0%} of rounds)")
    return lines

"""What the window says about speculation, in words for somebody who has never heard of it. No Textual."""

from __future__ import annotations

from dspark_cli.engine.live import Live, Race

TITLES = {
    "plain": "plain decoding",
    "silent": "nothing to propose",
    "unverified": "not worth checking",
    "speculating": "speculating",
    "parked": "parked",
}


def doing(live: Live | None, drafter: str | None, policy: str) -> str:
    """What speculation does now, in two or three words."""
    if live is None or live.doing == "plain":
        return "waiting for a question" if drafter else "plain decoding"
    if drafter is None or policy == "off":
        return TITLES["plain"]
    return TITLES[live.doing]


def explain(live: Live | None, drafter: str | None, policy: str) -> str:
    """Why it does that."""
    if drafter is None:
        return "No drafter: the target makes every token by itself, one a pass. /drafter lookup changes that."
    if policy == "off":
        return "The policy is off: the target makes every token by itself. /policy auto changes that."
    if live is None or live.doing == "plain":
        return f"The {drafter} drafter will guess tokens ahead; the target checks several guesses in one pass."
    return {
        "silent": _silent(drafter),
        "unverified": "Guesses are made, but checking them would cost more time than they save on this machine.",
        "speculating": "Guessed tokens are checked several in one pass; right ones are kept, so one pass gives many tokens.",
        "parked": f"{_reason(live)}Guessing did not pay here, so it rests: plain decoding, and a new try now and then.",
    }[live.doing]


def _silent(drafter: str) -> str:
    if drafter == "lookup":
        return "Lookup guesses what followed the same words earlier. Nothing repeats here, so there is no guess."
    return f"The {drafter} drafter has no guess here: the target makes the tokens by itself."


def _reason(live: Live) -> str:
    return f"{live.reason}. " if live.reason else ""


def race_result(race: Race) -> str:
    """The outcome of a race in one line."""
    if race.ratio is None:
        return "too short to compare"
    same = "identical" if race.identical else f"differs at token {race.first_difference}"
    return f"{race.ratio:.2f}x plain, {same}"


def race_verdict(race: Race, near_tie: float, *, comparable: bool) -> str:
    """What the comparison of the two texts means. near_tie: logits closer than this may swap between kernels."""
    if not comparable:
        return "Residual acceptance draws other tokens than plain decoding: only the speeds compare."
    if race.identical:
        return "Both texts are identical, token by token."
    if race.margin is not None and race.margin < near_tie:
        return f"They part at a near-tie: the two best logits are {race.margin:.3f} apart there."
    margin = "" if race.margin is None else f" (logits {race.margin:.3f} apart)"
    return f"They part at token {race.first_difference}{margin}: `dspark generate --check` looks closer."


def size_of_text(text: str) -> str:
    """How much was pasted: "3012 lines, 200 kB"."""
    lines, n_bytes = text.count("\n") + 1, len(text.encode("utf-8", errors="replace"))
    return f"{lines} line{'s' if lines > 1 else ''}, {n_bytes / 1e3:.0f} kB"

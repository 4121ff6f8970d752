"""Greedy output with every drafter and policy equals plain decoding on the embedded model, near-ties apart.

A pass of one row and a pass of many use different kernels on a CPU, so logits differ in their last bits and two words of
nearly equal logit may swap. After a swap the texts differ for good: what is checked is that each *first* difference is such
a near-tie (first and second logit of the plain pass closer than NEAR_TIE), and that differences are rare.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from dspark_cli.engine.auto import AutoSchedule
from dspark_cli.engine.costs import CostModel, Curve
from dspark_cli.engine.rounds import Request, SamplingOptions
from dspark_cli.engine.session import NEAR_TIE, OpenOptions, Session, first_difference
from dspark_cli.registry import resolve
from prompts import PROMPTS

TOKENS = 200
#: drafter and policy, and with how many of the prompts: all with what people get who choose nothing
ARMS = {
    "auto auto": 30,
    "dspark fixed:4": 10,
    "lookup threshold:0.5": 10,
    "lookup fixed:4": 10,
    "lookup fixed:16": 6,
    "small fixed:3": 8,
}

pytestmark = pytest.mark.slow


class DraftsPay(CostModel):
    """Costs that no round changes: where this machine's own say that drafts do not pay, `auto` verifies next to nothing."""

    def observe_verify(self, shared: int, tokens: int, depth: float, ms: float, *, switched: bool = False) -> None:
        pass

    def observe_draft(self, shared: int, block: int, depth: float, ms: float) -> None:
        pass

    def observe_pass(self, shared: int, own_ms: float, inject_ms: float) -> None:
        pass

    def observe_overhead(self, own_ms: float) -> None:
        pass


def some(count: int) -> Sequence[str]:
    """`count` of the prompts, from all their kinds."""
    return PROMPTS[:: len(PROMPTS) // count][:count]


def requests(session: Session, sampling: SamplingOptions, prompts: Sequence[str]) -> list[Request]:
    return [
        session.chat_request([{"role": "user", "content": prompt}], max_tokens=TOKENS, sampling=sampling)
        for prompt in prompts
    ]


def answers(
    session: Session, sampling: SamplingOptions, prompts: Sequence[str], **how: bool
) -> tuple[list[list[int]], list[list[float]], int]:
    """Tokens and margins per prompt, and how many draft tokens were accepted in all."""
    tokens, margins, accepted = [], [], 0
    for request in requests(session, sampling, prompts):
        rounds = list(session.run(request, **how))
        tokens.append([t for r in rounds for t in r.tokens])
        margins.append([m for r in rounds for m in r.margins or ()])
        accepted += sum(r.accepted for r in rounds)
    return tokens, margins, accepted


@pytest.fixture(scope="module")
def plain(embedded_gguf: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Prompt -> tokens, margins."""
    with Session.open(OpenOptions(embedded_gguf, "smollm2-135m", drafter="none")) as session:
        tokens, margins, _ = answers(session, SamplingOptions(), PROMPTS, margins=True)
    return dict(zip(PROMPTS, zip(tokens, margins, strict=True), strict=True))


@pytest.mark.parametrize("arm", ARMS)
def test_every_drafter_and_policy_gives_the_plain_text(
    arm: str, embedded_gguf: Path, plain: dict[str, tuple[list[int], list[float]]]
) -> None:
    drafter, policy = arm.split()
    path = str(embedded_gguf) if drafter == "small" else drafter
    own, prompts = resolve("smollm2-135m").drafter_path, some(ARMS[arm])
    options = OpenOptions(embedded_gguf, "smollm2-135m", drafter=path, drafter_path=own, policy=policy)
    with Session.open(options) as session:
        if isinstance(session.schedule, AutoSchedule):
            session.schedule.costs = DraftsPay(
                Curve({1: 10.0, 2: 12.0, 5: 15.0, 17: 30.0}), draft=Curve({1: 1.0, 4: 2.0})
            )
        tokens, _, accepted = answers(session, SamplingOptions(), prompts)
    assert accepted > 50, "nothing was drafted: the test says nothing"
    ties = []
    for prompt, mine in zip(prompts, tokens, strict=True):
        theirs, margins = plain[prompt]
        first = first_difference(mine, theirs)
        if first is not None:
            assert margins[first] < NEAR_TIE, f"{prompt!r} differs at token {first}, margin {margins[first]:.3f}"
            ties.append((prompt, first, round(margins[first], 4)))
    print(f"{arm}: {len(prompts) - len(ties)} of {len(prompts)} identical; near-ties {ties}")
    assert len(ties) <= len(prompts) // 3, ties


def test_check_finds_a_difference(embedded_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--check` must be able to fail: with a sampler that keeps every draft it reports where the texts part."""
    with Session.open(OpenOptions(embedded_gguf, "smollm2-135m", drafter="lookup", policy="fixed:4")) as session:
        [request] = requests(session, SamplingOptions(), PROMPTS[-4:-3])
        assert session.check(request).first_difference is None or session.check(request).margin < NEAR_TIE  # type: ignore[operator]
        monkeypatch.setattr(
            "dspark_cli.engine.sampling.Sampler.verify",
            lambda self, logits, draft: (len(draft), int(logits[-1].argmax())),
        )
        report = session.check(request)
    assert not report.identical
    assert report.first_difference is not None
    assert report.ids_sha256 != report.plain_sha256

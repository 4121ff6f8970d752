"""Prompts of six kinds, of our own writing: what a drafter finds easy and what it does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dspark_cli.engine.rounds import Request, SamplingOptions
    from dspark_cli.engine.session import Session


@dataclass(frozen=True)
class Prompt:
    """One prompt. `raw`: continue the text as it is, without the chat template."""

    kind: str
    text: str
    raw: bool = False

    def request(self, session: Session, tokens: int, sampling: SamplingOptions) -> Request:
        """This prompt for `session`, answered with at most `tokens` tokens."""
        if self.raw:
            return session.text_request(self.text, max_tokens=tokens, sampling=sampling)
        return session.chat_request([{"role": "user", "content": self.text}], max_tokens=tokens, sampling=sampling)


FERRY = (
    "The ferry left the northern pier at seven, carrying nine passengers, two bicycles and a crate of early apples. "
    "Halfway across, the engine coughed twice and fell silent, and the captain, who had seen worse, asked everybody "
    "to move to the left side while he looked for the spare belt. It took him eleven minutes. Nobody complained."
)
TOTALS = (
    "def total(prices, tax):\n    amount = 0\n    for price in prices:\n        amount = amount + price\n"
    "    amount = amount + amount * tax\n    return amount\n\n\ndef largest(prices):\n    best = prices[0]\n"
    "    for price in prices:\n        if price > best:\n            best = price\n    return best\n"
)
GARDEN = (
    "Before the first frost the beds are cleared, the tools are oiled and hung by size, and the tomato stakes are tied in "
    "bundles of ten. Leaves from the two maples go on the long heap behind the shed; leaves from the walnut tree do not, "
    "because little will grow where they have rotted. The rain barrel is emptied, turned over and set on three bricks."
)
LIGHTHOUSE = (
    "The lamp at Carrow Point was lit for the first time on a Tuesday in March. It burned whale oil in those days and had to "
    "be trimmed every four hours, which is why the keepers worked in pairs and why the log is written in two hands. The "
    "first keeper, a retired cooper named Amos Dell, wrote small and wasted no ink. The second, his niece Hannah, drew "
    "birds in the margin. Between them they recorded every ship that passed for thirty-one years.\n\n"
    "The tower is nineteen metres high. Its walls are two metres thick at the foot and hardly half a metre at the gallery. "
    "There are ninety-six steps, and a rope instead of a rail, because a rail would have rusted. In the storm of the "
    "eleventh winter the sea broke the lower door, filled the store room to the third step and carried off forty sacks of "
    "flour, a goat, and the only chair that Amos liked.\n\n"
    "When electricity came, the oil room became a kitchen. The great lens stayed; it had cost more than the tower. Visitors "
    "are told not to touch it, and are told why: a fingerprint left on the glass is thrown upon the clouds, a mile long. "
    "Hannah's last entry says only that the new lamp is brighter, that it hums, and that the birds do not mind it.\n"
)


def copied(text: str) -> str:
    """A text, its copy, and the beginning of another: even a very small model goes on copying."""
    return f"Original:\n{text}\n\nCopy:\n{text}\n\nCopy:\n{text[: len(text) // 6]}"


KINDS: dict[str, tuple[Prompt, ...]] = {
    "question": (
        Prompt("question", "Why is the sky blue?"),
        Prompt("question", "How do I keep bread fresh for longer?"),
        Prompt("question", "What is the difference between a frog and a toad?"),
        Prompt("question", "What should I look at when I buy a used bicycle?"),
    ),
    "arithmetic": (
        Prompt("arithmetic", "A train travels 60 miles in 2 hours. How fast is it? Show your work."),
        Prompt(
            "arithmetic", "A shirt costs 20 dollars and is reduced by 15 percent. What is the new price? Step by step."
        ),
        Prompt("arithmetic", "List the first ten square numbers, one per line."),
        Prompt(
            "arithmetic", "Tom has 12 apples, gives away 5 and buys 8 more. How many has he now? Explain each step."
        ),
    ),
    "code": (
        Prompt("code", "Write a Python function that returns the largest number of a list, and explain it."),
        Prompt("code", "Write a small Python class for a bank account with deposit and withdraw."),
        Prompt("code", "Write a Python function that checks whether a word is a palindrome, with three examples."),
        Prompt("code", "How do I read a CSV file line by line in Python? Show the code."),
    ),
    "copy-edit": (
        Prompt("copy-edit", copied(FERRY), raw=True),
        Prompt("copy-edit", copied(TOTALS), raw=True),
        Prompt("copy-edit", copied(GARDEN), raw=True),
        Prompt("copy-edit", copied(LIGHTHOUSE[:420]), raw=True),
    ),
    "story": (
        Prompt("story", "Write a short story about a lost dog."),
        Prompt("story", "Tell me a story about a clockmaker who is always late."),
        Prompt("story", "Describe a market in the early morning."),
        Prompt("story", "Write a letter from a traveller to a friend."),
    ),
    "long context": (
        Prompt("long context", f"{LIGHTHOUSE}\nWho was Hannah, and what did she do? Answer from the text above."),
        Prompt("long context", f"{LIGHTHOUSE}\nSummarise the text above in five sentences."),
        Prompt("long context", f"{LIGHTHOUSE}\n{GARDEN}\nWhich of the two texts is about a tower? Describe the tower."),
        Prompt("long context", f"{LIGHTHOUSE}\nList all numbers in the text above and say what each one counts."),
    ),
}

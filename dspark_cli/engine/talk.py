"""How the next answer of a conversation is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dspark_cli.engine.rounds import Request, SamplingOptions

if TYPE_CHECKING:
    from dspark_cli.engine.conversation import Conversation
    from dspark_cli.engine.session import Session


@dataclass
class Settings:
    """What may be changed between answers. thinking: None leaves it to the model's template."""

    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    max_tokens: int = 1024
    thinking: bool | None = None

    def request(self, session: Session, talk: Conversation) -> Request:
        """The request that answers the last message. Raises DsparkError when the template refuses the conversation."""
        return session.chat_request(
            talk.all_messages(), max_tokens=self.max_tokens, sampling=self.sampling, thinking=self.thinking
        )

"""One prompt of a batch: what a record of an input file becomes, and what is wrong with it if it cannot."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark_cli.backends.errors import BadInput, DsparkError

if TYPE_CHECKING:
    from dspark_cli.batch.template import PromptTemplate
    from dspark_cli.engine.rounds import Request, SamplingOptions
    from dspark_cli.engine.session import Session

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Item:
    """One record of an input.

    number: from 0, over all inputs;  line: of `file`, from 1
    key:    hash of the record's content, wherever it stands
    fields: what it says ("prompt", "messages", options, whatever a template reads)
    error:  why it cannot be read; `fields` is then empty
    """

    number: int
    file: Path
    line: int
    key: str
    fields: Fields = field(default_factory=dict)
    error: str | None = None

    @property
    def id(self) -> str | int | None:
        given = self.fields.get("id")
        return given if isinstance(given, str | int) else None

    def place(self) -> dict[str, Any]:
        """What a result says of where its item came from."""
        return {"id": self.id, "file": str(self.file), "line": self.line, "key": self.key}


def key_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:24]


@dataclass(frozen=True)
class PromptOptions:
    """How items become requests: what holds where an item says nothing of its own."""

    sampling: SamplingOptions
    max_tokens: int
    stop: tuple[str, ...] = ()
    system: str | None = None
    template: PromptTemplate | None = None
    raw: bool = False
    thinking: bool | None = None

    def as_dict(self) -> dict[str, Any]:
        """Everything that an answer depends on beside its item and the model."""
        own = {name: value for name, value in vars(self).items() if name not in ("sampling", "template")}
        return {**own, **vars(self.sampling), "template": self.template.source if self.template else None}


def request_of(item: Item, session: Session, options: PromptOptions) -> Request:
    """The request of an item. Raises DsparkError that says what is wrong with it."""
    fields = item.fields
    sampling, max_tokens, stop = _options(fields, options)
    messages = _messages(fields, options)
    if options.raw:
        if len(messages) != 1 or messages[0]["role"] != "user":
            raise BadInput("messages and system prompts need the chat template, and --raw asks for none")
        text = messages[0]["content"]
    else:
        text = session.target.render_chat(messages, thinking=options.thinking)
    _refuse_far_too_long(session, text)
    request = session.prompt_request(text, chat=not options.raw, max_tokens=max_tokens, sampling=sampling, stop=stop)
    return replace(request, id=item.number)


def _messages(fields: Fields, options: PromptOptions) -> list[dict[str, str]]:
    if options.template is not None:
        prompt: Any = options.template.render(fields)
    elif "messages" in fields:
        return _checked(fields["messages"], fields.get("system", options.system))
    else:
        prompt = fields.get("prompt")
    if not isinstance(prompt, str):
        raise BadInput(
            "neither `prompt` nor `messages`" if prompt is None else f"`prompt` is {_kind(prompt)}, not text"
        )
    if not prompt.strip():
        raise BadInput("the prompt is empty")
    return _checked([{"role": "user", "content": prompt}], fields.get("system", options.system))


def _checked(messages: Any, system: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise BadInput(f"`messages` is {_kind(messages)}, not a list of messages")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise BadInput("a message needs `role` and `content`, both text")
    if system is None or messages[0]["role"] == "system":
        return messages
    if not isinstance(system, str):
        raise BadInput(f"`system` is {_kind(system)}, not text")
    return [{"role": "system", "content": system}, *messages]


#: per-line options: name -> (types, lowest, highest)
NUMBERS: dict[str, tuple[tuple[type, ...], float, float]] = {
    "max_tokens": ((int,), 1, 1 << 31),
    "temperature": ((int, float), 0, 1e6),
    "top_k": ((int,), 0, 1 << 31),
    "top_p": ((int, float), 0, 1),
    "min_p": ((int, float), 0, 1),
    "repeat_penalty": ((int, float), 0.1, 1e6),
    "seed": ((int,), 0, (1 << 63) - 1),
}


def _options(fields: Fields, options: PromptOptions) -> tuple[SamplingOptions, int, tuple[str, ...]]:
    own: dict[str, Any] = {}
    for name, (types, lowest, highest) in NUMBERS.items():
        value = fields.get(name)
        if value is None or (options.template is not None and not isinstance(value, types)):
            continue  # with a template, a column may be called `seed` and hold apples
        if not isinstance(value, types) or isinstance(value, bool) or not lowest <= value <= highest:  # type: ignore[operator]
            raise BadInput(f"`{name}` is {_kind(value)}, not a number from {lowest} to {highest:g}")
        own[name] = value
    stop = fields.get("stop")
    if isinstance(stop, str):
        stop = [stop]
    if stop is not None and not (isinstance(stop, list) and all(isinstance(s, str) for s in stop)):
        raise BadInput(f"`stop` is {_kind(stop)}, not text or a list of texts")
    limit = own.pop("max_tokens", options.max_tokens)
    return replace(options.sampling, **own), limit, options.stop if stop is None else tuple(stop)


def _refuse_far_too_long(session: Session, text: str) -> None:
    """Spare the tokenizer texts that cannot fit however they are cut (it is slow on a text of 50 MB)."""
    n_ctx, size = session.target.info.n_ctx, len(text)
    if size <= 64 * n_ctx:
        return
    least = size // session.longest_token
    if least >= n_ctx:
        raise DsparkError(f"the prompt has {size} characters, at least {least} tokens; the context holds {n_ctx}")


def _kind(value: Any) -> str:
    """A value as an error message shows it."""
    shown = json.dumps(value, ensure_ascii=False, default=str)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."

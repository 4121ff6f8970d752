"""Prompts built from the fields of a record by a jinja2 template, in a sandbox."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dspark_cli.backends.errors import BadInput

MAX_PROMPT = 64 << 20  # characters: what a template may make of one record


class PromptTemplate:
    """A template; `source` is its text. Raises BadInput for one that cannot be parsed."""

    def __init__(self, source: str) -> None:
        from jinja2 import StrictUndefined, TemplateSyntaxError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self.source = source
        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=False)
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise BadInput(f"the template has an error in line {error.lineno}: {error.message}") from None

    @classmethod
    def read(cls, text: str) -> PromptTemplate:
        """`text` itself, or the file after an @. Raises BadInput."""
        if not text.startswith("@"):
            return cls(text)
        path = Path(text[1:]).expanduser()
        try:
            return cls(path.read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"the template {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None

    def render(self, fields: Mapping[str, Any]) -> str:
        """The prompt. Raises BadInput when this record does not suit the template."""
        parts, size = [], 0
        try:
            for part in self._template.generate(dict(fields)):
                parts.append(part)
                size += len(part)
                if size > MAX_PROMPT:
                    raise BadInput(f"the template makes a prompt of more than {MAX_PROMPT >> 20} MB")
        except BadInput:
            raise
        except Exception as error:  # a template may raise anything: the record failed, not the program
            raise BadInput(f"the template fails: {error or type(error).__name__}") from None
        return "".join(parts)

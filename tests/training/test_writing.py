"""What the target writes for training: both turns, the template whole, and the same rules whoever runs the target."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from dspark_cli.backends.llamacpp.context import ContextOptions
from dspark_cli.backends.llamacpp.target import LlamaCppTarget
from dspark_cli.backends.torch.gguf_model import load_gguf_model
from dspark_cli.training.documents import Document
from dspark_cli.training.writing import TEMPERATURES, BatchWriter, EngineWriter, Frame, WritingOptions, openings

OPTIONS = WritingOptions(user_tokens=12, answer_tokens=20, seed=3)


def written(path: Path, by: str, count: int) -> tuple[list[Document], Frame]:
    with LlamaCppTarget(path, ContextOptions(ctx=OPTIONS.longest, n_seq=4)) as target:
        frame, words = Frame.of(target), openings(target, OPTIONS.seed)
        if by == "llamacpp":
            writer: BatchWriter | EngineWriter = EngineWriter(target, frame, words, OPTIONS)
        else:
            writer = BatchWriter(load_gguf_model(path), frame, words, OPTIONS, rows=4)
        return list(islice(writer.documents(), count)), frame


@pytest.mark.parametrize("by", ["llamacpp", "torch"])
def test_documents_hold_both_turns_inside_the_template(tiny_target: Path, by: str) -> None:
    documents, frame = written(tiny_target, by, 10)
    for document in documents:
        prefix, suffix = len(frame.prefix), len(frame.suffix)
        assert document.ids[:prefix] == frame.prefix
        assert document.ids[document.answer_start - suffix : document.answer_start] == frame.suffix
        user = document.ids[prefix : document.answer_start - suffix]
        answer = document.ids[document.answer_start :]
        assert 1 <= len(user) <= OPTIONS.user_tokens + 8  # the opening words come on top
        assert 1 <= len(answer) <= OPTIONS.answer_tokens
        assert not set(answer[:-1]) & frame.ends
        assert len(answer) == OPTIONS.answer_tokens or answer[-1] in frame.ends
        assert document.temperature in TEMPERATURES
    assert len({d.ids for d in documents}) > len(documents) // 2  # so small a model says some things twice
    assert len({d.temperature for d in documents}) > 1


def test_greedy_answers_of_both_writers_are_the_targets_own(tiny_target: Path) -> None:
    """A document's answer at temperature 0 is what plain decoding of its prompt gives."""
    from dspark_cli.engine.decode import Engine
    from dspark_cli.engine.rounds import Request

    for by in ("llamacpp", "torch"):
        greedy = [d for d in written(tiny_target, by, 16)[0] if d.temperature == 0.0]
        assert greedy
        with LlamaCppTarget(tiny_target, ContextOptions(ctx=512, kv_type="f32", flash_attn="off")) as target:
            for document in greedy[:3]:
                prompt, answer = document.ids[: document.answer_start], document.ids[document.answer_start :]
                request = Request(prompt, len(answer), stop_ids=target.tokenizer.eog_ids)
                plain = [token for item in Engine(target).run([request]) for token in item.tokens]
                assert plain == list(answer)

"""`dspark generate`: one answer."""

from __future__ import annotations

import json as json_
import sys
from pathlib import Path
from typing import Annotated

import typer

from dspark_cli.backends.errors import BadInput, DsparkError
from dspark_cli.cli import options as o


def generate(
    model: o.Model,
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; `-` or nothing reads standard input.", show_default=False)
    ] = None,
    file: Annotated[Path | None, typer.Option(help="Read the prompt from this file.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Decode twice, with and without drafting, and report the first difference.")
    ] = False,
    stats: Annotated[bool, typer.Option("--stats/--no-stats", help="Statistics on stderr after the answer.")] = True,
    json: o.Json = False,
    drafter: o.Drafter = "auto",
    policy: o.Policy = None,
    max_tokens: o.MaxTokens = 512,
    temperature: o.Temperature = 0.0,
    top_k: o.TopK = 0,
    top_p: o.TopP = 1.0,
    min_p: o.MinP = 0.0,
    repeat_penalty: o.RepeatPenalty = 1.0,
    seed: o.Seed = 0,
    accept: o.Accept = "exact",
    stop: o.Stop = None,
    thinking: o.Thinking = None,
    backend: o.Backend = "auto",
    quant: o.Quant = None,
    ctx: o.Ctx = None,
    threads: o.Threads = None,
    gpu_layers: o.GpuLayers = None,
    kv_type: o.KvType = "f16",
    flash_attn: o.FlashAttn = "auto",
    offline: o.Offline = False,
) -> None:
    """Answer one prompt: the answer on stdout as it comes, everything else on stderr.

    Example: dspark generate smollm2-135m "Why is the sky blue?" --max-tokens 100
    """
    if raw and system:
        raise BadInput("--system needs the chat template, and --raw asks for none")
    text = read_prompt(prompt, file)
    sampling = o.sampling_options(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repeat_penalty=repeat_penalty,
        seed=seed,
        accept=accept,
    )
    pair = o.PairOptions(
        *(model, drafter, policy, backend, quant, ctx, threads, gpu_layers, kv_type, flash_attn, offline),
        thinking=thinking,
        chat=not raw,
    )
    from dspark_cli.cli.answer import Answer, as_json, print_stats, stream
    from dspark_cli.engine.watch import Watch

    with o.open_session(pair) as session:
        ends = tuple(stop or ())
        if raw:
            request = session.text_request(text, max_tokens=max_tokens, sampling=sampling, stop=ends)
        else:
            messages = [{"role": "system", "content": system}] if system else []
            messages.append({"role": "user", "content": text})
            request = session.chat_request(
                messages, max_tokens=max_tokens, sampling=sampling, stop=ends, thinking=thinking
            )
        if check:
            raise typer.Exit(_check(session, request, as_json=json))
        answer = Answer()
        try:
            stream(
                session.run(request),
                answer,
                echo=not json,
                watch=Watch(session.drafter.kind if session.drafter else None),
            )
        finally:
            if json and answer.tokens:
                typer.echo(json_.dumps(as_json(session, request, answer), ensure_ascii=False))
            elif stats and answer.tokens:
                print_stats(session, answer)


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt from the argument, the file or stdin. Raises BadInput when there is none, DsparkError when unreadable."""
    if prompt not in (None, "-") and file is not None:
        raise BadInput("a prompt was given twice: as an argument and with --file")
    if prompt not in (None, "-"):
        text = str(prompt)
    elif file is not None:
        text = _decoded(_read(file), str(file))
    elif prompt is None and sys.stdin.isatty():
        raise BadInput("no prompt", hint='dspark generate MODEL "PROMPT", --file FILE, or pipe it in')
    else:
        text = _decoded(sys.stdin.buffer.read(), "standard input")
    if not text.strip():
        raise BadInput("the prompt is empty")
    return text


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DsparkError(f"{file} cannot be read: {error.strerror}") from None


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DsparkError(
            f"{where} is not UTF-8: byte {data[error.start]:#04x} at position {error.start}",
            hint=f"iconv -f ISO-8859-1 -t UTF-8 < {where} (if that is its encoding)",
        ) from None


def _check(session: object, request: object, *, as_json: bool) -> int:
    """Compare with plain decoding and report; returns the exit code (1 for a difference that is no near-tie)."""
    from dspark_cli.engine.session import NEAR_TIE, Session

    assert isinstance(session, Session)
    report = session.check(request)  # type: ignore[arg-type]
    tie = report.margin is not None and report.margin < NEAR_TIE
    if as_json:
        typer.echo(json_.dumps({**vars(report), "near_tie": tie}))
    elif report.identical:
        typer.echo(f"identical: {report.tokens} tokens, sha256 {report.ids_sha256[:16]}")
    else:
        kind = "a near-tie" if tie else "NOT a near-tie"
        margin = "unknown" if report.margin is None else f"{report.margin:.4f}"
        typer.echo(
            f"differs at token {report.first_difference} of {report.tokens}: the first two logits are {margin} apart there, "
            f"{kind} (below {NEAR_TIE})"
        )
    return 0 if report.identical or tie else 1

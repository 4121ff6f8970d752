"""`dspark batch`: many prompts from files."""

from __future__ import annotations

import json as json_
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dspark_cli.backends.errors import BadInput
from dspark_cli.cli import options as o
from dspark_cli.cli.lines import EVERY_S, NowAndThen

if TYPE_CHECKING:
    from dspark_cli.batch.progress import Figures
    from dspark_cli.batch.runner import Job


def batch(
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="INPUT...", help="Files (.jsonl, .txt, .csv), folders or globs.", show_default=False),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Results: .jsonl, or .csv (the input with added columns).")
    ] = None,
    output_dir: Annotated[Path | None, typer.Option(help="Results as one file per input file, in this folder.")] = None,
    model: Annotated[str, typer.Option(help="Name, Hub repository, GGUF file or checkpoint folder.")] = "smollm2-135m",
    parallel: Annotated[
        str, typer.Option(help="Sequences decoded at once: a number, or auto (at most 16, by memory and items).")
    ] = "auto",
    column: Annotated[str | None, typer.Option(help="CSV column that holds the prompt; default `prompt`.")] = None,
    whole_files: Annotated[
        bool, typer.Option("--whole-files", help="One prompt a file (.txt, .md) instead of one a line.")
    ] = False,
    template: Annotated[
        str | None, typer.Option(help="Prompt as a jinja2 template of the record's fields; @FILE reads it from a file.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt where an item has none.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue texts as they are, without the chat template.")] = False,
    encoding: Annotated[str, typer.Option(help="Encoding of inputs without a byte order mark.")] = "utf-8",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with this output: do what is missing in it.")] = False,
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="With --resume: do failed items again.")] = False,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="Stop at the first item that fails.")] = False,
    unordered: Annotated[
        bool, typer.Option("--unordered", help="Leave results in the order they were finished, not the input's.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Nothing on stderr but errors.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object on stdout.")] = False,
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
    """Answer every prompt of the inputs, several at a time. Killed or interrupted, it goes on with --resume.

    Example: dspark batch questions.jsonl -o answers.jsonl --max-tokens 200
    """
    if retry_errors and not resume:
        raise BadInput("--retry-errors goes with --resume")
    n_seq = _parallel(parallel)
    sampling = o.sampling_options(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repeat_penalty=repeat_penalty,
        seed=seed,
        accept=accept,
    )
    from dspark_cli.batch.earlier import scan
    from dspark_cli.batch.inputs import ReadOptions, find_files, read_items
    from dspark_cli.batch.items import PromptOptions
    from dspark_cli.batch.output import Output
    from dspark_cli.batch.progress import Figures
    from dspark_cli.batch.runner import Job, run_job, settings_of
    from dspark_cli.batch.template import PromptTemplate

    say = _nothing if quiet else _say
    made = PromptTemplate.read(template) if template is not None else None
    reading = ReadOptions(column, whole_files, encoding, any_column=made is not None)
    prompting = PromptOptions(sampling, max_tokens, tuple(stop or ()), system, made, raw, thinking)
    where = Output.of(output, output_dir, unordered=unordered)
    files = find_files(inputs, reading, never=[where.path, where.journal])
    where.check(files, reading, resume=resume)
    known = scan(read_items(files, reading))
    if not known:
        raise BadInput("the inputs hold no prompt")
    pair = o.PairOptions(
        *(model, drafter, policy, backend, quant, ctx, threads, gpu_layers, kv_type, flash_attn, offline),
        thinking=thinking,
        chat=not raw,
        parallel=n_seq,
        most=len(known),
        quiet=quiet,
    )
    found, plan = o.find_checked(pair)
    job = Job(files, known, reading, prompting, where, settings_of(found.path, reading, prompting), fail_fast)
    figures = Figures(len(known), parallel=plan.n_seq)
    try:
        whole = run_job(
            job,
            lambda: o.load(pair, found, plan),
            figures,
            say=say,
            tick=_ticker(figures, quiet),
            retry_errors=retry_errors,
        )
    except KeyboardInterrupt:
        say(f"\ninterrupted: {figures.finished} of {len(known)} items are in {where.journal}; --resume goes on")
        raise
    finally:
        if figures.finished:
            _summary(figures, job, quiet=quiet, as_json=json)
    if not whole:
        raise typer.Exit(1)


def _parallel(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdigit():
        raise BadInput(f"--parallel {text} is neither a number nor auto")
    return int(text)


def _say(text: str) -> None:
    typer.secho(text, dim=True, err=True)


def _nothing(text: str) -> None:
    pass


def _ticker(figures: Figures, quiet: bool) -> Callable[[], None]:
    """Shows progress when it is called often: one line that is written over on a terminal, else a line now and then."""
    if quiet:
        return lambda: None
    terminal = sys.stderr.isatty()
    lines = NowAndThen(0.2 if terminal else EVERY_S)

    def tick() -> None:
        if lines.due():
            line = figures.line()
            sys.stderr.write(f"\r\x1b[2K{line[: _columns() - 1]}" if terminal else f"{line}\n")
            sys.stderr.flush()

    return tick


def _columns() -> int:
    import shutil

    return shutil.get_terminal_size().columns


def _summary(figures: Figures, job: Job, *, quiet: bool, as_json: bool) -> None:
    """What the run did: on stderr, and with --json one object on stdout."""
    if as_json:
        typer.echo(json_.dumps({"output": str(job.output.path), **figures.as_dict()}, ensure_ascii=False))
    if quiet:
        return
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[2K")
    stats = figures.stats
    lines = [
        f"{figures.finished} of {figures.total} items in {job.output.path}: {figures.done} done, {figures.failed} failed, "
        f"{figures.skipped} done before"
    ]
    if stats.tokens:
        estimate = figures.against_plain
        against = (
            f", decoding {estimate:.2f}x plain (estimated from measured costs)" if estimate and stats.verified else ""
        )
        lines += [
            f"speed     {stats.tokens} tokens in {figures.seconds:.1f} s: {figures.tok_s:.1f} tok/s, "
            f"{figures.parallel} at once{against}",
            f"prompts   {stats.prompt_tokens} tokens: {stats.prefill_tokens} computed, {figures.cached} shared",
            f"drafts    {stats.verified} verified, {stats.accepted} accepted ({stats.acceptance_rate:.0%}), "
            f"{stats.accepted_length:.2f} tokens per round, parked {stats.parked_share:.0%}",
        ]
    if figures.near_ties:
        lines.append(
            f"near-ties {figures.near_ties} tokens (`near_ties` of the results): another batch may choose otherwise there"
        )
    for line in lines:
        _say(line)

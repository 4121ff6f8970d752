"""Bringing what is missing: the pair of a name, or a repository, chosen for this machine and then downloaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from dspark_cli.backends.errors import DsparkError
from dspark_cli.registry import hub
from dspark_cli.registry.as_gguf import check_convertible, gguf_copy, repository_of, write_copy
from dspark_cli.registry.choose import Machine, Resolution, Wish, choose
from dspark_cli.registry.download import Job, Pulled, Report, Silent, check_space, pull_files
from dspark_cli.registry.hub import Listing
from dspark_cli.registry.lock import locked
from dspark_cli.registry.models import find
from dspark_cli.registry.quants import FULL_PRECISION
from dspark_cli.registry.resolve import (
    Resolved,
    entry_of,
    is_repository,
    looks_like_path,
    ready,
    refuse_drafter,
    resolve,
)

if TYPE_CHECKING:
    from dspark_cli.registry.schema import Entry, GgufFile, KnownDrafter


@dataclass
class Obtained:
    """What `pull` did: one `Pulled` a repository. happened: what went wrong on the way, but did not stop it."""

    choice: Resolution
    pulled: list[Pulled] = field(default_factory=list)
    happened: list[str] = field(default_factory=list)


def obtain(model: str, wish: Wish, machine: Machine | None = None, report: Report | None = None) -> Resolved:
    """`resolve`, and a download first where something is missing. Raises what `resolve` and `pull` raise."""
    if looks_like_path(model):
        return resolve(model, wish.quant, wish, machine)
    found = None
    try:
        found = resolve(model, wish.quant, wish, machine)
        if hub.offline() or found.resolution is None or found.resolution.drafter is None or found.drafter_path:
            return found
    except DsparkError:
        if hub.offline() or (not is_repository(model) and find(model).package):
            raise
    try:
        happened = pull(model, wish, machine, report).happened
    except DsparkError as error:
        if found is None:
            raise
        happened = [_no_drafter(error)]  # the target is here
    return resolve(model, wish.quant, wish, machine).noting(happened)


def pull(
    model: str,
    wish: Wish | None = None,
    machine: Machine | None = None,
    report: Report | None = None,
    *,
    revision: str | None = None,
    update: bool = False,
    verify: bool = False,
) -> Obtained:
    """Download the pair of `model` that fits this machine. What is here is kept; `verify` hashes it again.

    revision: of the target's repository (branch, tag, commit); a revision pulled earlier stays pinned unless `update`.
    """
    from dspark_cli.registry.devices import this_machine

    machine = machine or this_machine()
    report = report or Silent()
    entry = listed_entry(model, revision, update) if is_repository(model) else find(model)
    wish = ready(entry, wish.quant if wish else None, wish)
    entry = _with_listing(entry, wish, revision, update)
    choice = choose(entry, machine, wish)
    done = Obtained(choice)
    jobs = [] if entry.package else [_target_files(choice, revision, update)]
    target_only = list(jobs)
    if choice.drafter is not None and choice.drafter.repository:
        with _may_fail(wish, done):
            job = _drafter_files(choice.drafter, update)
            check_space([*jobs, job])
            jobs.append(job)
    check_space(jobs, report)
    for job in jobs:
        with nullcontext() if job in target_only else _may_fail(wish, done):
            done.pulled.append(pull_files(*job, report, verify=verify))
    try:
        _convert(choice, report)
    except DsparkError as error:
        done.happened.append(f"its drafter runs through torch: {error}")
    return done


def _needs_a_copy(choice: Resolution) -> bool:
    return choice.drafter is not None and choice.backend == "llamacpp" and choice.drafter.format == "safetensors"


def _convert(choice: Resolution, report: Report) -> None:
    folder = choice.drafter.path if choice.drafter is not None and _needs_a_copy(choice) else None
    target = choice.entry.on_disk().get(choice.quant)
    if folder is not None and target is not None and not gguf_copy(folder).exists():
        check_convertible(folder)
        report.say(f"converting {repository_of(folder)} to GGUF, which libllama runs beside the target (once)")
        write_copy(folder, target)


@contextmanager
def _may_fail(wish: Wish, done: Obtained) -> Iterator[None]:
    """Without a drafter that nobody asked for by name it goes too: its failure is a note."""
    try:
        yield
    except DsparkError as error:
        if wish.drafter != "auto":
            raise
        done.happened.append(_no_drafter(error))


def _no_drafter(error: DsparkError) -> str:
    return f"no drafter: {error}" + (f" ({error.hint})" if error.hint else "")


def listed_entry(repository: str, revision: str | None = None, update: bool = False) -> Entry:
    """An entry for a Hub repository, from its listing there."""
    refuse_drafter(repository)
    listing = _listing(repository, revision, update)
    files = _gguf_files(listing)
    weights = 0 if files else sum(f.size for f in hub.checkpoint_files(listing) if f.name.endswith(".safetensors"))
    return entry_of(repository, files, weights)


def _gguf_files(listing: Listing) -> dict[str, GgufFile]:
    from dspark_cli.registry.schema import GgufFile

    found = hub.quants_in(listing)
    return {quant: GgufFile(file=parts[0].name, bytes=sum(p.size for p in parts)) for quant, parts in found.items()}


def _with_listing(entry: Entry, wish: Wish, revision: str | None, update: bool) -> Entry:
    """`entry` with the quants its GGUF repository really has, where models.toml lists none and the network may be asked."""
    if entry.gguf is None or entry.gguf_files or hub.offline():
        return entry
    files = _gguf_files(_listing(entry.gguf, revision, update))
    return entry.model_copy(update={"gguf_files": files}) if files else entry


def _listing(repository: str, revision: str | None, update: bool) -> Listing:
    pinned = locked(repository)
    if revision is None and pinned is not None and not update:
        return replace(hub.list_files(repository, pinned.revision), requested=pinned.requested)
    return hub.list_files(repository, revision or "main")


def _target_files(choice: Resolution, revision: str | None, update: bool) -> Job:
    assert choice.repository is not None
    if choice.format == "safetensors":
        listing = _listing(choice.repository, revision, update)
        return listing, hub.checkpoint_files(listing)
    problem: DsparkError | None = None
    for repository in (choice.repository, *choice.entry.gguf_mirrors):
        try:
            listing = _listing(repository, revision, update)
            return listing, hub.gguf_parts(listing, choice.file, choice.quant)
        except DsparkError as error:
            problem = problem or error
    assert problem is not None
    raise problem


def _drafter_files(drafter: KnownDrafter, update: bool) -> Job:
    assert drafter.repository is not None
    listing = _listing(drafter.repository, drafter.revision, update)
    if drafter.format == "safetensors":
        return listing, hub.checkpoint_files(listing)
    if drafter.file is not None:
        return listing, hub.gguf_parts(listing, drafter.file, None)
    every = {quant: parts for quant, parts in hub.quants_in(listing).items() if quant != FULL_PRECISION}
    best = next((parts for quant, parts in every.items() if quant == "Q8_0"), None) or next(iter(every.values()), None)
    return listing, best or hub.gguf_parts(listing, None, None)

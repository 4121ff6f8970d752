"""Opens and switches pairs for the terminal UI, which hears how far it is instead of reading stderr."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from dspark_cli.backends.errors import NotReady
from dspark_cli.cli import options as o
from dspark_cli.tui.opening import Opened, Progress

if TYPE_CHECKING:
    from dspark_cli.registry.plan import MemoryPlan


class PairOpener:
    """What the command line asked for, loaded in whatever thread calls `open`."""

    def __init__(self, options: o.PairOptions) -> None:
        self.options = options

    @property
    def model(self) -> str:
        return self.options.model

    @property
    def drafter(self) -> str:
        return self.options.drafter

    def check(self) -> None:
        """Refuse what cannot work before the terminal is taken over. Raises DsparkError."""
        from dspark_cli.engine.schedule import parse_policy
        from dspark_cli.registry.models import find
        from dspark_cli.registry.resolve import check_path, is_repository, looks_like_path

        o.check_backend(self.options)
        o.check_drafter(self.options.drafter)
        if self.options.policy is not None:
            parse_policy(self.options.policy)
        if looks_like_path(self.model):
            from pathlib import Path

            check_path(Path(self.model).expanduser())
        elif not is_repository(self.model):
            find(self.model)

    def open(self, progress: Progress) -> Opened:
        """Find, download, plan, load, measure. Raises DsparkError, and whatever `progress` raises to cancel."""
        from dspark_cli.engine.session import Session

        progress.stage("looking for the files")
        found, plan = o.find_checked(self.options, report=progress, say=progress.say)
        asked = replace(o.loading(self.options, found, plan, progress.say), progress=progress.stage)
        return Opened(Session.open(asked), plan)

    def switch(self, opened: Opened, drafter: str, policy: str | None, progress: Progress) -> Opened:
        """Another drafter or policy beside the loaded target. Raises DsparkError with everything as it was."""
        if drafter == "none" and policy not in (None, "off"):
            policy = None  # switching off the drafter is meant as that, whatever the policy was
        options = replace(self.options, drafter=drafter, policy=policy)
        o.check_drafter(drafter)
        wide = replace(options, ctx=opened.session.target.info.n_ctx)
        found, plan = o.find_planned(wide, report=progress)
        changed = _beside(opened.plan, plan)
        asked = replace(o.loading(wide, found, plan, progress.say), progress=progress.stage)
        opened.session.switch(asked)
        self.options = options
        return Opened(opened.session, changed)


def _beside(old: MemoryPlan | None, new: MemoryPlan) -> MemoryPlan:
    """`old` with the drafter of `new`. Raises NotReady when that drafter does not fit into what is free now."""
    from dspark_cli.registry.plan import size

    old = old or new
    need = new.drafter.total if new.drafter else 0
    before = old.drafter.total if old.drafter else 0
    if need > new.device.usable + before:
        raise NotReady(
            f"the drafter needs {size(need)} on {new.device.name}, {size(new.device.usable + before)} can be used",
            hint="--drafter lookup needs nothing",
        )
    on_host = old.device.kind == "cpu"
    return replace(
        old,
        drafter=new.drafter,
        on_device=old.on_device + (0 if on_host else need - before),
        on_host=old.on_host + (need - before if on_host else 0),
    )

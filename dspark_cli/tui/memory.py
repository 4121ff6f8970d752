"""Context used, and the memory of target, drafter and cache against what the device has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from dspark_cli.engine.live import Live
from dspark_cli.registry.plan import size
from dspark_cli.tui import draw
from dspark_cli.tui.section import Section

if TYPE_CHECKING:
    from dspark_cli.registry.plan import MemoryPlan

BAR = 16


class Memory(Section):
    """Figures of the memory plan: what was planned when the pair was loaded."""

    def __init__(self) -> None:
        super().__init__(5, title="Context and memory", id="memory")

    def update_from(self, live: Live | None, n_ctx: int, plan: MemoryPlan | None) -> None:
        used = live.context_used if live else 0
        rows = [
            draw.labelled("context", draw.bar(used / n_ctx if n_ctx else 0, BAR, "blue")).append(f" {used}/{n_ctx}")
        ]
        if plan is not None:
            rows += _plan(plan)
        self.show(rows)


def _plan(plan: MemoryPlan) -> list[Text]:
    drafter = plan.drafter.weights if plan.drafter else 0
    kv = plan.target.kv + (plan.drafter.kv if plan.drafter else 0)
    free = plan.device.free
    return [
        draw.labelled("memory", draw.bar(plan.total / free if free else 0, BAR, "blue")).append(f" {size(plan.total)}"),
        draw.labelled("", f"of {size(free)} free on {plan.device.name}"),
        draw.labelled("", f"target {size(plan.target.weights)}, drafter {size(drafter) if drafter else '0'}"),
        draw.labelled("", f"KV {size(kv)}, buffers {size(plan.total - plan.target.weights - drafter - kv)}"),
    ]

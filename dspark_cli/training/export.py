"""What a finished training leaves: the drafter, the recipe that makes it again, its calibration, a card with its figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark_cli.backends.errors import DsparkError
from dspark_cli.backends.llamacpp.quants import Formats
from dspark_cli.backends.torch.dspark import DSpark
from dspark_cli.backends.torch.eagle3 import Eagle3
from dspark_cli.bench.plots import lines, standalone
from dspark_cli.engine.beliefs import CalibrationFile, sha256_of, shipped_path


@dataclass(frozen=True)
class Exported:
    """Files of a drafter. `drafter` is a GGUF, or a folder in DeepSpec's format where libllama has no graph for it."""

    drafter: Path
    recipe: Path
    calibration: Path | None


def write_drafter(model: DSpark | Eagle3, path: Path, target: Path, formats: Formats) -> Path:
    """`path` as GGUF if it ends so, else as a folder of config.json and safetensors."""
    if path.suffix == ".gguf":
        from dspark_cli.backends.torch.gguf_drafter import save_gguf_drafter

        return save_gguf_drafter(model, path, target, formats)
    from dspark_cli.backends.torch.export import save_drafter

    save_drafter(model, path)
    return path


CURVE_ROWS = 12  # of a card


def write_companions(
    drafter: Path, kind: str, recipe: dict[str, Any], evaluation: dict[str, Any], curve: Sequence[dict[str, Any]] = ()
) -> Exported:
    """Recipe, calibration, card and plot beside `drafter`; `curve`: held-out acceptance along the training (`curve.jsonl`).

    Raises DsparkError when the disk refuses.
    """
    try:
        recipe_path = drafter.with_name(drafter.name + ".recipe.json")
        recipe_path.write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")
        calibration = None
        if drafter.is_file():
            calibration = shipped_path(drafter)
            CalibrationFile(
                sha256_of(drafter),
                kind,
                tuple(evaluation["temperatures"]),
                tuple(evaluation["survival"]),
                int(evaluation["rounds"]),
            ).save(calibration)
        drafter.with_name(drafter.name + ".md").write_text(
            card(drafter.name, recipe, evaluation, curve), encoding="utf-8"
        )
        if curve:
            drafter.with_name(drafter.name + ".svg").write_text(plot(curve), encoding="utf-8")
    except OSError as error:
        raise DsparkError(f"{drafter.parent} cannot be written: {error.strerror}") from None
    return Exported(drafter, recipe_path, calibration)


def card(name: str, recipe: dict[str, Any], evaluation: dict[str, Any], curve: Sequence[dict[str, Any]] = ()) -> str:
    """The model card, Markdown."""
    shape = recipe["shape"]
    text = [
        f"# {name}",
        "",
        f"A {shape['kind']} drafter for `{recipe['target']}`, made by:",
        "",
        f"    {recipe['command']}",
        "",
        f"{shape['layers']} layer(s), block {shape['block']}, rank {shape['rank']}, draft vocabulary {shape['vocabulary']}"
        f" ({recipe['coverage']:.1%} of the answer tokens), {recipe['parameters'] / 1e6:.1f}M trained parameters.",
        f"Trained for {recipe['train_hours']:.2f} hours ({recipe['device']}) on {recipe['tokens']:,} tokens that the target "
        f"wrote itself; {recipe['positions']:,} anchors seen. No other text was used."
        + (f" {recipe['made']}" if "made" in recipe else ""),
        "",
        f"Held-out documents (none of them in training), every drafted token verified, {evaluation['target_format']} target:",
        "",
        "| prompts | temperature | tau | accepted by position | rounds |",
        "|---|---|---|---|---|",
    ]
    for row in evaluation["rows"]:
        survival = " ".join(f"{s:.2f}" for s in row["survival"])
        text.append(
            f"| {row['prompts']} | {row['temperature']:g} | {row['accepted_length']:.2f} | {survival} | {row['rounds']} |"
        )
    text += [
        "",
        f"Confidence: ECE of the cumulative product {evaluation['ece_before']:.3f}, after STS {evaluation['ece_after']:.3f} "
        "(fitted on one half of the prompts, judged on the other"
        + ("" if evaluation["sts_used"] else "; not used: it was no better there")
        + ").",
        "",
        *_curve(curve),
    ]
    return "\n".join(text)


def plot(curve: Sequence[dict[str, Any]]) -> str:
    """Tau (teacher forced, held-out documents) by hours of training, an SVG file."""
    points = {"temperature 1": [(p["hours"], p["expected_tau"]) for p in curve]}
    return standalone(lines("Held-out expected tau by hours of training", points, "hours", "tau", bottom=1.0))


def _curve(points: Sequence[dict[str, Any]]) -> list[str]:
    """A table of how acceptance grew: what more time would bring shows in its last rows."""
    if not points:
        return []
    some = sorted({round(i * (len(points) - 1) / (CURVE_ROWS - 1)) for i in range(CURVE_ROWS)})
    text = [
        "Along the training (held-out documents; 1 - TV of each position, given the true tokens before it, and the tau that "
        "it implies at temperature 1):",
        "",
        "| hours | anchors | accepted by position | implied tau |",
        "|---|---|---|---|",
    ]
    for point in (points[i] for i in some):
        rates = " ".join(f"{r:.2f}" for r in point["acceptance"])
        text.append(f"| {point['hours']:.2f} | {point['positions']:,} | {rates} | {point['expected_tau']:.2f} |")
    return [*text, ""]

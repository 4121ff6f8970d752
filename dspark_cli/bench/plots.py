"""Small plots as SVG text: bars, lines and points, enough for one report without a plotting library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 640, 274
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 40, 40  # above the plot: the title, and a line for the legend
CHARACTER = 6.5  # pixels of a letter, about
WHOLE = (3, 20)  # a width from this to that is marked by its whole numbers, any other by about five round ones
COLOURS = ("#3366aa", "#cc6633", "#339966", "#993388", "#888822", "#557788", "#aa3344", "#666666")

Points = Sequence[tuple[float, float]]


class Axes:
    """A frame with its scales; `x` and `y` map values to pixels."""

    def __init__(
        self, title: str, x_range: tuple[float, float], y_range: tuple[float, float], x_label: str, y_label: str
    ):
        self._x, self._y = x_range, y_range
        self._parts = [
            f'<text x="{LEFT}" y="16" class="title">{escape(title)}</text>',
            f'<text x="{WIDTH / 2}" y="{HEIGHT - 6}" class="label" text-anchor="middle">{escape(x_label)}</text>',
            f'<text x="12" y="{HEIGHT / 2}" class="label" text-anchor="middle" '
            f'transform="rotate(-90 12 {HEIGHT / 2})">{escape(y_label)}</text>',
        ]
        for tick in ticks(*y_range):
            self._parts.append(
                f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{self.y(tick):.1f}" y2="{self.y(tick):.1f}" class="grid"/>'
                f'<text x="{LEFT - 6}" y="{self.y(tick) + 4:.1f}" class="tick" text-anchor="end">{tick:g}</text>'
            )

    def x(self, value: float) -> float:
        low, high = self._x
        return LEFT + (value - low) / ((high - low) or 1) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self._y
        return HEIGHT - BOTTOM - (value - low) / ((high - low) or 1) * (HEIGHT - TOP - BOTTOM)

    def x_tick(self, value: float, text: str) -> None:
        self._parts.append(
            f'<text x="{self.x(value):.1f}" y="{HEIGHT - BOTTOM + 14}" class="tick" text-anchor="middle">{escape(text)}</text>'
        )

    def line(self, points: Points, colour: str, *, dashed: bool = False) -> None:
        path = " ".join(f"{self.x(a):.1f},{self.y(b):.1f}" for a, b in points)
        dash = ' stroke-dasharray="4 4"' if dashed else ""
        self._parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"{dash}/>')

    def dot(self, point: tuple[float, float], colour: str, radius: float = 3.0, hint: str = "") -> None:
        a, b = point
        self._parts.append(
            f'<circle cx="{self.x(a):.1f}" cy="{self.y(b):.1f}" r="{radius:.1f}" fill="{colour}" fill-opacity="0.8">'
            f"<title>{escape(hint)}</title></circle>"
        )

    def bar(self, at: float, width: float, value: float, colour: str, hint: str = "") -> None:
        left, right, top = self.x(at - width / 2), self.x(at + width / 2), self.y(value)
        self._parts.append(
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{self.y(self._y[0]) - top:.1f}" '
            f'fill="{colour}"><title>{escape(hint)}</title></rect>'
        )

    def legend(self, names: Sequence[str]) -> None:
        """Names on a line between title and plot, where they hide neither."""
        x = float(LEFT)
        for i, name in enumerate(names):
            self._parts.append(
                f'<rect x="{x:.0f}" y="23" width="10" height="10" fill="{colour_of(i)}"/>'
                f'<text x="{x + 14:.0f}" y="32" class="tick">{escape(name)}</text>'
            )
            x += 30 + CHARACTER * len(name)

    def svg(self) -> str:
        return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(self._parts)}</svg>'


def colour_of(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers between `low` and `high`."""
    span = (high - low) or 1.0
    step = next(s for s in (m * 10.0**e for e in range(-4, 7) for m in (1, 2, 5)) if span / s <= 6)
    first = -(-low // step)
    return [round((first + i) * step, 6) for i in range(int((high - first * step) / step + 1e-6) + 1)]


def bars(title: str, values: Mapping[str, float], y_label: str) -> str:
    """One bar a name."""
    axes = Axes(title, (-0.6, len(values) - 0.4), (0.0, 1.08 * max(values.values(), default=1.0)), "", y_label)
    for i, (name, value) in enumerate(values.items()):
        axes.bar(i, 0.7, value, colour_of(2 if name.startswith("auto") else 0), f"{name}: {value:.1f}")
        axes.x_tick(i, name.replace("threshold:", "p>").replace("fixed:", "n="))
    return axes.svg()


def lines(
    title: str,
    curves: Mapping[str, Points],
    x_label: str,
    y_label: str,
    *,
    bottom: float = 0.0,
    top: float | None = None,
) -> str:
    """One line a name. `bottom`: the lowest value that there can be."""
    points = [p for curve in curves.values() for p in curve] or [(0.0, bottom)]
    left, right = min(a for a, _ in points), max(a for a, _ in points)
    highest = max(b for _, b in points)
    axes = Axes(title, (left, right), (bottom, top or highest + 0.08 * (highest - bottom)), x_label, y_label)
    whole = WHOLE[0] <= right - left <= WHOLE[1]
    for tick in range(int(left), int(right) + 1) if whole else ticks(left, right):
        axes.x_tick(tick, f"{tick:g}")
    for i, curve in enumerate(curves.values()):
        axes.line(curve, colour_of(i))
        for point in curve:
            axes.dot(point, colour_of(i), 2.5, f"{point[1]:.3g}")
    axes.legend(list(curves))
    return axes.svg()


def standalone(svg: str) -> str:
    """A plot as a file of its own: reports bring the style along, files have to carry it."""
    style = "<style>.title{font:bold 13px sans-serif}.label,.tick{font:11px sans-serif}.grid{stroke:#ddd}</style>"
    return svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(
        'role="img">', f'role="img">{style}', 1
    )

"""Charts as SVG in the page's colours, so that they are light or dark as it is; numbers in legend and alt text."""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

SERIES = 7
"""How many series have a colour of their own; the next ones repeat the colours with other dashes."""
DOTS = 500
"""How many points of a series a scatter chart draws; of more every second, third ... one."""
_DASHES = ((), (6, 2), (2, 2), (6, 2, 2, 2))
# Stand-ins in matplotlib's SVG for the variables of the page's style, which defines them for light and dark.
_TEXT, _LINE = "#010101", "#020202"
_COLOURS = [f"#0303{number:02x}" for number in range(SERIES)]
_VARIABLES = {_TEXT: "var(--text)", _LINE: "var(--line)"}
_VARIABLES |= {colour: f"var(--series-{place})" for place, colour in enumerate(_COLOURS)}


@dataclass(frozen=True)
class Series:
    """Points under a name; `place` decides colour and dashes, and marks are for what was measured now and then."""

    name: str
    points: Sequence[tuple[float, float]]
    place: int = 0
    marked: bool = False
    lined: bool = True
    filled: bool = True
    note: str = ""  # beside the name

    @property
    def colour(self) -> int:
        """Which of the page's colours."""
        return self.place % SERIES

    @property
    def dashes(self) -> tuple[int, ...]:
        """Lengths of dashes and gaps."""
        return _DASHES[(self.place + self.place // SERIES) % len(_DASHES)]


@dataclass(frozen=True)
class Chart:
    """A drawn chart with its title, what it says in words, and its legend."""

    title: str
    svg: Markup
    alt: str
    series: Sequence[Series] = ()


def number(value: float) -> str:
    """A value in few digits.

    >>> [number(value) for value in (0.123456, 12345.6, 40.0, -1.341e-07, -0.0)]
    ['0.1235', '12,346', '40', '-1.3e-07', '0']
    """
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2g}" if 0 < abs(value) < 1e-3 else f"{value + 0.0:.4g}"  # no -0


def lines(title: str, series: Sequence[Series], x_label: str = "step", *, from_zero: bool = False) -> Chart:
    """Curves over steps."""
    figure, axes = _axes(x_label, "")
    shown = []
    for one in series:
        xs, ys = zip(*one.points, strict=True)
        marker = "o" if one.marked or len(xs) == 1 else None
        dashes = (0, one.dashes) if one.dashes else "-"
        axes.plot(xs, ys, marker=marker, markersize=4, linewidth=1.8, color=_COLOURS[one.colour], linestyle=dashes)
        shown.append(replace(one, note=number(ys[0]) if len(ys) == 1 else f"{number(ys[0])} → {number(ys[-1])}"))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    if from_zero:
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    return Chart(title, _svg(figure), f"{title}: {'; '.join(_told(one, x_label) for one in series)}.", shown)


def scatter(title: str, series: Sequence[Series], x_label: str, y_label: str) -> Chart:
    """Points, with the correlation of the two axes for each series."""
    figure, axes = _axes(x_label, y_label)
    shown, told = [], []
    for one in series:
        xs, ys = zip(*one.points, strict=True)
        colour = _COLOURS[one.colour]
        face = colour if one.filled else "none"
        every = slice(None, None, math.ceil(len(xs) / DOTS))
        axes.plot(xs[every], ys[every], "o", markersize=4.5, color=colour, markerfacecolor=face, alpha=0.8)
        note = f"correlation {correlation(one.points)}"
        shown.append(replace(one, marked=True, lined=False, note=note))
        means = f"mean {x_label} {number(sum(xs) / len(xs))}, mean {y_label} {number(sum(ys) / len(ys))}"
        told.append(f"{one.name}, {len(xs)} points, {means}, {note}")
    return Chart(title, _svg(figure), f"{title}: {'; '.join(told)}.", shown)


def bars(title: str, values: Sequence[tuple[str, float, float, int]], *, guessing: float | None = None) -> Chart:
    """Bars with their names, heights, standard errors and colours, which are places of series."""
    figure, axes = _axes("", "")
    axes.grid(visible=False, axis="x")
    names, heights, errors, places = zip(*values, strict=True)
    colours = [_COLOURS[place] for place in places]
    drawn = axes.bar(names, heights, color=colours, width=0.6, yerr=errors, ecolor=_TEXT, capsize=4)
    axes.bar_label(drawn, [f"{height:.3f}" for height in heights], fontsize=11, padding=2, color=_TEXT)
    axes.set_ylim(0, 1.2 * max(heights) or 1)
    if guessing is not None:
        axes.axhline(guessing, color=_TEXT, linewidth=1, linestyle=":")
    told = "; ".join(f"{name.replace(chr(10), ' ')} {height:.3f} ± {error:.3f}" for name, height, error, _ in values)
    return Chart(title, _svg(figure), f"{title}: {told}.")


def correlation(points: Sequence[tuple[float, float]]) -> str:
    """Pearson's, as text; it is not defined where one of the two does not vary.

    >>> correlation([(1, 1), (2, 3), (3, 2)]), correlation([(1, 1), (1, 2)])
    ('+0.50', 'undefined')
    """
    xs, ys = ([point[axis] for point in points] for axis in (0, 1))
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = math.sqrt(sum((x - x_mean) ** 2 for x in xs) * sum((y - y_mean) ** 2 for y in ys))
    return f"{sum((x - x_mean) * (y - y_mean) for x, y in points) / spread:+.2f}" if spread else "undefined"


def _told(series: Series, x_label: str) -> str:
    (first, start), (last, end) = series.points[0], series.points[-1]
    values = [value for _, value in series.points]
    if len(values) == 1:
        return f"{series.name} {number(start)} at {x_label} {first}"
    return (
        f"{series.name} from {number(start)} at {x_label} {first} to {number(end)} at {x_label} {last}, "
        f"between {number(min(values))} and {number(max(values))}"
    )


def _axes(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    """A panel that is legible on a phone: 360 units wide, as wide as one."""
    figure = Figure(figsize=(5, 3.1), layout="constrained", facecolor="none")
    axes = figure.add_subplot(facecolor="none")
    axes.grid(color=_LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=11, color=_LINE, labelcolor=_TEXT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_LINE)
    axes.set_xlabel(x_label, fontsize=11, color=_TEXT)
    axes.set_ylabel(y_label, fontsize=11, color=_TEXT)
    return figure, axes


def _svg(figure: Figure) -> Markup:
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report", "font.sans-serif": ["DejaVu Sans"]}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    box = re.search(r'viewBox="([^"]*)"', text)
    assert box is not None  # matplotlib writes one
    body = text[text.index("</defs>", text.index("<style")) + len("</defs>") :]
    body = re.sub(r' id="(?![mp][0-9a-f]{10}")[^"]*"', "", body)  # the others are alike in every chart
    for word, instead in {**_VARIABLES, "'DejaVu Sans'": "system-ui"}.items():
        body = body.replace(word, instead)
    return Markup(f'<svg viewBox="{box[1]}" aria-hidden="true">{body}')

"""before_after.png: unseen images with descriptions after SFT and after PPO, and what that comes to, for a README."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, HPacker, TextArea, VPacker
from PIL import Image

from trl_llava.demo.data import IMAGES
from trl_llava.demo.metrics import invented_objects, known
from trl_llava.demo.report import judged, standard_errors
from trl_llava.demo.stages import Stages

COLUMNS = {"sft": "after SFT", "ppo": "after PPO"}
SHARES = {"chair": "invented among\nmentioned", "recall": "mentioned among\npresent"}
EXAMPLES = 3
LINE = 26
"""Characters of a line of a description."""
# Okabe and Ito's palette, on white: it stands in pages of any colour.
INK, WRONG, RIGHT = "#222222", "#b3400a", "#0072b2"


def draw_before_and_after(stages: Stages, path: Path) -> None:
    """Draw the first unseen images about which the policy invents something after SFT, whatever PPO says of them."""
    described = enumerate(stages.evaluations["sft"].answers)
    inventions = (i for i, a in described if a.kind == "describe" and invented_objects(a.text, a.objects))
    figure = Figure(figsize=(9.6, 4.6), facecolor="white", layout="constrained")
    grid = figure.add_gridspec(EXAMPLES, 5, width_ratios=(1, 1.9, 1.9, 1, 1))
    for row, index in zip(range(EXAMPLES), inventions, strict=False):
        _example(figure, grid, row, stages, index)
    for column, (name, title) in enumerate(SHARES.items()):
        _bars(figure.add_subplot(grid[:, 3 + column]), stages, name, title)
    figure.savefig(path, dpi=100)


def _example(figure: Figure, grid: Any, row: int, stages: Stages, index: int) -> None:
    axes = figure.add_subplot(grid[row, 0])
    image = Image.open(stages.folder / "data" / IMAGES / stages.unseen[index]["images"][0])
    axes.imshow(image, interpolation="nearest")
    axes.axis("off")
    for column, (result, title) in enumerate(COLUMNS.items(), start=1):
        axes = figure.add_subplot(grid[row, column])
        axes.axis("off")
        if row == 0:
            axes.set_title(title, fontsize=12, color=INK, loc="left")
        pieces, _ = judged(stages.evaluations[result].answers[index])
        texts: list[list[Artist]] = [[_text(*piece) for piece in line] for line in wrapped(pieces)]
        lines: list[Artist] = [HPacker(children=line, pad=0, sep=0) for line in texts]
        box = VPacker(children=lines, pad=0, sep=4, align="left")
        axes.add_artist(AnnotationBbox(box, (0, 0.5), xycoords="axes fraction", box_alignment=(0, 0.5), frameon=False))


def wrapped(pieces: Sequence[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """Break marked text into lines of at most `LINE` characters, between words.

    >>> list(wrapped([("I see a red circle and a ", False), ("blue cross", True), (".", False)]))
    [[('I see a red circle and a ', False)], [('blue cross', True), ('.', False)]]
    """
    line: list[tuple[str, bool]] = []
    for text, wrong in pieces:
        for word in text.replace(" ", " \n").split("\n"):
            if line and sum(len(part) for part, _ in line) + len(word.rstrip()) > LINE and word.strip(" ."):
                yield line
                line = []
            if line and line[-1][1] == wrong:
                word = line.pop()[0] + word
            line.append((word, wrong))
    yield [part for part in line if part[0]]


def _text(text: str, wrong: bool) -> TextArea:
    style = {"color": WRONG, "weight": "bold"} if wrong else {"color": INK}
    return TextArea(text, textprops={"size": 11, **style})


def _bars(axes: Axes, stages: Stages, name: str, title: str) -> None:
    heights = [known(stages.evaluations[result].quality.as_dict()[name]) for result in COLUMNS]
    errors = [standard_errors(stages, result)[name] for result in COLUMNS]
    drawn = axes.bar(["SFT", "PPO"], heights, color=[WRONG, RIGHT], width=0.6, yerr=errors, capsize=4, ecolor=INK)
    axes.bar_label(drawn, [f"{height:.1%}" for height in heights], fontsize=11, padding=3)
    axes.set_title(title, fontsize=11, color=INK)
    axes.set_ylim(0, 1.1)  # both panels on one scale, so that bars can be compared
    axes.set_yticks([])
    axes.spines[["top", "right", "left"]].set_visible(False)

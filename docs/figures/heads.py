"""``python docs/figures/heads.py``: draws heads-light.svg and heads-dark.svg, the figure of docs/heads.md."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

matplotlib.rcParams["svg.hashsalt"] = "heads"  # the same file from every run
SIDES = (1.0, 0.5, 0.25, 0.125)
"""Of the levels' maps, relative to the largest."""
COLOURS = {"light": ("#1b1b1b", "#8a8a8a", "#c2571a", "#2f6f9f"), "dark": ("#e8e8e8", "#9a9a9a", "#f08a4b", "#6fb1e0")}


def draw(theme: str) -> Path:
    """One figure: above, the original; below, the replacement."""
    ink, pale, costly, cheap = COLOURS[theme]
    figure, axes = plt.subplots(figsize=(9, 4.6))
    axes.set_xlim(0, 18)
    axes.set_ylim(0, 9.2)
    axes.axis("off")

    def square(x: float, y: float, side: float, colour: str) -> None:
        axes.add_patch(plt.Rectangle((x, y - side / 2), side, side, fill=False, linewidth=1.6, edgecolor=colour))

    def arrow(x: float, y: float, to_x: float, to_y: float) -> None:
        axes.annotate("", (to_x, to_y), (x, y), arrowprops={"arrowstyle": "->", "color": pale, "linewidth": 1})

    def words(x: float, y: float, text: str, colour: str = ink, size: float = 9) -> None:
        axes.text(x, y, text, color=colour, ha="center", va="center", fontsize=size)

    for top, replaced in ((8.2, False), (3.6, True)):
        words(1.3, top + 0.7, "replaced" if replaced else "as written", size=11)
        for level, side in enumerate(SIDES):
            y = top - level * 0.95
            square(1.8, y, 0.9 * side, ink)
            arrow(2.9, y, 4.6, y)
            if replaced:
                words(5.2, y, f"× W{level + 1}", cheap)
                arrow(5.8, y, 7.3, y)
                square(7.5, y, 0.9 * side, cheap)
                arrow(8.6, y, 10.4, y)
                words(11.1, y, "resize" if level else "–")
            else:
                words(5.3, y, "resize" if level else "–")
                arrow(6.1, y, 7.3, y)
                square(7.5, y, 0.9, costly)
            arrow(12.0 if replaced else 8.6, y, 13.4 if replaced else 10.0, top - 1.4)
        if replaced:
            words(13.8, top - 1.4, "+", size=15)
            arrow(14.2, top - 1.4, 15.6, top - 1.4)
        else:
            words(11.3, top - 1.4, "concatenate,\n× [W1 W2 W3 W4]", costly)
            arrow(12.7, top - 1.4, 15.6, top - 1.4)
        square(15.9, top - 1.4, 0.9, ink)
        words(17.7, top - 1.4, "norm, …")
    path = Path(__file__).with_name(f"heads-{theme}.svg")
    figure.savefig(path, transparent=True, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    return path


if __name__ == "__main__":
    for theme in COLOURS:
        print(draw(theme))

"""Draws ``algebra-light.svg`` and ``algebra-dark.svg``: the published chain of an AFNB above the collapsed one.

    python docs/figures/algebra.py

A bar is a matrix: its width stands for channels, its height for rows. Tall bars have one row per pixel, low ones have
one row per pooled token.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

WIDTH, HEIGHT = 1000, 635
PIXELS, TOKENS = 120, 16  # heights of a bar
CHANNELS_PER_UNIT = 24  # channels of one unit of width
FONT = "ui-sans-serif, system-ui, 'Segoe UI', Helvetica, Arial, sans-serif"


class Theme(NamedTuple):
    """Colours of one file."""

    background: str
    text: str
    faint: str
    pixel: str
    token: str


THEMES = {
    "light": Theme("#ffffff", "#1f2328", "#59636e", "#8db9ee", "#f0a35e"),
    "dark": Theme("#0d1117", "#e6edf3", "#9198a1", "#3f6ea8", "#c77b35"),
}


class Drawing:
    """SVG elements, collected in drawing order."""

    def __init__(self, theme: Theme) -> None:
        self.theme = theme
        self.elements: list[str] = []

    def text(self, x: float, y: float, text: str, *, size: int = 14, bold: bool = False, faint: bool = False) -> None:
        colour = self.theme.faint if faint else self.theme.text
        weight = ' font-weight="600"' if bold else ""
        self.elements.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}"{weight} fill="{colour}" text-anchor="middle">{text}</text>'
        )

    def heading(self, y: float, title: str, explanation: str) -> None:
        self.elements.append(
            f'<text x="24" y="{y}" font-size="18" font-weight="600" fill="{self.theme.text}">{title}'
            f'<tspan font-size="14" font-weight="400" fill="{self.theme.faint}" dx="12">{explanation}</tspan></text>'
        )

    def bar(self, x: float, centre: float, channels: int, *, tokens: bool, name: str, shape: str) -> float:
        """Draw a matrix whose left edge is at ``x``; returns its right edge."""
        width, height = max(channels / CHANNELS_PER_UNIT, 10), TOKENS if tokens else PIXELS
        colour = self.theme.token if tokens else self.theme.pixel
        self.elements.append(
            f'<rect x="{x:g}" y="{centre - height / 2:g}" width="{width:g}" height="{height}" rx="2" fill="{colour}"/>'
        )
        self.text(x + width / 2, centre - height / 2 - 10, name, bold=True)
        self.text(x + width / 2, centre + height / 2 + 18, shape, size=12, faint=True)
        return x + width

    def arrow(self, x: float, y: float, to_x: float, to_y: float, label: str = "", lift: float = 8) -> None:
        self.elements.append(
            f'<line x1="{x:g}" y1="{y:g}" x2="{to_x:g}" y2="{to_y:g}" stroke="{self.theme.faint}" stroke-width="1.5" '
            f'marker-end="url(#tip)"/>'
        )
        if label:
            self.text((x + to_x) / 2, (y + to_y) / 2 - lift, label, size=13)

    def svg(self) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
            f'height="{HEIGHT}" font-family="{FONT}" role="img">\n'
            f"<title>The published chain of an AFNB and the collapsed one</title>\n"
            f'<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{self.theme.faint}"/></marker></defs>\n'
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="{self.theme.background}"/>\n'
        )
        return head + "\n".join(self.elements) + "\n</svg>\n"


def draw(theme: Theme) -> str:
    """The figure in one theme."""
    drawing = Drawing(theme)
    _published(drawing)
    drawing.elements.append(f'<line x1="24" y1="276" x2="976" y2="276" stroke="{theme.faint}" stroke-opacity="0.35"/>')
    _collapsed(drawing)
    return drawing.svg()


def _published(drawing: Drawing) -> None:
    drawing.heading(36, "Published", "six of seven matrices have one row for each of the N pixels")
    y = 150
    low = drawing.bar(30, y, 1024, tokens=False, name="X_l", shape="N × 1024")
    value = drawing.bar(150, y, 256, tokens=False, name="", shape="N × 256")
    drawing.arrow(low + 6, y, 144, y, "W_v")
    pooled = drawing.bar(242, y, 256, tokens=True, name="V", shape="110 × 256")
    drawing.arrow(value + 6, y, 236, y, "pool")
    context = drawing.bar(352, y, 256, tokens=False, name="A·V", shape="N × 256")
    drawing.arrow(pooled + 6, y, 346, y, "A ·")
    out = drawing.bar(450, y, 2048, tokens=False, name="context", shape="N × 2048")
    drawing.arrow(context + 6, y, 444, y, "W_o")
    joined = drawing.bar(604, y, 4096, tokens=False, name="[context, X_h]", shape="N × 4096")
    drawing.arrow(out + 6, y, 598, y, "join")
    drawing.bar(890, y, 2048, tokens=False, name="out", shape="N × 2048")
    drawing.arrow(joined + 6, y, 884, y, "[W_1 W_2]")


def _collapsed(drawing: Drawing) -> None:
    drawing.heading(312, "Collapsed", "the same result: everything linear behind the attention acts on 110 tokens")
    chain, high, out = 405, 540, 470  # heights at which the chain of tokens, X_h and the output are centred
    low = drawing.bar(30, chain, 1024, tokens=False, name="X_l", shape="N × 1024")
    pooled = drawing.bar(150, chain, 1024, tokens=True, name="PᵀX_l", shape="110 × 1024")
    drawing.arrow(low + 6, chain, 144, chain, "pool")
    value = drawing.bar(268, chain, 256, tokens=True, name="V", shape="110 × 256")
    drawing.arrow(pooled + 6, chain, 262, chain, "W_v")
    context = drawing.bar(370, chain, 2048, tokens=True, name="V W_o", shape="110 × 2048")
    drawing.arrow(value + 6, chain, 364, chain, "W_o")
    tokens = drawing.bar(536, chain, 2048, tokens=True, name="U", shape="110 × 2048")
    drawing.arrow(context + 6, chain, 530, chain, "W_1")
    features = drawing.bar(536, high, 2048, tokens=False, name="X_h", shape="N × 2048")
    drawing.bar(890, out, 2048, tokens=False, name="out", shape="N × 2048")
    drawing.arrow(tokens + 6, chain, 884, out - 12, "A ·")
    drawing.arrow(features + 6, high, 884, out + 12, "W_2", lift=-20)
    drawing.text(755, out + 5, "+  c  +", size=14)


def main() -> None:
    for name, theme in THEMES.items():
        Path(__file__).with_name(f"algebra-{name}.svg").write_text(draw(theme))


if __name__ == "__main__":
    main()

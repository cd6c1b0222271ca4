"""Draw the badges of README.md from what the repository says of itself: python docs/badges.py

No service is asked, so that a badge cannot say more than pyproject.toml and versions.py do.
"""

import re
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).parents[1]
FILE = ROOT / "docs" / "img" / "badges.svg"
HEIGHT, GAP, PADDING = 20, 8, 7
#: Pixels of a letter of 11 px Verdana, on average; textLength fits the letters to it everywhere.
LETTER = 6.6
LABEL, VALUE = "#555", "#12557a"


def badges() -> list[tuple[str, str]]:
    """Return label and value of every badge."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    source = (ROOT / "sdgp_cusparselt" / "versions.py").read_text(encoding="utf-8")
    version = _found(r'^__version__ = "([^"]+)"', source)
    pythons = re.findall(r"Python :: (3\.\d+)", project)
    licence = _found(r'^license = "([^"]+)"', project)
    torch = _found(r'"torch>=([\d.]+)"', project)
    return [
        ("version", version),
        ("Python", f"{pythons[0]} to {pythons[-1]}"),
        ("torch", f"{torch} or later"),
        ("licence", licence),
        ("GPU results", "none yet" if not (ROOT / "bench" / "results").is_dir() else "measured"),
    ]


def drawing(pairs: list[tuple[str, str]]) -> str:
    """Return one SVG with a badge for each pair."""
    parts, x = [], 0.0
    for pair in pairs:
        for text, fill in zip(pair, (LABEL, VALUE), strict=True):
            width = len(text) * LETTER + 2 * PADDING
            parts.append(f'<rect x="{x:.1f}" width="{width:.1f}" height="{HEIGHT}" fill="{fill}"/>')
            length = f'textLength="{width - 2 * PADDING:.1f}" lengthAdjust="spacingAndGlyphs"'
            parts.append(f'<text x="{x + PADDING:.1f}" y="14" {length}>{escape(text)}</text>')
            x += width
        x += GAP
    said = escape("; ".join(f"{label}: {value}" for label, value in pairs))
    size = f'width="{x - GAP:.0f}" height="{HEIGHT}"'
    style = 'fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11"'
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" {style}>']
    return "\n".join([*lines, f"<title>{said}</title>", *parts, "</svg>", ""])


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.MULTILINE)
    if match is None:
        raise ValueError(f"badges: text must hold {pattern}, got none of it.")
    return match[1]


if __name__ == "__main__":
    FILE.write_text(drawing(badges()), encoding="utf-8")

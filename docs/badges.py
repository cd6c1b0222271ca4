"""Draw the badges of README.md from what the repository says of itself: python docs/badges.py

No service is asked, so that a badge cannot say more than pyproject.toml and versions.py do.
"""

import re
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "img" / "badges"
HEIGHT, PADDING = 20, 7
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
    results = (ROOT / "bench" / "results").glob("*/*.json")
    cards = {path.parent.name for path in results} - {"cpu"}
    return [
        ("version", version),
        ("Python", f"{pythons[0]} to {pythons[-1]}"),
        ("torch", f"{torch} or later"),
        ("licence", licence),
        ("GPU results", "measured" if cards else "none yet"),
    ]


def drawing(label: str, value: str) -> str:
    """Return a badge as SVG."""
    parts, x = [], 0.0
    for text, fill in ((label, LABEL), (value, VALUE)):
        width = len(text) * LETTER + 2 * PADDING
        parts.append(f'<rect x="{x:.1f}" width="{width:.1f}" height="{HEIGHT}" fill="{fill}"/>')
        length = f'textLength="{width - 2 * PADDING:.1f}" lengthAdjust="spacingAndGlyphs"'
        parts.append(f'<text x="{x + PADDING:.1f}" y="14" {length}>{escape(text)}</text>')
        x += width
    size = f'width="{x:.0f}" height="{HEIGHT}"'
    style = 'fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11"'
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" {style}>']
    return "\n".join(
        [*lines, f"<title>{escape(label)}: {escape(value)}</title>", *parts, "</svg>", ""]
    )


def files() -> dict[Path, str]:
    """Return what stands in which file."""
    return {path_of(label): drawing(label, value) for label, value in badges()}


def path_of(label: str) -> Path:
    """Return the file of a badge."""
    return FOLDER / f"{label.lower().replace(' ', '-')}.svg"


def markdown() -> str:
    """Return the line of README.md that shows them."""
    pictures = []
    for label, value in badges():
        place = path_of(label).relative_to(ROOT).as_posix()
        pictures.append(f"![{label}: {value}]({place})")
    return "\n".join(pictures)


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.MULTILINE)
    if match is None:
        raise ValueError(f"badges: text must hold {pattern}, got none of it.")
    return match[1]


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")

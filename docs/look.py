"""Take pictures of the documentation in a browser, light and dark, wide and narrow, and measure it.

python docs/look.py [--site site] [--out build/look] [--pages index,readme] [--height 900]

Needs a site that mkdocs built (make docs) and Chromium (of Debian: apt-get install chromium). Each
picture shows a page in a frame of 1280 pixels beside one of 400. A page that is wider than its
frame, or a table or a picture that leaves it, is an error: what a narrow screen cannot show whole
must scroll inside its own box.
"""

import argparse
import functools
import html
import http.server
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import markdown

ROOT = Path(__file__).parents[1]
WIDTHS = (1280, 400)
#: An error page, and one of hundreds of screens; both can be asked for by --pages.
LEFT_OUT = ("404", "internals")
#: Blink's numbers of the two colour schemes that a page can be asked for.
SCHEMES = {"light": 1, "dark": 0}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
#: Without the network flags Chromium asks its maker's hosts for updates at every start.
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run")
FLAGS += ("--disable-sync", "--disable-background-networking", "--disable-component-update")
FLAGS += ("--disable-dev-shm-usage", "--hide-scrollbars")
#: The page with two frames. Once both are loaded it writes what does not fit into its own body.
FRAMES = """<!doctype html><meta charset="utf-8"><title>look</title>
<style>body {{ margin: 0; display: flex; gap: 20px; background: #888; }}
iframe {{ border: 0; height: {height}px; background: #fff; }}</style>
{frames}
<script>
addEventListener("load", () => setTimeout(() => {{
  for (const frame of document.querySelectorAll("iframe")) {{
    const page = frame.contentDocument, width = frame.clientWidth, found = [];
    if (page.documentElement.scrollWidth > width)
      found.push("the page is " + page.documentElement.scrollWidth + " wide");
    for (const box of page.querySelectorAll("table, img, pre, svg.figure")) {{
      let scrolls = false;
      for (let up = box; up; up = up.parentElement)
        scrolls ||= ["auto", "scroll"].includes(frame.contentWindow.getComputedStyle(up).overflowX);
      const right = box.getBoundingClientRect().right;
      if (!scrolls && right > width + 1)
        found.push("a " + box.tagName + " ends at " + Math.round(right));
    }}
    for (const what of found)
      document.body.insertAdjacentHTML("beforeend", `<p class="bad">${{width}}: ${{what}}</p>`);
  }}
  document.body.insertAdjacentHTML("beforeend", '<p class="done" hidden></p>');
}}, 400));
</script>"""
#: About what a code host makes of a README.
README_STYLE = """
body { font: 16px/1.5 sans-serif; max-width: 920px; margin: 0 auto; padding: 24px; color: #1f2328;
  overflow-wrap: break-word; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { border: 1px solid #d1d9e0; padding: 6px 13px; }
pre { background: #f6f8fa; padding: 16px; overflow-x: auto; } img { max-width: 100%; }
code { background: #f6f8fa; font-size: 85%; } pre code { background: none; }
h1, h2 { border-bottom: 1px solid #d1d9e0; padding-bottom: .3em; } a { color: #0969da; }
@media (prefers-color-scheme: dark) {
  body { background: #0d1117; color: #f0f6fc; } a { color: #4493f8; }
  pre, code { background: #151b23; } th, td, h1, h2 { border-color: #3d444d; }
}
"""


def main(arguments: list[str] | None = None) -> int:
    """Write the pictures; return 1 if something does not fit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--site", type=Path, default=ROOT / "site")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "look")
    parser.add_argument("--pages", default="", help="names without .html")
    parser.add_argument("--height", type=int, default=900, help="pixels from the top")
    options = parser.parse_args(arguments)
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        parser.error("no Chromium on the PATH. Run: apt-get install chromium")
    if not (options.site / "index.html").exists():
        parser.error(f"--site must be a built site, got {options.site}. Run: make docs")
    wrong = []
    with (
        tempfile.TemporaryDirectory() as made,
        served(assemble(options.site, folder := Path(made))) as url,
    ):
        names = sorted(path.stem for path in folder.glob("site/*.html"))
        every = [name for name in names if name not in LEFT_OUT]
        asked = options.pages.split(",") if options.pages else every
        if unknown := set(asked) - set(names):
            parser.error(f"--pages must be of {', '.join(names)}, got {', '.join(unknown)}")
        options.out.mkdir(parents=True, exist_ok=True)
        out = options.out.resolve()
        for name in asked:
            frames_page(folder / "frames.html", name, options.height)
            for scheme in SCHEMES:
                path = out / f"{name}-{scheme}.png"
                show(browser, f"{url}/frames.html", scheme, options.height, f"--screenshot={path}")
                print(path, flush=True)
            wrong += [f"{name}: {text}" for text in misfits(browser, f"{url}/frames.html")]
    print(*wrong, sep="\n", file=sys.stderr)
    return bool(wrong)


def assemble(site: Path, folder: Path) -> Path:
    """Put the site, and the README as a page of its own, below one folder to serve."""
    shutil.copytree(site, folder / "site")
    # Pictures are named from the root of the repository there.
    shutil.copytree(ROOT / "docs" / "img", folder / "site" / "docs" / "img")
    (folder / "site" / "readme.html").write_text(readme_page(), encoding="utf-8")
    return folder


def readme_page() -> str:
    """Return README.md as HTML, about as a code host shows it."""
    text = re.sub(r"^```(\w+)[^\n]*$", r"```\1", (ROOT / "README.md").read_text(), flags=re.M)
    body = markdown.markdown(text, extensions=["tables", "fenced_code"])
    head = '<meta charset="utf-8"><meta name="color-scheme" content="light dark">'
    return f"<!doctype html>{head}<title>README</title><style>{README_STYLE}</style>{body}"


def frames_page(path: Path, name: str, height: int) -> None:
    """Write the page that shows ``name`` in a frame of each width."""
    source = html.escape(f"site/{name}.html")
    frames = "".join(f'<iframe src="{source}" width="{width}"></iframe>' for width in WIDTHS)
    path.write_text(FRAMES.format(frames=frames, height=height), encoding="utf-8")


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder on the loopback while the block runs; yields its address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def show(browser: str, url: str, scheme: str, height: int, wish: str) -> str:
    """Open an address in a new browser, have it do what ``wish`` says, and return its output."""
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, *FLAGS, f"--user-data-dir={profile}", "--virtual-time-budget=8000"]
        command += [f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}"]
        command += [f"--window-size={sum(WIDTHS) + 20},{height}", wish, url]
        return subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=300
        ).stdout


def misfits(browser: str, url: str) -> list[str]:
    """Return what does not fit into a frame; colours do not matter here."""
    dom = show(browser, url, "light", 900, "--dump-dom")
    if '<p class="done"' not in dom:
        raise RuntimeError(f"misfits: {url} did not load in the browser")
    return re.findall(r'<p class="bad">(\d.*?)</p>', dom)


if __name__ == "__main__":
    sys.exit(main())

"""A page in a headless Chromium of the system, at the width of a phone or a screen, light or dark.

The page lies in an iframe of that width, since a browser's own window has a least one; what the iframe measures is read
from the outer page's DOM. `python tests/headless_chromium.py PAGE OUT.png [--width 390] [--height 844] [--dark] [--top 0]` takes a screenshot.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

SECONDS = 90  # of one run, on a busy machine
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--allow-file-access-from-files",
    "--no-first-run",
    "--disable-background-networking",
    "--force-device-scale-factor=1",
    "--virtual-time-budget=4000",
)
MEASURE = """
<pre id="said"></pre><script>
addEventListener("load", () => {
  const said = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, root = page.scrollingElement;
    const wide = [...page.querySelectorAll("body *")].filter(e => {
      const box = e.getBoundingClientRect();
      return box.width && box.right > root.clientWidth + 0.5 && !e.closest(".scroll, pre, nav, svg");
    });
    return {
      width: root.clientWidth, scroll: root.scrollWidth, height: root.scrollHeight,
      wide: wide.map(e => e.outerHTML.slice(0, 90)),
      background: frame.contentWindow.getComputedStyle(page.body).backgroundColor,
      ink: frame.contentWindow.getComputedStyle(page.body).color,
      asked: frame.contentWindow.performance.getEntriesByType("resource").map(e => e.name),
      images: [...page.images].every(i => i.complete && i.naturalWidth > 0),
      small: [...page.querySelectorAll("svg text")].filter(t => t.getBoundingClientRect().height).map(
        t => t.getBoundingClientRect().height).reduce((a, b) => Math.min(a, b), 999),
      cut: [...page.querySelectorAll("svg text")].filter(t => {
        const box = t.getBoundingClientRect(), own = t.closest("svg").getBoundingClientRect();
        return box.width && (box.left < own.left - 2 || box.right > own.right + 2);
      }).map(t => t.textContent),
    };
  });
  document.getElementById("said").textContent = JSON.stringify(said);
});
</script>
"""


def found() -> str | None:
    """The browser's command, None where there is none."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def measured(page: Path, widths: tuple[int, ...], *, dark: bool) -> list[dict[str, Any]]:
    """What the page measures at each width."""
    with tempfile.TemporaryDirectory() as home:
        outer = Path(home) / "outer.html"
        outer.write_text(framed(page, [(width, 900) for width in widths]) + MEASURE)
        dom = run("--dump-dom", outer.as_uri(), home=home, dark=dark)
    said = re.search(r'<pre id="said">(.+?)</pre>', dom, re.DOTALL)
    assert said, dom[-2000:]
    return json.loads(html.unescape(said[1]))


def screenshot(page: Path, out: Path, width: int, height: int, *, dark: bool, top: int = 0) -> None:
    """`height` pixels of the page from `top` on."""
    with tempfile.TemporaryDirectory() as home:
        outer = Path(home) / "outer.html"
        outer.write_text(framed(page, [(width, top + height)], top))
        size = f"--window-size={max(width, 500)},{height}"
        run(f"--screenshot={Path(home) / 'shot.png'}", size, outer.as_uri(), home=home, dark=dark)
        from PIL import Image

        Image.open(Path(home) / "shot.png").crop((0, 0, width, height)).save(out, optimize=True)


def framed(page: Path, sizes: list[tuple[int, int]], top: int = 0) -> str:
    frames = "".join(
        f'<iframe src="{page.resolve().as_uri()}" style="border:0;display:block;width:{w}px;height:{h}px;margin-top:-{top}px"></iframe>'
        for w, h in sizes
    )
    return f'<!doctype html><meta charset="utf-8"><body style="margin:0;overflow:hidden">{frames}'


def run(*arguments: str, home: str, dark: bool) -> str:
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    command = [str(found()), *FLAGS, scheme, f"--user-data-dir={home}/profile", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True).stdout


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("page", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=900)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--top", type=int, default=0)
    args = parser.parse_args()
    screenshot(args.page, args.out, args.width, args.height, dark=args.dark, top=args.top)

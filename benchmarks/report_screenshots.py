"""Draw two parts of a run's report as a browser shows them: pictures of docs/howto.

    make demo
    python -m benchmarks.report_screenshots runs/demo

Writes ``report.png`` (the verdict, the gains and the table) and ``progress.png`` (reward and path
KL). Chromium or Chrome has to be there; nothing is fetched.
"""

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from PIL import Image

HOWTO = Path(__file__).parent.parent / "docs" / "howto"
BROWSERS = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome")
PARTS = {"report": None, "progress": "Progress"}  # a picture's name, the heading of its part
WIDTH, HEIGHT, MARGIN = 1160, 3000, 10  # pixels; a part is lower than HEIGHT
SECONDS = 60  # that a browser may take for a page


def browser_path(named: str | None = None) -> str:
    """The path of the browser that draws.

    Args:
        named: a program, or its path; the first of ``BROWSERS`` that there is by default.

    Raises:
        FileNotFoundError: there is none.
    """
    for name in BROWSERS if named is None else (named,):
        if path := shutil.which(name):
            return path
    raise FileNotFoundError(
        f"the pictures are drawn by a browser, but there is no {named or ', '.join(BROWSERS)}; "
        "install Chromium, or name it: --browser PATH"
    )


def part(report: str, heading: str | None) -> str:
    """A report with one of its parts alone.

    Args:
        report: HTML that ``write_report`` has written.
        heading: of the part; None is what stands before the first heading.

    Raises:
        ValueError: the report has no such part.
    """
    before, body, after = re.split(r"(?<=<body>)|(?=</body>)", report)
    parts = re.split(r"(?=<h2>)", body)
    for text in parts[:1] if heading is None else parts[1:]:
        if heading is None or text.startswith(f"<h2>{heading}</h2>"):
            return before + text + after
    raise ValueError(f"the report has no part {heading!r}; a run of two updates and more has")


def drawn(page: str, program: str) -> Image.Image:
    """What a browser shows of a page, without what is empty above and below.

    Args:
        page: HTML.
        program: the browser's path.

    Raises:
        RuntimeError: the browser failed, or left no picture.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "page.html").write_text(page, encoding="utf-8")
        command = [program, "--headless", "--disable-gpu", "--hide-scrollbars"]
        command += ["--force-device-scale-factor=1", f"--window-size={WIDTH},{HEIGHT}"]
        command += [f"--user-data-dir={folder / 'profile'}"]
        command += [f"--screenshot={folder / 'page.png'}"]
        if os.geteuid() == 0:
            command += ["--no-sandbox"]  # Chromium has none for root
        command += [(folder / "page.html").as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        if done.returncode or not (folder / "page.png").is_file():
            raise RuntimeError(
                f"{program} left no picture (exit code {done.returncode}): {done.stderr[-1000:]}"
            )
        return cropped(Image.open(folder / "page.png").convert("RGB"))


def cropped(picture: Image.Image) -> Image.Image:
    """A picture's rows that are not all background (the colour of its last corner), and a margin.

    Raises:
        ValueError: it is all background, or not even its last row is.
    """
    pixels = np.asarray(picture)
    rows = np.flatnonzero((pixels != pixels[-1, -1]).any((1, 2)))
    if not len(rows) or rows[-1] == len(pixels) - 1:
        raise ValueError("the browser's picture is empty, or cut off below: raise HEIGHT")
    top, bottom = max(0, int(rows[0]) - MARGIN), min(len(pixels), int(rows[-1]) + 1 + MARGIN)
    return picture.crop((0, top, picture.width, bottom))


def main(
    run: Annotated[Path, tyro.conf.Positional], output: Path = HOWTO, browser: str | None = None
) -> None:
    """Draw them.

    Args:
        run: folder of a finished run.
        output: folder of the pictures.
        browser: Chromium or Chrome, by name or path; the first that there is by default.
    """
    report = (run / "report.html").read_text(encoding="utf-8")
    program = browser_path(browser)
    for name, heading in PARTS.items():
        made = drawn(part(report, heading), program).quantize(256)
        made.save(output / f"{name}.png", format="PNG", optimize=True)
        print(output / f"{name}.png")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)

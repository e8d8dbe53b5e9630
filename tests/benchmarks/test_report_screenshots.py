"""Pictures of a report: one part each, drawn by a browser, cut to what is seen."""

import sys

import numpy as np
import pytest
from PIL import Image

from benchmarks import report_screenshots as screenshots

REPORT = (
    "<!doctype html>\n<html><head><style>p{}</style></head><body><header>run</header>"
    "<h2>Progress</h2><p>curve</p><h2>Settings</h2><p>all</p></body></html>\n"
)
# Chromium's place: it writes a picture whose colour says which part the page had.
BROWSER = """#!{python}
import sys
from pathlib import Path
from urllib.parse import unquote, urlparse
from PIL import Image, ImageDraw
options = dict(w.split("=", 1) for w in sys.argv[1:] if "=" in w)
page = Path(unquote(urlparse(sys.argv[-1]).path)).read_text()
colour = "red" if "curve" in page else "blue"
picture = Image.new("RGB", tuple(int(n) for n in options["--window-size"].split(",")), "white")
ImageDraw.Draw(picture).rectangle((5, 40, 20, 59), fill=colour)
picture.save(options["--screenshot"])
"""


def program(folder, text):
    path = folder / "browser"
    path.write_text(text.format(python=sys.executable))
    path.chmod(0o755)
    return str(path)


def test_a_part_is_the_report_without_the_others():
    progress = screenshots.part(REPORT, "Progress")
    assert "curve" in progress
    assert "<style>p{}</style>" in progress
    assert progress.endswith("</body></html>\n")
    assert "run" not in progress.split("<body>")[1]
    assert "all" not in progress
    first = screenshots.part(REPORT, None)
    assert "run" in first
    assert "curve" not in first


def test_a_part_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="no part 'Frontier'"):
        screenshots.part(REPORT, "Frontier")


def test_a_picture_is_cut_to_its_rows_and_a_margin():
    picture = Image.new("RGB", (30, 200), "white")
    picture.paste("black", (3, 50, 6, 70))
    made = np.asarray(screenshots.cropped(picture))
    assert made.shape == (20 + 2 * screenshots.MARGIN, 30, 3)
    assert (made[screenshots.MARGIN, 3] == 0).all()
    assert (made[-1 - screenshots.MARGIN, 3] == 0).all()


@pytest.mark.parametrize("until", [0, 200])
def test_a_picture_that_shows_nothing_or_not_all_is_refused(until):
    picture = Image.new("RGB", (30, 200), "white")
    picture.paste("black", (3, 0, 6, until))
    with pytest.raises(ValueError, match="empty, or cut off"):
        screenshots.cropped(picture)


def test_the_command_writes_a_picture_of_each_part(tmp_path):
    (tmp_path / "report.html").write_text(REPORT)
    screenshots.main(tmp_path, tmp_path, program(tmp_path, BROWSER))
    for name, colour in (("report", (0, 0, 255)), ("progress", (255, 0, 0))):
        picture = Image.open(tmp_path / f"{name}.png").convert("RGB")
        assert picture.size == (screenshots.WIDTH, 20 + 2 * screenshots.MARGIN)
        assert picture.getpixel((6, screenshots.MARGIN + 1)) == colour


def test_without_a_browser_it_is_said_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"chromium, .*install Chromium, .*: --browser"):
        screenshots.browser_path()
    with pytest.raises(FileNotFoundError, match="there is no no-browser;"):
        screenshots.browser_path("no-browser")


def test_a_browser_that_fails_is_told_with_its_words(tmp_path):
    failing = program(tmp_path, "#!/bin/sh\necho no display >&2\nexit 3\n")
    with pytest.raises(RuntimeError, match=r"left no picture \(exit code 3\): no display"):
        screenshots.drawn(REPORT, failing)

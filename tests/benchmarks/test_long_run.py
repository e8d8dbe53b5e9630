"""Some hundred updates of the cheapest run: memory is flat, files follow their rules."""

import mmap

import pytest

from benchmarks import long_run
from diffusion_envs.runs.tracking import stays

UPDATES, EVERY = 200, 4


class Leaking(long_run.Watched):
    """Keeps some bytes of every call, in pages of its own: no free place of the heap takes them.

    As many as make three times the growth that is allowed, whatever this process holds already.
    """

    def __call__(self, images, prompts):
        if not self.resident:
            self.kept = []
            self.size = round(3 * long_run.GROWTH * long_run.resident() / (UPDATES // 2))
        page = mmap.mmap(-1, self.size)
        page.write(b"\1" * self.size)
        self.kept.append(page)
        return super().__call__(images, prompts)


@pytest.mark.slow
@pytest.mark.usefixtures("as_users_run_it")
def test_memory_is_flat_and_pictures_thin_out(tmp_path):
    made = long_run.run(tmp_path, UPDATES, 30, picture_every=EVERY)
    assert made.updates == UPDATES
    assert made.growth <= long_run.GROWTH
    assert made.report <= long_run.REPORT
    assert made.flat
    left = sorted(int(p.stem[5:]) for p in (tmp_path / "run" / "samples").glob("step-*.png"))
    assert left == [u for u in range(0, UPDATES + 1, EVERY) if stays(u, UPDATES, EVERY)]
    assert len(left) < UPDATES / EVERY
    assert made.files["checkpoints"] == 2 * 3


@pytest.mark.slow
@pytest.mark.usefixtures("as_users_run_it")
def test_a_leak_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(long_run, "Watched", Leaking)
    made = long_run.run(tmp_path, UPDATES // 2, 3)
    assert made.bytes_an_update > 0
    assert not made.flat

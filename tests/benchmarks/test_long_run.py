"""Some hundred updates of the cheapest run: memory is flat, files follow their rules."""

import mmap

import pytest

from benchmarks import long_run
from diffusion_envs.runs.tracking import stays

UPDATES, EVERY = 200, 4


class Leaking(long_run.Watched):
    """Keeps 100 kB of every call, in pages of its own: no free place of the heap takes them."""

    def __call__(self, images, prompts):
        page = mmap.mmap(-1, 10**5)
        page.write(b"\1" * 10**5)
        self.kept = [*getattr(self, "kept", []), page]
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
    assert made.bytes_an_update > 5e4
    assert not made.flat

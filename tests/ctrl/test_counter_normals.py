"""Normals by counter: what a number depends on, in both implementations."""

import numpy as np
import pytest
from scipy import stats

from ctrl import compiled_normals, drawn_ahead
from ctrl.compiled_normals import CompiledRows
from ctrl.counter_normals import fill, key_of

KEY = key_of(3, "test")
DTYPES = [np.float32, np.float64]


def drawn(dtype, rows=3, groups=4, row=0, group=0, key=KEY, scales=None):
    out = np.empty((rows, 256 * groups), dtype)
    scales = np.ones(rows) if scales is None else scales
    fill(out, key, row=row, group=group, scales=scales)
    return out


@pytest.fixture(scope="module")
def library():
    built = compiled_normals.build()
    if built is None:
        pytest.skip("no C compiler on this machine")
    return built


def test_the_words_are_those_of_philox():
    """Known answers of Random123 for Philox4x64-10: that of the counter 0 and key 0."""
    drawn = np.random.Philox(key=np.zeros(2, np.uint64), counter=np.zeros(4, np.uint64))
    drawn.advance(2**256 - 1)  # numpy counts before it draws
    want = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert drawn.random_raw(4).tolist() == want


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_number_depends_on_its_key_row_and_place_alone(dtype):
    whole = drawn(dtype, rows=5, groups=6)
    assert np.array_equal(drawn(dtype, rows=2, groups=3, row=3, group=2), whole[3:, 512:1280])
    assert np.array_equal(drawn(dtype, rows=1, groups=1, row=4, group=5), whole[4:, 1280:])
    assert len(np.unique(whole)) > 0.999 * whole.size
    assert not np.any(whole == drawn(dtype, rows=5, groups=6, key=key_of(3, "other")))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_formula_is_that_of_box_and_muller(dtype):
    """Against the C library's logarithm, sine and cosine in double precision."""
    got = drawn(dtype, rows=1, groups=200).reshape(-1, 2, 128).astype(np.float64)
    words = 128 if dtype == np.float32 else 256
    bits = np.random.Philox(key=KEY, counter=np.zeros(4, np.uint64)).random_raw(200 * words)
    if dtype == np.float32:
        radii, angles = bits.view(np.uint32).reshape(-1, 2, 128).swapaxes(0, 1)
        u = ((radii >> 1) + 0.5) / 2**31
        angle = ((angles >> 8) + 0.5) / 2**24
    else:
        radii, angles = bits.reshape(-1, 2, 128).swapaxes(0, 1)
        u = ((radii >> 12) + 0.5) / 2**52
        angle = ((angles >> 12) + 0.5) / 2**52
    turn = (angle - 0.5) * np.pi / 2
    radius = np.where(radii & 1, -1, 1) * np.sqrt(-2 * np.log(u))
    nearer, other = radius * np.cos(turn), radius * np.sin(turn)
    swapped = angles & 1
    want = np.stack([np.where(swapped, other, nearer), np.where(swapped, nearer, other)], axis=1)
    # where u is near 1, its rounding in the dtype is that of -log u, of which the root is taken
    eps = np.finfo(dtype).eps
    error = 8 * eps * np.abs(want) + np.minimum(2 * eps / np.abs(radius), np.sqrt(2 * eps))[:, None]
    assert np.all(np.abs(got - want) <= error)


@pytest.mark.parametrize("dtype", DTYPES)
def test_they_are_standard_normals(dtype):
    numbers = drawn(dtype, rows=20, groups=200).astype(np.float64)  # a million
    n = numbers.size
    # Kolmogorov-Smirnov at one in a million; a variance 1 % off has 0.0024, 5 times the bound
    assert stats.kstest(numbers.ravel(), "norm").statistic < 2.7 / n**0.5
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs((numbers**power).mean() - moment) < 5 * (variance / n) ** 0.5
    assert np.abs(numbers).max() > 4.4  # 10 of a million are expected beyond
    first, second = numbers.reshape(-1, 2, 128).swapaxes(0, 1)
    pairs = [(first, second), (first**2, second**2), (numbers[:-1], numbers[1:])]
    pairs += [(numbers[:, :-256], numbers[:, 256:]), (numbers[:, :-1], numbers[:, 1:])]
    pairs += [(numbers, drawn(dtype, rows=20, groups=200, key=key_of(4, "test")))]
    for one, other in pairs:
        r = np.corrcoef(one.ravel(), other.ravel())[0, 1]
        assert abs(r) < 5 / one.size**0.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "groups", "row", "group"), [(3, 70, 5, 3), (9, 1, 0, 2**40)])
def test_the_compiled_numbers_are_the_same_bits(library, dtype, rows, groups, row, group):
    scales = np.linspace(0.3, 0.9, rows)
    want = drawn(dtype, rows, groups, row, group, scales=scales)
    got = np.empty_like(want)
    CompiledRows(library, got, KEY, row, group, scales, piece=3).draw_all()
    assert got.tobytes() == want.tobytes()


def test_scales_are_one_multiplication():
    scales = np.array([0.3, 1.7, 0.01])
    want = drawn(np.float32) * scales.astype(np.float32)[:, None]
    assert np.array_equal(drawn(np.float32, scales=scales), want)


@pytest.mark.parametrize("compiler", [True, False], ids=["compiled", "numpy"])
@pytest.mark.parametrize("numbers", [range(0, 512), range(100, 900), range(7, 8), range(0, 40000)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_the_same_for_any_number_of_threads(
    monkeypatch, request, compiler, numbers, dtype
):
    library = request.getfixturevalue("library") if compiler else None
    monkeypatch.setattr(drawn_ahead, "compiled", lambda numbers: library)
    monkeypatch.setattr(drawn_ahead, "_cores", lambda: 8)
    scales = np.linspace(0.3, 0.9, 100).tolist()
    first, last = numbers.start // 256, -(-numbers.stop // 256)
    want = drawn(dtype, 100, last - first, group=first, scales=np.array(scales))
    begin = numbers.start - 256 * first
    want = want[:, begin : begin + len(numbers)]
    for workers in (1, 2, 5):
        with drawn_ahead.threads(workers) as by:
            rows = drawn_ahead.rows(numbers, dtype, KEY, scales=scales, by=by)
            assert np.array_equal(np.stack([row.copy() for row in rows]), want)


def test_threads_that_are_stopped_early_end(library):
    out = np.empty((400, 2**15), np.float32)
    with drawn_ahead.threads(2) as by:
        drawn_ahead.draw(out, KEY, by=by).wait_for(0)
    for drawing in by._begun:
        drawing.stop()
    before = out.copy()
    assert out.tobytes() == before.tobytes()


def test_without_a_compiler_or_a_cache_the_numbers_are_the_same(tmp_path, library, monkeypatch):
    closed, others = tmp_path / "closed", tmp_path / "others" / "ctrl"
    closed.touch()  # no folder can be made there
    others.mkdir(parents=True)
    others.chmod(0o777)  # others could replace what is there
    settings = {
        ("CTRL_COMPILER", "none"): False,
        ("XDG_CACHE_HOME", str(closed)): True,
        ("XDG_CACHE_HOME", str(others.parent)): True,
        ("XDG_CACHE_HOME", str(tmp_path / "new")): True,
        ("PATH", str(tmp_path)): False,
    }
    want = drawn(np.float32, 200, 128)
    for (name, value), compiles in settings.items():
        with monkeypatch.context() as changed:
            changed.setenv(name, value)
            changed.setattr(compiled_normals, "_here", compiled_normals._Compiled())
            assert compiled_normals.compiled(1) is None  # not for a few numbers
            assert not compiled_normals._here.tried
            out = np.empty_like(want)
            drawing = drawn_ahead.draw(out, KEY)
            for k in range(200):
                drawing.wait_for(k)
            assert (compiled_normals._here.library is not None) == compiles
        assert out.tobytes() == want.tobytes()
    assert not list(others.iterdir())
    assert len(list((tmp_path / "new" / "ctrl").iterdir())) == 1

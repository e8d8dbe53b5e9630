"""``simulate(..., workers=n)``: the same bits, whoever draws."""

import threading
import time

import pytest
import torch

import ctrl
from ctrl import compiled_normals, drawn_ahead
from ctrl.noise import PathStreams

LINEAR = ctrl.ControlledSDE(lambda t, x, a: a - x, lambda t, x: 0.5)
SCALAR = ctrl.ControlledSDE(lambda t, x, a: a - x, lambda t, x: 0.5, "scalar")
STATE = ctrl.ControlledSDE(lambda t, x, a: a - x, lambda t, x: 0.5 + 0.1 * x.square())
GENERAL = ctrl.ControlledSDE(
    lambda t, x, a: a - x, lambda t, x: 0.3 * torch.ones(*x.shape, 2).to(x), "general", 2
)
DRAWN = ctrl.GaussianPolicy(lambda t, x: 0.1 * x, 0.3)
MEAN = ctrl.DeterministicPolicy(lambda t, x: 0.1 * x)
CASES = {
    # 512 paths of dimension 4: whole groups of 256 numbers, drawn into the paths' own memory
    "states": {"keep": ("states",)},
    "all": {},
    "drawn actions": {"policy": DRAWN},
    "scalar noise": {"sde": SCALAR, "keep": ("states",)},
    "general noise": {"sde": GENERAL},
    "milstein": {"sde": STATE, "solver": ctrl.Milstein()},
    "srk": {"sde": STATE, "solver": ctrl.TorchSDE("srk")},
    "graph": {"differentiable": True, "policy": DRAWN},
    "black box": {
        "solver": ctrl.BlackBox(lambda t0, t1, x, a: x + (t1 - t0).to(x) * a),
        "policy": DRAWN,
    },
    # groups that begin and end within the batch
    "some paths": {"paths": 301, "first": 37},
    "one path": {"paths": 1, "first": 1000, "policy": DRAWN},
}


def run(case, workers, dtype=torch.float32, end=False, seed=0):
    settings = {"sde": LINEAR, "policy": MEAN, "paths": 512, "first": 0, "solver": None} | case
    sde, policy, paths, first, solver = (
        settings.pop(name) for name in ("sde", "policy", "paths", "first", "solver")
    )
    arguments = (
        ctrl.ControlProblem(sde, 1.0), policy, torch.full((paths, 4), 0.2, dtype=dtype),
        ctrl.uniform_grid(1.0, 23), solver,
    )  # fmt: skip
    settings["generator"] = PathStreams(seed, ("workers",), first)
    if end:
        settings.pop("keep", None)
        return ctrl.simulate_end(*arguments, workers=workers, **settings)
    return ctrl.simulate(*arguments, workers=workers, **settings)


def bits(paths):
    parts = (paths.states, paths.actions, paths.increments)
    return [None if part is None else part.detach().numpy().tobytes() for part in parts]


@pytest.fixture
def _cores(monkeypatch):
    monkeypatch.setattr(drawn_ahead, "_cores", lambda: 8)


@pytest.fixture(params=["compiled", "numpy"])
def compiler(request, monkeypatch):
    library = compiled_normals.build() if request.param == "compiled" else None
    if library is None and request.param == "compiled":
        pytest.skip("no C compiler on this machine")
    monkeypatch.setattr(drawn_ahead, "compiled", lambda numbers: library)
    return request.param


@pytest.mark.usefixtures("_cores")
@pytest.mark.parametrize("case", CASES)
def test_paths_are_the_same_bits_for_any_number_of_workers(case, compiler):
    for dtype in (torch.float32, torch.float64):
        one = run(CASES[case], 1, dtype)
        for workers in (2, 5):
            assert bits(run(CASES[case], workers, dtype)) == bits(one)
        end = run(CASES[case], 2, dtype, end=True)
        assert torch.equal(end, one.states[:, -1])


@pytest.mark.parametrize("case", CASES)
def test_paths_are_the_same_bits_with_and_without_a_compiler(case, monkeypatch):
    library = compiled_normals.build()
    seen = []
    for there in (library, None):
        monkeypatch.setattr(drawn_ahead, "compiled", lambda numbers, there=there: there)
        seen.append(bits(run(CASES[case], 1)))
    assert seen[0] == seen[1]


@pytest.mark.usefixtures("_cores")
def test_the_users_functions_run_in_the_callers_thread_alone():
    seen = set()

    def drift(t, x, a):
        seen.add((threading.get_ident(), len(x)))
        return a - x

    sde = ctrl.ControlledSDE(drift, lambda t, x: seen.add((threading.get_ident(), len(x))) or 0.5)
    mean = ctrl.GaussianPolicy(lambda t, x: seen.add((threading.get_ident(), len(x))) or x, 0.3)
    run({"sde": sde, "policy": mean}, 3)
    assert seen == {(threading.get_ident(), 512)}


@pytest.fixture
def made(monkeypatch):
    """All threads that were asked to draw."""
    seen, begin = [], drawn_ahead.Threads.begin
    monkeypatch.setattr(
        drawn_ahead.Threads,
        "begin",
        lambda self, drawing: seen.append(self) or begin(self, drawing),
    )
    return seen


@pytest.mark.usefixtures("_cores", "compiler")
def test_threads_end_with_the_roll_out_and_with_its_failure(made):
    calls = []

    def drift(t, x, a):
        calls.append(made[0]._running)
        if len(calls) == 7:
            raise RuntimeError("of the drift")
        return a - x

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(RuntimeError, match="of the drift"):
            run({"sde": ctrl.ControlledSDE(drift, lambda t, x: 0.5)}, 3)
        run({}, 3)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert max(calls) <= 2
    assert len(made) == 2
    assert [(one.others, one._running) for one in made] == [(2, 0), (2, 0)]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failure_of_a_thread_is_raised(monkeypatch, made, workers):
    here = threading.get_ident()

    def fill(*arguments, **settings):
        if workers == 1 or threading.get_ident() != here:
            raise MemoryError("of a thread")
        time.sleep(0.01)  # so that another thread has its turn

    monkeypatch.setattr(drawn_ahead, "compiled", lambda numbers: None)
    monkeypatch.setattr(drawn_ahead, "_NUMPY_PIECE", 2048)  # a row: more pieces than one
    monkeypatch.setattr(drawn_ahead, "_cores", lambda: 8)
    monkeypatch.setattr(drawn_ahead, "fill", fill)
    with pytest.raises(MemoryError, match="of a thread"):
        run({}, workers)
    assert not made[0]._running


BAD = [
    (0, ValueError, "workers must be at least 1, got 0"),
    (-2, ValueError, "workers must be at least 1, got -2"),
    (True, TypeError, "workers must be an int, got True"),
    (2.0, TypeError, "workers must be an int, got 2.0"),
    ("2", TypeError, "workers must be an int, got '2'"),
    (None, TypeError, "workers must be an int, got None"),
]


@pytest.mark.parametrize("end", [False, True], ids=["simulate", "simulate_end"])
@pytest.mark.parametrize(("workers", "error", "text"), BAD)
def test_bad_numbers_of_workers_are_refused(workers, error, text, end):
    with pytest.raises((error, TypeError), match="workers") as refused:
        run({}, workers, end=end)
    if type(refused.value) is error:
        assert text in str(refused.value)


def test_a_generator_and_explicit_noise_take_one_worker():
    arguments = (
        ctrl.ControlProblem(LINEAR, 1.0), MEAN, torch.zeros(3, 1), ctrl.uniform_grid(1.0, 2)
    )  # fmt: skip
    noise = ctrl.Noise(torch.zeros(3, 2, 1))
    for source in ({"generator": torch.Generator()}, {"noise": noise}):
        ctrl.simulate(*arguments, workers=1, **source)
        for function in (ctrl.simulate, ctrl.simulate_end):
            with pytest.raises(ValueError, match=r"workers must be 1 unless .*PathStreams, got 2"):
                function(*arguments, workers=2, **source)


def test_more_workers_than_cores_start_no_more_threads(monkeypatch, made):
    monkeypatch.setattr(drawn_ahead, "_cores", lambda: 3)
    assert bits(run({}, 10**9)) == bits(run({}, 1))
    assert [one.others for one in made] == [2, 0]

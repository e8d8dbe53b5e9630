"""Controlled SDEs: noise in each of its three forms, whitening, refusals."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ctrl

T = torch.tensor(0.4, dtype=torch.float64)


def drift(t, x, a):
    return a


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"noise": "white"}, "noise"),
        ({"noise": "general"}, "noise_dim"),
        ({"noise_dim": 2}, "noise_dim"),
        ({"noise": "general", "noise_dim": 0}, "noise_dim"),
        ({"drift": 0.0}, "drift"),
        ({"diffusion": 0.5}, "diffusion"),
    ],
    ids=str,
)
def test_bad_dynamics_are_refused(settings, name):
    good = {"drift": drift, "diffusion": lambda t, x: 0.5}
    with pytest.raises((ValueError, TypeError), match=name):
        ctrl.ControlledSDE(**good | settings)


@pytest.mark.parametrize(
    ("noise", "noise_dim", "shape"),
    [
        ("diagonal", None, (2,)),
        ("diagonal", None, (3, 1)),
        ("scalar", None, (3,)),
        ("general", 4, ()),
        ("general", 4, (3, 2)),
        ("general", 4, (2, 4)),
    ],
    ids=str,
)
def test_diffusions_that_would_broadcast_are_refused(noise, noise_dim, shape):
    sde = ctrl.ControlledSDE(drift, lambda t, x: torch.ones(shape).double(), noise, noise_dim)
    x = torch.zeros(3, 2, dtype=torch.float64)
    increment = torch.zeros(3, *sde.noise_shape((2,)), dtype=torch.float64)
    with pytest.raises(ValueError, match="diffusion must return"):
        sde.diffuse(T, x, increment)
    with pytest.raises(ValueError, match="diffusion must return"):
        sde.whiten(T, x, x)


@pytest.mark.parametrize("wrong", [torch.zeros(2), torch.zeros(3, 1), torch.zeros(3, 2)], ids=str)
def test_drifts_that_would_broadcast_or_cast_are_refused(wrong):
    sde = ctrl.ControlledSDE(lambda t, x, a: wrong, lambda t, x: 0.5)
    x = torch.zeros(3, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="drift must return"):
        sde.drift_at(T, x, x)


def test_general_noise_drives_vectors_only():
    sde = ctrl.ControlledSDE(drift, lambda t, x: x, "general", 3)
    with pytest.raises(ValueError, match="general"):
        sde.noise_shape((4, 8, 8))


@given(
    seed=st.integers(0, 2**32 - 1),
    noise=st.sampled_from(["number", "diagonal", "scalar"]),
    event=st.sampled_from([(), (1,), (3,), (2, 2)]),
)
def test_whitening_undoes_spreading(seed, noise, event):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(4, *event, dtype=torch.float64, generator=g)
    sde = ctrl.ControlledSDE(
        drift,
        lambda t, x: 0.6 if noise == "number" else 0.3 + 0.2 * x.square() + t,
        "scalar" if noise == "scalar" else "diagonal",
    )
    u = torch.randn(4, *sde.noise_shape(event), dtype=torch.float64, generator=g)
    whitened = sde.whiten(T, x, sde.diffuse(T, x, u))
    torch.testing.assert_close(whitened, u.reshape(4, -1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["diagonal", "scalar", "general"])
def test_whitening_has_its_gradient_where_the_drifts_agree(kind):
    """At the start of fine-tuning both drifts agree: the shift is 0, its gradient is not."""
    sigma = {"diagonal": 0.5, "scalar": 0.5, "general": torch.full((2, 1, 1), 0.5).double()}[kind]
    sde = ctrl.ControlledSDE(drift, lambda t, x: sigma, kind, 1 if kind == "general" else None)
    shift = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
    sde.whiten(T, torch.zeros(2, 1, dtype=torch.float64), shift).sum().backward()
    torch.testing.assert_close(shift.grad, torch.full((2, 1), 2.0).double(), rtol=1e-14, atol=0)


@given(seed=st.integers(0, 2**32 - 1), condition=st.sampled_from([1e0, 1e3, 1e6, 1e9]))
def test_ill_conditioned_is_not_singular(seed, condition):
    g = torch.Generator().manual_seed(seed)
    left, right = torch.linalg.qr(torch.randn(2, 3, 3, dtype=torch.float64, generator=g))[0]
    values = torch.tensor([1.0, 0.3, 1 / condition], dtype=torch.float64)
    matrix = (left * values) @ right.T
    sde = ctrl.ControlledSDE(drift, lambda t, x: matrix.expand(len(x), 3, 3), "general", 3)
    shift = torch.randn(5, 3, dtype=torch.float64, generator=g)
    u = sde.whiten(T, torch.zeros(5, 3, dtype=torch.float64), shift)
    expected = ((shift @ left) / values) @ right.T  # right (1 / values) left' shift
    # relative to the whole vector, a solve errs by round-off times the condition number
    gap = (u - expected).norm(dim=1) / expected.norm(dim=1)
    assert gap.max() < 100 * 2.3e-16 * max(condition, 1 / 0.3)


@pytest.mark.parametrize("kind", ["diagonal", "scalar", "general"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_diffusions_that_are_not_finite_are_refused(kind, bad):
    sigma = torch.full((2, 1, 1), bad) if kind == "general" else bad
    sde = ctrl.ControlledSDE(drift, lambda t, x: sigma, kind, 1 if kind == "general" else None)
    with pytest.raises(ValueError, match=r"diffusion must be finite, but at t = 0\.4"):
        sde.whiten(T, torch.zeros(2, 1), torch.ones(2, 1))


# --- calculus, controlled diffusions, conversions


def stratonovich(diffusion, **settings):
    return ctrl.ControlledSDE(drift, diffusion, calculus="stratonovich", **settings)


@pytest.mark.parametrize("noise", ["diagonal", "scalar", "general", "controlled"])
def test_conversion_adds_half_of_the_noise_drift(noise):
    """Against the Jacobian of every column, taken by reverse mode."""
    g = torch.Generator().manual_seed(3)
    x, a = (torch.randn(4, 2, dtype=torch.float64, generator=g) for _ in range(2))
    mix = torch.randn(2, 2, 3, dtype=torch.float64, generator=g)
    own = lambda t, x, *a: 0.3 + 0.2 * x.square() + t * x
    diffusion, kind, motions, controlled = {
        "diagonal": (own, "diagonal", None, False),
        "scalar": (lambda t, x: x.flip(1) * x, "scalar", None, False),
        "general": (lambda t, x: torch.einsum("pi,ijk->pjk", x.sin(), mix), "general", 3, False),
        "controlled": (lambda t, x, a: own(t, x) * a, "diagonal", None, True),
    }[noise]
    settings = {"noise": kind, "noise_dim": motions, "controls_diffusion": controlled}
    sde = stratonovich(diffusion, **settings)

    def column(j, x):
        return sde.columns(T, x, a)[..., j]

    correction = torch.zeros_like(x)
    for j in range(sde.columns(T, x, a).shape[-1]):
        jacobian = torch.autograd.functional.jacobian(lambda y, j=j: column(j, y).sum(0), x)
        correction += torch.einsum("ipk,pk->pi", jacobian, column(j, x))
    torch.testing.assert_close(sde.noise_drift(T, x, a), correction, rtol=1e-12, atol=1e-12)
    ito = sde.to_ito()
    assert ito.calculus == "ito"
    assert ito.to_ito() is ito
    difference = ito.drift_at(T, x, a) - sde.drift_at(T, x, a)
    torch.testing.assert_close(difference, 0.5 * correction, rtol=1e-12, atol=1e-12)
    back = ito.to_stratonovich()
    torch.testing.assert_close(
        back.drift_at(T, x, a), sde.drift_at(T, x, a), rtol=1e-12, atol=1e-12
    )


def test_a_diffusion_that_is_a_number_or_free_of_the_state_needs_no_correction():
    x = torch.ones(3, 2, dtype=torch.float64)
    for diffusion in (lambda t, x: 0.4, lambda t, x: torch.full_like(x, 0.4)):
        sde = stratonovich(diffusion)
        torch.testing.assert_close(sde.noise_drift(T, x), torch.zeros_like(x))


def test_diagonal_noise_that_mixes_coordinates_is_refused_where_its_derivative_is_needed():
    sde = stratonovich(lambda t, x: 0.3 + x.flip(1))
    with pytest.raises(ValueError, match="general noise"):
        sde.to_ito().drift_at(T, torch.rand(3, 2).double(), torch.zeros(3, 2).double())


def test_the_other_calculus_is_refused_with_its_conversion():
    with pytest.raises(ValueError, match="to_ito"):
        stratonovich(lambda t, x: 0.3).require_calculus("ito", "EulerMaruyama")
    with pytest.raises((ValueError, TypeError)):
        ctrl.ControlledSDE(drift, lambda t, x: 0.3, calculus="marcus")


def test_a_controlled_diffusion_needs_its_action():
    sde = ctrl.ControlledSDE(drift, lambda t, x, a: a * x, controls_diffusion=True)
    x = torch.full((3, 1), 2.0)
    torch.testing.assert_close(sde.diffusion_at(T.float(), x, 3 * x), 6 * x)
    with pytest.raises(ValueError, match="actions"):
        sde.diffusion_at(T.float(), x)


def test_numbers_keep_the_precision_of_the_states():
    sde = ctrl.ControlledSDE(drift, lambda t, x: 0.6)
    columns = sde.columns(T, torch.zeros(1, 2, dtype=torch.float64))
    assert columns[0, 0, 0].item() == 0.6

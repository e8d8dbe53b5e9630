from pathlib import Path

import pytest
import torch

from diffusion_envs.rewards.aesthetic import Aesthetic, read_head
from tests.diffusion_envs.rewards import plain_clip

DATA = Path(__file__).parents[4] / "shared" / "data" / "aesthetic"
V2, V1 = "sac+logos+ava1-l14-linearMSE.pth", "sa_0_4_vit_l_14_linear.pth"
needs_heads = pytest.mark.skipif(not (DATA / V2).is_file(), reason="needs the published heads")


@pytest.fixture
def folder(tmp_path, generator):
    (tmp_path / "clip").mkdir()
    return plain_clip.write_hugging_face(tmp_path / "clip", plain_clip.state(generator), "gelu")


@pytest.fixture
def images(generator):
    return torch.rand(2, 3, 30, 28, generator=generator)


def linear(width):
    return {"weight": torch.ones(1, width), "bias": torch.zeros(1)}


# -- the published heads ---------------------------------------------------------------------------


@needs_heads
def test_the_published_head_v2_is_one_affine_map():
    head = read_head(DATA / V2, "v2")
    # known from another reading of the file, to the digits that are written here
    assert head.weight.double().norm().item() == pytest.approx(17.9956, abs=6e-5)
    assert head.bias.item() == pytest.approx(5.2366, abs=6e-5)


@needs_heads
@pytest.mark.parametrize(("file", "version"), [(V2, "v2"), (V1, "v1")])
def test_published_heads_score_as_their_layers_do(file, version, generator):
    state = torch.load(DATA / file, weights_only=True, map_location="cpu")
    vectors = torch.randn(8, 768, generator=generator)
    x = vectors = vectors / vectors.norm(dim=1, keepdim=True)
    for name in [name for name in state if name.endswith("weight")]:
        x = x @ state[name].T + state[name.replace("weight", "bias")]
    head = read_head(DATA / file, version)
    # float32 layers of 1024 with entries below 1 against one product of 768
    torch.testing.assert_close(head(vectors), x, rtol=0, atol=1e-4)


@needs_heads
@pytest.mark.parametrize(("file", "version"), [(V2, "v2"), (V1, "v1")])
def test_published_heads_score_pictures_through_a_clip_of_their_width(
    file, version, tmp_path, images, generator
):
    tensors = plain_clip.state(generator, width=768)
    folder = plain_clip.write_hugging_face(tmp_path, tensors, "quick_gelu")
    reward = Aesthetic(folder, head=DATA / file, version=version)
    vectors = reward.embedding(images)
    scores = reward(images, ["", ""])
    head = read_head(DATA / file, version)
    # a rating near the bias: a unit vector moves it by less than the norm of the weights
    assert ((scores - head.bias).abs() <= head.weight.norm()).all()
    expected = vectors.double() @ head.weight[0].double() + head.bias.double()
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=1e-5)


@needs_heads
def test_a_published_head_of_the_other_version_is_refused(folder, images):
    with pytest.raises(ValueError, match=r"must hold the head v2.*it is v1's, pass version='v1'"):
        Aesthetic(folder, head=DATA / V1)(images, ["", ""])
    with pytest.raises(ValueError, match=r"must hold the head v1.*it is v2's, pass version='v2'"):
        Aesthetic(folder, head=DATA / V2, version="v1")(images, ["", ""])


# -- any head --------------------------------------------------------------------------------------


def test_a_clip_of_another_width_is_refused(folder, images, tmp_path):
    head = tmp_path / V1
    torch.save(linear(768), head)
    with pytest.raises(ValueError, match=r"width 768, but the CLIP of .* has 20: take openai/clip"):
        Aesthetic(folder, head=head, version="v1")(images, ["", ""])


def test_the_head_is_looked_for_beside_the_clip_unless_it_is_named(
    folder, images, tmp_path, monkeypatch
):
    torch.save(linear(plain_clip.WIDTH), folder / V1)
    monkeypatch.chdir(tmp_path)
    inside = Aesthetic("clip", version="v1")
    named = Aesthetic("clip", head=f"clip/{V1}", version="v1")
    assert Path(str(named.head)) == folder / V1
    assert torch.equal(inside(images, ["", ""]), named(images, ["", ""]))


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_head_that_is_not_there_says_where_it_is_published(folder, version):
    with pytest.raises(FileNotFoundError, match=r"lacks .*pth.*https://github.com/"):
        Aesthetic(folder, version=version)
    with pytest.raises(FileNotFoundError, match=r"nowhere.pth is none: take .*github"):
        Aesthetic(folder, head="nowhere.pth", version=version)


def test_layers_that_do_not_fit_one_another_are_refused(tmp_path):
    layers = {0: (768, 1024), 2: (1024, 128), 4: (129, 64), 6: (64, 16), 7: (16, 1)}
    state = {}
    for place, (before, after) in layers.items():
        state[f"layers.{place}.weight"] = torch.ones(after, before)
        state[f"layers.{place}.bias"] = torch.ones(after)
    torch.save(state, tmp_path / V2)
    with pytest.raises(ValueError, match=r"layers.4.weight is \[64, 129\] after .* width 128"):
        read_head(tmp_path / V2, "v2")
    torch.save({"weight": torch.ones(2, 8), "bias": torch.ones(2)}, tmp_path / V1)
    with pytest.raises(ValueError, match="must give one number, but gives 2"):
        read_head(tmp_path / V1, "v1")


def test_an_unknown_version_is_refused(monkeypatch, folder):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # as in production
    with pytest.raises(ValueError, match=r"version must be one of \('v2', 'v1'\), got 'v3'"):
        Aesthetic(folder, version="v3")

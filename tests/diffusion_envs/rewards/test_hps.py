import pytest
import torch

from diffusion_envs.rewards.hps import HPS
from tests.diffusion_envs.rewards import plain_clip

FILES = {"2.1": "HPS_v2.1_compressed.pt", "2.0": "HPS_v2_compressed.pt"}
OTHER = {"2.1": "2.0", "2.0": "2.1"}


@pytest.fixture
def tensors(generator):
    return plain_clip.state(generator)


@pytest.mark.parametrize("version", ["2.1", "2.0"])
@pytest.mark.parametrize("as_file", [False, True])
def test_weights_of_the_other_version_are_refused(tmp_path, tensors, version, as_file):
    plain_clip.write_open_clip(tmp_path, tensors, FILES[version])
    source = tmp_path / FILES[version] if as_file else tmp_path
    assert HPS(source, version=version)
    with pytest.raises(ValueError, match=f"weights of HPS v{version} .*pass version='{version}'"):
        HPS(source, version=OTHER[version])


def test_a_folder_may_hold_both_versions(tmp_path, generator, tensors):
    plain_clip.write_open_clip(tmp_path, tensors, FILES["2.1"])
    other = plain_clip.state(generator)
    plain_clip.write_open_clip(tmp_path, other, FILES["2.0"])
    images, rows = torch.rand(2, 3, 28, 28, generator=generator), plain_clip.ROWS[:2]
    scores = {
        version: HPS(tmp_path, version=version, heads=plain_clip.HEADS)(
            images, plain_clip.PROMPTS[:2]
        )
        for version in FILES
    }
    assert (scores["2.1"] - scores["2.0"]).abs().max() > 1e-3
    for version, own in (("2.1", tensors), ("2.0", other)):
        prepare = HPS(tmp_path, version=version).declaration.preprocessing
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (prepare.mean, prepare.std))
        expected = plain_clip.cosines(own, (images - mean) / std, rows, "gelu")
        torch.testing.assert_close(scores[version].double(), expected, rtol=0, atol=1e-5)


def test_an_unknown_version_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # as in production
    with pytest.raises(ValueError, match=r"version must be one of \('2.1', '2.0'\), got '3'"):
        HPS(tmp_path, version="3")


def test_what_overshoots_is_kept_as_published(tmp_path, tensors, generator):
    prepare = HPS(plain_clip.write_open_clip(tmp_path, tensors, FILES["2.1"])).declaration
    assert (prepare.preprocessing.fit, prepare.preprocessing.saturate) == ("pad", False)
    assert prepare.version == "HPSv2.1"

import json

import pytest
import torch
from torch.nn import functional

from diffusion_envs.rewards import clip
from diffusion_envs.rewards.aesthetic import Aesthetic
from diffusion_envs.rewards.clip_score import CLIPScore
from diffusion_envs.rewards.hps import HPS
from diffusion_envs.rewards.pick_score import PickScore
from tests.diffusion_envs.rewards import plain_clip

FILE = "HPS_v2.1_compressed.pt"


@pytest.fixture(scope="module")
def tensors():
    return plain_clip.state(torch.Generator().manual_seed(3))


@pytest.fixture
def folder(tensors, tmp_path):
    return plain_clip.write_hugging_face(tmp_path, tensors, "gelu")


@pytest.fixture
def open_clip_folder(tensors, tmp_path):
    return plain_clip.write_open_clip(tmp_path, tensors, FILE)


@pytest.fixture
def images(generator):
    return torch.rand(2, 3, 28, 28, generator=generator)


def paths_of(folder, weights="model.safetensors"):
    names = {"weights": weights, "vocabulary": "vocab.json", "merges": "merges.txt"}
    if weights == "model.safetensors":
        names["config"] = "config.json"
    return {role: folder / name for role, name in names.items()}


# -- tokens ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("cat", ["cat</w>"]),
        ("  A\tCAT\n ", ["a</w>", "cat</w>"]),
        ("cat,dog", ["cat</w>", ",</w>", "dog</w>"]),
        ("act", ["a", "c", "t</w>"]),
        ("cata", ["ca", "t", "a</w>"]),
        ("", []),
        (" ", []),
    ],
)
def test_prompts_are_cut_into_byte_pairs(folder, prompt, words):
    model = clip.from_hugging_face(paths_of(folder))
    tokens, cut = model.tokens([prompt])
    vocabulary = plain_clip.VOCABULARY
    start, end = vocabulary[plain_clip.START], vocabulary[plain_clip.END]
    row = [start, *(vocabulary[word] for word in words)]
    assert tokens.tolist() == [row + [end] * (77 - len(row))]
    assert cut == [False]


def test_a_prompt_ends_at_its_first_end_token(folder):
    # as in both packages, which take the first place of the largest token
    model = clip.from_hugging_face(paths_of(folder))
    vectors, _ = model.text_embeddings([f"cat{plain_clip.END}dog", "cat", "dog"], 3)
    torch.testing.assert_close(vectors[0], vectors[1], rtol=0, atol=1e-6)
    assert (vectors[1] - vectors[2]).norm() > 0.01


def test_prompts_that_repeat_are_embedded_once(folder, monkeypatch):
    model = clip.from_hugging_face(paths_of(folder))
    sizes = []
    forward = model.network.text_model.forward
    monkeypatch.setattr(
        model.network.text_model,
        "forward",
        lambda input_ids: sizes.append(len(input_ids)) or forward(input_ids=input_ids),
    )
    vectors, cut = model.text_embeddings(["dog", "cat", "dog", "cat " * 90, "cat " * 90], 2)
    assert sizes == [2, 1]
    assert cut == 2
    expected = plain_clip.text_embeddings(
        plain_clip.state(torch.Generator().manual_seed(3)),
        [["dog</w>"], ["cat</w>"], ["dog</w>"], ["cat</w>"] * 90, ["cat</w>"] * 90],
        "gelu",
    )
    torch.testing.assert_close(vectors.double(), expected, rtol=0, atol=1e-5)


# -- layouts ---------------------------------------------------------------------------------------


def test_both_layouts_of_the_same_tensors_are_one_network(tensors, tmp_path, generator):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    one = clip.from_hugging_face(
        paths_of(plain_clip.write_hugging_face(tmp_path / "one", tensors, "gelu"))
    )
    folder = plain_clip.write_open_clip(tmp_path / "other", tensors, FILE)
    other = clip.from_open_clip(paths_of(folder, FILE), plain_clip.HEADS)
    renamed = other.network.state_dict()
    assert list(renamed) == list(one.network.state_dict())
    for name, value in one.network.state_dict().items():
        assert torch.equal(renamed[name], value), name
    assert (one.image_size, one.width, one.places) == (28, plain_clip.WIDTH, 77)
    assert (other.image_size, other.width, other.places) == (28, plain_clip.WIDTH, 77)
    assert other.scale.item() == pytest.approx(torch.tensor(3.0).exp().item())


def test_networks_are_frozen_in_float32_and_shared_between_rewards(
    tensors, tmp_path, images, generator
):
    half = {k: v.half() for k, v in tensors.items()}
    folder = plain_clip.write_hugging_face(tmp_path, half, "gelu")
    head = tmp_path / "head.pth"
    torch.save({"weight": torch.ones(1, plain_clip.WIDTH), "bias": torch.zeros(1)}, head)
    network = clip.from_hugging_face(paths_of(folder)).network
    assert not network.training
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in network.parameters())
    assert clip.from_hugging_face(paths_of(folder)).network is network
    CLIPScore(folder)(images, ["cat", "dog"])
    PickScore(folder)(images, ["cat", "dog"])
    ours = Aesthetic(folder, head=head, version="v1").embedding(images)
    without = {"weights": folder / "model.safetensors", "config": folder / "config.json"}
    assert clip.from_hugging_face(without).network is network
    torch.testing.assert_close(ours.norm(dim=1), torch.ones(2))


def test_heads_are_those_of_the_published_networks():
    # ViT-B/32, B/16, L/14, H/14, g/14, bigG/14: open_clip's model_configs
    widths = (768, 768, 1024, 1280, 1408, 1664)
    assert [clip.vision_heads(width) for width in widths] == [12, 12, 16, 16, 16, 16]
    assert [clip.text_heads(width) for width in (512, 768, 1024, 1280)] == [8, 12, 16, 20]


def test_heads_of_another_size_have_to_be_named(open_clip_folder, images):
    with pytest.raises(ValueError, match=r"no multiple of 5 heads: pass heads=\(vision, text\)"):
        HPS(open_clip_folder, heads=(5, 3))(images, ["cat", "dog"])
    # by default one head of width 64 or less, which is another network
    ours = HPS(open_clip_folder, heads=plain_clip.HEADS)(images, ["cat", "dog"])
    assert not torch.allclose(HPS(open_clip_folder)(images, ["cat", "dog"]), ours, atol=1e-3)


@pytest.mark.parametrize(
    "name", ["visual.conv1.weight", "positional_embedding", "text_projection", "ln_final.bias"]
)
def test_an_open_clip_file_that_lacks_a_tensor_is_refused(tensors, tmp_path, images, name):
    rest = {k: v for k, v in tensors.items() if k != name}
    folder = plain_clip.write_open_clip(tmp_path, rest, FILE)
    with pytest.raises(ValueError, match=f"{FILE} does not hold .* it lacks .*"):
        HPS(folder, heads=plain_clip.HEADS)(images, ["cat", "dog"])


def test_tensors_that_are_no_part_of_the_network_are_refused(tensors, tmp_path, images):
    more = tensors | {"score_predictor.weight": torch.ones(2)}
    folder = plain_clip.write_open_clip(tmp_path, more, FILE)
    with pytest.raises(ValueError, match=r"it has in addition score_predictor\.weight"):
        HPS(folder, heads=plain_clip.HEADS)(images, ["cat", "dog"])


def test_buffers_that_older_versions_stored_are_left_out(tensors, tmp_path, images):
    mask = torch.full((77, 77), -torch.inf).triu(1).nan_to_num(neginf=-1e4)
    more = tensors | {"attn_mask": mask, "context_length": torch.tensor(77)}
    folder = plain_clip.write_open_clip(tmp_path, more, FILE)
    assert HPS(folder, heads=plain_clip.HEADS)(images, ["cat", "dog"]).isfinite().all()


# -- files that do not fit together ----------------------------------------------------------------


def test_a_folder_of_another_kind_of_model_is_refused(folder, images):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "siglip"}))
    with pytest.raises(ValueError, match="a model of type 'siglip', but it must be 'clip'"):
        CLIPScore(folder)(images, ["cat", "dog"])


def test_a_vocabulary_of_another_network_is_refused(folder, images):
    path = folder / "vocab.json"
    words = {k: v for k, v in plain_clip.VOCABULARY.items() if k != "dog</w>"}
    path.write_text(json.dumps(words))
    with pytest.raises(ValueError, match="no byte-pair vocabulary"):  # a merge of what is not there
        CLIPScore(folder)(images, ["cat", "dog"])
    merges = [m for m in plain_clip.MERGES if m != "do g</w>"]
    (folder / "merges.txt").write_text("\n".join(merges))
    with pytest.raises(ValueError, match=r"has 15 tokens, but the network of .* has 16"):
        CLIPScore(folder)(images, ["cat", "dog"])


@pytest.mark.parametrize("file", ["vocab.json", "config.json"])
def test_a_file_that_is_no_json_is_named(folder, images, file):
    (folder / file).write_text("<html>404</html>")
    with pytest.raises(ValueError, match=file):
        CLIPScore(folder)(images, ["cat", "dog"])


def test_pictures_as_they_would_be_stored(folder, generator):
    images = torch.rand(2, 3, 41, 58, generator=generator)
    prompts = ["cat", "dog"]
    stored = (images * 255).round() / 255
    exact, rounded = CLIPScore(folder), CLIPScore(folder, quantise=True)
    close = {"rtol": 0, "atol": 1e-4}
    torch.testing.assert_close(rounded(stored, prompts), rounded(images, prompts), **close)
    assert not torch.allclose(rounded(images, prompts), exact(images, prompts), **close)
    assert rounded.declaration.preprocessing.quantise
    slope = lambda reward, x: torch.autograd.grad(reward(x, prompts).sum(), x)[0]
    ours, theirs = (slope(r, images.clone().requires_grad_()) for r in (rounded, exact))
    assert functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.9


@pytest.mark.parametrize("reward", [CLIPScore, PickScore])
def test_an_unknown_scale_is_refused(monkeypatch, folder, reward):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # as in production
    with pytest.raises(ValueError, match=r"scale must be one of \('logit', .*got 'hundred'"):
        reward(folder, scale="hundred")

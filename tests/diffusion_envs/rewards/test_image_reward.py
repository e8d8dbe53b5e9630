import pytest
import torch

from diffusion_envs.rewards import image_reward
from diffusion_envs.rewards.image_reward import ImageReward
from tests.diffusion_envs.rewards import plain_blip
from tests.diffusion_envs.rewards.plain_blip import PROMPTS, ROWS


@pytest.fixture(scope="module")
def tensors():
    return plain_blip.state(torch.Generator().manual_seed(16))


@pytest.fixture(scope="module")
def folder(tensors, tmp_path_factory):
    return plain_blip.write(tmp_path_factory.mktemp("image-reward"), tensors)


@pytest.fixture
def images(generator):
    return torch.rand(4, 3, 41, 58, generator=generator)


def test_the_published_file_alone_is_enough_where_the_vocabulary_lies_beside_it(folder, images):
    whole = ImageReward(folder)(images, PROMPTS)
    assert torch.equal(ImageReward(folder / "ImageReward.pt")(images, PROMPTS), whole)


def test_other_sizes_are_read_off_the_tensors(tmp_path, generator):
    tensors = plain_blip.state(
        generator, side=24, patch=12, width=64, text_width=64, layers=1, positions=40
    )
    images = torch.rand(2, 3, 31, 26, generator=generator)
    scores = ImageReward(plain_blip.write(tmp_path, tensors))(images, PROMPTS[:2])
    expected = plain_blip.scores(tensors, images, ROWS[:2])
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_embedding_is_the_first_token_of_the_vision_network(tensors, folder, images):
    expected = torch.stack([plain_blip.patches(tensors, image)[0] for image in images])
    embedding = ImageReward(folder, batch=3).embedding(images)
    torch.testing.assert_close(embedding.double(), expected, rtol=1e-5, atol=1e-5)


def test_prompt_and_picture_both_count(folder, images):
    reward = ImageReward(folder)
    one = images[:1].expand(2, -1, -1, -1)
    prompts = reward(one, ["a cat", "blue dogs"])
    pictures = reward(torch.stack([images[0], images[0] ** 3]), ["a cat", "a cat"])
    # a hundred times what float32 leaves
    assert (prompts[0] - prompts[1]).abs() > 1e-3
    assert (pictures[0] - pictures[1]).abs() > 1e-3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"blip.visual_encoder.norm.bias": None}, r"lacks vision\.post_layernorm\.bias"),
        ({"blip.text_decoder.bias": torch.ones(1)}, r"has in addition blip\.text_decoder\.bias"),
        ({"mlp.layers.7.bias": torch.ones(2)}, r"in another shape head\.7\.bias \[2\] for \[1\]"),
        ({"blip.visual_encoder.pos_embed": None}, r"lacks blip\.visual_encoder\.pos_embed"),
        ({"mlp.layers.2.weight": None}, r"in addition head\.2\.bias"),
        (
            {"blip.text_encoder.embeddings.word_embeddings.weight": torch.ones(30, 192)},
            "has 30 tokens.*vocabulary has 15: take vocab.txt of google-bert/bert-base-uncased",
        ),
    ],
)
def test_other_tensors_are_refused_by_name(tensors, tmp_path, images, change, words):
    changed = {k: v for k, v in (tensors | change).items() if v is not None}
    reward = ImageReward(plain_blip.write(tmp_path, changed))
    with pytest.raises(ValueError, match=words):
        reward(images, PROMPTS)


def test_what_the_reward_does_not_use_may_be_missing(tensors, tmp_path, folder, images):
    needed = {k: v for k, v in tensors.items() if "_proj." not in k and "position_ids" not in k}
    assert len(needed) == len(tensors) - 5
    reward = ImageReward(plain_blip.write(tmp_path, needed))
    assert torch.equal(reward(images, PROMPTS), ImageReward(folder)(images, PROMPTS))


def test_making_one_reads_nothing_and_draws_nothing(folder, tmp_path, images):
    plain_blip.write(tmp_path, {}).joinpath("ImageReward.pt").write_text("no tensors")
    ImageReward(tmp_path)
    before = torch.get_rng_state()
    image_reward.load(folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_two_tokens_that_blip_added_are_tokens(tensors, folder, images):
    prompts = ["a [ENC] cat", "[DEC]red dogs", "a [enc] cat"]
    rows = [["a", "[ENC]", "cat"], ["[DEC]", "red", "dog", "##s"], ["a", *3 * ["[UNK]"], "cat"]]
    expected = plain_blip.scores(tensors, images[:3], rows)
    scores = ImageReward(folder)(images[:3], prompts)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)


def test_pictures_are_rounded_to_8_bits_where_asked(folder, images):
    quantised = ImageReward(folder, quantise=True)
    stored = (255 * images).round() / 255
    assert torch.equal(quantised(images, PROMPTS), quantised(stored, PROMPTS))
    assert not torch.equal(ImageReward(folder)(images, PROMPTS), quantised(images, PROMPTS))
    assert quantised.declaration.preprocessing.quantise


def test_layers_are_normalised_with_the_published_epsilons(tensors, tmp_path, images):
    """On quiet networks, whose variances of 1e-5 and 1e-10 show what is added to them."""
    quiet = dict(tensors)
    eyes = ("cls_token", "pos_embed", "patch_embed", ".attn.proj.", ".mlp.fc2.")
    for name, value in tensors.items():
        if "visual_encoder" in name and any(part in name for part in eyes):
            quiet[name] = 0.003 * value
        if "text_encoder.embeddings" in name and name.endswith("embeddings.weight"):
            quiet[name] = 1e-5 * value
    expected = plain_blip.scores(quiet, images, ROWS)
    scores = ImageReward(plain_blip.write(tmp_path, quiet))(images, PROMPTS)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)

"""The embedded model: what is shipped, its tokenizer, and that its training resumes."""

from pathlib import Path

import pytest
import torch
from transformers import CLIPTokenizer

from diffusion_envs.cifar10.data import CLASSES, class_of, load
from diffusion_envs.models.folders import tiny_folder
from diffusion_envs.models.text_to_image_pipeline import load_pipeline
from diffusion_envs.rewards.classifier import load_classifier
from diffusion_envs.tiny.captions import LENGTH, caption, with_article, write_tokenizer
from diffusion_envs.tiny.train_classifier import accuracy, augment, half
from diffusion_envs.tiny.train_denoiser import sample

pytestmark = pytest.mark.filterwarnings("default")  # diffusers and transformers deprecate freely
DATA = Path(__file__).parents[4] / "shared" / "data" / "cifar10"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="CIFAR-10 is not there")


def test_the_shipped_model_is_small():
    sizes = [f.stat().st_size for f in tiny_folder().rglob("*") if f.is_file()]
    assert sum(sizes) <= 12e6
    for which in ("reward", "judge"):
        path = tiny_folder().parent / f"classifier_{which}.safetensors"
        assert path.stat().st_size <= 2e6


def test_the_pipeline_has_stable_diffusions_classes_and_schedule():
    pipe = load_pipeline("tiny")
    names = [type(getattr(pipe, part)).__name__ for part in ("unet", "vae", "text_encoder")]
    assert names == ["UNet2DConditionModel", "AutoencoderKL", "CLIPTextModel"]
    config = pipe.scheduler.config
    assert (config.beta_schedule, config.beta_start, config.beta_end) == (
        "scaled_linear",
        0.00085,
        0.012,
    )
    assert len(pipe.tokenizer) > 500  # a tokenizer that lost its files has two tokens


def test_samples_show_what_the_prompt_names():
    """40 pictures: chance gives 4; 20 or more by chance has probability below 1e-9."""
    prompts = [with_article(f"a photo of a {name}") for name in CLASSES for _ in range(4)]
    images = sample(load_pipeline("tiny"), prompts, steps=20, guidance=3.0, eta=1.0, seed=1)
    seen = load_classifier("judge")(images).argmax(-1)
    assert int((seen == torch.arange(10).repeat_interleave(4)).sum()) >= 20


@needs_data
def test_both_classifiers_know_the_test_set():
    images, labels = load(DATA, "test", limit=2000)
    for which in ("reward", "judge"):
        assert accuracy(load_classifier(which), images, labels) > 0.8  # standard error 0.009


@needs_data
def test_reward_and_judge_were_shown_different_pictures():
    data = load(DATA, "test", limit=50)
    first, second = (half(data, which).images for which in ("reward", "judge"))
    assert len(first) == len(second) == 25
    assert not any(torch.equal(a, b) for a in first for b in second)


def test_words_of_captions_are_single_tokens_and_all_text_encodes(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    for label in range(10):
        generator = torch.Generator().manual_seed(label)
        for _ in range(20):
            text = caption(label, generator)
            assert class_of(text) == label
            assert len(tokenizer(text).input_ids) == len(text.split()) + 2
    odd = "zèbre, 42!"
    assert tokenizer.decode(tokenizer(odd).input_ids[1:-1]).replace(" ", "") == "zèbre,42!"
    assert tokenizer.model_max_length == LENGTH


@pytest.mark.parametrize(
    ("prompt", "label"),
    [
        ("a photo of a cat", 3),
        ("Two cars, parked", 1),
        ("a plane", 0),
        ("a cat and a dog", None),
        ("a catalogue", None),
        ("", None),
    ],
)
def test_class_of_a_prompt(prompt, label):
    assert class_of(prompt) == label


def test_augmentation_keeps_range_and_shape(generator):
    images = torch.rand(9, 3, 32, 32, generator=generator)
    got = augment(images, generator)
    assert got.shape == images.shape
    assert bool(((got >= 0) & (got <= 1)).all())


def test_data_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train\.parquet"):
        load(tmp_path)

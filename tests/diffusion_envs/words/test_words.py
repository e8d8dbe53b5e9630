"""The second embedded model: what is shipped, that it writes what the prompt says, its training."""

import dataclasses
import importlib.util

import pytest
import torch

from ctrl.noise import stream
from diffusion_envs.models.folders import WORDS, shipped_folder
from diffusion_envs.models.text_to_image_pipeline import load_pipeline
from diffusion_envs.rewards import ReadableText
from diffusion_envs.tiny.train_autoencoder import psnr, reconstruct
from diffusion_envs.tiny.train_denoiser import sample
from diffusion_envs.words import signs, train_autoencoder, train_denoiser
from diffusion_envs.words.measure import held_out_words

pytestmark = pytest.mark.filterwarnings("default")  # diffusers and transformers deprecate freely
needs_reader = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("rapidocr", "onnxruntime")),
    reason="the extra ocr is not installed",
)


def test_the_shipped_model_is_small():
    sizes = [f.stat().st_size for f in shipped_folder(WORDS).rglob("*") if f.is_file()]
    assert sum(sizes) <= 6e6


def test_the_pipeline_has_stable_diffusions_classes_and_schedule():
    pipe, tiny = load_pipeline("words"), load_pipeline("tiny")
    for part in ("unet", "vae", "text_encoder", "tokenizer"):
        assert type(getattr(pipe, part)) is type(getattr(tiny, part))
    assert dict(pipe.scheduler.config) == dict(tiny.scheduler.config)
    pieces = pipe.tokenizer.tokenize(signs.caption("CAT"))
    assert pieces[:5] == ["a</w>", "sign</w>", "that</w>", "says</w>", '"</w>']
    assert pieces[5:] == ["c", "a", "t</w>", '"</w>']


@needs_reader
def test_words_that_were_never_trained_on_can_be_read():
    """24 pictures: a word is read by chance with probability 26^-3, two of 24 with 1e-6."""
    words = held_out_words(3, 24, seed=1)
    assert all(map(signs.held_out, words))
    prompts = [signs.caption(word) for word in words]
    images = sample(load_pipeline("words"), prompts, steps=10, guidance=3.0, eta=1.0, seed=1)
    assert int(ReadableText()(images, prompts).sum()) >= 2


def test_the_autoencoder_keeps_signs_it_has_not_seen(generator):
    """Grey pictures would have some 10 dB; letters need about 20."""
    drawn = (255 * signs.signs(held_out_words(3, 40, seed=2), generator)).round().byte()
    rebuilt = reconstruct(load_pipeline("words").vae, drawn)
    assert psnr(drawn, torch.full(drawn.shape, 0.5)) < 14
    assert psnr(drawn, rebuilt) > 20


def test_training_it_again_makes_a_model_that_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(train_denoiser, "PICTURES", 40)
    short = {"updates": 2, "batch": 4}
    train_autoencoder.train(
        tmp_path, recipe=dataclasses.replace(train_autoencoder.RECIPE, **short), seed=1
    )
    train_denoiser.train(
        tmp_path, recipe=dataclasses.replace(train_denoiser.RECIPE, **short), seed=1
    )
    images = sample(
        load_pipeline(tmp_path / "model"), [signs.caption("FOX")], steps=2, guidance=3.0, eta=1.0,
        seed=0,
    )  # fmt: skip
    assert images.shape == (1, 3, 32, 32)
    assert (tmp_path / "samples" / "step-000002.png").is_file()


def test_pictures_that_are_encoded_belong_to_their_words(tmp_path, monkeypatch):
    monkeypatch.setattr(train_denoiser, "PICTURES", 6)
    vae = load_pipeline("words").vae
    latents, words = train_denoiser._encoded_signs(vae, tmp_path / "latents.safetensors", 3)
    again, same = train_denoiser._encoded_signs(vae, tmp_path / "latents.safetensors", 3)
    assert torch.equal(latents, again)
    assert words == same
    random = stream(3, "signs", "train")
    assert signs.draw_words(6, random) == words
    pictures = (255 * signs.signs(words, random)).round().byte()
    expected = train_denoiser.encode(vae, pictures)
    torch.testing.assert_close(latents.float(), expected, rtol=2**-10, atol=2**-14)  # float16

"""Signs: what is drawn, where, which words are held out, and how their captions are spelled."""

import pytest
import torch
from transformers import CLIPTokenizer

from diffusion_envs.runs.prompts import read_prompts
from diffusion_envs.words import signs
from diffusion_envs.words.train_denoiser import LENGTH, write_tokenizer

LUMA = torch.tensor([0.299, 0.587, 0.114])


def test_pictures_are_in_range_and_of_their_stream(generator):
    words = signs.draw_words(40, generator)
    images = signs.signs(words, torch.Generator().manual_seed(3))
    assert images.shape == (40, 3, 32, 32)
    assert bool(((images >= 0) & (images <= 1)).all())
    assert torch.equal(images, signs.signs(words, torch.Generator().manual_seed(3)))
    assert not torch.equal(images, signs.signs(words, torch.Generator().manual_seed(4)))


def test_letters_differ_from_their_plate_in_brightness(generator):
    """An I is at least 1.5 pixels wide, so the middle of one pixel in its columns is all ink."""
    images = signs.signs(["HHH"] * 30, generator)
    brightness = (images * LUMA[:, None, None]).sum(1)  # [n, 32, 32]
    middle = brightness[:, 12:20, 3:29].flatten(1)  # inside the plate, whatever the shift
    contrast = middle.amax(1) - middle.amin(1)
    assert float(contrast.min()) > 0.55  # 0.6, but for the edge of a pixel that no ink fills


def test_a_word_has_its_letters_side_by_side(generator):
    """Each letter changes its own third of the picture and, if all else is equal, no other."""
    for place in range(3):
        other = "".join("L" if k == place else "H" for k in range(3))
        seeds = [torch.Generator().manual_seed(5) for _ in range(2)]
        before, after = signs.signs(["HHH"], seeds[0]), signs.signs([other], seeds[1])
        changed = (before != after).any(1).any(1)[0].nonzero().flatten()
        # a cell of 9 pixels about 7, 16 or 25, and one pixel of shift
        assert 16 + 9 * (place - 1) - 6 <= int(changed.min())
        assert int(changed.max()) <= 16 + 9 * (place - 1) + 6


def test_held_out_words_are_never_drawn_and_a_fifth_of_all(generator):
    words = signs.draw_words(3000, generator)
    assert not any(map(signs.held_out, words))
    share = sum(map(signs.held_out, signs.all_words(3))) / 26**3
    assert share == pytest.approx(0.2, abs=6 * (0.2 * 0.8 / 26**3) ** 0.5)  # a hash is no coin
    assert not any(map(signs.held_out, signs.LETTERS))  # every letter is seen
    lengths = torch.bincount(torch.tensor([len(word) for word in words]), minlength=4)
    assert lengths[0] == 0
    expected = 3000 * torch.tensor([0.1, 0.2, 0.7])
    assert bool(((lengths[1:] - expected).abs() < 6 * expected.sqrt()).all())


def test_prompts_to_train_and_to_judge_are_of_different_words():
    folder = signs.PROMPTS
    training = read_prompts(folder / "training.txt")
    held_out = read_prompts(folder / "held_out.txt")
    for prompts, expected in ((training, False), (held_out, True)):
        words = [prompt.split('"')[1] for prompt in prompts]
        assert prompts == tuple(map(signs.caption, words))
        assert {signs.held_out(word) for word in words} == {expected}
    assert not set(training) & set(held_out)
    assert len(held_out) >= 50


def test_every_letter_of_a_sign_is_one_token(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    pieces = tokenizer.convert_ids_to_tokens(tokenizer(signs.caption("CAT")).input_ids)
    assert pieces[1:6] == ["a</w>", "sign</w>", "that</w>", "says</w>", '"</w>']
    assert pieces[6:-1] == ["c", "a", "t</w>", '"</w>']
    assert tokenizer.model_max_length == LENGTH
    spelled = {tuple(tokenizer(signs.caption(word)).input_ids) for word in signs.all_words(2)}
    assert len(spelled) == 26**2

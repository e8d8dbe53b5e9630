"""What the words model can do: words read by length, the autoencoder's ceiling, a grid."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctrl import Estimate
from ctrl.noise import stream
from diffusion_envs.models.folders import local_folder
from diffusion_envs.models.text_to_image_pipeline import SUPPORTED, load_pipeline
from diffusion_envs.rewards.text_in_picture import ReadableText
from diffusion_envs.runs.contact_sheet import grid
from diffusion_envs.runs.run_folder import write_json
from diffusion_envs.tiny.train_autoencoder import psnr, reconstruct
from diffusion_envs.tiny.train_denoiser import sample
from diffusion_envs.words.signs import all_words, caption, held_out, signs

STEPS = 20
SETTINGS = ((1.0, 1.0), (3.0, 1.0), (5.0, 1.0))  # guidance, eta


def held_out_words(length: int, n: int, seed: int) -> list[str]:
    """Random words of this length that were never trained on; of one letter, any."""
    among = [word for word in all_words(length) if held_out(word) or length == 1]
    places = torch.randint(len(among), (n,), generator=stream(seed, "words", length)).tolist()
    return [among[place] for place in places]


def measure(output: Path, model: str, samples: int, seed: int) -> dict[str, Any]:
    """Measure everything that ``docs/words.md`` publishes; write ``words.json`` and ``words.png``.

    Args:
        output: folder of the results.
        model: folder of the model, or "words".
        samples: pictures for each length, guidance and eta.
        seed: of words and samples.
    """
    pipe = load_pipeline(model)
    folder = local_folder(model, None, SUPPORTED, {})
    words = {length: held_out_words(length, samples, seed) for length in (1, 2, 3)}
    measured: dict[str, Any] = {
        "bytes": sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()),
        "samples": samples,
        "steps": STEPS,
        "drawn": {},
        "reconstructed": {},
        "written": [],
    }
    for length, few in words.items():
        drawn = (255 * signs(few, stream(seed, "signs", length))).round().byte()
        rebuilt = reconstruct(pipe.vae, drawn)
        measured["drawn"][length] = _share(drawn.float() / 255, few)
        measured["reconstructed"][length] = _share(rebuilt, few) | {"dB": psnr(drawn, rebuilt)}
    for guidance, eta in SETTINGS:
        row: dict[str, Any] = {"guidance": guidance, "eta": eta, "share": {}}
        for length, few in words.items():
            prompts = [caption(word) for word in few]
            pictures = sample(pipe, prompts, steps=STEPS, guidance=guidance, eta=eta, seed=seed)
            row["share"][length] = _share(pictures, few)
            if (guidance, eta, length) == (3.0, 1.0, 3):
                shown = min(48, samples)
                sheet = grid(pictures[:shown], [f'"{word}"' for word in few[:shown]], columns=16)
                sheet.save(output / "words.png")
        measured["written"].append(row)
    write_json(output / "words.json", measured)
    return measured


def _share(pictures: Tensor, words: list[str]) -> dict[str, float | int | None]:
    """Share of the pictures in which exactly the word is read."""
    return Estimate.of(ReadableText()(pictures, [caption(word) for word in words])).as_dict()

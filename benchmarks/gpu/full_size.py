"""Stable Diffusion 1.5's full size at 512 x 512, random weights, bfloat16, LoRA, beside plain DDPO.

Of every batch: images a second sampled and trained on, the most memory in use, and the share of an
update that its network calls take alone, replayed in the same run.
"""

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.full_size import build_sd15, millions
from benchmarks.gpu.plain_ddpo import PlainDDPO
from benchmarks.gpu.timing import Device
from benchmarks.update import record
from diffusion_envs import objectives, rewards, samplers
from diffusion_envs.environment import Environment
from diffusion_envs.models.folders import TINY
from diffusion_envs.models.text_to_image_unet import TextToImageUNet
from diffusion_envs.training import parallel
from diffusion_envs.training.trainer import Trainer
from diffusion_envs.training.update_size import UpdateSize

BATCHES, STEPS = (1, 4, 16), 8
PROMPTS = ["a photo of a cat", "a photo of a ship"]


def rows(where: Device) -> Iterator[dict[str, Any]]:
    """One line a batch and what is timed."""
    with tempfile.TemporaryDirectory() as temporary:
        model: str | Path = TINY
        if not where.rehearsal:
            model = Path(temporary) / "model"
            build_sd15(model)
            yield {"case": "millions of parameters", **millions(model)}
        for batch in (1, 2) if where.rehearsal else BATCHES:
            yield from of_batch(where, model, batch)


def of_batch(where: Device, model: str | Path, batch: int) -> Iterator[dict[str, Any]]:
    """Sampling, an update of DDPO here and by hand; out of memory is a line too, and an end."""
    try:
        yield from _of_batch(where, model, batch)
    except torch.OutOfMemoryError:
        free, whole = (size / 2**30 for size in torch.cuda.mem_get_info())
        yield {
            "case": "out of memory",
            "batch": batch,
            "says": f"this GPU has {whole:.0f} GiB, {free:.1f} of them free: too few for batch "
            f"{batch}",
        }
    finally:
        if where.device.type == "cuda":
            torch.cuda.empty_cache()


def _of_batch(where: Device, model: str | Path, batch: int) -> Iterator[dict[str, Any]]:
    seconds = 0.0
    for row in _ours(where, model, batch):
        seconds = row["seconds"]
        yield row
    by_hand = _by_hand(where, model, batch)
    yield {**by_hand, "ours_over_by_hand": seconds / by_hand["seconds"]}


def _sizes(where: Device, batch: int) -> dict[str, int]:
    """Steps of the sampler and samples of an update."""
    if where.rehearsal:
        return {"batch": batch, "steps": 2, "samples": max(2, batch)}
    return {"batch": batch, "steps": STEPS, "samples": max(4, batch)}


def _built(where: Device, folder: str | Path, batch: int) -> tuple[TextToImageUNet, Environment]:
    model = TextToImageUNet.load(
        folder,
        guidance=1.0,
        batch=batch,
        precision="float32" if where.rehearsal else "bfloat16",
        device=where.device,
    )
    environment = Environment(
        model=model,
        sampler=samplers.DDIM(eta=1.0).bind(model.table, _sizes(where, batch)["steps"]),
        reward=rewards.Colour("red"),
        prompts=PROMPTS,
        seed=0,
        batch=batch,
    )
    return model, environment


def _line(where: Device, batch: int, case: str, function: Callable[[], object]) -> dict[str, Any]:
    timed: dict[str, float] = {}
    memory = where.peak_gib(lambda: timed.update(where.seconds(function, runs=2)))
    sizes = _sizes(where, batch)
    images = sizes["samples"] / timed["seconds"]
    return {"case": case, **sizes, **timed, "images_per_second": images, "peak_GiB": memory}


def _ours(where: Device, folder: str | Path, batch: int) -> Iterator[dict[str, Any]]:
    model, environment = _built(where, folder, batch)
    trainer = Trainer(
        environment,
        objectives.DDPO(),
        UpdateSize(samples=_sizes(where, batch)["samples"], batch=batch),
        accelerator=parallel.start(where.device.type),
    )
    yield _line(where, batch, "sampled", trainer.sample)
    trainer.step()  # the preflight belongs to the first update only
    whole = _line(where, batch, "an update of DDPO", trainer.step)
    calls: list[tuple[str, Callable[[], Any]]] = []
    record(model, environment.reward, environment, calls)
    trainer.step()
    replayed = [again for _, again in calls]
    alone = where.seconds(lambda: [again() for again in replayed], runs=2)
    yield {**whole, "over_its_network_calls": whole["seconds"] / alone["seconds"]}


def _by_hand(where: Device, folder: str | Path, batch: int) -> dict[str, Any]:
    sizes = _sizes(where, batch)
    plain = _plain(*_built(where, folder, batch), sizes["steps"], batch)
    generator = torch.Generator(where.device).manual_seed(0)
    update = partial(plain.update, sizes["samples"], generator)
    return _line(where, batch, "an update of DDPO by hand", update)


def _plain(model: TextToImageUNet, environment: Environment, steps: int, batch: int) -> PlainDDPO:
    levels = len(model.table.alphas_cumprod)
    timesteps = torch.linspace(levels - 1, levels / steps, steps).long().tolist()

    def reward(latents: torch.Tensor) -> torch.Tensor:
        images = model.decode(latents)
        return environment.reward(images, PROMPTS[:1] * len(images))

    return PlainDDPO(
        unet=model.pipe.unet,
        alphas_cumprod=model.pipe.scheduler.alphas_cumprod,
        timesteps=timesteps,
        context=model.condition(PROMPTS[:1]).tokens,
        event=model.event,
        reward=reward,
        optimiser=torch.optim.AdamW(model.parameters, lr=1e-4),
        batch=batch,
        dtype=model.precision,
    )

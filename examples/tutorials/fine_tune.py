# run with: UPDATES, SAMPLES, STEPS = 12, 16, 8 -> UPDATES, SAMPLES, STEPS = 4, 2, 2
# run with: CTRL_C_IN_CALL = 12 -> CTRL_C_IN_CALL = 5
# run with: evaluation_samples=24 -> evaluation_samples=2

# %% [markdown]
# # Fine-tune the embedded model with your own reward and prompts
#
# A tiny Stable Diffusion ships with the library: 32 by 32 pixels, ten kinds of pictures, every
# class of diffusers that the large one has. So everything below runs on a laptop's CPU in about a
# minute, with nothing to download, and is what you would type for Stable Diffusion 1.5, 2.1 or XL:
# only the model's name changes.
#
# ## A reward is a function
#
# Images in `[n, 3, height, width]` with values in [0, 1] and their prompts come in, one number for
# each image goes out, larger is better. It need not be differentiable, and may call whatever it
# likes. This one asks for warm colours, and counts its calls, so that this page can press Ctrl-C
# in the middle:

# %%
import json
import tempfile
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from diffusion_envs import objectives, samplers, sd15
from diffusion_envs.models.folders import tiny_folder
from diffusion_envs.runs.options import RunOptions
from diffusion_envs.training.update_size import UpdateSize

UPDATES, SAMPLES, STEPS = 12, 16, 8
CTRL_C_IN_CALL = 12

calls = 0


def warmth(images, prompts):
    """How much more red than blue a picture is, in tenths."""
    global calls
    calls += 1
    if calls == CTRL_C_IN_CALL:
        raise KeyboardInterrupt  # what Ctrl-C raises
    return 10 * (images[:, 0] - images[:, 2]).mean((1, 2))


# %% [markdown]
# ## The run
#
# The objective is the method; `ScoreAsAction` is the paper's. `kl_weight` says what a nat of
# distance from the pretrained model costs, in units of the reward. `size` is that of an update,
# and `options` say how the run is watched. Held-out samples, which training never sees, are made
# before and after, with the same seeds.

# %%
folder = Path(tempfile.mkdtemp()) / "warm"
arguments = {
    "reward": warmth,
    "prompts": ["a photo of a ship", "a photo of a horse", "a photo of a truck"],
    "output": folder,
    "objective": objectives.ScoreAsAction(kl_weight=0.5),
    "sampler": samplers.DDIM(eta=1.0),
    "steps": STEPS,
    "updates": UPDATES,
    "size": UpdateSize(samples=SAMPLES),
    "options": RunOptions(evaluation_samples=24, progress=False),
    "seed": 0,
}
model = sd15.StableDiffusion("tiny", guidance=1.0)
try:
    sd15.finetune(model, **arguments)
except KeyboardInterrupt:
    done = len((folder / "metrics.jsonl").read_text().splitlines())
    print(f"stopped after {done} updates")

# %% [markdown]
# ## Go on
#
# The same call with `resume=True` goes on from the last checkpoint. On one machine it comes to the
# same numbers, bit for bit, as a run that was never stopped.

# %%
run = sd15.finetune(model, **arguments, resume=True)
print("reward before", run.reward_before)
print("reward after ", run.reward)
print("gain, by seed", run.reward_gain)
print("path KL      ", run.path_kl, "nats")

# %% [markdown]
# ## Read it
#
# `report.html` in the run's folder has the curves with their intervals, the pictures before and
# after, how the reward and the held-out metrics went apart if they did, and every setting; it is
# one file, and needs no server. The numbers behind it are lines of JSON:

# %%
for line in (folder / "metrics.jsonl").read_text().splitlines()[:: UPDATES // 4]:
    numbers = json.loads(line)
    reward, kl = numbers["reward"], numbers["path_kl"]
    print(f"update {numbers['update']:2}: reward {reward['mean']:.2f}, path KL {kl['mean']:.2f}")

# %% [markdown]
# Before, and after, with the same seeds:

# %%
with Image.open(folder / "samples" / "step-000000.png") as before:
    before.load()
before.info["caption"] = "Pictures of the pretrained model"
before

# %%
with Image.open(folder / "samples" / f"step-{UPDATES:06d}.png") as after:
    after.load()
after.info["caption"] = "The same seeds after fine-tuning: warmer"
after

# %% [markdown]
# ## Use it without this library
#
# What trained is a LoRA, in the run's folder, in diffusers' own format:

# %%
pipe = StableDiffusionPipeline.from_pretrained(
    tiny_folder(), dtype=torch.float32, safety_checker=None, requires_safety_checker=False
)
pipe.set_progress_bar_config(disable=True)


def pictures() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    asked = ["a photo of a ship"] * 16
    steps = {"num_inference_steps": STEPS, "guidance_scale": 1.0, "eta": 1.0}
    made = pipe(asked, generator=generator, output_type="pt", **steps).images
    return torch.as_tensor(made)


plain = warmth(pictures(), []).mean()
pipe.load_lora_weights(folder)
print(f"in plain diffusers: {plain:.2f} without, {warmth(pictures(), []).mean():.2f} with the LoRA")

# %% [markdown]
# ## The same from the command line
#
# Put the reward into a file, and say where:
#
# ```python title="my_rewards.py"
# def warmth(images, prompts):
#     """How much more red than blue a picture is, in tenths."""
#     return 10 * (images[:, 0] - images[:, 2]).mean((1, 2))
# ```
#
# ```bash
# python -m diffusion_envs.sd15 --reward my_rewards.py:warmth --output runs/warm \
#     --prompts "a photo of a ship" "a photo of a horse" --kl-weight 0.5 --guidance 1 \
#     --updates 12 --samples 16 --steps 8
# python -m diffusion_envs.sd15 --resume runs/warm --updates 24
# ```
#
# ## What to try
#
# - `kl_weight=0.05`: twelve updates later every picture is a sheet of orange (a reward of 8.3 at
#   39 nats). That is what was asked for. `RunOptions(judges={...})` watches with rewards that are
#   not trained on, and the report says when they fall.
# - `RunOptions(frontier_samples=1000)`: how much any policy could have earned at the same KL.
# - Your own model: `sd15.StableDiffusion("path/to/folder")`, a single `.safetensors` file, or a
#   hub id; what fits in memory is printed by `--estimate`.
#
# The theory: [score as action, from the theorem to the loss](score_as_action.md),
# [the training loop](../theory/training-loop.md),
# [the frontier of KL and reward](../theory/frontier.md). Further: [rewards](../rewards.md),
# [the run's folder](../run_folder.md), [which method when](../which_method.md).

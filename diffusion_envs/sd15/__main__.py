"""Command line of Stable Diffusion.

python -m diffusion_envs.sd15 --model tiny --reward jpeg-compressibility --output runs/demo
python -m diffusion_envs.sd15 --objective grpo --group 8 --clip 0.5 --reward red --output runs/red
python -m diffusion_envs.sd15 --objective grpo --help
python -m diffusion_envs.sd15 --resume runs/demo
python -m diffusion_envs.sd15 evaluate runs/demo --steps 10 25 50 100 --samplers ddim dpm++ heun
"""

import sys

from diffusion_envs.runs.command_line import Family, main
from diffusion_envs.sd15.stable_diffusion import StableDiffusion

FAMILY = Family("python -m diffusion_envs.sd15", StableDiffusion)

if __name__ == "__main__":
    sys.exit(main(FAMILY, sys.argv[1:]))

"""Command line of Stable Diffusion.

python -m diffusion_envs.sd15 --model tiny --reward jpeg-compressibility --output runs/demo
python -m diffusion_envs.sd15 --objective grpo --group 8 --clip 0.5 --reward red --output runs/red
python -m diffusion_envs.sd15 --objective grpo --help
python -m diffusion_envs.sd15 --resume runs/demo
python -m diffusion_envs.sd15 evaluate runs/demo --steps 10 25 50 100 --samplers ddim dpm++ heun
python -m diffusion_envs.sd15 export runs/demo --merged models/demo
python -m diffusion_envs.sd15 export runs/demo --push USER/NAME
"""

import sys

from diffusion_envs.runs.command_line import Family, main
from diffusion_envs.runs.publishing import command
from diffusion_envs.sd15.stable_diffusion import StableDiffusion

PROGRAM = "python -m diffusion_envs.sd15"
FAMILY = Family(PROGRAM, StableDiffusion, commands={"export": command(PROGRAM)})

if __name__ == "__main__":
    sys.exit(main(FAMILY, sys.argv[1:]))

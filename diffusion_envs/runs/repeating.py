"""The trainer of a run that lies in a folder, as it was started: to look at one step of it again.

```python
from diffusion_envs.runs.refused import repeat
from diffusion_envs.runs.repeating import trainer_of

repeat(trainer_of("runs/demo"), "runs/demo/refused/update-000007")  # NonFiniteError, as then
```
"""

from pathlib import Path
from typing import Any

from diffusion_envs.models.protocol import Model
from diffusion_envs.runs.finetune import make_environment
from diffusion_envs.runs.prompts import read_prompts
from diffusion_envs.runs.run_folder import read_settings
from diffusion_envs.runs.settings import rebuild
from diffusion_envs.training import parallel
from diffusion_envs.training.optimisers import AdamW
from diffusion_envs.training.trainer import Trainer


def trainer_of(folder: str | Path, **changed: Any) -> Trainer:
    """A fresh trainer with a run's settings; the run itself is not touched.

    Args:
        folder: of the run.
        changed: arguments of ``finetune`` that are to be others, such as a reward that no name
            leads to, or ``size=UpdateSize(...)`` with another batch.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: it is damaged, or does not go together with what is changed.
    """
    settings = rebuild(read_settings(Path(folder).expanduser())) | changed
    options, size, seed = settings["options"], settings["size"], settings["seed"]
    model = settings["model"]
    accelerator = parallel.start(None if model.device is None else str(model.device))
    if not isinstance(model, Model):
        model = model.load(device=accelerator.device, batch=size.batch, seed=seed)
    training, _ = options.prompts_of(read_prompts(settings["prompts"]), seed)
    environment = make_environment(
        model,
        sampler=settings["sampler"],
        steps=settings["steps"],
        reward=settings["reward"],
        prompts=training,
        seed=seed,
        batch=size.batch,
        reward_timeout=options.reward_timeout,
    )
    return Trainer(
        environment,
        settings["objective"],
        size,
        accelerator=accelerator,
        preference=options.preference,
        data=options.data,
        target_kl=options.target_kl,
        log_path_kl=options.log_path_kl,
        optimiser=settings["optimiser"] or AdamW(),
    )

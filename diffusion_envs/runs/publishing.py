"""What is done with a finished run's export: written again, merged, pushed to the hub.

python -m diffusion_envs.sd15 export runs/demo
python -m diffusion_envs.sd15 export runs/demo --merged models/demo
python -m diffusion_envs.sd15 export runs/demo --push USER/NAME
"""

import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Protocol, runtime_checkable

import torch
import tyro
from rich.console import Console

from diffusion_envs.digests import read_tensors
from diffusion_envs.models.adapters import LORA_FILE
from diffusion_envs.models.exports import KOHYA_FILE, PIPELINE
from diffusion_envs.models.guidance_schedule import GUIDANCE_FILE
from diffusion_envs.runs.exported import load_exported
from diffusion_envs.runs.model_card import CARD, card, write_card
from diffusion_envs.runs.run_folder import read_settings
from diffusion_envs.runs.settings import rebuild

_ADAPTER_FILES = (LORA_FILE, KOHYA_FILE, GUIDANCE_FILE)
_REPOSITORY = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


@runtime_checkable
class Mergeable(Protocol):
    """A model that can be written whole."""

    def export_merged(self, folder: Path) -> Path:
        """Write a pipeline with what was trained in its weights; plain diffusers reads it first."""
        ...


@dataclass(frozen=True)
class Export:
    """Write what a finished run trained: again, as a whole model, or to the Hugging Face hub.

    Attributes:
        run: folder of the run.
        merged: folder that gets a whole pipeline, with what was trained in its weights (float32).
        push: repository on the hub, as USER/NAME; made if need be. Log in first: hf auth login.
        private: make that repository private.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    merged: Path | None = None
    push: str | None = None
    private: bool = False


def command(program: str) -> Callable[[Sequence[str]], None]:
    """The command ``export`` of a family's command line."""

    def called(words: Sequence[str]) -> None:
        options = tyro.cli(Export, args=list(words), prog=f"{program} export")
        for line in export(options.run, options.merged, options.push, private=options.private):
            Console().print(line, soft_wrap=True)

    return called


def export(
    run: str | Path,
    merged: str | Path | None = None,
    push: str | None = None,
    *,
    private: bool = False,
) -> list[str]:
    """Write what a finished run trained: again into its folder, merged, or to the hub.

    Args:
        run: folder of the run.
        merged: folder that gets a whole pipeline, with what was trained in its weights.
        push: repository on the hub, as USER/NAME.
        private: make that repository private.

    Returns:
        What was done, a sentence each.

    Raises:
        FileNotFoundError: there is no such run, or it has exported nothing yet.
        FileExistsError: ``merged`` holds something.
        ValueError: ``push`` names no repository, or the run's model cannot be loaded again, or what
            it exported is damaged.
        PermissionError: nobody is logged in to the hub.
        ConnectionError: the hub does not take it; all is still in the run's folder.
    """
    folder = Path(run).expanduser()
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"run must be the folder of a run, but {folder} holds none")
    whole = None if merged is None else Path(merged).expanduser()
    if whole is not None and whole.exists() and (whole.is_file() or any(whole.iterdir())):
        raise FileExistsError(f"merged must be a new or empty folder, but {whole} holds something")
    api = None if push is None else _logged_in(push)
    said = list[str]()
    if whole is not None or push is None:
        model = _exported_model(folder)
        if whole is None:
            said.append(f"exported: {model.export(folder)}")
        elif isinstance(model, Mergeable):
            whole.parent.mkdir(parents=True, exist_ok=True)
            said.append(f"merged: {model.export_merged(whole)}")
        else:
            raise ValueError(f"{type(model).__name__} cannot be written as a whole model")
    if (folder / "summary.json").is_file():
        write_card(folder)
        if whole is not None:
            (whole / CARD).write_text(card(folder, merged=True), encoding="utf-8")
    if push is not None:
        said.append(f"pushed: {_push(folder, api, push, private)}")
    return said


def _exported_model(folder: Path) -> Any:
    """The run's model with what it exported, in float32 on the CPU."""
    named: Any = rebuild(read_settings(folder)["model"], "model")
    if not hasattr(named, "load"):
        raise ValueError(f"the model of run {folder} has no name that leads back to it ({named})")
    here = {"precision": "float32", "device": "cpu"}  # whatever the run had
    known = {f.name for f in fields(named)}
    named = replace(named, **{name: here[name] for name in here if name in known})
    model = named.load(device=torch.device("cpu"), batch=8, seed=0)
    load_exported(model, folder)
    return model


# -- the hub -------------------------------------------------------------------------------------


def _logged_in(repository: str) -> Any:
    """The hub's interface, for somebody who is logged in; asked before anything is written."""
    from huggingface_hub import HfApi

    if not _REPOSITORY.fullmatch(repository):
        raise ValueError(f"push must be a repository, as USER/NAME, got {repository!r}")
    api = HfApi()
    try:
        api.whoami()
    except Exception as error:  # its own kinds, those of its network library, and of the system
        raise PermissionError(
            f"the hub does not know who you are, so that nothing was written or pushed: "
            f"{_first_line(error)}. Log in by hf auth login, or set HF_TOKEN"
        ) from error
    return api


def _push(folder: Path, api: Any, repository: str, private: bool) -> str:
    """Upload the card and what was exported; its address."""
    if not (folder / CARD).is_file():
        raise FileNotFoundError(f"run {folder} is not finished; let it finish, or resume it")
    whole = folder / PIPELINE
    with tempfile.TemporaryDirectory() as place:
        staged = Path(place) / "upload"
        if whole.is_dir():
            shutil.copytree(whole, staged, copy_function=_link)
        else:
            staged.mkdir()
            held = [name for name in _ADAPTER_FILES if (folder / name).is_file()]
            if not held:
                raise FileNotFoundError(
                    f"run {folder} has exported no model yet; let it finish, or resume it"
                )
            for name in held:
                if name != GUIDANCE_FILE:
                    read_tensors(folder / name)  # nothing damaged is published
                shutil.copyfile(folder / name, staged / name)
        shutil.copyfile(folder / CARD, staged / CARD)
        try:
            made = api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=repository,
                folder_path=str(staged),
                commit_message="Upload a fine-tuned model",
            )
        except Exception as error:  # its own kinds, those of its network library, and of the system
            raise ConnectionError(
                f"the hub did not take {repository}: {_first_line(error)}. All of it is still in "
                f"{folder}; push again"
            ) from error
    return str(made)


def _link(source: str, target: str) -> None:
    """A second name of a file, where the disk has such; gigabytes are not copied."""
    try:
        Path(target).hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)

"""Weights from the hub into one folder, and foreign files as safetensors."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file

from diffusion_envs.rewards.weights import PICKLES, Weights, locate, read_tensors


def fetch(weights: Weights, folder: Path) -> Mapping[str, Path]:
    """Download what a reward needs into one folder, and return the files by what they are for.

    What is there is not asked for again; what was interrupted goes on.

    Raises:
        FileNotFoundError: files are missing in the end; it lists them, and how to get them by hand.
    """
    from huggingface_hub import snapshot_download  # here: not all commands download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    folder = folder.expanduser()
    reasons = []
    for repository, files in weights.repositories.items():
        missing = [name for name in files if not (folder / name).is_file()]
        if not missing:
            continue
        try:
            snapshot_download(repository, allow_patterns=missing, local_dir=folder)
        except (OSError, ValueError, RuntimeError, HfHubHTTPError, HFValidationError) as error:
            words = str(error).strip().splitlines()
            reasons.append(f" ({repository}: {words[0] if words else type(error).__name__})")
    nowhere = [
        " or ".join(weights.names(role))
        for role in weights.files
        if not {name for files in weights.repositories.values() for name in files}
        & set(weights.names(role))
        and not any((folder / name).is_file() for name in weights.names(role))
    ]
    absent = {
        repository: [name for name in files if not (folder / name).is_file()]
        for repository, files in weights.repositories.items()
    }
    if lacking := [f"{', '.join(names)} of {name}" for name, names in absent.items() if names]:
        raise FileNotFoundError(
            f"{weights.reward} is not complete in {folder}: it lacks {'; '.join(lacking)}"
            f"{''.join(reasons)}. The same command goes on from here; {weights.by_hand()}"
        )
    if nowhere:
        raise FileNotFoundError(
            f"{weights.reward} is not complete in {folder}: {', '.join(nowhere)} is on no hub; put "
            "it there by hand (docs/rewards.md says where it is published)"
        )
    return locate(weights, folder)


def convert(weights: Weights, source: str | Path, folder: Path) -> list[Path]:
    """Write a reward's foreign files as safetensors into a folder, and copy the rest beside them.

    Tensors keep their names and types, so that scores stay what they are, bit for bit.

    Raises:
        FileExistsError: a file that would be written is there.
        FileNotFoundError: files are missing in the source.
        ValueError: nothing needs converting, or a file holds anything but finite tensors.
    """
    folder = folder.expanduser()
    targets: dict[Path, Path] = {}
    for role, path in locate(weights, source).items():
        if path.suffix not in PICKLES:
            targets[folder / path.name] = path
            continue
        name = next((n for n in weights.names(role) if n.endswith(".safetensors")), None)
        if name is None:
            raise ValueError(f"{weights.reward} reads {path.name} as it is: it is small, keep it")
        targets[folder / name] = path
    if not any(path.suffix in PICKLES for path in targets.values()):
        raise ValueError(f"{source} holds safetensors already: nothing is left to convert")
    targets = {target: path for target, path in targets.items() if not _same(target, path)}
    if there := [str(target) for target in targets if target.exists()]:
        raise FileExistsError(
            f"{', '.join(there)} would be overwritten; name another folder, or remove what is there"
        )
    for target, path in targets.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f".{target.name}.unfinished")
        if path.suffix in PICKLES:
            tensors = {name: value.clone() for name, value in read_tensors(path).items()}
            save_file(tensors, unfinished, {"format": "pt"})  # as transformers asks for
        else:
            shutil.copyfile(path, unfinished)
        unfinished.replace(target)
    return list(targets)


def _same(one: Path, other: Path) -> bool:
    return one.exists() and one.samefile(other)

"""The logs of a run: JSON lines, TensorBoard, Weights & Biases, and grids of pictures."""

import json
import logging
import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from ctrl.estimate import Estimate
from diffusion_envs.digests import opened, sealed
from diffusion_envs.runs.contact_sheet import grid, save
from diffusion_envs.runs.interruption import whole_calls
from diffusion_envs.whole_files import append, naming, whole

OVER_OPTIMISATION = "over_optimisation.jsonl"
TRAINING_BY_PROMPT = "training_by_prompt.jsonl"
LOGS = ("metrics.jsonl", OVER_OPTIMISATION, TRAINING_BY_PROMPT)
PROJECT = "ctrl"  # of Weights & Biases
_ALWAYS = ("reward", "reward_queries", "network_calls", "seconds")  # where one line has it
_COLUMNS = ("prompt", "mean", "standard_error", "n")  # of training_by_prompt.jsonl
_RECENT = 32  # pictures that all stay
_MOST_PROMPTS = 20  # in the config that Weights & Biases gets
_log = logging.getLogger(__name__)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``; a last line that a crash cut short is left out.

    Raises:
        ValueError: another line is damaged.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")
    read = list[dict[str, Any]]()
    for number, line in enumerate(
        lines[:-1], start=1
    ):  # what follows the last newline was cut short
        try:
            numbers = json.loads(line.decode())
            read.append(numbers | {"update": int(numbers["update"])})
            _require_legible(numbers, read[-2] if len(read) > 1 else numbers)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{path}, line {number} is damaged ({error}); take the line out to go on without it"
            ) from error
    if lines[-1]:
        _log.warning("%s: its last line was cut short and is left out", path)
    return read


def _require_legible(numbers: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Refuse a line that its readers would stumble over.

    Args:
        numbers: the line.
        before: the line before it, or itself.

    Raises:
        ValueError: an estimate lacks a number, one of two lines has a cost or a reward that the
            other has not, or columns are not all there, of one length.
    """
    for name, value in numbers.items():
        if isinstance(value, Mapping) and not _is_estimate(value):
            raise ValueError(f"{name} is no estimate: {dict(value)}")
    for name in _ALWAYS:
        if (name in numbers) != (name in before):
            raise ValueError(f"{name} is not in both this line and the one before")
    if any(isinstance(value, list) for value in numbers.values()):
        columns = [numbers.get(name) for name in _COLUMNS]
        lengths = {len(each) if isinstance(each, list) else None for each in columns}
        if None in lengths or len(lengths) > 1 or not all(numbers["n"]):
            raise ValueError(f"{', '.join(_COLUMNS)} are not columns of one length")


def _is_estimate(value: Mapping[str, Any]) -> bool:
    error = value.get("standard_error", "missing")
    numbers = [value.get("mean"), value.get("n"), *([] if error is None else [error])]
    return len(value) == 3 and all(isinstance(each, int | float) for each in numbers)


class Tracker:
    """Writes the logs of a run: files of JSON lines, ``tensorboard/`` and ``samples/``.

    On resuming, lines of updates that will be done again are dropped first, so that the log of a
    resumed run is that of an uninterrupted one. A run of Weights & Biases goes on under the same
    id, which ``wandb.json`` keeps; its config is the run's ``config.json``.

    Args:
        folder: of the run.
        first_update: updates already done.
        picture_every: updates between pictures, which thin out with age (``stays``).
        wandb: log to Weights & Biases too: the name of the project, or True for the project
            "ctrl" (of a resumed run: the project it is in).
        wandb_name: of the run there; the folder's if left out (of a resumed run: the one it has).
        enabled: False on all processes but the main one: then nothing is written.

    Raises:
        ValueError: ``metrics.jsonl`` or ``wandb.json`` is damaged, Weights & Biases is not
            installed or not logged in, or the run is in another project.
    """

    def __init__(
        self,
        folder: Path,
        *,
        first_update: int = 0,
        picture_every: int = 1,
        wandb: bool | str = False,
        wandb_name: str | None = None,
        enabled: bool = True,
    ) -> None:
        self.folder, self.enabled, self._picture_every = folder, enabled, picture_every
        self._service: Any = None  # the module wandb
        self._wandb: Any = None  # its run
        if not enabled:
            return
        if wandb:
            self._service = require_wandb()
        from torch.utils.tensorboard import SummaryWriter

        path = folder / "metrics.jsonl"
        self._last = _keep_lines_until(path, first_update)
        self._last_metrics = _keep_lines_until(folder / OVER_OPTIMISATION, first_update)
        _keep_lines_until(folder / TRAINING_BY_PROMPT, first_update)
        if self._service is not None:
            self._wandb = _wandb_run(self._service, folder, wandb, wandb_name)
        with self._board_called():
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_update + 1)
        append(path, "")  # there is a log from the start
        (folder / "samples").mkdir(exist_ok=True)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.enabled:
            return
        with self._board_called():
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    @contextmanager
    def _board_called(self) -> Iterator[None]:
        """TensorBoard's writer shares a queue with a thread of its own."""
        with whole_calls(), naming(self.folder / "tensorboard"):
            yield

    def log(self, numbers: Mapping[str, Any]) -> None:
        """One line of an update.

        Args:
            numbers: estimates, numbers, or None for what was not measured; ``"update"`` among them.

        Raises:
            ValueError: a number is not finite, or the update is not later than the last one.
            TypeError: a value is neither number nor estimate.
        """
        if not self.enabled:
            return
        plain = {name: _plain(name, value) for name, value in numbers.items()}
        update = numbers["update"]
        if update <= self._last:
            raise ValueError(
                f"update must be later than {self._last}, already logged; got {update}"
            )
        append(self.folder / "metrics.jsonl", json.dumps(plain, allow_nan=False) + "\n")
        self._last = update
        flat = {n: v.mean if isinstance(v, Estimate) else v for n, v in numbers.items()}
        flat = {name: value for name, value in flat.items() if value is not None}
        self._draw(flat, update)
        self._send(flat, update)

    def _send(self, values: Mapping[str, Any], update: int) -> None:
        """Values of an update, to Weights & Biases."""
        if self._wandb is not None:
            with whole_calls():
                self._wandb.log(values, step=update)

    def _draw(self, flat: Mapping[str, Any], update: int) -> None:
        """Numbers of an update, for TensorBoard."""
        with self._board_called():
            for name, value in flat.items():
                self._board.add_scalar(name, value, update)

    def by_prompt(self, update: int, rewards: Mapping[int, Estimate]) -> None:
        """A line of ``training_by_prompt.jsonl``: rewards of an update, by index of the prompt.

        The index is that of ``prompts`` in ``config.json``.
        """
        if not self.enabled:
            return
        line = {
            "update": update,
            "prompt": list(rewards),
            "mean": [each.mean for each in rewards.values()],
            "standard_error": [each.as_dict()["standard_error"] for each in rewards.values()],
            "n": [each.n for each in rewards.values()],
        }
        append(self.folder / TRAINING_BY_PROMPT, json.dumps(line, allow_nan=False) + "\n")

    def over_optimisation(self, update: int, numbers: Mapping[str, Estimate]) -> None:
        """A line of ``over_optimisation.jsonl``; of a run that was finished before, once more.

        Its last line is not in any checkpoint, and so is made anew where it was altered.

        Raises:
            ValueError: a number is not finite.
        """
        if not self.enabled or update < self._last_metrics:
            return
        path = self.folder / OVER_OPTIMISATION
        plain = {name: _plain(name, value) for name, value in numbers.items()}
        line = json.dumps({"update": update, **plain}, allow_nan=False)
        if update == self._last_metrics:  # it was finished before; else there is no line of it
            lines = read_metrics(path)
            if lines[-1:] == [json.loads(line)]:
                return
            _keep_lines_until(path, update - 1)
            if lines:  # a run of no updates has none before its end
                text = "%s: the line of update %d was altered, and is made anew"
                _log.warning(text, path, update)
        append(path, f"{line}\n")
        self._last_metrics = update
        flat = {f"over_optimisation/{name}": value.mean for name, value in numbers.items()}
        self._draw(flat, update)
        self._send(flat, update)

    def pictures(
        self,
        update: int,
        images: Float[Tensor, "n 3 h w"],
        captions: Sequence[str],
        *,
        last: bool = False,
    ) -> None:
        """A grid of pictures, the same prompts and seeds each time; older ones are thinned out.

        Files of the newest 32 times stay, and fewer and fewer of earlier ones (``stays``).
        TensorBoard and Weights & Biases, from which nothing can be taken away again, get those
        that stay longest (``lasts``).

        Args:
            update: after which they were made.
            images: in [0, 1].
            captions: one for each.
            last: of the run; they are sent everywhere.
        """
        if not self.enabled:
            return
        path = self.folder / "samples" / f"step-{update:06d}.png"
        sheet = grid(images, captions)
        with whole(path) as partial:
            save(sheet, partial)
        for other in path.parent.glob("step-*.png"):
            earlier = int(other.stem[5:])
            if earlier < update and not stays(earlier, update, self._picture_every):
                other.unlink(missing_ok=True)
        if not last and not lasts(update, self._picture_every):
            return
        with self._board_called():
            self._board.add_image("samples", np.asarray(sheet), update, dataformats="HWC")
        if self._wandb is not None:
            self._send({"samples": self._service.Image(sheet)}, update)


def stays(update: int, newest: int, every: int) -> bool:
    """Whether the pictures of an update stay when there are newer ones.

    Of the newest 32 times all stay, of those up to twice as old every second, up to four times as
    old every fourth, and so on: 32 and then 16 whenever a run doubles. What goes would go in a
    longer run, too, so that a run that is resumed keeps what an uninterrupted one does.

    Args:
        update: theirs.
        newest: update of the newest pictures.
        every: updates between pictures.
    """
    return _on_time(update, newest - update, every)


def lasts(update: int, every: int) -> bool:
    """Whether the pictures of an update stay until the run is twice as long: 32, then 16."""
    return _on_time(update, update, every)


def _on_time(update: int, age: int, every: int) -> bool:
    """Whether an update is a multiple of every, every 2, every 4, ... updates, by an age."""
    doublings = (age // (_RECENT * every)).bit_length()
    return doublings == 0 or update % (every << doublings) == 0


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, Estimate):
        if not math.isfinite(value.mean) or math.isnan(value.standard_error):
            raise ValueError(f"metric {name} must be finite, got {value!r}")
        return value.as_dict()
    if value is not None and not isinstance(value, int | float):
        raise TypeError(f"metric {name} must be a number or an Estimate, got {value!r:.80}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"metric {name} must be finite, got {value}")
    return value


def _keep_lines_until(path: Path, update: int) -> int:
    """Drop lines of later updates, and a last line that a crash cut short; the last update kept."""
    kept = [line for line in read_metrics(path) if line["update"] <= update]
    if path.is_file():
        with whole(path) as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    return kept[-1]["update"] if kept else 0


# -- Weights & Biases ----------------------------------------------------------------------------


def require_wandb() -> Any:
    """The ``wandb`` module, logged in: call it before anything is made or evaluated.

    Raises:
        ValueError: it is not installed, or nobody is logged in.
    """
    try:
        import wandb  # pyright: ignore[reportMissingImports]  # an extra
    except ImportError as error:
        raise ValueError("wandb is not installed: pip install ctrl-diffusion[wandb]") from error
    try:
        wandb.login()  # asks for a key where there is a person to ask
    except wandb.Error as error:
        raise ValueError(
            f"wandb cannot log in ({error}); run `wandb login` first, or set WANDB_MODE=offline"
        ) from error
    return wandb


def _wandb_run(service: Any, folder: Path, project: bool | str, name: str | None) -> Any:
    """The run that ``wandb.json`` names, begun or gone on with."""
    record = folder / "wandb.json"
    wanted, former = None if project is True else project, None
    if record.is_file():
        try:
            stored = opened(json.loads(record.read_text(encoding="utf-8")), record)
            known = {"project": str(stored["project"]), "id": str(stored["id"])}
            former = stored.get("name")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{record} is damaged ({error}); delete it to begin a new run of wandb"
            ) from error
        if wanted not in (None, known["project"]):
            raise ValueError(
                f"wandb must be the project of the run that is resumed, {known['project']!r} "
                f"(or True), got {wanted!r}; delete {record} to begin a new run of wandb"
            )
    else:
        known = {"project": wanted or PROJECT, "id": secrets.token_hex(4)}
    known["name"] = name or former or folder.resolve().name
    with whole(record) as partial:
        partial.write_text(json.dumps(sealed(known)), encoding="utf-8")
    return service.init(**known, dir=str(folder), config=_config_of(folder), resume="allow")


def _config_of(folder: Path) -> dict[str, Any] | None:
    """The run's config, of many prompts only the first and their number."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    config = json.loads(path.read_text(encoding="utf-8"))
    settings = config.get("settings", {})
    prompts = settings.get("prompts")
    if isinstance(prompts, list) and len(prompts) > _MOST_PROMPTS:
        settings["prompts"] = prompts[:_MOST_PROMPTS]
        settings["number of prompts"] = len(prompts)
    return config

"""A reward behind a server: pictures and prompts go as JSON over HTTP, one number each comes back.

``docs/reward_servers.md`` has the protocol, so that a server can be written in any language;
``diffusion_envs.rewards.serve`` is one for every reward of this library. Nothing is pickled.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_envs.prompt import metadata_of
from diffusion_envs.rewards.contract import require_inputs
from diffusion_envs.rewards.declaration import Declaration
from diffusion_envs.rewards.http import Client, Question, WrongAnswerError, excerpt, read_object
from diffusion_envs.rewards.picture_formats import FORMATS, Format, encode

PROTOCOL = 1  # version of what is sent and answered
_HEALTH = "health check"
_SENT = {
    "png": "sent as 8-bit PNG (values rounded to multiples of 1/255, ties to even)",
    "float32": "sent as exact float32 numbers, clamped to [0, 1]",
}


@dataclass(frozen=True)
class _Identity:
    """What a server says of itself."""

    reward: str
    version: str
    declaration: Mapping[str, Any]


@dataclass(frozen=True)
class Remote:
    """The reward that a server computes; not differentiable.

    Nothing is asked when it is made. Before its first request, the server is asked who it is. What
    may heal is asked again; everything else, and a server that becomes another one in the middle
    of a run, ends the run with a ``RewardError`` that names the server and the request.

    Attributes:
        url: address of the server, such as "http://127.0.0.1:8000"; without a password, since it is
            stored with the run's settings.
        version: that the server must have; any, but always the same one, if left out.
        format: "png", which rounds to 8 bits, or "float32", exact and some six times as large.
        batch: pictures in one request.
        concurrency: requests on their way at once; scores come in order in any case.
        timeout: seconds for one attempt, until the last byte of its answer.
        connect_timeout: seconds for a connection.
        retries: further attempts of a request, where one may help.
        backoff: seconds before the second attempt; each further pause is twice as long.
        patience: seconds for a request with all its attempts and pauses.
    """

    url: str
    _: KW_ONLY
    version: str | None = None
    format: Format = "png"
    batch: int = 16
    concurrency: int = 4
    timeout: float = 120.0
    connect_timeout: float = 10.0
    retries: int = 6
    backoff: float = 1.0
    patience: float = 1800.0
    differentiable: ClassVar[bool] = False
    concurrent: ClassVar[bool] = True  # may be called from several threads at once
    _client: Client = field(init=False, repr=False, compare=False)
    _known: list[_Identity] = field(init=False, repr=False, compare=False, default_factory=list)
    _lock: Any = field(init=False, repr=False, compare=False, default_factory=threading.Lock)

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {self.format!r}")
        if isinstance(self.batch, bool) or not isinstance(self.batch, int) or self.batch < 1:
            raise ValueError(f"batch must be an integer of at least 1, got {self.batch!r}")
        client = Client(
            self.url,
            kind="reward",
            timeout=self.timeout,
            connect_timeout=self.connect_timeout,
            patience=self.patience,
            retries=self.retries,
            backoff=self.backoff,
            concurrency=self.concurrency,
        )
        object.__setattr__(self, "_client", client)

    def __call__(
        self, images: Float[Tensor, "n 3 h w"], prompts: Sequence[str]
    ) -> Float[Tensor, " n"]:
        """What the server says, float32 on the CPU.

        Raises:
            RewardError: a request is not answered, or wrongly; the server, the request's number,
                what came and what to do are in its message.
        """
        require_inputs(images, prompts)
        identity = self._identity()
        parts = zip(
            images.detach().cpu().split(self.batch),
            [prompts[k : k + self.batch] for k in range(0, len(prompts), self.batch)],
            strict=True,
        )
        answers = self._client.ask([self._question(*part, identity) for part in parts])
        return torch.cat(answers)

    @property
    def counts(self) -> Mapping[str, int]:
        """Requests, and attempts beyond the first of each, since it was made."""
        return {"requests": self._client.asked, "requests_retried": self._client.retried}

    @property
    def declaration(self) -> Declaration:
        """The server's own, which is asked for, and how pictures come to it.

        Raises:
            RewardError: the server does not say who it is.
        """
        identity = self._identity()
        told = {name: str(value) for name, value in identity.declaration.items()}
        there = told.get("preprocessing", "not declared")
        return Declaration(
            scale=told.get("scale", "not declared"),
            licence=told.get("licence", "not declared"),
            version=identity.version,
            source=told.get("source", f"{identity.reward} at {self.url}"),
            preprocessing=f"{_SENT[self.format]}; then by the server: {there}",
        )

    def _identity(self) -> _Identity:
        """Who the server is: asked once."""
        with self._lock:
            if not self._known:
                (identity,) = self._client.ask([Question("/health", self._introduced)], _HEALTH)
                self._client.name = identity.reward
                self._known.append(identity)
            return self._known[0]

    def _introduced(self, content: bytes) -> _Identity:
        """Who the server says it is, if it is whom we want."""
        told = read_object(content)
        if told.get("protocol") != PROTOCOL:
            raise WrongAnswerError(
                f"speaks protocol {told.get('protocol')!r:.80}, and this version {PROTOCOL}: "
                "answer GET /health as docs/reward_servers.md says"
            )
        reward, version = _names(told, content)
        if self.version is not None and version != self.version:
            raise WrongAnswerError(
                f"reward {reward} has version {version!r:.80} there, and version={self.version!r} "
                "is asked for: start the server with that one, or name the other"
            )
        declaration = told.get("declaration") or {}
        if not isinstance(declaration, dict):
            raise WrongAnswerError(f"declaration must be an object, got {excerpt(content)}")
        return _Identity(reward, version, declaration)

    def _question(self, images: Tensor, prompts: Sequence[str], identity: _Identity) -> Question:
        def body() -> dict[str, Any]:
            columns = [dict(metadata_of(prompt)) for prompt in prompts]
            return {
                "protocol": PROTOCOL,
                "format": self.format,
                "images": encode(images, self.format),
                "prompts": list(prompts),
                **({"metadata": columns} if any(columns) else {}),
            }

        def read(content: bytes) -> Tensor:
            told = read_object(content)
            if (names := _names(told, content)) != (identity.reward, identity.version):
                raise WrongAnswerError(
                    f"answered as {names[0]} of version {names[1]!r:.80}, but it began as "
                    f"{identity.reward} of version {identity.version!r:.80}: a run needs one "
                    "reward to its end; start the first one again and resume the run"
                )
            return _scores(told, len(images), content)

        return Question("/score", read, body)


def _names(told: Mapping[str, Any], content: bytes) -> tuple[str, str]:
    """Name and version of the reward that answers."""
    names = told.get("reward"), told.get("version")
    if not all(isinstance(name, str) and name for name in names):
        raise WrongAnswerError(
            f"must name its reward and version in every answer, got {excerpt(content)}"
        )
    return str(names[0]), str(names[1])


def _scores(told: Mapping[str, Any], wanted: int, content: bytes) -> Float[Tensor, " n"]:
    """One finite number for each picture, in float32.

    Raises:
        WrongAnswerError: there is something else.
    """
    scores = told.get("scores")
    if not isinstance(scores, list):
        raise WrongAnswerError(f"answered without a list of scores: {excerpt(content)}")
    if len(scores) != wanted:
        raise WrongAnswerError(
            f"answered with {len(scores)} scores for {wanted} pictures: {excerpt(content)}"
        )
    numbers = torch.empty(wanted)
    for k, score in enumerate(scores):
        number = finite(score)
        if number is None:
            raise WrongAnswerError(
                f"answered with {score!r:.80} for picture {k}, which is no finite number: the "
                "reward there must have a lowest finite score where it has no answer"
            )
        numbers[k] = number
    return numbers


def finite(value: Any) -> float | None:
    """A JSON number that float32 can hold; None for all else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if abs(number) <= torch.finfo(torch.float32).max else None

"""A vision-language model as a reward, by an OpenAI-compatible endpoint; it answers with a number.

One question a picture: the picture as PNG in a data URL, temperature 0, and an answer that a JSON
schema holds to one number. Answers are cached by content, so that no picture is asked about twice,
by this run, by one that is resumed, or by others that share the folder of the cache.

Source  OpenAI's chat completions with structured output, which vLLM, SGLang and others serve.
"""

import base64
import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_envs.rewards.contract import RewardError, require_inputs
from diffusion_envs.rewards.declaration import Declaration
from diffusion_envs.rewards.http import Client, Question, WrongAnswerError, excerpt, read_object
from diffusion_envs.rewards.picture_formats import png, quantised
from diffusion_envs.rewards.remote import finite

QUESTION = (
    'How well does this picture show "{prompt}", and how well is it made? Answer with one number '
    "from {low:g} (not at all, or broken) to {high:g} (exactly, and without a flaw)."
)
_log = logging.getLogger(__name__)


@dataclass
class _State:
    """What changes: answers by content, counts, and the model that answered first."""

    answers: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=lambda: {"asked": 0, "cached": 0, "repeated": 0})
    answers_as: str | None = None
    lock: Any = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class VLMJudge:
    """A number between the ends of ``scale`` that a model answers with; not differentiable.

    Attributes:
        url: base of the endpoint, such as "http://127.0.0.1:8000/v1"; "/chat/completions" follows.
        model: which one the endpoint is to ask.
        question: with {prompt}, {low} and {high}, which are filled in.
        scale: lowest and highest number; what is outside is no answer.
        api_key_variable: of the environment; holds the key, if there is one. The key itself is in
            no setting, log or message.
        cache: folder of answers, which several processes may share; in memory alone if left out.
        max_tokens: of an answer; models that think aloud first need more.
        extra: further fields of a question, or other values of these; None leaves one out
            (``{"max_tokens": None, "max_completion_tokens": 256}``).
        concurrency: questions on their way at once.
        timeout: seconds for one attempt, until the last byte of its answer.
        connect_timeout: seconds for a connection.
        retries: further attempts of a question, where one may help, and as many after an answer
            that cannot be read.
        backoff: seconds before the second attempt; each further pause is twice as long.
        patience: seconds for a question with all its attempts and pauses.
    """

    url: str
    _: KW_ONLY
    model: str
    question: str = QUESTION
    scale: tuple[float, float] = (0.0, 10.0)
    api_key_variable: str = "OPENAI_API_KEY"
    cache: Path | None = None
    max_tokens: int = 256
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)
    concurrency: int = 8
    timeout: float = 120.0
    connect_timeout: float = 10.0
    retries: int = 6
    backoff: float = 1.0
    patience: float = 1800.0
    differentiable: ClassVar[bool] = False
    concurrent: ClassVar[bool] = True  # may be called from several threads at once
    _client: Client = field(init=False, repr=False, compare=False)
    _state: _State = field(init=False, repr=False, compare=False, default_factory=_State)

    def __post_init__(self) -> None:
        low, high = self.scale
        if finite(low) is None or finite(high) is None or not low < high:
            raise ValueError(f"scale must be two numbers, the lower first, got {self.scale!r}")
        if not self.model:
            raise ValueError("model must name what the endpoint is to ask, got ''")
        if isinstance(self.max_tokens, bool) or not isinstance(self.max_tokens, int):
            raise ValueError(f"max_tokens must be an integer, got {self.max_tokens!r}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        try:
            self._asked("a cat")
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise ValueError(
                "question may hold {prompt}, {low} and {high}, and other braces twice ({{ }}): "
                f"{type(error).__name__}: {error}"
            ) from error
        if self.cache is not None:
            object.__setattr__(self, "cache", Path(self.cache).expanduser().absolute())
        client = Client(
            self.url,
            kind="judge",
            timeout=self.timeout,
            connect_timeout=self.connect_timeout,
            patience=self.patience,
            retries=self.retries,
            backoff=self.backoff,
            concurrency=self.concurrency,
            headers=self._headers,
            credentials=f"the environment variable {self.api_key_variable} holds the key",
        )
        client.name = self.model
        object.__setattr__(self, "_client", client)

    @classmethod
    def at(cls, place: str) -> "VLMJudge":
        """The usual one by one word, MODEL@URL.

        Raises:
            ValueError: it is none.
        """
        model, _, url = place.rpartition("@")
        if not model or not url:
            raise ValueError(f"a judge must be MODEL@URL, got {place!r}")
        return cls(url, model=model)

    def __call__(
        self, images: Float[Tensor, "n 3 h w"], prompts: Sequence[str]
    ) -> Float[Tensor, " n"]:
        """What the model answers, float32 on the CPU.

        Raises:
            RewardError: a question is not answered, or not by a number of the scale; the endpoint,
                the request's number, what came and what to do are in its message.
        """
        require_inputs(images, prompts)
        pictures = [png(pixels) for pixels in quantised(images.detach())]
        keys = [self._key(*pair) for pair in zip(pictures, prompts, strict=True)]
        new = {
            key: (picture, prompt)
            for key, picture, prompt in zip(keys, pictures, prompts, strict=True)
            if self._remembered(key) is None
        }
        counts = self._state.counts
        with self._state.lock:
            counts["cached"] += len(keys) - len(new)
        self._ask(new)
        return torch.tensor([self._state.answers[key] for key in keys])

    @property
    def counts(self) -> Mapping[str, int]:
        """Pictures asked about and taken from the cache; attempts and answers beyond the first."""
        return {**self._state.counts, "retried": self._client.retried}

    @property
    def declaration(self) -> Declaration:
        """What is known of it; the endpoint is not asked."""
        return Declaration(
            scale=f"the model's rating from {self.scale[0]:g} to {self.scale[1]:g}",
            licence="that of the model",
            version=self.model,
            source=f"{self.url}: {self.question}",
            preprocessing="sent as 8-bit PNG of its own size; then by the endpoint: not declared",
        )

    def _ask(self, new: Mapping[str, tuple[bytes, str]]) -> None:
        """Until every answer is remembered; what cannot be read is asked again."""
        left, tries = dict(new), 0
        while left:
            with self._state.lock:
                self._state.counts["repeated" if tries else "asked"] += len(left)
            tries += 1
            first = self._client.asked + 1
            answers = self._client.ask([self._question(k, *content) for k, content in left.items()])
            numbered = enumerate(zip(left, answers, strict=True), first)
            unread = {key: (number, why) for number, (key, why) in numbered if why is not None}
            if unread and tries > self.retries:
                key, (number, why) = next(iter(unread.items()))
                raise RewardError(
                    f"{self._client.who}, request {number}: {why}, when asked about "
                    f"{left[key][1]!r:.80} for the {tries}. time; see whether the model keeps to "
                    f"response_format, and needs more than max_tokens={self.max_tokens}"
                )
            left = {key: left[key] for key in unread}

    def _question(self, key: str, picture: bytes, prompt: str) -> Question:
        def body() -> dict[str, Any]:
            image = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
            content = [
                {"type": "text", "text": self._asked(prompt)},
                {"type": "image_url", "image_url": {"url": image}},
            ]
            return self._sent([{"role": "user", "content": content}])

        def read(content: bytes) -> str | None:
            answer = self._read(content)
            if isinstance(answer, str):
                return answer
            self._remember(key, answer)  # at once: the next question may fail
            return None

        return Question("/chat/completions", read, body)

    def _sent(self, messages: list[Any]) -> dict[str, Any]:
        """Fields of a question."""
        fields = {
            "model": self.model,
            "temperature": 0,
            "max_tokens": self.max_tokens,
            "messages": messages,
            "response_format": {"type": "json_schema", "json_schema": self._schema()},
            **self.extra,
        }
        return {name: value for name, value in fields.items() if value is not None}

    def _schema(self) -> dict[str, Any]:
        low, high = self.scale
        return {
            "name": "rating",
            "strict": True,
            "schema": {
                "type": "object",
                "properties": {"score": {"type": "number", "minimum": low, "maximum": high}},
                "required": ["score"],
                "additionalProperties": False,
            },
        }

    def _read(self, content: bytes) -> float | str:
        """The number; or, in words, why the model's text holds none.

        Raises:
            WrongAnswerError: there is no text of the model, or it is another model's.
        """
        told = read_object(content)
        try:
            message = told["choices"][0]["message"]
            text = message["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise WrongAnswerError(
                f"answered without choices[0].message.content: {excerpt(content)}"
            ) from error
        model = told.get("model")
        if isinstance(model, str):
            with self._state.lock:
                first = self._state.answers_as = self._state.answers_as or model
            if model != first:
                raise WrongAnswerError(
                    f"answered by model {model!r:.80}, but it began with {first!r:.80}: a run "
                    "needs one judge to its end; name a model that stays"
                )
        if isinstance(text, list):  # in parts
            text = "".join(str(part.get("text", "")) for part in text if isinstance(part, dict))
        return self._rating(text)

    def _rating(self, text: Any) -> float | str:
        """The number in the model's last JSON object, or why there is none."""
        if not isinstance(text, str) or not text.strip():
            return f"no text, but {text!r:.80}"
        shown = excerpt(text.encode())
        objects = re.findall(r"\{[^{}]*\}", text)  # a fence or a thought aloud may stand before it
        try:
            score = json.loads(objects[-1])["score"]
        except (IndexError, ValueError, KeyError):
            return f"no JSON object with a score, but {shown}"
        number, (low, high) = finite(score), self.scale
        if number is None or not low <= number <= high:
            return f"no score from {low:g} to {high:g}, but {shown}"
        return number

    def _asked(self, prompt: str) -> str:
        return self.question.format(prompt=prompt, low=self.scale[0], high=self.scale[1])

    def _headers(self) -> Mapping[str, str]:
        """With the key, if there is one.

        Raises:
            RewardError: it cannot be sent; it is not shown.
        """
        key = os.environ.get(self.api_key_variable, "").strip()
        if not key:
            return {}
        if not (key.isascii() and key.isprintable()):
            raise RewardError(f"{self.api_key_variable} holds what no key holds: set it again")
        return {"Authorization": f"Bearer {key}"}

    # -- the cache ---------------------------------------------------------------------------------

    def _key(self, picture: bytes, prompt: str) -> str:
        """Of all that the answer depends on."""
        about = json.dumps(self._sent([self._asked(prompt)]), sort_keys=True)
        digest = hashlib.sha256(hashlib.sha256(picture).digest())
        digest.update(about.encode())
        return digest.hexdigest()

    def _remembered(self, key: str) -> float | None:
        """The answer, if this or another process has it; a damaged file has none."""
        answers, (low, high) = self._state.answers, self.scale
        if key in answers or self.cache is None:
            return answers.get(key)
        try:
            number = finite(json.loads(self._file(key).read_bytes())["score"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            _log.warning("passing over a damaged answer: %s: %s", self._file(key), error)
            return None
        if number is None or not low <= number <= high:
            return None
        answers[key] = number
        return number

    def _remember(self, key: str, answer: float) -> None:
        self._state.answers[key] = answer
        if self.cache is None:
            return
        file = self._file(key)
        partial = file.with_name(f"{key}.{os.getpid()}.{threading.get_ident()}.partial")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps({"score": answer, "model": self.model}) + "\n")
            partial.replace(file)  # whole, or not there: others may be reading
        except OSError as error:
            raise RewardError(f"cache {self.cache} cannot be written: {error}") from error

    def _file(self, key: str) -> Path:
        assert self.cache is not None
        return self.cache / key[:2] / f"{key}.json"

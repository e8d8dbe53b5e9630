"""Where a cluster waits: a simulation of one update on several GPUs and a reward, by events.

Every GPU samples its pictures in pieces, decodes them and has them scored; it asks the pretrained
model along its paths; then all GPUs wait for each other, since advantages are of the whole batch,
and each computes gradients. A reward is computed on the GPU itself, or by servers that all GPUs
share: a request takes a latency, in which no server is busy, and the time of one server for each
picture.

Without overlap a GPU samples all, asks the pretrained model, and then has one piece after another
scored, waiting for each. With overlap a piece is handed to a thread of its own once it is decoded,
which asks for one piece after another, or for several at once, while the next is sampled and while
the pretrained model is asked. What is computed is the same.
"""

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import astuple, dataclass, field


@dataclass(frozen=True)
class Work:
    """One update on each GPU: seconds a picture, unless something else is said.

    Attributes:
        pictures: of one GPU.
        batch: pictures of a piece.
        sample: all steps of a path.
        decode: one picture, copied to the host.
        reference: the pretrained model along a path; 0 where no method asks it.
        update: gradients of a path.
        shared: seconds an update that do not depend on the number of pictures: communication,
            optimiser, checkpoint, the share of an evaluation.
    """

    pictures: int
    batch: int
    sample: float
    decode: float
    reference: float
    update: float
    shared: float = 0.0

    @property
    def computed(self) -> float:
        """Seconds of one GPU without its rewards."""
        each = self.sample + self.decode + self.reference + self.update
        return self.pictures * each + self.shared


@dataclass(frozen=True)
class Reward:
    """Who scores pictures, and how fast.

    Attributes:
        name: for tables.
        latency: seconds of a request beside its service, least and most: the logarithm is uniform
            between them.
        service: seconds of one server for a picture.
        servers: that all GPUs share; or of each of them (its own processor, say).
        of_each: whether every GPU has so many of its own.
        request: pictures in a request.
        at_once: requests of one process on their way at once.
        on_gpu: computed on the GPU that samples; then all but ``service`` is ignored.
    """

    name: str
    latency: tuple[float, float] = (0.0, 0.0)
    service: float = 0.0
    servers: int = 1
    of_each: bool = False
    request: int = 16
    at_once: int = 4
    on_gpu: bool = False

    def drawn(self, numbers: random.Random) -> float:
        """The latency of one request, seconds."""
        least, most = self.latency
        return least if least == most else least * (most / least) ** numbers.random()


@dataclass(frozen=True)
class Update:
    """What became of an update.

    Attributes:
        seconds: until the last GPU is done.
        waiting: seconds in which a GPU waits for rewards, mean over the GPUs.
        uneven: seconds in which it waits for other GPUs, mean.
        servers_busy: share of the update in which the servers work.
    """

    seconds: float
    waiting: float
    uneven: float
    servers_busy: float

    @property
    def share_waiting(self) -> float:
        """Share of the GPUs' time that is spent waiting, for rewards or for each other."""
        return (self.waiting + self.uneven) / self.seconds


class Events:
    """What happens, in the order of time."""

    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def after(self, seconds: float, what: Callable[[], None]) -> None:
        """Let something happen later; what is due at the same moment comes in order of asking."""
        heapq.heappush(self._queue, (self.now + seconds, next(self._numbers), what))

    def run(self) -> None:
        """Until nothing is left to happen."""
        while self._queue:
            self.now, _, what = heapq.heappop(self._queue)
            what()


@dataclass
class _Servers:
    """Requests are served in the order of their arrival by whoever is free."""

    events: Events
    reward: Reward
    numbers: random.Random
    number: int
    busy: int = 0
    worked: float = 0.0
    waiting: list[tuple[int, Callable[[], None]]] = field(default_factory=list)

    def request(self, pictures: int, answered: Callable[[], None]) -> None:
        """Half of the latency lies before the service, half after it."""
        latency = self.reward.drawn(self.numbers)

        def arrive() -> None:
            self.waiting.append((pictures, lambda: self.events.after(latency / 2, answered)))
            self._serve()

        self.events.after(latency / 2, arrive)

    def _serve(self) -> None:
        while self.waiting and self.busy < self.number:
            pictures, answered = self.waiting.pop(0)
            seconds = pictures * self.reward.service
            self.busy += 1
            self.worked += seconds

            def served(answered: Callable[[], None] = answered) -> None:
                self.busy -= 1
                answered()
                self._serve()

            self.events.after(seconds, served)


@dataclass
class _Asking:
    """One process's threads that have pieces scored: so many at once, in order."""

    servers: _Servers
    calls: int
    pieces: list[int] = field(default_factory=list)  # pictures of each that has not begun
    under_way: int = 0
    idle: Callable[[], None] | None = None

    def ask(self, pictures: int) -> None:
        """Have a piece scored after those before it."""
        self.pieces.append(pictures)
        self._next()

    def when_idle(self, what: Callable[[], None]) -> None:
        """Once all that was asked is answered."""
        self.idle = what
        self._next()

    def _next(self) -> None:
        while self.pieces and self.under_way < self.calls:
            self.under_way += 1
            self._send(self.pieces.pop(0))
        if not self.under_way and (what := self.idle) is not None:
            self.idle = None
            what()

    def _send(self, pictures: int) -> None:
        reward = self.servers.reward
        requests = [min(reward.request, pictures - k) for k in range(0, pictures, reward.request)]
        left = len(requests)

        def send() -> None:
            if requests:
                self.servers.request(requests.pop(0), answered)

        def answered() -> None:
            nonlocal left
            left -= 1
            send()
            if not left:
                self.under_way -= 1
                self._next()

        for _ in range(reward.at_once):
            send()


def update(
    work: Work, reward: Reward, gpus: int, *, overlap: int, uneven: float = 0.0, seed: int = 0
) -> Update:
    """Simulate one update.

    Args:
        work: of each GPU.
        reward: who scores.
        gpus: that sample and learn, and share the reward's servers.
        overlap: pieces of one process that are scored at once while more is sampled; 0: one after
            another, and nothing is sampled meanwhile.
        uneven: standard deviation of the GPUs' speed, relative.
        seed: of speeds and latencies.
    """
    events, numbers = Events(), random.Random(seed)
    number = reward.servers * (gpus if reward.of_each else 1)
    servers = _Servers(events, reward, numbers, number)
    speeds = [max(0.5, numbers.gauss(1.0, uneven)) for _ in range(gpus)]
    sizes = [min(work.batch, work.pictures - k) for k in range(0, work.pictures, work.batch)]
    began_waiting, scored = [0.0] * gpus, [0.0] * gpus

    def one(gpu: int, speed: float) -> None:
        asking, left = _Asking(servers, max(1, overlap)), list(sizes)
        each = work.sample + work.decode + (reward.service if reward.on_gpu else 0.0)

        def sample() -> None:
            if not left:
                events.after(work.pictures * work.reference / speed, wait)
                return
            pictures = left.pop(0)

            def sampled() -> None:
                if overlap and not reward.on_gpu:
                    asking.ask(pictures)
                sample()

            events.after(pictures * each / speed, sampled)

        def wait() -> None:
            began_waiting[gpu] = events.now
            if not overlap and not reward.on_gpu:
                for pictures in sizes:
                    asking.ask(pictures)
            asking.when_idle(done)

        def done() -> None:
            scored[gpu] = events.now

        sample()

    for gpu, speed in enumerate(speeds):
        one(gpu, speed)
    events.run()
    met = max(scored)
    ends = [met + work.pictures * work.update / speed for speed in speeds]
    seconds = max(ends) + work.shared
    waiting = sum(b - a for a, b in zip(began_waiting, scored, strict=True)) / gpus
    apart = sum(met - s + max(ends) - e for s, e in zip(scored, ends, strict=True)) / gpus
    return Update(seconds, waiting, apart, servers.worked / (number * seconds))


def mean_update(
    work: Work, reward: Reward, gpus: int, *, overlap: int, uneven: float = 0.03, updates: int = 20
) -> Update:
    """Means over several updates, whose speeds and latencies are drawn by their number."""
    made = [
        update(work, reward, gpus, overlap=overlap, uneven=uneven, seed=seed)
        for seed in range(updates)
    ]
    return Update(*(sum(values) / updates for values in zip(*map(astuple, made), strict=True)))

"""A time within which a reward must answer: one that hangs ends the run instead of holding it."""

from collections.abc import Callable, Sequence
from concurrent.futures import wait
from typing import TypeVar

from torch import Tensor

from diffusion_envs.rewards.contract import Reward, RewardError, Scorer, reward_name
from diffusion_envs.rewards.daemon_threads import DaemonThreads, as_here

Result = TypeVar("Result")


def within(seconds: float | None, call: Callable[[], Result], what: str, images: Tensor) -> Result:
    """What a call returns or raises, if it ends in time.

    With a limit it is made in a daemon thread of its own. If it is late it goes on there, and ends
    with the process at the latest. Signals arrive while it is waited for.

    Args:
        seconds: the call may take; None for any time, without a thread.
        call: asks a reward.
        what: is asked of which pictures, for messages.
        images: that are scored; their device is the thread's.

    Raises:
        RewardError: it has not ended in time.
    """
    if seconds is None:
        return call()
    thread = DaemonThreads()
    try:
        answer = thread.submit(as_here(call, images.device))
        late = bool(wait([answer], timeout=seconds).not_done)
        if not late:
            return answer.result()
    finally:
        thread.close()
    raise RewardError(
        f"{what}: no answer within {seconds:g} s (reward_timeout). It goes on in a thread that "
        "ends with this process; see whether it hangs, then resume the run, with a larger "
        "reward_timeout if it was only slow"
    )


def limited(seconds: float | None, ask: Scorer, pictures: Sequence[int] | None = None) -> Scorer:
    """A scorer whose every call of a reward must end in time.

    Args:
        seconds: as of ``within``.
        ask: how a reward is asked.
        pictures: index of each picture among its run's, for messages.
    """
    if seconds is None:
        return ask

    def timed(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor:
        which = range(len(images)) if pictures is None else pictures
        what = f"reward {reward_name(reward)} on {numbered(which)}"
        return within(seconds, lambda: ask(reward, images, prompts), what, images)

    return timed


def numbered(pictures: Sequence[int]) -> str:
    """Which pictures, in few words: "pictures 8 to 15", "picture 3", "pictures 1, 4, 7"."""
    distinct = sorted(set(pictures))
    if len(distinct) == 1:
        return f"picture {distinct[0]}"
    if distinct == list(range(distinct[0], distinct[-1] + 1)):
        return f"pictures {distinct[0]} to {distinct[-1]}"
    return "pictures " + ", ".join(str(k) for k in distinct)


def require_seconds(seconds: float | None) -> None:
    """Refuse what is no time.

    Raises:
        ValueError: it is neither None nor a number above 0.
    """
    bad = isinstance(seconds, bool) or not isinstance(seconds, int | float | None)
    if bad or (seconds is not None and not seconds > 0):
        raise ValueError(
            f"reward_timeout must be a number of seconds above 0, or None, got {seconds!r}"
        )

"""Write the tables of the documentation again from the stored results; nothing is measured.

    python -m benchmarks.pages

A table stands between ``<!-- NAME -->`` and ``<!-- end of NAME -->`` on its page. ``sentences`` are
what the prose of pages quotes from the same files: they are not written, but a test holds every one
of them to be on its page, so that a result that changes cannot leave an old number behind.
"""

import csv
import itertools
import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
Pair = Sequence[float]  # a mean and its standard error


def stored(name: str, folder: Path = DOCS) -> Any:
    """What ``folder/NAME.json`` holds."""
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def filled(text: str, name: str, table: str) -> str:
    """A page with a table in its place.

    Args:
        text: of the page.
        name: of the place.
        table: what is to stand there.

    Raises:
        ValueError: the page has no such place, or more than one.
    """
    place = re.compile(
        rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end of {re.escape(name)} -->)", re.DOTALL
    )
    text, times = place.subn(lambda m: f"{m[1]}{table}\n{m[2]}", text)
    if times != 1:
        raise ValueError(f"the page must have one place for the table {name!r}, got {times}")
    return text


def bracketed(pair: Pair, digits: int) -> str:
    """0.992(1): the standard error in units of the last digit."""
    mean, error = pair
    return f"{mean:.{digits}f}({round(error * 10**digits)})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def resolved(pair: Pair, digits: int | None = None) -> str:
    """A number of three digits; none where its standard error is more than half of it."""
    if None in pair or pair[1] >= 0.5 * abs(pair[0]):
        return "not resolved"
    return f"{pair[0]:.3g}" if digits is None else bracketed(pair, digits)


# -- tables ----------------------------------------------------------------------------------------


def transfer() -> str:
    """Shares of the Gaussian problem on other step counts and solvers."""
    rows: dict[tuple[str, int], dict[tuple[str, int], Any]] = {}
    for row in stored("transfer")["rows"]:
        if row["problem"] == "gaussian" and row["method"] != "pretrained":
            policy = rows.setdefault((row["method"], row["train_steps"]), {})
            policy[row["solver"], row["steps"]] = row
    names = {
        "optimum": "exact optimum, continuous time",
        "optimum of the chain, a table, nearest elsewhere": (
            "optimum of the 50-step chain, a table, nearest elsewhere"
        ),
        "optimum of the chain, a table, zero elsewhere": (
            "optimum of the 50-step chain, a table, zero elsewhere"
        ),
    }
    columns = [("share_of_j", "DDIM eta 1", steps) for steps in (10, 25, 50, 100)]
    columns += [("share", "DDIM eta 0", 10), ("share", "DDIM eta 0", 50)]
    columns += [("share", "DPM-Solver++", 10), ("share", "DPM-Solver++", 25)]
    columns += [("share", "UniPC", 10), ("share", "Heun", 10)]
    lines = []
    for (method, steps), policy in rows.items():
        cells = [names.get(method, f"{method} ({steps})")]
        for quantity, solver, count in columns:
            row = policy[solver, count]
            value = row[quantity]
            cells.append(bracketed(value, 3) if row["trained"] else f"{value[0]:.3f}")
        lines.append(cells)
    head = ["policy (steps of training)", "J: SDE 10", "25", "50", "100", "KL: ODE 10", "ODE 50"]
    return table([*head, "DPM++ 10", "DPM++ 25", "UniPC 10", "Heun 10"], lines)


def transfer_images() -> str:
    """Gains of the embedded model on other samplers: reward / held-out classifier."""
    results = stored("transfer_images")
    lines = []
    for sampler, mean in results["pretrained"].items():
        cells = [sampler, f"{mean:.2f}"]
        for gains in results["gains"].values():
            one = gains[sampler]
            cells.append(f"{bracketed(one['reward'], 2)} / {bracketed(one['held_out'], 2)}")
        lines.append(cells)
    return table(["evaluated on", "pretrained", *results["gains"]], lines)


def variance() -> str:
    """Noise and direction of one update's gradient, by steps."""
    rows = {(r["policy"], r["estimator"], r["steps"]): r for r in stored("variance")["rows"]}
    lines = []
    for name in dict.fromkeys(estimator for _, estimator, _ in rows):
        own = {(policy, steps): r for (policy, n, steps), r in rows.items() if n == name}

        def noise(policy: str, steps: int, own: Mapping[Any, Any] = own) -> str:
            row = own.get((policy, steps))
            return resolved(row["relative_variance"]) if row else ""

        middle = own["pretrained", 50]
        there = own["half way", 50]
        known, seen = (resolved(r["relative_variance"]) != "not resolved" for r in (middle, there))
        costs = [_rounded(middle[k]) if known else "" for k in ("queries_to_1", "calls_to_1")]
        lines.append(
            [name, *(noise("pretrained", k) for k in (5, 10, 20, 50, 100))]
            + [f"{middle['cosine_of_one'][1]:.2f}", *costs]
            + [noise("half way", k) for k in (10, 50, 100)]
            + [resolved(there["cosine_of_mean"], 3) if seen else "not resolved"]
        )
    head = ["estimator", "5 steps", "10", "20", "50", "100", "cosine of one, 50", "queries"]
    head += ["calls", "half way: 10", "50", "100", "cosine of the mean, 50"]
    return table(head, lines)


def _rounded(value: float) -> str:
    """Two digits, with commas."""
    return f"{float(f'{value:.2g}'):,.0f}" if value >= 10 else f"{value:.2g}"


def calls_to_reward() -> str:
    """Network calls until DDPO's final reward on the embedded image model."""
    lines = []
    for name, row in stored("calls_to_reward")["rows"].items():
        reached = row["calls_to_target"] is not None
        lines.append(
            [name, bracketed(row["gain"], 3), bracketed(row["held_out_gain"], 3)]
            + [f"{row['path_kl'][0]:.1f}", f"{row['calls']:,.0f}", f"{row['queries']:,.0f}"]
            + ([f"{row['calls_to_target']:,.0f}", f"{row['ratio']:.1f}"] if reached else ["-"] * 2)
        )
    head = ["method", "gain at the end", "held out", "path KL, nats", "network calls"]
    return table([*head, "reward queries", "calls until DDPO's end", "times fewer"], lines)


def tiny() -> str:
    """Share of the embedded model's samples that the judge assigns to the class."""
    results = stored("tiny")
    shares = {(row["guidance"], row["eta"]): row["share"] for row in results["agreement"]}
    lines = [
        [f"{guidance:g}"]
        + [
            f"{share['mean']:.3f} ({1000 * share['standard_error']:.0f})"
            for share in (shares[guidance, 0.0], shares[guidance, 1.0])
        ]
        for guidance in dict.fromkeys(guidance for guidance, _ in shares)
    ]
    return table(["guidance", "eta 0", "eta 1"], lines)


def words() -> str:
    """Share of pictures in which exactly the word is read, by its length."""
    results = stored("words")
    decibels = [results["reconstructed"][length]["dB"] for length in "123"]
    through = f"the same through the autoencoder ({min(decibels):.0f} to {max(decibels):.0f} dB)"
    rows = {
        "signs as they are drawn": results["drawn"],
        f"{through}: the ceiling": results["reconstructed"],
    }
    for one in results["written"]:
        rows[f"samples, guidance {one['guidance']:g}, eta {one['eta']:g}"] = one["share"]
    lines = [
        [name] + [bracketed((row[k]["mean"], row[k]["standard_error"]), 2) for k in "123"]
        for name, row in rows.items()
    ]
    return table([" ", "1 letter", "2 letters", "3 letters"], lines)


def ergodic() -> str:
    """What learners of the ergodic problem end at, beside the optimum."""
    results = stored("ergodic_lq")["summary"]
    quantities = {
        "average reward of the learned policy (exact)": ("average_reward", "0.658497", 4),
        "average reward as the agent estimates it": ("learned_average_reward", "0.658497", 4),
        "gain": ("gain", "-0.354249", 3),
        "offset": ("offset", "-0.708497", 3),
        "variance of the policy": ("variance", "0.035425", 4),
    }
    lines = []
    for name, (key, optimum, digits) in quantities.items():
        cells = [name, optimum]
        for method in ("actor-critic", "q-learning"):
            one = results[f"{method} {key}"]
            cells.append(f"{one['mean']:.{digits}f} ({one['standard_deviation']:.{digits}f})")
        lines.append(cells)
    head = ["5 seeds, mean (standard deviation)", "optimum", "actor-critic", "q-learning"]
    return table(head, lines)


def score_matching_frame() -> str:
    """Each method as an estimator of a value's gradient."""
    lines = []
    for name, one in stored("score_matching_frame")["rows"].items():
        thirds = " ".join(f"{share:.2f}" for share in one["weight"])
        cosines = f"{min(one['cosine'], 1):.3f} ({min(one['other'], 1):.3f})"
        rows = _rounded(one["rows"]) if one["rows"] > 1e-4 else "0"
        lines.append(
            [name, one["order"], one["value"], cosines, thirds, f"{one['pull']:.2f}", rows]
        )
    head = ["method", "order", "value", "cosine (with the other)", "weight", "pull", "rows"]
    return table(head, lines)


def device() -> str:
    """What a step asks a device for, counted."""
    lines = [
        [name, f"{one['synchronised']:g}", f"{one['launched']:g}"]
        for name, one in stored("device")["steps"].items()
    ]
    return table(["for every step", "synchronisations", "launches"], lines)


def reward_cost() -> str:
    """Processor seconds of learned rewards of full size."""
    users = {"ViT-L/14": "`CLIPScore`, `Aesthetic`", "ViT-H/14": "`PickScore`, `HPS`"}
    results = stored("reward_cost")
    lines = []
    for one in results["networks"]:
        weights = 4 * one["parameters"] / 1e9
        lines.append(
            [f"{one['network']} ({users[one['network']]})", f"{one['parameters'] / 1e6:.0f} M"]
            + [f"{weights:.1f} GB"]
            + [f"{one[k]:.2g} s" for k in ("picture", "prompt", "with gradient")]
        )
    for one in results["text"]:
        side, taken = one["side"], f"{one['picture']:.2g} s"
        lines.append([f"`TextInPicture`, {side} x {side}", "", "", taken, "", ""])
    head = ["network", "parameters", "weights", "picture", "prompt"]
    return table([*head, "both with the picture's gradient"], lines)


TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "docs/benchmarks.md": {
        "device": device,
        "transfer": transfer,
        "transfer of images": transfer_images,
    },
    "docs/gradient_noise.md": {"variance": variance},
    "docs/methods_measured.md": {
        "calls to reward": calls_to_reward,
        "score matching frame": score_matching_frame,
    },
    "docs/ergodic_lq.md": {"ergodic": ergodic},
    "docs/tiny.md": {"agreement": tiny},
    "docs/words.md": {"read": words},
    "docs/rewards.md": {"reward cost": reward_cost},
}


# -- prose -----------------------------------------------------------------------------------------


def percent(pair: Pair) -> str:
    """47(1) %: a share with its standard error."""
    return f"{bracketed([100 * x for x in pair], 0)} %"


def _ranged(values: Sequence[float]) -> str:
    """Median (least to most), as speed.md has it."""
    middle, least, most = values
    return f"{middle:.3g} times ({least:.2f} to {most:.2f})"


OURS = "simulate, streams by path"


def _peer(name: str) -> tuple[float, float, float]:
    """How many times as long another library takes for a roll-out of 4,096 paths."""
    return _times(("4096", OURS, 1), ("4096", name, 1))


def _times(one: tuple[str, str, int], other: tuple[str, str, int]) -> tuple[float, float, float]:
    """How many times as long another case takes: (paths, name, threads); median, least, most."""
    rows = {
        (str(row["paths"]), row["case"], row["threads"]): row["seconds"]
        for row in stored("speed")["peers"]["roll-outs"]
    }
    ratios = [b / a for a, b in zip(rows[one], rows[other], strict=True)]
    middle, least, most = (  # to the digits that the table of speed.md has them with
        float(f"{ratio:.4g}") for ratio in (statistics.median(ratios), min(ratios), max(ratios))
    )
    return middle, least, most


def _speeds() -> list[str]:
    """Of speed.md: roll-outs beside other libraries."""
    few, many = (_times((n, OURS, 2), (n, OURS, 1)) for n in ("4096", "65536"))
    others = {row["case"]: row["seconds"] for row in stored("speed")["peers"]["others"]}
    solved = [
        statistics.median(others[f"exit problem: {name}"])
        for name in ("`hjb.solve_discounted`", "finhjb")
    ]
    generator, plain, scan, default = (
        _peer(name)[0]
        for name in (
            "simulate, torch.Generator",
            "plain torch loop, memory kept",
            "jax scan",
            "torchsde Euler, default",
        )
    )
    return [
        f"Two threads are {few[0]:.3g} and {many[0]:.3g} times as fast as one",
        f"in the best rounds {few[2]:.3g} and {many[2]:.3g} times",
        f"One thread is {generator:.3g} times as fast as torch's own generator, {plain:.3g} times "
        "a plain loop",
        f"{scan:.3g} times jax's scan, {default:.3g} times torchsde's default",
        f"{solved[0] / solved[1]:.0f} times shorter than ours",
    ]


def _curve(method: str) -> list[tuple[float, float, float]]:
    """Mean gain over seeds at each evaluation: (calls, gain, queries), from no gain at no calls."""
    with (DOCS / "calls_to_reward.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["method"] == method]
    at: dict[float, list[tuple[float, float]]] = {}
    for row in rows:
        at.setdefault(float(row["calls"]), []).append((float(row["gain"]), float(row["queries"])))
    means = [
        (calls, statistics.fmean(g for g, _ in pairs), statistics.fmean(q for _, q in pairs))
        for calls, pairs in sorted(at.items())
    ]
    return [(0.0, 0.0, 0.0), *means]


def _reached(method: str, gain: float) -> tuple[float, float]:
    """Network calls and reward queries at which the mean gain passes a value."""
    for one, two in itertools.pairwise(_curve(method)):
        if one[1] <= gain <= two[1]:
            part = (gain - one[1]) / (two[1] - one[1])
            return one[0] + part * (two[0] - one[0]), one[2] + part * (two[2] - one[2])
    raise ValueError(f"{method} does not reach a gain of {gain}")


def _exact(problem: str) -> dict[str, Pair]:
    """Shares of the gap that methods close on a problem whose optimum is known."""
    return {row["method"]: row["share"] for row in stored(f"leaderboard_{problem}")["rows"]}


def sentences() -> dict[str, list[str]]:
    """What pages say in prose of stored results, a list of phrases for each page."""
    gaussian, mixture = _exact("gaussian"), _exact("mixture")
    calls = stored("calls_to_reward")["rows"]
    baseline, ours, few = (
        calls[name] for name in ("DDPO-IS", "score-as-action", "score-as-action, 5 steps")
    )
    above = baseline["gain"][0] + 2 * baseline["gain"][1]
    later, _ = _reached("score-as-action", above)
    queries = _reached("score-as-action", baseline["gain"][0])[1]
    ddpo = next(r for r in stored("speed")["update tiny"]["rows"] if r["method"] == "DDPO")
    rival, plain = ddpo["ours_over"]["rival"], _peer("plain torch loop, memory kept")
    diffrax = _peer("diffrax Euler, batch as state")
    torchsde = _peer("torchsde Euler, told its dt")
    fewer = f"{baseline['calls'] / later:.0f} times"
    final = calls["score-as-action, final rewards"]
    return {
        "README.md": [
            f"**{ours['ratio']:.0f} times fewer network calls**",
            f"{fewer} to two standard errors above it",
            f"**{bracketed([100 * x for x in gaussian['score-as-action']], 1)} % of the gap",
            f"DDPO, which has no KL term, {bracketed([100 * x for x in gaussian['ddpo']], 1)} %",
            f"an update takes {_ranged(rival)} that of a plain DDPO loop",
            f"{_ranged(plain)} as fast as a plain torch loop",
            f"{diffrax[0]:.1f} times ({diffrax[1]:.1f} to {diffrax[2]:.1f}) as diffrax's Euler",
            f"and {torchsde[0]:.1f} ({torchsde[1]:.1f} to {torchsde[2]:.1f}) as torchsde's",
        ],
        "docs/methods.md": [
            f"share of the gap in J | {bracketed(gaussian['score-as-action (r(x0) in V)'], 4)} | "
            f"{bracketed(gaussian['score-as-action'], 4)} |",
            f"gain in held-out reward | {bracketed(ours['gain'], 3)} | "
            f"{bracketed(final['gain'], 3)} |",
        ],
        "docs/methods_measured.md": [
            f"charged with the path KL ({bracketed(gaussian['adjoint-matching (path KL)'], 4)})",
            f"through all steps ({bracketed(gaussian['draft (all steps, KL)'], 4)}) are closest",
            f"Score as Action ({bracketed(gaussian['score-as-action'], 4)}) and DPOK charged with "
            f"the whole path KL ({bracketed(gaussian['dpok (path KL)'], 4)})",
            f"close {gaussian['ram (path cost)'][0]:.2f} to "
            f"{gaussian['adjoint-matching (path KL)'][0]:.3f} of the gap",
            f"DRaFT through all steps is first ({bracketed(mixture['draft (all steps, KL)'], 4)})",
            f"with {ours['ratio']:.1f} times fewer network calls",
            f"gains {ours['gain'][0] / baseline['gain'][0]:.1f} times as much",
            f"it needs some {float(f'{queries:.1g}'):.0f} queries for DDPO's "
            f"{baseline['queries']:,.0f}",
            f"at {above:.2f}, Score as Action is after {float(f'{later:.2g}'):,.0f} calls, {fewer} "
            "fewer",
            f"at {few['path_kl'][0] / ours['path_kl'][0]:.1f} times the path KL",
        ],
        "docs/which_method.md": _choices(),
        "docs/benchmarks.md": [*_transfers(), *_counts()],
        "docs/gradient_noise.md": _noises(),
        "docs/speed.md": _speeds(),
        "docs/tiny.md": _embedded(),
        "docs/words.md": [f"files, float16 | {stored('words')['bytes'] / 1e6:.1f} MB together"],
    }


def _choices() -> list[str]:
    """Of which_method.md, from the leaderboard on images."""
    images = {
        (row["method"], row["kl_weight"]): row for row in stored("leaderboard_images")["rows"]
    }
    guidance = [images["score-as-action, guidance", weight] for weight in (1.0, 0.3, 0.1)]
    lora, gradient, tilted, natural, ddpo = (
        images[name, 0.3]
        for name in (
            "score-as-action",
            "adjoint-matching (path KL)",
            "tilted-regression",
            "score-as-action, natural gradient",
            "ddpo",
        )
    )
    rivals = [images[name, 0.3]["share"][0] for name in ("pcpo", "nft", "grpo-guard", "grpo")]
    of_path = [row["chain_kl"][0] / row["path_kl"][0] for row in images.values()]
    shares = [bracketed([100 * x for x in row["share"]], 0) for row in guidance]
    nats = [f"{row['path_kl'][0]:.1f}" for row in guidance]
    return [
        f"{percent(guidance[1]['share'])} of the gap with 12,000 calls, where a LoRA of 86,016 "
        f"numbers has {percent(lora['share'])}",
        f"{percent(gradient['share'])} on the same LoRA with the same calls",
        f"far too few on images ({percent(tilted['share'])})",
        f"closes {shares[0]}, {shares[1]} and {shares[2]} % of the gap, with {nats[0]}, {nats[1]} "
        f"and {nats[2]} nats",
        f"here {min(of_path):.0f} to {max(of_path):.0f} times",
        f"better than the pretrained model ({percent(guidance[1]['chain_share'])} of the gap)",
        f"they close {100 * min(rivals):.0f} to {100 * max(rivals):.0f} %",
        *(["DDPO none"] if ddpo["share"][0] < 0 else []),
        f"and {percent(guidance[1]['share'])} after 12,000 on guidance alone",
        f"| {percent(lora['share'])} | {percent(gradient['share'])} |",
        f"| {percent(lora['share'])} | {percent(guidance[1]['share'])} |",
        f"| {percent(lora['share'])} | {percent(natural['share'])} |",
    ]


def _transfers() -> list[str]:
    """Of benchmarks.md: other step counts, solvers and samplers."""
    rows = {
        (row["method"], row["train_steps"], row["solver"], row["steps"]): row
        for row in stored("transfer")["rows"]
    }

    def share(method: str, trained: int, steps: int) -> str:
        return f"{rows[method, trained, 'DDIM eta 1', steps]['share_of_j'][0]:.3f}"

    def errors(solver: str, *steps: int) -> str:
        each = [rows["optimum", 50, solver, k]["kl_to_target"][0] for k in steps]
        return ", ".join(f"{nats:.3f}" for nats in each)

    away = [row["kl_to_target"][0] for key, row in rows.items() if key[0] == "pretrained"]
    table_of = "optimum of the chain, a table, {} elsewhere"
    matching = "adjoint-matching (path KL)"
    nft, ddpo = (
        [rows[name, 50, f"DDIM eta {eta}", 50] for eta in (1, 0)] for name in ("nft", "ddpo")
    )
    images = stored("transfer_images")["gains"]["score-as-action, 10 steps"]
    kept = images["DDIM eta 1, 50"]["reward"][0] / images["DDIM eta 1, 10"]["reward"][0]
    return [
        f"SDE {errors('DDIM eta 1', 10, 25, 50, 100)} nats at 10, 25, 50, 100 steps",
        f"ODE {errors('DDIM eta 0', 10, 25, 50, 100)}",
        f"DPM-Solver++ {errors('DPM-Solver++', 10, 25)} at 10, 25",
        f"UniPC {errors('UniPC', 10, 25)}; Heun {errors('Heun', 10, 25)}",
        f"the pretrained model is {min(away):.2f} to {max(away):.2f} nats away",
        f"the exact optimum itself ({share('score-as-action', 50, 10)} and "
        f"{share('optimum', 50, 10)})",
        f"closes {nft[0]['share'][0]:.2f} of the KL's gap with noise and {nft[1]['share'][0]:.2f} "
        "without",
        f"doubles ({ddpo[1]['gain'][0] / ddpo[0]['gain'][0]:.2f} times)",
        f"Score as Action has {share('score-as-action', 10, 50)} (it would have "
        f"{share('score-as-action', 50, 50)} if trained there), adjoint matching "
        f"{share(matching, 10, 50)} ({share(matching, 50, 50)}), GRPO {share('grpo', 10, 50)} "
        f"({share('grpo', 50, 50)})",
        f"{share('grpo', 10, 10)} was all that GRPO had at 10 steps",
        f"keeps {float(share(table_of.format('zero'), 50, 100)):.2f} of J's share at 100 steps",
        f"taking the nearest entry, {share(table_of.format('nearest'), 50, 100)}",
        f"{100 * kept:.0f} % of that on 50 noisy steps",
    ]


def _noises() -> list[str]:
    """Of gradient_noise.md: noise and direction of one update's gradient."""
    rows = {(r["policy"], r["estimator"], r["steps"]): r for r in stored("variance")["rows"]}

    def noise(name: str, steps: int = 50) -> float:
        return rows["pretrained", name, steps]["relative_variance"][0]

    def spent(name: str, what: str) -> float:
        return rows["pretrained", name, 50][f"{what}_to_1"]

    exact, ddpo, learned = noise("score-as-action, exact V"), noise("ddpo"), "score-as-action"
    first = "score-as-action, exact V, dV"
    middle = rows["pretrained", "score-as-action, r(x0) in V", 50]
    asked = middle["queries"] / rows["pretrained", learned, 50]["queries"]
    backwards = [rows["half way", k, 10]["cosine_of_mean"][0] for k in ("grpo", "dpok (exact KL)")]
    quarter, drawn = "score-as-action, a quarter", "score-as-action, a quarter by g^2"
    fraction = rows["pretrained", quarter, 50]["calls"] / rows["pretrained", learned, 50]["calls"]
    growing = ", ".join(f"{noise('drawn 0.3, no V', k):.2g}" for k in (5, 10, 20))
    return [
        f"is {ddpo / exact:.1f} times less noisy than DDPO's",
        f"({ddpo / noise(first):.0f} times with dV)",
        f"with a learned V {ddpo / noise(learned):.1f} times, so "
        f"{spent('ddpo', 'queries') / spent(learned, 'queries'):.1f} times fewer queries and "
        f"{spent('ddpo', 'calls') / spent(learned, 'calls'):.1f} times fewer calls",
        f"no better than DDPO ({noise('score-as-action, no V'):.2f} and {ddpo:.2f})",
        f"({noise('score-as-action, exact V', 100):.3f} with V, {noise(first, 100):.3f} with dV, "
        f"{noise('score-as-action, no V', 100):.2f} without V at 100 steps)",
        f"grow about in proportion to the steps ({growing} at 5, 10, 20)",
        f"an exact V ({noise('drawn 0.3, exact V', 5):.2f} to "
        f"{noise('drawn 0.3, exact V', 100):.1f})",
        f"a learned V ({middle['relative_variance'][0]:.3f}) for {asked:.0f} times the queries, so "
        f"{_rounded(middle['queries_to_1'])} instead of {spent(learned, 'queries'):.0f}, "
        f"worse than DDPO's {spent('ddpo', 'queries'):.0f}",
        f"is {noise(learned, 10) / noise('score-as-action, exact V', 10):.1f} times as noisy as an "
        "exact one",
        f"point backwards (cosine {backwards[0]:.2f} and {backwards[1]:.2f})",
        f"has {noise(quarter) / noise(learned):.1f} times the variance (50 steps) for "
        f"{fraction:.2f} of the calls",
        f"is worse still: {noise(drawn) / noise(learned):.1f} times",
    ]


def _counts() -> list[str]:
    """Of benchmarks.md: what an update waits for."""
    updates = stored("device")["updates"].values()
    waits = [one["synchronised"] for one in updates]
    return [f"waits {min(waits)} to {max(waits)} times"]


def _embedded() -> list[str]:
    """Of tiny.md: the embedded model."""
    results = stored("tiny")
    accuracy = results["classifier_test_accuracy"]
    return [
        f"{results['bytes'] / 1e6:.1f} MB together",
        f"{results['reconstruction_psnr_db']:.1f} dB mean PSNR",
        f"{100 * accuracy['judge']:.1f} % (all 10,000) / "
        f"{100 * results['judge_accuracy_on_reconstructions']:.1f} % (2,000)",
        f"accuracy on test pictures | {100 * accuracy['reward']:.1f} %",
    ]


def main() -> None:
    """Write every table into its place."""
    for page, tables in TABLES.items():
        text = (ROOT / page).read_text(encoding="utf-8")
        for name, make in tables.items():
            text = filled(text, name, make())
        (ROOT / page).write_text(text, encoding="utf-8")
        print(page)


if __name__ == "__main__":
    main()

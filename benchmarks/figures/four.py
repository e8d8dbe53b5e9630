"""Figure 4: samples of CIFAR-10 before and after, on the same noise; the runs are Figure 3's."""

from pathlib import Path

from matplotlib.figure import Figure as Picture

from benchmarks.figures import three
from benchmarks.figures.figure import Figure, table

BUDGETS = three.BUDGETS


def run(budget: three.Budget, output: Path, seeds: int) -> Figure:
    """Sheets of the pretrained model and of every method's first seed."""
    start, results, _ = three.everything(budget, output, seeds)
    sheets = {"pretrained": start} | {method: each[0] for method, each in results.items()}
    picture = Picture(figsize=(10, 1.05 * (len(sheets) + 1)), layout="constrained")
    places = picture.subplots((len(sheets) + 1) // 2, 2).flat
    for axes in places:
        axes.set_axis_off()
    for axes, (name, result) in zip(picture.axes, sheets.items(), strict=False):
        three.shown(axes, result["sheet"], name)
    data = [
        {"method": name, "quantity": measure, "mean": result["lines"][-1][measure]}
        for name, result in sheets.items()
        for measure in (three.DISTANCE, three.CONFIDENCE)
    ]
    numbers = {(r["method"], r["quantity"]): r["mean"] for r in data}
    lines = [
        [name, *(f"{numbers[name, m]:.3f}" for m in (three.DISTANCE, three.CONFIDENCE))]
        for name in sheets
    ]
    return Figure(
        title="Samples of CIFAR-10 at ten steps",
        settings=three.settings(budget),
        data=data,
        picture=picture,
        paragraph=f"""
{three.SHOWN} samples of each method's first seed after {budget.updates} updates, and of the model
that all begin with. A picture's place is its noise: the same in every sheet. The network is small
and was trained for minutes, so that none of them are good; what can be seen is what a method
changes.

{table(["method", three.DISTANCE, three.CONFIDENCE], lines)}
""",
    )

"""Write the pictures of the pages of theory.

    python -m benchmarks.theory_plots [NAME ...]

Each name is that of a picture; all of them if there is none.
"""

import argparse
import time
from pathlib import Path

import torch

from benchmarks.theory_plots import control, fine_tuning, path_laws
from benchmarks.theory_plots.style import FOLDER, save

PICTURES = {
    "path_kl": path_laws.path_kl,
    "terminal_kl": path_laws.terminal_kl,
    "two_actions": path_laws.two_actions,
    "trust_region": path_laws.trust_region_gap,
    "generation": fine_tuning.generation,
    "eta_family": fine_tuning.eta_family,
    "kl_tilt": fine_tuning.kl_tilt,
    "value_function_bias": fine_tuning.value_function_bias,
    "step_transfer": fine_tuning.step_transfer,
    "natural_gradient": fine_tuning.natural_gradient,
    "frontier": fine_tuning.frontier,
    "ddim": fine_tuning.ddim,
    "policy_evaluation": control.policy_evaluation,
    "exploratory_sde": control.exploratory_sde,
    "exploratory_lq": control.exploratory_lq,
    "policy_iteration": control.policy_iteration,
    "exits": control.exits,
    "solver_orders": control.solver_orders,
}


def main() -> None:
    """Draw what is asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.theory_plots", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PICTURES))
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where to (docs/theory/plots)")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(PICTURES):
        parser.error(f"there is no picture {sorted(unknown)}; there are {', '.join(PICTURES)}")
    torch.set_num_threads(1)  # sums in one order, so that the bytes are the same again
    for name in arguments.names or PICTURES:
        began = time.perf_counter()
        file = save(PICTURES[name](), name, arguments.folder)
        print(f"{file} ({file.stat().st_size // 1024} KB, {time.perf_counter() - began:.1f} s)")


if __name__ == "__main__":
    main()

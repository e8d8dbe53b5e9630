#!/usr/bin/env bash
# Does the package work with the lowest versions that it declares? Run from the repository's root:
#   bash benchmarks/lowest_versions.sh FOLDER
# makes an environment in FOLDER, installs each requirement of pyproject.toml at its lower bound, and runs part of the tests, a
# fine-tuning run and some claims. Its settings are variables of the environment:
#   PYTHON    the interpreter (python3.11)
#   SYSTEM    1: torch is the system's (a CPU build of a distribution, say), which the environment sees
#   INSTEAD   "name==version ...": pins that replace lower bounds, where one has no wheel for this Python or machine
#   LATEST    1: no lower bounds at all, the newest that there is: to try a Python rather than old libraries
#   TESTS     what pytest is called with
# docs/releasing.md says what was tried.
set -euo pipefail
folder=${1:?a folder for the environment}
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
mkdir -p "$folder"
"${PYTHON:-python3.11}" -m venv ${SYSTEM:+--system-site-packages} "$folder/venv"
python=$folder/venv/bin/python
[ -z "${INSTEAD:-}" ] || echo "instead: $INSTEAD"
"$python" - "$folder" "${LATEST:-}" ${INSTEAD:-} <<'END'
"""Write lowest.txt, a line for each requirement, and tools.txt, what the tests need beside them."""

import re
import sys
import tomllib
from pathlib import Path

folder, latest, *instead = sys.argv[1:]
project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
replaced = dict(one.split("==") for one in instead)
lines = []
for asked in project["dependencies"] + extras["diffusion"] + extras["verification"] + extras["gym"]:
    if bound := re.fullmatch(r"([\w-]+)>=([\w.]+)", asked):
        name, version = bound.groups()
        pin = f"{name}=={replaced.get(name, version)}"
        lines.append(name if latest and name not in replaced else pin)
Path(folder, "lowest.txt").write_text("\n".join(lines) + "\n")
pins = Path("constraints.txt").read_text().splitlines()
names = ("beartype", "hypothesis", "pytest", "pytest-xdist", "pyyaml")
tools = [pin for pin in pins if pin.partition("==")[0].lower() in names]
Path(folder, "tools.txt").write_text("\n".join(tools) + "\n")
END
install() { "$python" -m pip install --quiet --no-compile "$@"; }
# torch alone and first: what comes later must not replace it.
[ -n "${SYSTEM:-}" ] && sed --in-place '/^torch\b[^s]/d; /^torch$/d' "$folder/lowest.txt" || install "$(grep -E '^torch(==|$)' "$folder/lowest.txt")"
install --requirement "$folder/lowest.txt" --requirement "$folder/tools.txt"
"$python" -m pip check || [ -n "${SYSTEM:-}" ]  # a distribution's own packages may disagree among themselves
"$python" - <<'END'
import importlib.metadata
import platform

names = "torch torchsde numpy scipy jaxtyping diffusers transformers peft accelerate pillow pyarrow tyro sympy"
print("python", platform.python_version(), *(f"{n} {importlib.metadata.version(n)}" for n in names.split()))
END
core="girsanov simulate solvers linear martingale q_learning policy_gradient trust_region torchsde_solver gym workers jumps value"
tests=$(for name in $core; do echo "tests/ctrl/test_$name.py"; done)
# Old libraries warn of what newer ones took out: here warnings are no errors, which one test expects. Shapes and types are checked by the tests of today's.
"$python" -m pytest -q -p no:cacheprovider --override-ini addopts=--import-mode=importlib --override-ini filterwarnings=default \
    --disable-warnings --deselect tests/ctrl/test_torchsde_solver.py::test_what_a_drift_says_is_not_taken_for_a_failing_step \
    ${TESTS:-$tests tests/diffusion_envs/sd15/test_finetune.py tests/diffusion_envs/models/test_text_to_image_unet.py}
"$python" -m verification path-kl q-learning adjoint-matching --output "$folder/claims" >/dev/null
"$python" -m diffusion_envs.sd15 --reward jpeg-compressibility --samples 4 --steps 4 --updates 2 --evaluation-samples 4 \
    --output "$folder/run" 2>&1 | tail -3
echo "works"

"""Every claim holds on the right code, and rejects every mistake planted into it."""

import pytest
import torch

from verification import tolerances
from verification.claim import Setting
from verification.claims import CLAIMS
from verification.running import run

TABLE = tolerances.load()


def why(outcome):
    """What to read when it fails."""
    lines = [outcome.error] if outcome.error else []
    lines += [
        f"{check.verdict.value}: {check.name}: {check.deviation:.1e}, tolerance {check.tolerance}"
        for check in outcome.checks
    ]
    lines += [
        f"accepted: {w.name}: {w.note or w.deviations}" for w in outcome.mistakes if not w.rejected
    ]
    return "\n".join([outcome.claim.name, *lines])


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", CLAIMS)
def test_the_claim_holds_and_rejects_every_mistake(name, as_users_run_it):
    """As ``python -m verification`` runs it: mistakes are rejected by numbers, not by types."""
    outcome = run(CLAIMS[name], Setting(), TABLE["float64"].get(name, {}))
    assert outcome.holds, why(outcome)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", [name for name, claim in CLAIMS.items() if claim.single])
def test_the_claim_holds_in_single_precision(name):
    setting = Setting(dtype=torch.float32)
    outcome = run(CLAIMS[name], setting, TABLE["float32"].get(name, {}), plant=False)
    assert outcome.holds, why(outcome)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("name", CLAIMS)
def test_the_claim_holds_on_cuda(name, precision):
    claim = CLAIMS[name]
    if precision == "float32" and not claim.single:
        pytest.skip(claim.why_double)
    setting = Setting(dtype=getattr(torch, precision), device=torch.device("cuda"))
    outcome = run(claim, setting, TABLE[precision].get(name, {}), plant=False)
    assert outcome.holds, why(outcome)


def test_closed_forms_stand_on_their_own():
    """Neither ctrl nor torch, however indirectly."""
    import subprocess
    import sys

    code = (
        "import sys, pkgutil, importlib, verification.closed_form as c\n"
        "for m in pkgutil.iter_modules(c.__path__):\n"
        "    importlib.import_module(f'{c.__name__}.{m.name}')\n"
        "foreign = {'ctrl', 'torch', 'diffusion_envs'} & set(sys.modules)\n"
        "sys.exit(str(foreign) if foreign else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

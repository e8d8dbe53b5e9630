"""The claims: a folder for each theme, a file for each claim, each known by being here."""

import importlib
import pkgutil

from verification.claim import Claim


def _all() -> dict[str, Claim]:
    claims: dict[str, Claim] = {}
    for module in pkgutil.walk_packages(__path__, f"{__name__}."):
        if module.ispkg:
            continue
        claim = Claim.of(importlib.import_module(module.name))
        if claim.name in claims:
            raise ValueError(f"two claims are called {claim.name}: {claims[claim.name].file}")
        claims[claim.name] = claim
    return claims


CLAIMS = _all()

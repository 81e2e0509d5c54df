"""Fine-tune large models in a fraction of the activation memory: LoRAct (arXiv:2509.23472) and beyond."""

import importlib
from typing import Any

from loract.atlas import Spectrum, atlas
from loract.attach import Handle, attach
from loract.audit import Fidelity, audit
from loract.codecs import Exact, LowRank, Quantized, Transform
from loract.errors import InvalidSpec, LoractError, MissingExtra, UnsupportedModule
from loract.plan import plan
from loract.policy import Policy, Rule, Site, preset
from loract.policyfile import load_policy, save_policy
from loract.rangefinder import Gaussian, Sampled, Truncated

__version__ = "0.1.0"

__all__ = [
    "Exact",
    "Fidelity",
    "Gaussian",
    "Handle",
    "InvalidSpec",
    "LoractError",
    "LowRank",
    "MissingExtra",
    "Policy",
    "Quantized",
    "Rule",
    "Sampled",
    "Site",
    "Spectrum",
    "Transform",
    "Truncated",
    "UnsupportedModule",
    "atlas",
    "attach",
    "audit",
    "load_policy",
    "plan",
    "preset",
    "save_policy",
]


def __getattr__(name: str) -> Any:
    """`loract.hf` on first use: it imports transformers."""
    if name == "hf":
        return importlib.import_module("loract.hf")
    raise AttributeError(f"module 'loract' has no attribute {name!r}")

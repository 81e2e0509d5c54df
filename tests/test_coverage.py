"""Every preset on every architecture: values, gradients, sites, bytes, and the document that tells of them.

All values, sites and bytes always; the gradients of some architectures always, of all of them with -m full.
"""

import functools

import pytest
import torch

import loract

pytest.importorskip("transformers")
pytest.importorskip("peft")

from architectures import ARCHITECTURES
from coverage_document import (
    DOCUMENT,
    POLICIES,
    gradients,
    measure,
    output,
    parse,
    plain,
    render,
    row,
)
from replay import recorded, replayed
from tiny import error

ROUNDING = 1e-5
LOSSLESS = {
    "exact": (POLICIES["exact"], ROUNDING),
    "sublayer": (loract.preset("sublayer", codec=loract.Exact()), ROUNDING),
    "layer": (loract.preset("layer", codec=loract.Exact()), ROUNDING),
    "tensor at full rank": (loract.preset("tensor", codec=loract.LowRank(rank=1.0, guard=False)), 1e-4),
}
# Linear maps of the model have the names of stacked experts' weights: PEFT then looks for more of them than there are.
pytestmark = pytest.mark.filterwarnings("ignore:The following .* keys did not match any targeted module:RuntimeWarning")

COMPARED = 1e-4
"""Relative difference of two computations of one coded gradient, by rounding."""
DECODED = {"tensor": 1.0, "sublayer": 1.0, "layer": 1.0, "balanced": 0.05, "fast": 0.025, "smallest": 0.2}
"""Largest relative error of one decoded tensor: whatever stands for another tensor than its own is further off."""
REPLAYED = ("llama", "gemma3", "gpt2", "falcon", "bert", "albert", "t5", "swin", "deepseek_v3", "bamba", "written")
"""Architectures whose coded gradients are compared whenever tests run."""
LOSSY = tuple(preset for preset, policy in POLICIES.items() if not policy.lossless)


def full(names):
    return [name if name in REPLAYED else pytest.param(name, marks=pytest.mark.full) for name in names]


@functools.cache
def committed():
    return parse(DOCUMENT.read_text(encoding="utf-8"))


@pytest.mark.parametrize("preset", POLICIES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_values_sites_and_bytes(name, preset):
    exact, ours = plain(name), measure(name, POLICIES[preset])
    assert all(torch.equal(values, exact.values) for values in ours.values)
    assert torch.equal(ours.evaluated, exact.evaluated)
    assert ours.size < exact.size
    if POLICIES[preset].lossless:
        assert all(error(found, exact.gradients) <= ROUNDING for found in ours.gradients)

    found, told = row(name, {preset: ours}), committed()[name]
    assert found.sites == {kind: told.sites[kind] for kind in found.sites}
    assert found.left == {entry for entry in told.left if entry[2] == preset}
    assert abs(found.shares[preset] - told.shares[preset]) <= 1


@pytest.mark.full
@pytest.mark.parametrize("policy", LOSSLESS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_without_loss(name, policy):
    chosen, tolerance = LOSSLESS[policy]
    ours = measure(name, chosen)
    assert all(torch.equal(values, plain(name).values) for values in ours.values)
    assert all(error(found, plain(name).gradients) <= tolerance for found in ours.gradients)


@pytest.mark.parametrize("preset", LOSSY)
@pytest.mark.parametrize("name", full(ARCHITECTURES))
def test_gradients_are_those_of_the_decoded_tensors(name, preset):
    """The error is at most what plain autograd makes of the decoded tensors, and rounding; and no less than a third."""
    exact = plain(name)
    model, batch = exact.model, exact.batch
    with loract.attach(model, POLICIES[preset]) as handle, recorded(handle) as found:
        out = output(model, batch)
        ours = gradients(model, out, retain_graph=True)
        found.decode()
    with replayed(model, found):
        again = output(model, batch)
        expected = gradients(model, again)
    assert torch.equal(again, exact.values)
    for kind, errors in found.errors().items():
        assert max(errors) <= DECODED[preset], kind

    measured = error(ours, exact.gradients)
    bound = error(expected, exact.gradients) + COMPARED
    assert error(ours, expected) <= COMPARED
    assert measured <= bound <= 3 * measured


def test_the_document_is_what_its_figures_make():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert set(committed()) == set(ARCHITECTURES)
    assert render([committed()[name] for name in ARCHITECTURES]) == text

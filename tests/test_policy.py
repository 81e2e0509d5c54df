"""Rules decide in order; names that are nearly right are suggested."""

import pytest

from loract.codecs import Exact, LowRank, Quantized
from loract.errors import InvalidSpec, LoractError
from loract.policy import KINDS, PRESETS, REGIONS, Policy, Rule, Site, as_policy, preset


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.mlp", 3),
        ("h.11.attn.c_attn", 11),
        ("7.linear", 7),
        ("encoder.layer.0", 0),
        ("vision.blocks.2.experts.5.up", 2),
        ("model.norm", None),
        ("fc1.dense", None),
        ("", None),
    ],
)
def test_layer_is_the_first_number_of_the_name(name, layer):
    assert Site(kind="norm", name=name).layer == layer


def test_the_first_rule_that_matches_decides():
    first, second, third = LowRank(rank=1), LowRank(rank=2), LowRank(rank=3)
    rules = (
        Rule(kind="norm", codec=first, name="*.input_norm", layers=(0, 1)),
        Rule(kind="norm", codec=second, name="*.input_norm"),
        Rule(kind="norm", codec=third),
    )
    policy = Policy(name="mine", rules=rules)
    assert policy.codec(Site(kind="norm", name="layers.1.input_norm")) is first
    assert policy.codec(Site(kind="norm", name="layers.2.input_norm")) is second
    assert policy.codec(Site(kind="norm", name="layers.1.output_norm")) is third
    assert Policy(name="mine", rules=rules[::-1]).codec(Site(kind="norm", name="layers.1.input_norm")) is third


def test_a_site_that_no_rule_matches_is_left_alone():
    policy = Policy(name="mine", rules=(Rule(kind="norm", codec=Exact()),))
    assert policy.codec(Site(kind="gated", name="layers.0.mlp")) is None
    assert Policy(name="empty", rules=()).codec(Site(kind="norm", name="norm")) is None


@pytest.mark.parametrize(
    ("glob", "name", "matches"),
    [
        ("*", "anything.at.all", True),
        ("*.q_proj", "model.layers.0.self_attn.q_proj", True),
        ("*.q_proj", "model.layers.0.self_attn.Q_proj", False),
        ("*.[qk]_proj", "a.k_proj", True),
        ("*.[qk]_proj", "a.v_proj", False),
        ("layers.?.mlp", "layers.3.mlp", True),
        ("layers.?.mlp", "layers.13.mlp", False),
        ("q_proj", "a.q_proj", False),
    ],
)
def test_globs_match_whole_names_with_case(glob, name, matches):
    assert Rule(kind="norm", codec=Exact(), name=glob).matches(Site(kind="norm", name=name)) is matches


@pytest.mark.parametrize(
    ("layers", "name", "matches"),
    [
        ((1, 3), "layers.0.x", False),
        ((1, 3), "layers.1.x", True),
        ((1, 3), "layers.3.x", True),
        ((1, 3), "layers.4.x", False),
        ((0, 99), "final_norm", False),
        (None, "final_norm", True),
    ],
)
def test_layer_ranges_include_both_ends(layers, name, matches):
    assert Rule(kind="norm", codec=Exact(), layers=layers).matches(Site(kind="norm", name=name)) is matches


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind not in (*REGIONS, "stream", "attention_output", "other")]
)
def test_presets(kind):
    site = Site(kind=kind, name="layers.0.x")
    assert preset("exact").codec(site) == Exact()
    coded = kind != "attention"
    assert preset("tensor").codec(site) == (LowRank(rank=0.125) if coded else Exact())
    assert preset("tensor", rank=16).codec(site) == (LowRank(rank=16) if coded else Exact())
    assert preset("tensor", codec=Quantized(bits=4)).codec(site) == (Quantized(bits=4) if coded else Exact())


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("kind", KINDS)
def test_presets_of_regions(name, kind):
    acts = {"layer": ("layer", "sublayer"), "sublayer": ("sublayer",)}.get(name, ())
    site = Site(kind=kind, name="layers.0.x")
    policy = preset(name)
    streams = name in ("balanced", "fast", "smallest")
    if streams and kind == "sublayer":
        assert policy.codec(site) == Exact()  # its input is rebuilt from the stream
    elif kind == "stream":
        bits = {"balanced": 7, "fast": 8, "smallest": 5}.get(name)
        expected = None if bits is None else Quantized(bits=bits, scale="channel", outliers=16)
        assert policy.codec(site) == expected
    elif kind == "attention_output":
        assert policy.codec(site) == (Quantized(bits=8) if name == "fast" else None)
    elif kind == "other":
        assert policy.codec(site) is None
    elif kind in REGIONS:
        assert policy.codec(site) == (LowRank(rank=0.125) if kind in acts else None)
    else:
        assert policy.codec(site) is not None
    if kind in REGIONS:
        assert policy.recompute_codec(site) is None
    else:
        assert policy.recompute_codec(site) == Exact()  # what is needed at once is not coded


def test_rules_for_what_is_recomputed():
    inner = Rule(kind="norm", codec=Quantized(bits=4), recomputed=True)
    policy = Policy(name="mine", rules=(inner, Rule(kind="norm", codec=LowRank()), Rule(kind="layer", codec=Exact())))
    site = Site(kind="norm", name="layers.0.norm")
    assert (policy.codec(site), policy.recompute_codec(site)) == (LowRank(), Quantized(bits=4))


@pytest.mark.parametrize("name", PRESETS)
def test_as_policy(name):
    policy = preset(name)
    assert policy.name == name
    assert as_policy(policy) is policy
    assert as_policy(name) == policy


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: preset("tensr"), r"got preset 'tensr'; expected one of exact, tensor.*did you mean 'tensor'\?"),
        (lambda: preset("Exact"), "did you mean 'exact'"),
        (lambda: as_policy("exat"), "did you mean 'exact'"),
        (lambda: as_policy(8), "policy 8; expected a preset name or a Policy; next: use one of exact, tensor"),
        (lambda: as_policy(None), "policy None"),
        (lambda: preset("tensor", rank=8, codec=Exact()), "both rank and codec; expected one of them"),
        (lambda: preset("exact", rank=8), r"preset 'exact' with a rank or codec.*preset\(\"tensor\", \.\.\.\)"),
        (lambda: preset("exact", codec=Exact()), "preset 'exact' with a rank or codec"),
        (lambda: preset("tensor", rank=0), "rank=0"),
        (lambda: preset("tensor", rank=2.0), r"rank=2\.0"),
        (lambda: Rule(kind="norms", codec=Exact()), "kind='norms'; expected one of adapter_input.*did you mean 'norm'"),
        (lambda: Rule(kind="atention", codec=Exact()), "did you mean 'attention'"),
        (lambda: Rule(kind=3, codec=Exact()), "kind=3; expected one of adapter_input"),
        (lambda: Rule(kind="norm", codec="exact"), "codec='exact'; expected a Codec; next: .*LowRank"),
        (lambda: Rule(kind="norm", codec=None), "codec=None"),
        (lambda: Rule(kind="norm", codec=LowRank), "codec=<class.*expected a Codec"),
    ],
)
def test_mistakes_are_explained(make, message):
    with pytest.raises(InvalidSpec, match=message) as caught:
        make()
    assert isinstance(caught.value, LoractError)
    assert isinstance(caught.value, ValueError)

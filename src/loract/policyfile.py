"""Policies as files that people can read: YAML without tags, types by name, and the model that they were made for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn

from loract.blocks import find_regions
from loract.codecs import Codec, Exact, LowRank, Quantized, Transform
from loract.errors import InvalidSpec, LoractError, nearest
from loract.plainyaml import read_mapping, written
from loract.policy import Policy, Rule
from loract.rangefinder import Gaussian, Sampled, Truncated
from loract.recognize import recognize

CODECS: dict[str, type] = {kind.__name__: kind for kind in (Exact, LowRank, Quantized, Transform)}
"""Codecs that a policy file can name. A codec of your own is a frozen dataclass of plain values: add it here."""
SAMPLERS: dict[str, type] = {kind.__name__: kind for kind in (Sampled, Gaussian, Truncated)}


def describe(codec: Codec) -> str:
    """The codec's class and the fields that differ from its defaults.

    Example:
        >>> describe(Quantized(bits=5, scale="channel"))
        "Quantized(bits=5, scale='channel')"
    """
    if not is_dataclass(codec) or isinstance(codec, type):
        return type(codec).__name__
    return f"{type(codec).__name__}({', '.join(f'{name}={value!r}' for name, value in _changed(codec).items())})"


def _changed(value: Any) -> dict[str, Any]:
    """Fields of a dataclass that differ from their defaults."""
    out: dict[str, Any] = {}
    for item in fields(value):
        default = item.default if item.default_factory is MISSING else item.default_factory()
        own = getattr(value, item.name)
        if own != default or type(own) is not type(default):  # a rank of 1 is not one of 1.0
            out[item.name] = own
    return out


def save_policy(policy: Policy, path: str | Path, model: nn.Module | None = None) -> None:
    """Write `policy` as YAML that people can read and change; with `model`, also which model it is for.

    Raises:
        LoractError: a codec that is not in `CODECS`, or a file that cannot be written.
        MissingExtra: PyYAML is not installed.
    """
    values: dict[str, Any] = {"policy": policy.name, "rules": [_rule_values(rule) for rule in policy.rules]}
    if model is not None:
        values["model"] = type(model).__name__
        values["sites"] = _sites(model)
    text = written(values, default_flow_style=None, width=120)
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise LoractError(f"{str(path)!r} ({error.strerror})", "a file to write", "check the path") from None


def load_policy(path: str | Path, model: nn.Module | None = None) -> Policy:
    """The policy of a file that `save_policy` or a person wrote. Plain YAML; no tag is followed.

    With `model`, the file must have been written for a model of the same class with the same sites.

    Raises:
        InvalidSpec: an unknown kind, type or field (the nearest is named), or a value out of range.
        LoractError: no such file, not plain YAML, or another model (the first difference is named).
        MissingExtra: PyYAML is not installed.
    """
    values = read_mapping("policy file", Path(path), "write one with save_policy")
    _known("key", values, ("policy", "rules", "model", "sites"))
    rules = values.get("rules")
    if not isinstance(rules, list) or not rules:
        raise InvalidSpec(f"rules={rules!r}", "a list of rules", "see a file that save_policy wrote")
    policy = Policy(name=str(values.get("policy", Path(path).stem)), rules=tuple(_rule(rule) for rule in rules))
    if model is not None:
        _check_model(values, model)
    return policy


def _sites(model: nn.Module) -> list[str]:
    """Kind and name of each site that the model has, under any policy."""
    found = recognize(model)
    return [f"{item.site.kind} {item.site.name}" for item in (*found.sites, *find_regions(model, found))]


def _check_model(values: Mapping[str, Any], model: nn.Module) -> None:
    next_step = "plan again for this model, or load the file without model="
    if "model" not in values or not isinstance(values.get("sites"), list):
        raise LoractError("a policy file that names no model", "one saved with model=", next_step)
    if (name := type(model).__name__) != values["model"]:
        raise LoractError(f"a policy for {values['model']}", f"one for {name}", next_step)
    theirs, ours = [str(site) for site in values["sites"]], _sites(model)
    for index in range(max(len(theirs), len(ours))):
        there, here = (sites[index] if index < len(sites) else "no more sites" for sites in (theirs, ours))
        if there != here:
            raise LoractError(f"a policy for a {name} with {there!r} as site {index}", f"{here!r} there", next_step)


def _rule_values(rule: Rule) -> dict[str, Any]:
    changed = _changed_rule(rule)
    return {"kind": rule.kind, **changed, "codec": _written(rule.codec, CODECS)}


def _changed_rule(rule: Rule) -> dict[str, Any]:
    out: dict[str, Any] = {}
    if rule.name != "*":
        out["name"] = rule.name
    if rule.layers is not None:
        out["layers"] = list(rule.layers)
    if rule.recomputed:
        out["recomputed"] = True
    return out


def _written(value: Any, types: Mapping[str, type]) -> dict[str, Any]:
    name = type(value).__name__
    if types.get(name) is not type(value):
        raise LoractError(f"a {name}", f"one of {', '.join(types)}", "add its class to loract.policyfile.CODECS first")
    changed = _changed(value)
    return {"type": name, **{k: _written(v, SAMPLERS) if is_dataclass(v) else v for k, v in changed.items()}}


def _rule(values: Any) -> Rule:
    values = _mapping("rule", values)
    _known("key of a rule", values, ("kind", "name", "layers", "recomputed", "codec"))
    for key in ("kind", "codec"):
        if key not in values:
            raise InvalidSpec(f"rule {values!r} without {key}", "rules with kind and codec", f"add a line `{key}: ...`")
    name, layers, recomputed = values.get("name", "*"), values.get("layers"), values.get("recomputed", False)
    if not isinstance(name, str):
        raise InvalidSpec(f"name={name!r}", "a glob for names of modules", "quote it")
    if layers is not None:
        whole = isinstance(layers, list) and all(type(number) is int for number in cast(list[object], layers))
        if not whole or len(cast(list[int], layers)) != 2:
            raise InvalidSpec(f"layers={layers!r}", "the first and the last layer", "try layers: [0, 5]")
        layers = (layers[0], layers[1])
    if not isinstance(recomputed, bool):
        raise InvalidSpec(f"recomputed={recomputed!r}", "true or false", "leave it out for false")
    codec = _built("codec", values["codec"], CODECS)
    return Rule(kind=values["kind"], codec=codec, name=name, layers=layers, recomputed=recomputed)


def _built(what: str, values: Any, types: Mapping[str, type]) -> Any:
    """An object of one of `types` from its type's name and fields."""
    values = dict(_mapping(what, values))
    name = values.pop("type", None)
    if not isinstance(name, str) or name not in types:
        raise InvalidSpec(f"{what} type {name!r}", f"one of {', '.join(types)}", nearest(str(name), types))
    kind: Any = types[name]
    known = {item.name: item for item in fields(kind)}
    _known(f"field of {name}", values, known)
    for key, value in values.items():
        if isinstance(value, Mapping):
            values[key] = _built(key, value, SAMPLERS)
        elif isinstance(known[key].default, bool) != isinstance(value, bool):
            raise InvalidSpec(f"{name} with {key}={value!r}", f"a value like {known[key].default!r}", "correct it")
    try:
        return kind(**values)
    except TypeError as error:
        raise InvalidSpec(f"{name} with {values!r} ({error})", "values of its fields' types", "correct them") from None


def _mapping(what: str, values: Any) -> dict[str, Any]:
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in cast(dict[object, object], values)):
        raise InvalidSpec(f"{what} {values!r}", "lines like `key: value`", "see a file that save_policy wrote")
    return cast(dict[str, Any], values)


def _known(what: str, values: Mapping[str, Any], known: Sequence[str] | Mapping[str, Any]) -> None:
    for key in values:
        if key not in known:
            expected = f"one of {', '.join(known)}" if known else "no fields"
            raise InvalidSpec(f"unknown {what} {key!r}", expected, nearest(key, known) if known else f"drop {key}")

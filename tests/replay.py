"""An oracle for coded gradients: plain autograd that reads, in the place of each activation, what its site decodes.

`recorded` notes while an attached model runs what stands for the activation of every site. `replayed` then runs the
detached model, with plain torch in the place of each site: the module's own values forward, and backward the derivative
of a textbook formula (a norm) or of the module's own forward (everything else) at the decoded tensors. Of the library
it takes what was decoded and nothing else: none of its gradients, products with factors, second runs or sharing.
"""

import importlib
from collections import defaultdict
from contextlib import contextmanager

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from loract.recognize import GatedRole, NormRole, gated_forward, recognize
from loract.region import Region
from oracles import relative


class Recorded:
    """Calls of each site in their order; `decode` turns them into pairs of tensors (activation, decoded)."""

    def __init__(self):
        self.calls = defaultdict(list)

    def add(self, kind, owner, *pairs):
        self.calls[kind, id(owner)].append(pairs)

    def decode(self):
        """Right after a backward pass that retained its graph: before it reading would use up announced readers."""
        for calls in self.calls.values():
            calls[:] = [[(x, packed.decode().reshape(x.shape)) for x, packed in pairs] for pairs in calls]

    def errors(self):
        """By kind, the relative error of every activation."""
        found = defaultdict(list)
        for (kind, _), calls in self.calls.items():
            found[kind] += [relative(decoded, x) for pairs in calls for x, decoded in pairs if x.is_floating_point()]
        return dict(found)


@contextmanager
def recorded(handle):
    """Note every call of an attached model's sites, outside second runs."""
    module = importlib.import_module("loract.attach")
    names = ("adapter_product", "norm", "gated", "checkpoint")
    own, values = {name: getattr(module, name) for name in names}, Region.values
    found, running = Recorded(), []

    def first_run():
        return not handle.ledger.recomputing

    def adapter_product(x, weight, packed, forward):
        if first_run():
            found.add("adapter", weight, (x.detach(), packed))
        return own["adapter_product"](x, weight, packed, forward)

    def norm(x, weight, bias, call):
        pairs, encode = [], call.encode

        def noted(value):
            pairs.append((value.detach(), encode(value)))
            return pairs[-1][1]

        call.encode = noted
        y = own["norm"](x, weight, bias, call)
        if first_run():
            found.add("norm of s xhat" if call.lossy else "norm", weight, *pairs)
        return y

    def gated(gate, up, call):
        if first_run():
            pairs = [(gate.detach(), call.gate)] + ([] if up is None else [(up.detach(), call.up)])
            found.add("gated", call.activation.__self__, *pairs)
        return own["gated"](gate, up, call)

    def checkpoint(rerun, tensors, parameters):
        out = own["checkpoint"](rerun, tensors, parameters)
        found.add("region", running.pop(), *zip([t.detach() for t in tensors], rerun.operands, strict=True))
        return out

    def noted_values(region, *args):
        running.append(region.module)
        return values(region, *args)

    try:
        Region.values = noted_values
        for name, function in zip(names, (adapter_product, norm, gated, checkpoint), strict=True):
            setattr(module, name, function)
        yield found
    finally:
        Region.values = values
        for name in names:
            setattr(module, name, own[name])


class _Instead(torch.autograd.Function):
    """value(), whose gradients are those of function(*leaves) at `decoded`, with the random state of the first run."""

    @staticmethod
    def forward(ctx, value, function, decoded, count, *tensors):
        ctx.state = torch.get_rng_state()
        ctx.function, ctx.decoded, ctx.count, ctx.tensors = function, decoded, count, tensors
        leaves, ctx.spec = tree_flatten(value())
        ctx.set_materialize_grads(False)
        return tuple(leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)

    @staticmethod
    def backward(ctx, *grads):
        pairs = zip(ctx.tensors[: ctx.count], ctx.decoded, strict=True)
        leaves = [decoded.detach().clone().requires_grad_(x.requires_grad) for x, decoded in pairs]
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            torch.set_rng_state(ctx.state)
            outputs, _ = tree_flatten(ctx.function(*leaves))
        reached = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
        inputs = [*leaves, *ctx.tensors[ctx.count :]]
        wanted = [t for t in inputs if t.requires_grad]
        outputs, upstream = zip(*reached, strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, upstream, allow_unused=True))
        return None, None, None, None, *(next(found) if t.requires_grad else None for t in inputs)


def _instead(value, function, tensors, decoded, parameters):
    trained = [p for p in parameters if p.requires_grad]
    spec = []

    def noted():
        leaves, shape = tree_flatten(value())
        spec.append(shape)
        return leaves

    out = _Instead.apply(noted, function, decoded, len(tensors), *tensors, *trained)
    return tree_unflatten(list(out), spec[0])


@contextmanager
def replayed(model, found):
    """The detached model with every recorded site replaced."""
    calls = {key: iter(pairs) for key, pairs in found.calls.items()}
    roles = {id(site.module): site.role for site in recognize(model).sites}
    inside = {id(getattr(m, r.activation)) for m in model.modules() if isinstance(r := roles.get(id(m)), GatedRole)}
    patched = []

    def patch(module, forward):
        patched.append(module)
        module.forward = forward

    for module in model.modules():
        role, weight = roles.get(id(module)), getattr(module, "weight", None)
        if ("adapter", id(weight)) in calls:
            patch(module, _adapter(module, calls["adapter", id(weight)]))
        elif isinstance(role, NormRole):
            weight = getattr(module, role.weight)
            for kind in ("norm", "norm of s xhat"):
                if (kind, id(weight)) in calls:
                    patch(module, _norm(module, role, calls[kind, id(weight)], kind))
        elif isinstance(role, GatedRole) and ("gated", id(getattr(module, role.activation))) in calls:
            patch(module, _gated(module, role, calls["gated", id(getattr(module, role.activation))]))
        elif ("gated", id(module)) in calls and id(module) not in inside:
            patch(module, _activation(module, calls["gated", id(module)]))
        elif ("region", id(module)) in calls:
            patch(module, _region(module, calls["region", id(module)]))
    try:
        yield
    finally:
        for module in patched:
            del module.forward


def _adapter(module, calls):
    own = module.forward

    def forward(x):
        ((_, decoded),) = next(calls)
        return _instead(lambda: own(x), own, [x], [decoded.reshape(x.shape).to(x.dtype)], [module.weight])

    return forward


def _norm(module, role, calls, kind):
    own = module.forward

    def forward(x):
        ((value, decoded),) = next(calls)
        weight = getattr(module, role.weight)
        bias = None if role.bias is None else getattr(module, role.bias)
        mean = x.mean(-1, keepdim=True) if role.centred else torch.zeros(())
        rstd = ((x - mean).square().mean(-1, keepdim=True) + role.eps).rsqrt().detach()
        if kind == "norm":  # the input stands there, and it is centred by its own mean
            xhat = ((decoded - decoded.mean(-1, keepdim=True) if role.centred else decoded) * rstd).detach()
        else:  # normalised, and scaled by channel
            exact = ((x - mean) * rstd).detach().reshape(value.shape)
            scale = (value * exact).sum(0) / exact.square().sum(0)
            xhat = (decoded / scale).reshape(x.shape)

        def textbook(x):
            step = rstd * x
            step = step - step.detach()  # zero, with d xhat / dx = rstd (1 - [1 1^T / n] - xhat xhat^T / n)
            n = xhat + step - xhat * (xhat * step).mean(-1, keepdim=True)
            y = (n - step.mean(-1, keepdim=True) if role.centred else n) * (weight + role.offset)
            return y if bias is None else y + bias

        return _instead(lambda: own(x), textbook, [x], [x.detach()], [weight, *([] if bias is None else [bias])])

    return forward


def _gated(module, role, calls):
    activation = getattr(module, role.activation)

    def multiply(gate, up):
        (_, first), (_, second) = next(calls)

        def product(gate, up):
            return activation(gate) * up

        return _instead(lambda: product(gate, up), product, [gate, up], [first, second], [])

    return lambda x: gated_forward(module, role, x, multiply)


def _activation(module, calls):
    own = module.forward

    def forward(x):
        ((_, decoded),) = next(calls)
        return _instead(lambda: own(x), own, [x], [decoded], [])

    return forward


def _region(module, calls):
    own = module.forward

    def forward(*args, **kwargs):
        pairs = next(calls)
        leaves, spec = tree_flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        tensors = [leaves[i] for i in places]
        decoded = [next(d for x, d in pairs if x.dtype == t.dtype and torch.equal(x, t)) for t in tensors]

        def run(*given):
            filled = list(leaves)
            for i, tensor in zip(places, given, strict=True):
                filled[i] = tensor
            args, kwargs = tree_unflatten(filled, spec)
            return own(*args, **kwargs)

        return _instead(lambda: run(*tensors), run, tensors, decoded, list(module.parameters()))

    return forward

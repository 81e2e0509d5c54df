"""AdamW on projected gradients, against textbook arithmetic in coordinates and against torch's AdamW."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

import loract
from loract.optim import ProjectedAdamW, Projection
from loract.rangefinder import Gaussian, Sampled, Truncated

EXACT = Projection(rank=3, refresh=2, finder=Truncated(), bits=32)


def tensor(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def low_rank(rows, columns, rank, seed=0):
    return tensor(rows, rank, seed=seed) @ tensor(rank, columns, seed=seed + 1)


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.LayerNorm(24), nn.Linear(24, 8))


def loss(model, seed=0):
    x = tensor(16, 12, seed=100 + seed)
    return (model(x) - x @ tensor(12, 8, seed=200) / 4).square().mean()


def train(net, optimiser, steps=6, micro=1):
    losses = []
    for index in range(steps):
        for part in range(micro):
            value = loss(net, micro * index + part) / micro
            value.backward()
            losses.append(value.item())
        optimiser.step()
        optimiser.zero_grad()
    return losses


def run(parameter, optimiser, gradients):
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimiser.step()


@pytest.mark.parametrize("shape", [(10, 6), (6, 10)])
def test_gradients_of_low_rank_lose_nothing(shape):
    """With a basis that holds every gradient, weights move as plain Adam moves the coordinates R = G P."""
    base = low_rank(*shape, 3)
    gradients = [base * factor for factor in (1.0, -0.5, 2.0, 0.3)]
    weight = nn.Parameter(tensor(*shape, seed=9))
    start = weight.detach().clone()
    settings = {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.05}
    optimiser = ProjectedAdamW([weight], projection=Projection(rank=3, finder=Truncated(), bits=32), **settings)
    run(weight, optimiser, gradients)

    basis = optimiser.state[weight]["basis"]
    tall = shape[0] >= shape[1]
    coordinates = nn.Parameter(torch.zeros(max(shape), 3))
    adam = torch.optim.AdamW([coordinates], **(settings | {"weight_decay": 0.0}))
    expected, last = start, torch.zeros_like(coordinates)
    for gradient in gradients:
        run(coordinates, adam, [(gradient if tall else gradient.T) @ basis])
        move = (coordinates.detach() - last) @ basis.T
        expected = expected * (1 - 0.1 * 0.05) + (move if tall else move.T)
        last = coordinates.detach().clone()
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-5, atol=1e-6)


def test_what_is_not_projected_moves_as_under_adamw():
    ours, theirs = model(), model()
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    groups = [{"params": list(ours.parameters()), "project": False}]
    found = train(ours, ProjectedAdamW(groups, **settings))
    assert found == pytest.approx(train(theirs, torch.optim.AdamW(theirs.parameters(), **settings)), rel=1e-5)


def test_a_rank_of_all_columns_is_adamw():
    ours, theirs = model(), model()
    found = train(ours, ProjectedAdamW(ours.parameters(), lr=1e-2, projection=Projection(rank=1.0)))
    adamw = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.0)
    assert found == pytest.approx(train(theirs, adamw), rel=1e-5)


@pytest.mark.parametrize("finder", [Sampled(), Gaussian(), Truncated()])
@pytest.mark.parametrize("bits", [8, 32])
def test_it_trains(finder, bits):
    net = model()
    before = loss(net).item()
    projection = Projection(rank=0.5, refresh=3, finder=finder, bits=bits)
    train(net, ProjectedAdamW(net.parameters(), lr=2e-2, projection=projection), steps=40)
    assert loss(net).item() < 0.6 * before


def test_eight_bits_are_near_and_small():
    sizes, losses = {}, {}
    for bits in (8, 32):
        net = nn.Linear(64, 256, bias=False)
        nn.init.zeros_(net.weight)
        optimiser = ProjectedAdamW(net.parameters(), lr=1e-2, projection=Projection(rank=16, bits=bits))
        for index in range(20):
            (net(tensor(32, 64, seed=index)) - 1).square().mean().backward()
            optimiser.step()
            optimiser.zero_grad()
        sizes[bits] = optimiser.state_bytes
        losses[bits] = (net(tensor(32, 64, seed=99)) - 1).square().mean().item()
    basis = 64 * 16 * 4
    assert sizes[32] == 2 * 256 * 16 * 4 + basis
    assert sizes[8] == 2 * (256 * 16 + 2 * 256 * 4) + basis
    assert losses[8] == pytest.approx(losses[32], rel=0.02)


@pytest.mark.parametrize("micro", [1, 3])
def test_projecting_during_backward_changes_nothing_but_memory(micro):
    """One basis for all: projections add up as gradients do."""
    found = {}
    for during in (False, True):
        net = model()
        projection = Projection(rank=4, refresh=100, finder=Truncated())
        optimiser = ProjectedAdamW(net.parameters(), lr=1e-2, projection=projection, during_backward=during)
        # The first basis comes from the first micro-batch in one case and from their sum in the other.
        train(net, optimiser, steps=1)
        bases = {n: optimiser.state[p]["basis"] for n, p in net.named_parameters() if "basis" in optimiser.state[p]}
        found[during] = train(net, optimiser, steps=4, micro=micro), net, bases
    assert found[True][2].keys() == {"0.weight", "3.weight"}
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-5)
    for ours, theirs in zip(found[True][1].parameters(), found[False][1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_full_gradients_never_exist_together():
    net = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(6)))
    alive = []

    def look(parameter):
        alive.append(sum(p.grad is not None for p in net.parameters()))

    with ProjectedAdamW(net.parameters(), projection=Projection(rank=4), during_backward=True) as optimiser:
        for parameter in net.parameters():
            parameter.register_post_accumulate_grad_hook(look)
        net(tensor(8, 64)).sum().backward()
        optimiser.step()
    assert alive == [0] * 6
    net(tensor(8, 64)).sum().backward()  # closed: gradients stay
    assert all(p.grad is not None for p in net.parameters())


def test_zero_grad_forgets_what_waits():
    net = nn.Linear(16, 8, bias=False)
    before = net.weight.detach().clone()
    with ProjectedAdamW(net.parameters(), projection=Projection(rank=2), during_backward=True) as optimiser:
        net(torch.ones(4, 16)).sum().backward()
        assert optimiser.waiting_bytes == 16 * 2 * 4
        optimiser.zero_grad()
        assert optimiser.waiting_bytes == 0
        optimiser.step()
    assert torch.equal(net.weight, before)


def test_moments_survive_a_change_of_basis():
    """Two bases of one subspace: the mean is carried exactly, and so is the mean square of what has no spread."""
    weight = nn.Parameter(torch.zeros(10, 6))
    optimiser = ProjectedAdamW([weight], projection=EXACT)
    base = low_rank(10, 6, 3)
    run(weight, optimiser, [base])
    state = optimiser.state[weight]
    old, first, second = state["basis"].clone(), state["first"].clone(), state["second"].clone()
    turn = torch.linalg.qr(tensor(3, 3, seed=5)).Q
    optimiser._carry(state, turn)
    torch.testing.assert_close(state["first"] @ (old @ turn).T, first @ old.T)
    torch.testing.assert_close(second, first.square())
    torch.testing.assert_close(state["second"], state["first"].square())


def test_a_basis_is_found_anew_on_schedule():
    weight = nn.Parameter(torch.zeros(10, 6))
    optimiser = ProjectedAdamW([weight], projection=EXACT)
    bases = []
    for seed in range(4):
        run(weight, optimiser, [low_rank(10, 6, 3, seed=10 * seed)])
        bases.append(optimiser.state[weight]["basis"])
    assert [torch.equal(a, b) for a, b in pairwise(bases)] == [True, False, True]


def test_energy_chooses_the_rank():
    u, v = torch.linalg.qr(tensor(20, 4)).Q, torch.linalg.qr(tensor(10, 4, seed=1)).Q
    gradient = u * torch.tensor([10.0, 3.0, 1.0, 0.1]) @ v.T  # shares of the energy: .909, .082, .009, .0001
    for energy, columns in ((0.9, 1), (0.95, 2), (0.995, 3)):
        weight = nn.Parameter(torch.zeros(20, 10))
        run(weight, ProjectedAdamW([weight], projection=Projection(rank=8, energy=energy)), [gradient])
        optimiser = ProjectedAdamW([weight], projection=Projection(rank=8, energy=energy))
        run(weight, optimiser, [gradient])
        assert optimiser.state[weight]["basis"].shape == (10, columns)


@pytest.mark.parametrize("during", [False, True])
def test_clipping_counts_projections_and_plain_gradients(during):
    net = nn.Linear(6, 10)
    projection = Projection(rank=3, finder=Truncated(), bits=32)
    settings = {"lr": 1.0, "eps": 1e6, "betas": (0.0, 0.0), "projection": projection}  # eps: steps follow the gradient
    optimiser = ProjectedAdamW(net.parameters(), during_backward=during, **settings)
    before = [p.detach().clone() for p in net.parameters()]
    weight, bias = low_rank(10, 6, 3), tensor(10, seed=7)
    ((net.weight * weight).sum() + (net.bias * bias).sum()).backward()
    norm = (weight.square().sum() + bias.square().sum()).sqrt()
    for bound in (torch.inf, 0.5):
        torch.testing.assert_close(optimiser.clip_grad_norm_(bound), norm)
    torch.testing.assert_close(optimiser.clip_grad_norm_(torch.inf), torch.tensor(0.5))
    optimiser.step()
    for moved, start, gradient in zip(net.parameters(), before, (weight, bias), strict=True):
        torch.testing.assert_close((start - moved.detach()) * 1e6, gradient * 0.5 / norm, rtol=0.1, atol=5e-2)


def test_saved_and_loaded_in_the_middle(tmp_path):
    nets, found = [], []
    for cut in (None, 5):
        net = model().to(torch.bfloat16)
        make = {"lr": 1e-2, "projection": Projection(rank=4, refresh=3), "seed": 3}
        optimiser = ProjectedAdamW(net.parameters(), **make)
        losses = []
        for index in range(9):
            if index == cut:
                torch.save(optimiser.state_dict(), tmp_path / "state.pt")
                optimiser = ProjectedAdamW(net.parameters(), **make)
                optimiser.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
            x = tensor(16, 12, seed=index).bfloat16()
            value = net(x).float().square().mean()
            value.backward()
            losses.append(value.item())
            optimiser.step()
            optimiser.zero_grad()
        nets.append(net)
        found.append(losses)
    assert found[0] == found[1]
    for ours, theirs in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(ours, theirs)


def test_a_deep_copy_of_the_state_is_not_shared():
    net = model()
    optimiser = ProjectedAdamW(net.parameters(), projection=Projection(rank=4))
    train(net, optimiser, steps=1)
    kept = copy.deepcopy(optimiser.state_dict())
    optimiser.load_state_dict(kept)
    train(net, optimiser, steps=1)
    assert {state["step"] for state in kept["state"].values()} == {1}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, "rank=0"),
        ({"energy": 1.5}, r"energy=1\.5.*between 0 and 1"),
        ({"refresh": 0}, "refresh=0.*at least 1"),
        ({"bits": 4}, "bits=4.*8 or 32"),
        ({"scale": -1.0}, "scale"),
        ({"finder": Sampled}, "range finder"),
    ],
)
def test_bad_projections(values, message):
    with pytest.raises(loract.InvalidSpec, match=message):
        Projection(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": -1.0}, "lr=-1"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"weight_decay": 1.0}, "weight_decay"),
    ],
)
def test_bad_options(values, message):
    with pytest.raises(loract.InvalidSpec, match=message):
        ProjectedAdamW(model().parameters(), **values)


def test_sparse_gradients_are_refused():
    table = nn.Embedding(40, 16, sparse=True)
    optimiser = ProjectedAdamW(table.parameters(), projection=Projection(rank=2))
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(loract.UnsupportedModule, match="sparse gradient"):
        optimiser.step()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(40, 12)

    def forward(self, ids, head=None):
        weight = self.table.weight if head is None else head
        return self.table(ids).tanh() @ weight.T


@pytest.mark.parametrize("alone", [True, False], ids=["apart", "together"])
def test_uses_apart_add_up(alone):
    """A projection of a sum is the sum of projections, of any basis: here the first use's, which holds all."""
    losses = []
    for apart in (alone, False):
        net = Tied()
        projection = Projection(rank=11, finder=Truncated(), bits=32)
        with ProjectedAdamW(net.parameters(), lr=1e-3, projection=projection, during_backward=True) as optimiser:
            for index in range(4):
                ids = torch.arange(index, index + 9)
                net(ids, optimiser.apart(net.table.weight) if apart else None).square().mean().backward()
                assert net.table.weight.grad is None
                optimiser.step()
                losses.append(net(torch.arange(40)).square().mean().item())
    assert losses[:4] == pytest.approx(losses[4:], rel=2e-3)


def test_apart_is_the_parameter_where_nothing_is_projected():
    net = Tied()
    optimiser = ProjectedAdamW(net.parameters(), projection=Projection(rank=4))
    assert optimiser.apart(net.table.weight) is net.table.weight
    with ProjectedAdamW(net.parameters(), projection=Projection(rank=12), during_backward=True) as optimiser:
        assert optimiser.apart(net.table.weight) is net.table.weight


def test_a_backward_that_failed_leaves_no_trace():
    found = []
    for failing in (False, True):
        net = model()
        projection = Projection(rank=4, refresh=2)
        with ProjectedAdamW(net.parameters(), lr=1e-2, projection=projection, during_backward=True) as optimiser:
            train(net, optimiser, steps=2)
            loss(net, 0).backward()
            if failing:
                plain = [(p, p.grad.clone()) for p in net.parameters() if p.grad is not None]
                restore = optimiser.snapshot()
                loss(net, 7).backward()
                restore()
                for parameter, gradient in plain:
                    parameter.grad = gradient
            found.append(train(net, optimiser, steps=3))
    assert found[0] == found[1]

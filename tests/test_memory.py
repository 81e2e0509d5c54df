"""Measured bytes against bytes counted by hand."""

import json

import pytest
import torch

from loract.memory import MIB, Record, StorageTracker, peak_bytes, peak_rss_bytes, saved_bytes

N = 1000
VECTOR = 4 * N


class Stashing(torch.autograd.Function):
    """Parks its state on ctx, where saved-tensor hooks do not see it."""

    @staticmethod
    def forward(ctx, x):
        ctx.state = x * 2
        return x.sum()

    @staticmethod
    def backward(ctx, grad):
        return ctx.state * grad


@pytest.fixture
def x():
    return torch.ones(N, requires_grad=True)


@pytest.mark.parametrize(
    ("forward", "vectors"),
    [
        (lambda x: x.sin().sum(), 0),  # sin keeps x, which existed before
        (lambda x: x.exp().sum(), 1),  # exp keeps its result
        (lambda x: (x * 2).sin().sum(), 1),  # the product is sin's operand
        (lambda x: (x.exp() * x.sin()).sum(), 2),  # exp's result serves exp and the product: once
        (lambda x: x.exp().view(10, -1).T.sin().sum(), 1),  # views of one storage
        (lambda x: (x + 1 + 2).sum(), 0),  # sums keep nothing
        (lambda x: Stashing.apply(x), 1),
        (lambda x: x.detach().exp().sum(), 0),
    ],
)
def test_saved_bytes(x, forward, vectors):
    measured, output = saved_bytes(lambda: forward(x), [x])
    assert measured == vectors * VECTOR
    assert output.shape == ()


def test_outputs_are_not_counted_even_if_the_graph_keeps_them(x):
    measured, output = saved_bytes(lambda: {"out": [x.exp()]})
    assert measured == 0
    assert output["out"][0].grad_fn is not None


def test_what_a_forward_leaves_behind_is_counted(x):
    left = []
    measured, _ = saved_bytes(lambda: (left.append(x.detach() * 2), x.sum())[1])
    assert measured == VECTOR


def test_dtypes_count_by_their_size():
    x = torch.ones(N, requires_grad=True, dtype=torch.bfloat16)
    assert saved_bytes(lambda: x.exp().sum())[0] == 2 * N
    assert saved_bytes(lambda: x.double().exp().sum())[0] == 8 * N


def test_a_linear_layer_saves_its_input_only():
    layer = torch.nn.Linear(8, 4)
    batch = torch.ones(16, 8)
    measured, _ = saved_bytes(lambda: layer(batch * 2).sum(), layer.parameters())
    assert measured == 16 * 8 * 4


def test_tracker_follows_births_and_deaths():
    with StorageTracker() as tracker:
        a = torch.ones(N)
        b = a + 1
        assert tracker.current_bytes == 2 * VECTOR
        view = b[10:]
        assert (tracker.current_bytes, tracker.bytes_of([view])) == (2 * VECTOR, VECTOR)
        b.add_(1)
        del b
        assert tracker.current_bytes == 2 * VECTOR  # the view keeps the storage
        del view
        assert tracker.current_bytes == VECTOR
    del a
    assert tracker.current_bytes == 0
    assert tracker.peak_bytes == 2 * VECTOR


def test_tracker_does_not_confuse_new_storages_with_dead_ones():
    with StorageTracker() as tracker:
        for _ in range(100):
            x = torch.ones(N)
            assert tracker.current_bytes == VECTOR
            del x
        assert tracker.current_bytes == 0
    assert tracker.peak_bytes == VECTOR


def test_tracker_excludes():
    with StorageTracker() as tracker:
        x = torch.ones(N)
        tracker.exclude([])
        tracker.exclude([y := torch.empty(0)])
        assert (tracker.current_bytes, tracker.bytes_of([y])) == (VECTOR, 0)
    outside = torch.ones(N)
    with StorageTracker() as tracker:
        tracker.exclude([outside])
        outside.mul_(2).view(-1)
        assert tracker.current_bytes == 0
    assert tracker.bytes_of([x]) == 0


def test_peak_bytes_counts_the_most_alive_at_once(x):
    def step():
        with torch.no_grad():
            a = x + 1  # 1
            b = a + 1  # 2
            del a  # 1
            c = b + 1  # 2
            d = torch.cat([b, c])  # 4
            del b, c  # 2
            return d.sum()

    assert peak_bytes(step) == 4 * VECTOR


def test_peak_bytes_includes_backward(x):
    def step():
        x.grad = None
        x.exp().sum().backward()

    # exp's result, the expanded gradient of the sum (a scalar), and the gradient of x; two scalars.
    assert peak_bytes(step, [x]) == pytest.approx(2 * VECTOR, abs=64)
    assert torch.equal(x.grad, x.detach().exp())


def test_peak_bytes_are_freed_after_the_step(x):
    first = peak_bytes(lambda: x.exp().sum(), [x])
    assert [peak_bytes(lambda: x.exp().sum(), [x]) for _ in range(3)] == [first] * 3


def test_peak_rss_is_in_bytes_and_monotone():
    before = peak_rss_bytes()
    assert 10 * MIB < before < 1 << 42
    keep = torch.ones(64 * MIB // 4)
    assert peak_rss_bytes() >= before
    assert keep.sum() == keep.numel()


def test_records_append_as_json_lines(tmp_path):
    path = tmp_path / "deep" / "er" / "records.jsonl"
    first = Record(name="lora", saved_bytes=1, peak_bytes=2, step_seconds=0.5, time_ratio=1.0)
    second = Record(
        name="tensor",
        saved_bytes=10,
        peak_bytes=20,
        step_seconds=0.6,
        time_ratio=1.2,
        cosine=0.999,
        relative_error=0.04,
        extra={"rank": 0.125, "device": "cpu"},
    )
    first.append(path)
    second.append(path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["name"] for line in lines] == ["lora", "tensor"]
    assert [Record(**line) for line in lines] == [first, second]
    assert lines[0]["cosine"] is None
    assert lines[1]["extra"] == {"rank": 0.125, "device": "cpu"}

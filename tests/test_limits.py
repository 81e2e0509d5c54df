"""The profile of a step: FLOPs and bytes of known operators, parts of a tiny model's step, nothing measured twice."""

import json
from functools import partial

import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from loract import InvalidSpec
from test_benchmarks import lines, script, unneeded, work

limits = script("limits")
RATES = limits.Rates(products={"float32": 100.0, "bfloat16": 1000.0}, bandwidth=10.0)
METHODS = ("LoRA", "loract balanced", "loract fast")


def clocked(run, rates=RATES):
    clock = limits.Clock(rates)
    with limits.marked(clock), clock:
        run()
    return clock.parts


def values(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def tiny(length, train, held_out, dtype):
    return work(length=length, train=train, held_out=held_out, dtype=dtype)


@pytest.mark.parametrize(
    ("run", "count", "moved"),
    [
        (lambda: values(8, 16) @ values(16, 4), 2 * 8 * 16 * 4, 8 * 16 + 16 * 4 + 8 * 4),
        (lambda: values(16, 8).T @ values(16, 4), 2 * 8 * 16 * 4, 8 * 16 + 16 * 4 + 8 * 4),
        (lambda: values(3, 8, 16) @ values(3, 16, 4), 3 * 2 * 8 * 16 * 4, 3 * (8 * 16 + 16 * 4 + 8 * 4)),
        (lambda: torch.addmm(values(4), values(8, 16), values(16, 4)), 1024, 4 + 8 * 16 + 16 * 4 + 8 * 4),
        (lambda: values(8, 4).addmm_(values(8, 16), values(16, 4)), 1024, 8 * 16 + 16 * 4 + 2 * 8 * 4),
        (lambda: torch.mm(values(8, 16), values(16, 4), out=torch.empty(8, 4)), 1024, 8 * 16 + 16 * 4 + 8 * 4),
    ],
)
def test_flops_and_bytes_of_products(run, count, moved):
    found = clocked(run)[limits.PRODUCTS]
    assert (found.flops, found.bytes) == (count, 4 * moved)
    assert found.seconds > 0


@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("given", [True, False])
def test_what_is_added_to_a_product_is_read_if_it_counts(beta, given):
    total, a, b = values(3, 8, 4), values(3, 8, 16), values(3, 16, 4)
    found = clocked(lambda: torch.baddbmm(total, a, b, beta=beta, **({"out": total} if given else {})))
    read = a.nbytes + b.nbytes + (total.nbytes if beta else 0)
    assert (found[limits.PRODUCTS].flops, found[limits.PRODUCTS].bytes) == (3 * 1024, read + total.nbytes)


X, Y, TABLE = values(6, 10), values(6, 10), values(100, 10)
ROWS = torch.tensor([1, 5, 7])


@pytest.mark.parametrize(
    ("run", "moved"),
    [
        (X.clone, 2 * X.nbytes),
        (X.bfloat16, X.nbytes + X.nbytes // 2),
        (lambda: Y.copy_(X), 2 * X.nbytes),
        (lambda: Y[2:4].copy_(X[:2]), 2 * X.nbytes // 3),
        (Y.zero_, Y.nbytes),
        (lambda: Y.mul_(2), 2 * Y.nbytes),
        (lambda: torch.softmax(Y, -1, out=Y), 2 * Y.nbytes),
        (lambda: X + X[0], 2 * X.nbytes + 40),
        (lambda: X + X[:1].expand(6, -1), 2 * X.nbytes + 40),
        (lambda: torch.cat([X, Y]), 4 * X.nbytes),
        (lambda: torch.equal(X, X), 2 * X.nbytes),
        (lambda: functional.embedding(ROWS, TABLE), ROWS.nbytes + 2 * 3 * 40),
        (lambda: TABLE.index_copy_(0, ROWS, X[:3]), 2 * (ROWS.nbytes + 3 * 40)),
    ],
)
def test_bytes_of_everything_else(run, moved):
    found = clocked(run)
    assert found[limits.REST].bytes == moved
    assert found[limits.REST].seconds > 0
    assert not any(spent.flops for spent in found.values())


@pytest.mark.parametrize(
    "run",
    [
        X.detach,
        lambda: X.T,
        lambda: X[1:3, ::2],
        lambda: X.view(10, 6).unsqueeze(0).expand(5, -1, -1),
        lambda: X.view(torch.int32),
        lambda: torch.ops.aten._unsafe_view(X, [60]),
        lambda: torch.empty_like(X),
        lambda: X.new_empty(1000),
    ],
)
def test_views_and_untouched_memory_cost_nothing(run):
    found = clocked(run)[limits.REST]
    assert (found.flops, found.bytes, found.limit_seconds) == (0, 0, 0)
    assert found.seconds > 0


@pytest.mark.parametrize(("queries", "keys", "causal"), [(8, 8, False), (8, 8, True), (12, 5, True), (5, 12, True)])
def test_flops_of_attention(queries, keys, causal):
    query, key, value = values(2, 4, queries, 16), values(2, 4, keys, 16), values(2, 4, keys, 16)
    for each in (query, key, value):
        each.requires_grad_()
    attended = torch.ones(queries, keys).tril() if causal else torch.ones(queries, keys)
    product = 2 * 2 * 4 * int(attended.sum()) * 16
    out = []
    forward = clocked(lambda: out.append(functional.scaled_dot_product_attention(query, key, value, is_causal=causal)))
    backward = clocked(lambda: out[0].sum().backward())
    assert forward[limits.ATTENTION].flops == 2 * product
    assert backward[limits.ATTENTION].flops == 5 * product
    assert forward[limits.PRODUCTS].flops == backward[limits.PRODUCTS].flops == 0


def test_the_limit_is_the_longer_time_of_each_operator():
    a, b = values(8, 16), values(16, 4)
    found = clocked(lambda: (a @ b, a.bfloat16() @ b.bfloat16(), a.clone()))
    small, wide = 2 * (8 * 16 + 16 * 4 + 8 * 4), 4 * (8 * 16 + 16 * 4 + 8 * 4)
    assert found[limits.PRODUCTS].limit_seconds == pytest.approx(max(10.24, wide / 10) + max(1.024, small / 10))
    assert found[limits.REST].limit_seconds == pytest.approx((1.5 * a.nbytes + 1.5 * b.nbytes + 2 * a.nbytes) / 10)
    fast = limits.Rates(products={"float32": 100.0, "bfloat16": 1000.0}, bandwidth=1e9)
    assert clocked(lambda: a.bfloat16() @ b.bfloat16(), fast)[limits.PRODUCTS].limit_seconds == pytest.approx(1.024)


def test_rates_of_a_small_machine():
    found = limits.measured_rates(torch.bfloat16, size=32, copied=1 << 16, times=3)
    assert set(found.products) == {"bfloat16", "float32"}
    assert min(*found.products.values(), found.bandwidth) > 0


def originals():
    return [vars(owner)[name] for owner, name, _ in limits._marks()]


def test_marks_are_undone_when_the_step_raises():
    before = originals()

    def failing():
        assert not set(before) & set(originals())
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        clocked(failing)
    assert originals() == before


def test_the_innermost_mark_decides_and_ends_with_its_function():
    clock = limits.Clock(RATES)

    def failing():
        X.clone()
        raise ZeroDivisionError

    rebuilt = clock.marking(X.clone, None)
    coding = clock.marking(lambda: (rebuilt(), X.T @ X), limits.CODING)
    with clock:
        coding()
        with pytest.raises(ZeroDivisionError):
            clock.marking(failing, limits.ATTENTION)()
        X.clone()
    bytes_by_part = {part: spent.bytes for part, spent in clock.parts.items() if spent.bytes}
    assert bytes_by_part == {
        limits.REST: 4 * X.nbytes,
        limits.CODING: 2 * X.nbytes + 400,
        limits.ATTENTION: 2 * X.nbytes,
    }


def test_a_plain_step_has_the_flops_that_torch_counts():
    study = work(length=32)
    batch = study.rows(8, 2)
    upstream = study.upstream(study.model, batch)

    def step():
        study.hidden(study.model, batch).backward(upstream)

    with FlopCounterMode(display=False) as counter:
        step()
    assert clocked(step)[limits.PRODUCTS].flops == counter.get_total_flops() > 0


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    out = tmp_path_factory.mktemp("limits")
    # so many tokens that attention runs in blocks
    arguments = ("--batch", "2", "--length", "256", "--rounds", "2", "--only", *METHODS[1:], "--out", str(out))
    probe = partial(limits.measured_rates, size=32, copied=1 << 16)
    before = originals()
    limits.main(arguments, tiny, probe)
    assert originals() == before
    return out, arguments


def test_every_part_of_a_method_is_a_line(profiled):
    found = lines(profiled[0])
    assert [(row["method"], row["part"]) for row in found] == [(m, p) for m in METHODS for p in limits.PARTS]
    assert all(row["values"]["rates"] == found[0]["values"]["rates"] for row in found)
    for method in METHODS:
        parts = [row["values"] for row in found if row["method"] == method]
        assert sum(values["seconds"] for values in parts) == pytest.approx(parts[0]["clocked_seconds"])
        assert parts[0]["step_seconds"] > 0


def test_only_what_codes_has_a_coding_part(profiled):
    found = {(row["method"], row["part"]): row["values"] for row in lines(profiled[0])}
    for method in METHODS:
        for part in (limits.PRODUCTS, limits.ATTENTION):
            assert all(found[method, part][name] > 0 for name in ("seconds", "flops", "bytes", "limit_seconds"))
        assert found[method, limits.REST]["bytes"] > found[method, limits.REST]["flops"] == 0
        assert found[method, limits.OUTSIDE]["seconds"] > found[method, limits.OUTSIDE]["limit_seconds"] == 0
        coding = [found[method, limits.CODING][name] for name in ("seconds", "bytes", "limit_seconds")]
        assert coding == [0, 0, 0] if method == "LoRA" else min(coding) > 0
    # `fast` keeps attention's output, so that a second run forms no scores for it
    assert found["loract fast", limits.ATTENTION]["flops"] < found["loract balanced", limits.ATTENTION]["flops"]


def test_a_table_has_a_row_a_part(profiled, capsys):
    out, arguments = profiled
    limits.main(arguments, unneeded, unneeded)
    table = (out / "table.md").read_text()
    assert table.strip() in capsys.readouterr().out
    rows = [line.strip("| \n").split(" | ") for line in table.splitlines() if line.startswith("|")]
    assert "GFLOP/s in bfloat16" in table.splitlines()[0]
    assert len(rows) == len(METHODS) * (2 + len(limits.PARTS))
    assert [line.split("**")[1] for line in table.splitlines() if line.startswith("**")] == list(METHODS)
    for index in range(len(METHODS)):
        header, _, *parts = rows[7 * index : 7 * index + 7]
        assert header == ["part", "s", "share", "GFLOP", "GB", "s at the limit", "measured / limit"]
        assert [part[0] for part in parts] == list(limits.PARTS)
        assert sum(float(part[2].removesuffix(" %")) for part in parts) == pytest.approx(100, abs=0.3)
        assert parts[-1][3:] == ["0", "0", "0", "-"]


def test_a_rerun_measures_what_is_missing_at_the_first_rates(profiled, tmp_path):
    out, (*arguments, _) = profiled
    kept = (out / "records.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "records.jsonl").write_text("".join(kept[:10]))
    limits.main((*arguments, str(tmp_path)), tiny, unneeded)
    found = (tmp_path / "records.jsonl").read_text().splitlines(keepends=True)
    assert found[:10] == kept[:10]
    assert len(found) == 15
    for ours, theirs in zip(map(json.loads, found[10:]), map(json.loads, kept[10:]), strict=True):
        for name in ("flops", "bytes", "rates"):
            assert ours["values"].pop(name) == theirs["values"].pop(name)
        del ours["values"], theirs["values"]
        assert ours == theirs
    limits.main((*arguments, str(tmp_path)), unneeded, unneeded)
    assert (tmp_path / "records.jsonl").read_text() == "".join(found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--only", "loract balance"), "did you mean 'loract balanced'"),
        (("--only", "torch.compile, half the activations"), "uncompiled"),
        (("--rounds", "0"), "raise --rounds"),
        (("--model", "vit", "--length", "64"), "leave --length out"),
    ],
)
def test_mistakes_say_so(tmp_path, arguments, message):
    with pytest.raises(InvalidSpec, match=message):
        limits.main((*arguments, "--out", str(tmp_path)), unneeded, unneeded)
    assert not list(tmp_path.iterdir())

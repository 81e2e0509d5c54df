"""The rank atlas against prescribed spectra, against tensors caught by plain hooks, and from the command line."""

import json
import math
from dataclasses import asdict

import pytest
import tokenizers
import torch
import transformers
import typer
from matplotlib import image
from torch import nn
from typer.testing import CliRunner

import loract
from causal import causal, tokens
from loract.atlas import Spectrum, atlas, spectrum
from loract.cli.inspect import inspect
from loract.report.heatmap import _labels, heatmap
from oracles import decaying, needed_rank, optimum, outlier_channels, prescribed, relative
from tiny import FAMILIES, build, run

TINY = {
    "llama": [
        # Embeddings are frozen, so the first norm saves nothing and its reader packs its output.
        ("adapter_input", "layers.0.self_attn.q_proj"),
        *(("attention", f"layers.0.self_attn.{part}") for part in ("query", "key", "value")),
        ("adapter_input", "layers.0.self_attn.o_proj"),
        ("norm", "layers.0.post_attention_layernorm"),
        ("gated", "layers.0.mlp.gate"),
        ("gated", "layers.0.mlp.up"),
        ("norm", "layers.1.input_layernorm"),
        *(("attention", f"layers.1.self_attn.{part}") for part in ("query", "key", "value")),
        ("adapter_input", "layers.1.self_attn.o_proj"),
        ("norm", "layers.1.post_attention_layernorm"),
        ("gated", "layers.1.mlp.gate"),
        ("gated", "layers.1.mlp.up"),
        ("norm", "norm"),
    ],
    "bert": [
        line
        for layer in (0, 1)
        for line in (
            # After the first layer this is the output of a norm, which is packed there.
            *([("adapter_input", "encoder.layer.0.attention.self.query")] if layer == 0 else []),
            *(("attention", f"encoder.layer.{layer}.attention.self.{part}") for part in ("query", "key", "value")),
            ("adapter_input", f"encoder.layer.{layer}.attention.output.dense"),
            ("norm", f"encoder.layer.{layer}.attention.output.LayerNorm"),
            ("gated", f"encoder.layer.{layer}.intermediate.intermediate_act_fn"),
            ("norm", f"encoder.layer.{layer}.output.LayerNorm"),
        )
    ],
}


def measured(x, **options):
    return spectrum(x, kind="norm", name="model.layers.2.norm", **options)


@pytest.mark.parametrize("shape", [(200, 64), (48, 96)], ids=["tall", "wide"])
@pytest.mark.parametrize("kind", ["slow", "fast", "exponential", "flat"])
def test_figures_of_a_prescribed_spectrum(kind, shape, generator):
    rows, features = shape
    values = decaying(min(shape), kind)
    energies = (values.square() / values.square().sum()).tolist()
    found = measured(prescribed(values, rows, features, generator))
    assert (found.layer, found.tokens, found.features, found.sampled) == (2, rows, features, rows)
    assert found.stable_rank == pytest.approx(1 / energies[0], rel=1e-9)
    for share, energy in ((16, found.energy_sixteenth), (8, found.energy_eighth), (4, found.energy_quarter)):
        assert energy == pytest.approx(sum(energies[: features // share]), rel=1e-9)
    assert found.error_eighth == pytest.approx(math.sqrt(sum(energies[features // 8 :])), rel=1e-6)
    assert found.suggested_rank == needed_rank(values, 0.1)
    assert (found.ranks[0], found.ranks[-1], len(found.ranks)) == (1, min(shape), 32)
    assert found.energies == pytest.approx([sum(energies[:rank]) for rank in found.ranks], rel=1e-9)


@pytest.mark.parametrize("target", [0.3, 0.1])
def test_bits_and_bytes_are_those_of_encoding(target, generator):
    x = prescribed(decaying(64, "fast"), 256, 64, generator).float()
    found = measured(x, target=target)
    errors = {}
    for bits in range(2, 9):
        packed = loract.Quantized(bits=bits, scale="channel").encode(x)
        errors[bits] = relative(packed.decode(), x)
        if bits == found.suggested_bits:
            assert found.codec_bytes["Quantized"] == packed.nbytes
            assert found.codec_errors["Quantized"] == pytest.approx(errors[bits])
    assert found.suggested_bits == min(bits for bits in errors if errors[bits] <= target)
    assert found.codec_bytes["LowRank"] >= found.suggested_rank * (256 + 64) * 4
    assert all(error <= target for error in found.codec_errors.values())
    assert found.cheapest == min(found.codec_bytes, key=found.codec_bytes.get) == "Transform"


def test_each_codec_is_the_cheapest_somewhere(generator):
    noise = torch.randn(256, 64, generator=generator)
    assert measured(noise).cheapest == "Quantized"
    assert set(measured(noise).codec_bytes) <= {"Quantized", "Transform"}
    few = torch.randn(256, 2, generator=generator) @ torch.randn(2, 64, generator=generator)
    found = measured(few, target=1e-3)
    assert (found.cheapest, found.suggested_rank, found.suggested_bits) == ("LowRank", 2, None)
    assert measured(noise, target=1e-6).cheapest is None


def test_outlier_channels_and_tokens_are_found(generator):
    x = outlier_channels(300, 64, torch.Generator().manual_seed(0))
    loud = x.square().mean(0).sqrt()
    found = measured(x)
    assert found.outlier_channels == 4
    assert set(found.outlier_channel_indices) == set(loud.topk(4).indices.tolist())
    assert found.outlier_channel_indices[0] == int(loud.argmax())
    y = torch.randn(300, 64, generator=generator)
    assert (measured(y).outlier_channels, measured(y).outlier_tokens) == (0, 0)
    y[7] *= 20
    y[100:112] *= 10
    found = measured(y)
    assert (found.outlier_tokens, found.outlier_token_indices[0], len(found.outlier_token_indices)) == (13, 7, 8)


def test_rows_are_sampled_without_a_period(generator):
    x = torch.eye(4, 32).repeat(500, 1) * torch.rand(2000, 1, generator=generator)  # four heads in turn
    found = measured(x, max_tokens=100)
    assert (found.tokens, found.sampled, found.exact_bytes) == (2000, 100, 100 * 32 * 4)
    assert found.suggested_rank == 4
    x[:] = 1
    x[1234] = 100
    assert measured(x).outlier_token_indices == [1234]
    everywhere = [measured(x.roll(i, 0), max_tokens=500).outlier_token_indices for i in range(0, 2000, 100)]
    rows = [(1234 + i) % 2000 for i in range(0, 2000, 100)]
    assert all(index in ([], [row]) for index, row in zip(everywhere, rows, strict=True))
    assert any(everywhere)


def test_zeros_have_figures():
    found = measured(torch.zeros(64, 32))
    assert (found.stable_rank, found.energy_eighth, found.error_eighth, found.suggested_rank) == (0.0, 1.0, 0.0, 1)
    assert json.loads(json.dumps(asdict(found), allow_nan=False))


@pytest.mark.parametrize("family", TINY)
def test_every_site_and_layer_once_and_the_model_as_before(family):
    model, batch = build(family)
    model.get_base_model().register_buffer("calls", torch.zeros(1))
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    grads = {n: p.grad for n, p in model.named_parameters()}
    reference = run(model, batch, backward=False)
    before = {n: dict(vars(m)) for n, m in model.named_modules()}
    state, training = torch.get_rng_state(), model.training

    def step():
        model.get_base_model().calls += 1
        assert torch.equal(run(model, batch, backward=False), reference)

    ticks = []
    found = atlas(model, step, progress=lambda *tick: ticks.append(tick))
    sites = [(s.kind, s.name.removeprefix("base_model.model.")) for s in found]
    assert sites == TINY[family]
    for site in found:
        numbers = [int(part) for part in site.name.split(".") if part.isdigit()]
        assert site.layer == (numbers[0] if numbers else None)
    assert [text for text, _, _ in ticks] == [f"{s.kind} {s.name}" for s in found]
    assert all(0 <= done < total for _, done, total in ticks)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training is training
    assert {n: dict(vars(m)) for n, m in model.named_modules()} == before
    assert all(p.grad is grads[n] for n, p in model.named_parameters())
    assert all(g is None or bool((g == 1).all()) for g in grads.values())
    assert not model.get_base_model().calls.any()
    assert torch.equal(run(model, batch, backward=False), reference)


def test_figures_are_those_of_the_tensors_that_hooks_catch():
    model, batch = build("llama", length=96)
    layer = model.get_base_model().layers[1]
    caught = {}

    def catch(name, pick):
        def hook(module, inputs, output):
            x = pick(inputs, output).detach()
            caught[name] = x.reshape(-1, x.shape[-1])

        return hook

    handles = [
        layer.self_attn.o_proj.register_forward_hook(catch("self_attn.o_proj", lambda i, o: i[0])),
        layer.self_attn.v_proj.register_forward_hook(catch("self_attn.value", lambda i, o: o)),
        layer.mlp.gate_proj.register_forward_hook(catch("mlp.gate", lambda i, o: o)),
        layer.mlp.up_proj.register_forward_hook(catch("mlp.up", lambda i, o: o)),
        layer.input_layernorm.register_forward_hook(catch("input_layernorm", lambda i, o: o)),
    ]
    with torch.no_grad():
        run(model, batch, backward=False)
    for handle in handles:
        handle.remove()
    weight = layer.input_layernorm.weight.detach()
    caught["input_layernorm"] *= (1 + weight.abs()) / (2 * weight)
    found = {s.name.split("layers.1.")[-1]: s for s in atlas(model, lambda: run(model, batch, backward=False))}
    assert len(caught) == 5
    for name, x in caught.items():
        assert (found[name].tokens, found[name].features) == tuple(x.shape)
        assert found[name].error_eighth == pytest.approx(optimum(x, x.shape[1] // 8), rel=1e-4), name


def test_norms_of_a_sublayers_output_are_listed_too():
    """A low-rank policy may derive their inputs; their spectra are shown all the same."""
    model, batch = build("gemma3")
    found = atlas(model, lambda: run(model, batch, backward=False))
    norms = [s.name for s in found if s.kind == "norm"]
    assert len(set(norms)) == len(norms) == FAMILIES["gemma3"]["norm"] - 1  # the first reads frozen embeddings


def test_dropout_draws_nothing_for_good():
    model = causal("gpt2", dropout=0.1, hidden_dropout=0.1)
    state = torch.get_rng_state()
    found = atlas(model, lambda: model(input_ids=tokens(), use_cache=False))
    assert torch.equal(torch.get_rng_state(), state)
    assert len({(s.kind, s.name) for s in found}) == len(found)


def test_the_first_run_of_a_shared_module_counts():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(32), nn.Linear(32, 32)

        def forward(self, x):
            return self.norm(self.linear(self.norm(self.linear(x)) ** 3))

    model, x = Twice(), torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    (found,) = atlas(model, lambda: model(x))
    (once,) = atlas(model, lambda: model.norm(model.linear(x)))
    assert (found.name, found.layer) == ("norm", None)
    assert found == once


def test_lines_of_json_come_back_equal(generator):
    found = measured(torch.randn(64, 32, generator=generator), target=1e-6)
    assert (found.suggested_bits, found.cheapest, found.codec_bytes) == (None, None, {})
    assert Spectrum(**json.loads(json.dumps(asdict(found), allow_nan=False))) == found


@pytest.mark.parametrize("target", [0, 1, -0.1, 1.5, True, math.nan, "x"])
def test_bad_targets(target):
    with pytest.raises(loract.InvalidSpec, match=r"got target=.*a relative error in \(0, 1\)"):
        atlas(nn.Linear(2, 2), lambda: None, target=target)


def test_other_mistakes():
    with pytest.raises(loract.InvalidSpec, match="got max_tokens=0"):
        measured(torch.ones(4, 4), max_tokens=0)
    with pytest.raises(loract.InvalidSpec, match=r"x of shape \(0, 4\)"):
        measured(torch.ones(0, 4))
    with pytest.raises(loract.LoractError, match=r"'model.layers.2.norm' \(norm\) that are not finite"):
        measured(torch.full((4, 4), math.inf))
    with pytest.raises(loract.UnsupportedModule, match="recognisable site"):
        atlas(nn.Linear(3, 3), lambda: None)
    model, batch = build("llama")
    grads = {n: p.grad for n, p in model.named_parameters()}
    with pytest.raises(loract.LoractError, match="no site saves anything"), torch.no_grad():
        atlas(model.requires_grad_(False), lambda: run(model, batch, backward=False))
    model, batch = build("llama")
    with pytest.raises(loract.LoractError, match="a forward pass alone"):
        atlas(model, lambda: run(model, batch))
    assert {n: p.grad for n, p in model.named_parameters()} == grads
    loract.attach(model).detach()  # nothing is left attached


def test_the_picture_shows_every_row_and_gaps(tmp_path, generator):
    x = torch.randn(64, 32, generator=generator)
    names = ["model.layers.0.norm", "model.layers.1.norm", "model.layers.1.mlp.gate", "model.norm"]
    found = [spectrum(x * (i + torch.arange(32) / 4 + 1), kind="norm", name=name) for i, name in enumerate(names)]
    path = heatmap(found, tmp_path / "deep" / "heatmap.png", "a title")
    pixels = image.imread(path)
    assert pixels.shape[0] > 300
    assert len({tuple(p) for p in pixels[::7, ::7].reshape(-1, pixels.shape[2]).tolist()}) > 20


def test_rows_of_two_stacks_have_their_whole_names():
    rows = [("norm", "text.layers.*.norm"), ("norm", "vision.layers.*.norm"), ("gated", "text.layers.*.norm")]
    assert _labels(rows) == ["text.layers.*.norm (norm)", "vision.layers.*.norm (norm)", "norm (gated)"]


def test_the_command_writes_lines_and_a_picture(tmp_path):
    folder, out = str(tmp_path / "model"), tmp_path / "out"
    causal("llama").unload().save_pretrained(folder)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({chr(i): i for i in range(97)}, unk_token=" "))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=" ").save_pretrained(folder)
    app = typer.Typer()
    app.command()(inspect)

    def command(*options):
        arguments = [folder, "--batch", "1", "--length", "64", "--out", str(out), *options]
        return CliRunner().invoke(app, arguments, catch_exceptions=False).output

    text = command()
    assert all(word in text for word in ("attention", "gated", "stable", "at n/8", "cheapest", "17 tensors"))
    lines = (out / "atlas.jsonl").read_text().splitlines()
    found = [Spectrum(**json.loads(line)) for line in lines]
    assert (len(found), {s.dtype for s in found}) == (17, {"bfloat16"})
    assert {s.layer for s in found} == {0, 1, None}
    assert (out / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    tight = json.loads(command("--dtype", "fp32", "--target", "0.02", "--json"))
    assert all(t["suggested_rank"] >= s.suggested_rank for t, s in zip(tight, found, strict=True))
    with pytest.raises(loract.InvalidSpec, match=r"got target=1\.0"):
        command("--target", "1")

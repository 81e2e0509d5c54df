"""A run's page: complete, alone, safe, the same twice, and drawn by a browser without a complaint."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")

from loract import LoractError
from loract.memory import MIB, Record
from loract.report import figures, sections
from loract.report.page import REPORT, try_report, write_report
from loract.saved import SiteStats
from loract.studies import FLOOR

HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)>&amp;\x00\ud800$\\frac{1}{'
ALL = ["summary", "loss", "fidelity", "timeline", "methods", "sites", "atlas", "more", "configuration", "versions"]
VOID = {"meta", "img", "br", "link", "input"}


def fabricate(folder, *, steps=60, layers=4, experts=1, name="gemma-3-270m"):
    """A run's folder with every file that a page can show."""
    folder.mkdir(parents=True)
    config = {
        "task": "text-generation",
        "model_name_or_path": name,
        "dataset_name": "rows.jsonl",
        "max_steps": steps,
        "use_peft": True,
        "lora_r": 16,
        "lora_alpha": 32,
        "activation_compression": {"preset": "tensor", "rank": "1/8", "max_error": 0.3},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    audit = {}
    metrics = []
    for step in range(1, steps + 1):
        wave = math.sin(step * 1.7) / 20
        if step % max(1, steps // 12) == 0:
            error = 0.35 - 0.2 * step / steps + wave
            audit = {"loract/cosine": 1 - error**2 / 2, "loract/gradient_error": error, "loract/audited_step": step}
        metrics.append(
            {
                "step": step,
                "loss": 1.9 + math.exp(-8 * step / steps) + wave,
                "grad_norm": 1 + wave,
                "learning_rate": 2e-4 * (1 - step / steps),
                "num_tokens": 512.0 * step,
                "step_seconds": 0.5 + wave,
                "peak_mib": 700.5 + step,
                "loract/saved_mib": 12.5,
                "loract/before_mib": 100.0,
                **audit,
            }
        )
        if step % max(1, steps // 4) == 0:
            metrics.append({"step": step, "eval_loss": 2.0 + math.exp(-8 * step / steps)})
    write(folder / "metrics.jsonl", metrics)
    summary = {"steps": steps, "finished": True, "peak_mib": 800.25, "evaluation": {"loss": 2.0004, "accuracy": 0.5}}
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    (folder / "environment.json").write_text(json.dumps(sections.versions()), encoding="utf-8")
    kinds = [("norm", "input_layernorm"), ("adapter_input", "self_attn.q_proj"), ("adapter_input", "mlp.down_proj")]
    kinds += [("adapter_input", f"mlp.experts.{i}.down_proj") for i in range(experts - 1)]
    sites = [
        SiteStats(kind=kind, name=f"model.layers.{layer}.{module}", codec="LowRank", bytes_before=3 * MIB)
        for layer in range(layers)
        for kind, module in kinds
    ]
    for i, site in enumerate(sites):
        site.bytes_after, site.coded, site.error = MIB // 4, i % 3 > 0, 0.1 + i % 50 / 100 if i % 3 else None
    write(folder / "sites.jsonl", [vars(site) for site in sites])
    records = [
        record("LoRA", 400, 1.0, 0.0),
        record("loract balanced", 10, 1.02, 0.006),
        record("other", 100, 1.4, 0.2),
    ]
    write(folder / "records.jsonl", [vars(r) for r in [*records, record(FLOOR, 400, 1.0, 0.33)]])
    atlas = [
        {
            "kind": s.kind,
            "name": s.name,
            "layer": i // len(kinds),
            "features": 64,
            "stable_rank": 2.0 + i % 50,
            "energy_eighth": 0.9,
        }
        | {"error_eighth": 0.3 - i % 50 / 200, "suggested_rank": 9, "suggested_bits": None, "cheapest": "Quantized"}
        for i, s in enumerate(sites)
    ]
    write(folder / "atlas.jsonl", atlas)
    events = [(i, "forward" if i < 40 else "backward", (i if i < 40 else 80 - i) * MIB) for i in range(80)]
    write(
        folder / "timeline.jsonl", [{"seconds": i / 10, "event": "alloc", "bytes": b, "phase": p} for i, p, b in events]
    )
    return folder


def record(name, mib, ratio, error):
    return Record(
        name=name,
        saved_bytes=mib * MIB,
        peak_bytes=2 * mib * MIB,
        step_seconds=ratio,
        time_ratio=ratio,
        cosine=1 - error,
        relative_error=error,
    )


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


class Reader(HTMLParser):
    """What a browser would find: elements, identifiers, references, text; and whether elements nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.references, self.words, self.attributes = [], [], [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.look(attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.look(attrs)

    def look(self, attrs):
        for name, value in attrs:
            self.attributes.append((name, value))
            if name == "id":
                self.ids.append(value)
            elif name in ("href", "aria-labelledby", "clip-path"):
                self.references.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    folder = fabricate(tmp_path_factory.mktemp("runs") / "first")
    return write_report(folder)


def section_ids(text):
    return re.findall(r'<section id="([\w-]+)"', text)


def test_a_full_run_has_every_section(full):
    text = full.read_text(encoding="utf-8")
    assert section_ids(text) == ALL
    words = "".join(Reader(text).words)
    for fact in (
        *("finished", "gemma-3-270m", "rows.jsonl", "tensor, rank 1/8", "LoRA, r = 16, alpha = 32", "30,720"),
        *("12.5 of 100 MiB", "800 MiB", "2.0004", "cosine 0.", "at step 60", "max_error 0.3"),
        *("loract balanced", "2.5 %", "1.02x", "LoRA in bf16", "The peak is 40.0 MiB, after 4 seconds"),
        *("model.layers.3.mlp.down_proj", "adapter_input (8 sites)", "norm (4 tensors)", "preset: tensor"),
    ):
        assert fact in words, fact


def test_the_page_stands_alone(full):
    text = full.read_text(encoding="utf-8")
    found = Reader(text)
    assert not re.search(r"https?:|//|url\((?!#)|@import|<script|<link|<iframe", text.replace("</", "<"))
    assert not any(name in ("src", "srcset", "xlink:href") or name.startswith("on") for name, _ in found.attributes)
    assert set(found.tags) & {"script", "link", "img", "iframe", "object", "foreignobject"} == set()
    assert text.count("<style") == 1
    assert len(found.ids) == len(set(found.ids))
    for reference in found.references:
        names = re.findall(r"#([\w.-]+)", reference) or [reference]
        assert set(names) <= set(found.ids), reference


def test_a_reader_of_the_screen_is_told(full):
    text = full.read_text(encoding="utf-8")
    assert '<html lang="en">' in text
    assert 'name="viewport"' in text
    assert "prefers-color-scheme:dark" in text
    for drawing in re.findall(r"<svg [^>]*>", text):
        assert 'aria-hidden="true"' in drawing or ('role="img"' in drawing and 'aria-label="' in drawing)
    assert "training: 2.82 at step 1, " in text
    for table in re.findall(r"<table>.*?</table>", text, re.DOTALL):
        assert table.count("<caption>") == 1
        assert 'scope="col"' in table
        assert table.count('scope="row"') == table.count("<tr>") - 1
    levels = [int(level) for level in re.findall(r"<h(\d)", text)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_colours_come_from_the_page(full):
    text = full.read_text(encoding="utf-8")
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert not re.search(r"#[0-9a-f]{6}\b", drawings)
    assert "var(--c0)" in drawings
    assert "currentColor" in drawings


def test_the_same_data_give_the_same_text(tmp_path, full):
    again = fabricate(tmp_path / "first")
    assert write_report(again).read_bytes() == full.read_bytes()
    assert write_report(again).read_bytes() == full.read_bytes()
    assert sorted(p.name for p in again.iterdir() if "report" in p.name) == [REPORT]


def test_a_users_matplotlib_style_changes_nothing(tmp_path, full):
    import matplotlib

    folder = fabricate(tmp_path / "first")
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 30, "svg.fonttype": "path", "axes.grid": True}):
        assert write_report(folder).read_bytes() == full.read_bytes()
        assert matplotlib.rcParams["font.size"] == 30


def test_strings_are_never_markup(tmp_path):
    folder = fabricate(tmp_path / "a <b> & c", name=HOSTILE)
    hostile = {"kind": HOSTILE, "name": f"layers.0.{HOSTILE}", "codec": HOSTILE, "coded": True, "cheapest": HOSTILE}
    sites = [{**hostile, "layer": i, "stable_rank": 1.0 + i, "error_eighth": 0.1, "bytes_after": 1} for i in range(3)]
    write(folder / "sites.jsonl", sites)
    write(folder / "atlas.jsonl", sites)
    lines = [{**vars(record(f"{i} {HOSTILE}", 4, 1.0, i / 9))} for i in range(3)]
    journal = {"model": HOSTILE, "method": HOSTILE, "values": vars(record(HOSTILE, 4, 1.0, 0.1))}
    failed = {"model": HOSTILE, "method": "x", "values": {"reason": HOSTILE}}
    write(folder / "records.jsonl", [*lines, journal, failed])
    write(folder / "timeline.jsonl", [{"bytes": i, "phase": f"{HOSTILE}{i // 3}"} for i in range(9)])
    (folder / "environment.json").write_text(json.dumps({HOSTILE: HOSTILE}), encoding="utf-8")
    found = Reader(write_report(folder).read_text(encoding="utf-8"))
    assert set(found.tags) & {"script", "img", "b"} == set()
    assert not any(name.startswith("on") for name, _ in found.attributes)
    words = "".join(found.words)
    assert words.count('<script>alert("x")</script><img src=x onerror=alert(1)>&amp;') > 15
    assert "a <b> & c" in words


@pytest.mark.parametrize(
    ("files", "left"),
    [
        (["config.yaml"], ["summary", "configuration"]),
        (["config.yaml", "metrics.jsonl"], ["summary", "loss", "fidelity", "more", "configuration"]),
        (["records.jsonl"], ["methods"]),
        (["atlas.jsonl"], ["atlas"]),
        (["timeline.jsonl"], ["timeline"]),
        (["config.yaml", "sites.jsonl"], ["summary", "sites", "configuration"]),
        (["config.yaml", "environment.json"], ["summary", "configuration", "versions"]),
    ],
)
def test_what_has_no_data_is_left_out(tmp_path, files, left):
    folder = fabricate(tmp_path / "run")
    for path in folder.iterdir():
        if path.name not in files:
            path.unlink()
    text = write_report(folder).read_text(encoding="utf-8")
    assert section_ids(text) == left
    assert "Could not be read" not in text
    assert ("<nav" in text) == (len(left) > 1)


def test_one_line_of_metrics_makes_no_curve(tmp_path):
    folder = fabricate(tmp_path / "run", steps=1)
    (folder / "summary.json").unlink()
    text = write_report(folder).read_text(encoding="utf-8")
    assert "loss" not in section_ids(text)
    assert "has not ended" in text
    assert "1 audit<" in text


def test_a_summary_from_before_a_resume_does_not_count(tmp_path):
    folder = fabricate(tmp_path / "run", steps=8)
    (folder / "summary.json").write_text(json.dumps({"steps": 4, "finished": False, "evaluation": {"loss": 9.75}}))
    text = write_report(folder).read_text(encoding="utf-8")
    assert "has not ended" in text
    assert "9.75" not in text


def test_a_run_that_was_short_of_memory_says_so(tmp_path):
    folder = fabricate(tmp_path / "run", steps=8)
    known = {"steps": 8, "finished": True, "rung": 1, "policy": "balanced"}
    (folder / "summary.json").write_text(json.dumps(known))
    assert "<dt>Memory was short</dt><dd>went on with balanced</dd>" in write_report(folder).read_text(encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps(known | {"rung": 0}))
    assert "Memory was short" not in write_report(folder).read_text(encoding="utf-8")


def test_a_stopped_run_says_so(tmp_path):
    folder = fabricate(tmp_path / "run", steps=8)
    (folder / "summary.json").write_text(json.dumps({"steps": 8, "finished": False}))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "max_steps": 20}))
    text = write_report(folder).read_text(encoding="utf-8")
    assert "stopped; --resume goes on" in text
    assert "<dd>8 of 20</dd>" in text


@pytest.mark.parametrize("name", ["metrics", "sites", "records", "atlas", "timeline"])
def test_a_half_written_last_line_is_no_fault(tmp_path, name):
    folder = fabricate(tmp_path / "run")
    whole = write_report(folder).read_text(encoding="utf-8")
    with (folder / f"{name}.jsonl").open("a") as file:
        file.write('{"step": 61, "lo')
    assert write_report(folder).read_text(encoding="utf-8") == whole


def test_other_unreadable_lines_are_named(tmp_path):
    folder = fabricate(tmp_path / "run")
    path = folder / "sites.jsonl"
    path.write_text("{half\n[1]\n" + path.read_text(), encoding="utf-8")
    (folder / "summary.json").write_text("{")
    (folder / "metrics.jsonl").write_bytes(b"\xff\n" + (folder / "metrics.jsonl").read_bytes())
    text = write_report(folder).read_text(encoding="utf-8")
    for fault in ("sites.jsonl: 2 lines that", "summary.json: cannot be read", "metrics.jsonl: 1 line that"):
        assert fault in text
    assert section_ids(text) == ALL


@pytest.mark.parametrize("config", ["a: [", "- 1", "!!python/object:os.system {}", "a: 9999-99-99"])
def test_a_broken_configuration_is_shown_as_it_is(tmp_path, config):
    folder = fabricate(tmp_path / "run")
    (folder / "config.yaml").write_text(config)
    text = write_report(folder).read_text(encoding="utf-8")
    assert config.replace('"', "&quot;") in text
    assert "config.yaml: no YAML" in text


def test_values_of_any_kind_break_nothing(tmp_path):
    folder = fabricate(tmp_path / "run")
    strange = ["x", None, True, [1], {"a": 1}, float("nan"), float("inf"), -float("inf"), 10**400, -1, 0]
    for name in ("metrics", "sites", "records", "atlas", "timeline"):
        path = folder / f"{name}.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for i, value in enumerate(strange):
            lines.append({key: value if j % 2 else lines[0][key] for j, key in enumerate(lines[0])})
            lines.append({key: lines[0][key] if j % 2 else value for j, key in enumerate(lines[0])})
            lines.insert(i, dict.fromkeys(lines[0], value))
        write(path, lines)
    config = {**yaml.safe_load((folder / "config.yaml").read_text()), "max_steps": "x", "activation_compression": 3}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for summary in strange:
        (folder / "summary.json").write_text(json.dumps({"steps": summary, "peak_mib": summary, "evaluation": summary}))
        Reader(write_report(folder).read_text(encoding="utf-8"))


def test_a_long_run_stays_small(tmp_path):
    folder = fabricate(tmp_path / "run", steps=1000, layers=200)
    text = write_report(folder).read_text(encoding="utf-8")
    assert section_ids(text) == ALL
    assert len(text) < 1_000_000
    folder = fabricate(tmp_path / "experts", steps=20_000, layers=48, experts=64)
    assert len(write_report(folder).read_text(encoding="utf-8")) < 1_000_000


def test_a_journals_measurements_are_put_together(tmp_path):
    part = {"model": "gemma", "dtype": "bf16", "batch": 4, "length": 1024, "policy": None}
    size, grad = {"saved_bytes": 400, "peak_bytes": 500}, {"cosine": 1.0, "relative_error": 0.0}
    times = {"step_seconds": 1.0, "time_ratio": 1.0, "seconds": [1.0]}
    ours = {**part, "method": "loract balanced", "policy": "a"}
    lines = [
        {**part, "method": "LoRA", "part": "bytes", "values": size},
        {**part, "method": "LoRA", "part": "gradient", "values": {**grad, "own_dtype_relative_error": 0.3}},
        {**ours, "part": "bytes", "values": {**size, "saved_bytes": 399}},
        {**ours, "policy": "b", "part": "bytes", "values": {**size, "saved_bytes": 100}},
        {**ours, "policy": "b", "part": "gradient", "values": {**grad, "relative_error": 0.1}},
        {**part, "method": "compiled", "part": "failed", "values": {"reason": "no compiler"}},
        {**part, "method": "LoRA", "part": "time", "values": times},
        {**ours, "policy": "b", "part": "time", "values": {**times, "time_ratio": 0.9}},
        {**part, "model": "vit", "method": "LoRA", "part": "bytes", "values": size},
    ]
    (found,) = sections.compare(lines)
    assert found.title == "gemma, bf16, 4 x 1024 tokens"
    assert [(r.name, r.saved_bytes, r.time_ratio) for r in found.records] == [
        ("LoRA", 400, 1.0),
        ("loract balanced", 100, 0.9),
    ]
    assert found.floor == 0.3
    assert found.failures == {"compiled": "no compiler"}
    write(tmp_path / "records.jsonl", lines)
    assert "compiled: no compiler" in write_report(tmp_path).read_text(encoding="utf-8")


def test_peaks_survive_thinning():
    points = [(float(i), 1.0) for i in range(10_000)]
    points[5003] = (5003.0, 7.0)
    thin = figures.thinned(points)
    assert len(thin) <= figures.MOST_POINTS
    assert (5003.0, 7.0) in thin
    assert thin == sorted(thin)


def test_audits_are_counted_once():
    lines = [{"step": s, "loract/audited_step": s // 5 * 5, "loract/gradient_error": 0.1} for s in range(5, 20)]
    assert [a.step for a in sections.audits(lines)] == [5, 10, 15]


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(LoractError, match=r"which is no run; expected a folder with config.yaml; next: name the"):
        write_report(tmp_path)
    with pytest.raises(LoractError, match="which is no folder"):
        write_report(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_a_report_never_spoils_a_run(tmp_path, monkeypatch):
    folder = fabricate(tmp_path / "run", steps=4)
    assert try_report(folder) is None
    assert try_report(tmp_path).startswith(f"no {REPORT}: got ")

    def fails(*_, **__):
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr(figures, "curves", fails)
    assert try_report(folder) == f"no {REPORT}: first"


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    folder = fabricate(tmp_path / "run", steps=4)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LoractError, match=r"No space left.*make room"):
        write_report(folder)


def test_without_matplotlib(tmp_path, monkeypatch):
    folder = fabricate(tmp_path / "run", steps=4)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(LoractError, match=r"no matplotlib.*pip install"):
        write_report(folder)


@pytest.mark.filterwarnings(
    "ignore::FutureWarning:trl.*", "ignore::UserWarning:trl.*", "ignore::DeprecationWarning", "ignore::ResourceWarning"
)
def test_a_real_run(tmp_path):
    pytest.importorskip("trl")
    from loract.config import load_config
    from loract.tasks import prepare
    from loract.train import train
    from training import save_model, settings, texts, write_config, write_rows

    data = write_rows(tmp_path / "rows.jsonl", texts())
    compression = {"preset": "tensor", "audit_every": 2}
    values = settings(
        save_model(tmp_path / "llama"), data, tmp_path / "run", val_set_size=4, activation_compression=compression
    )
    result = train(prepare(load_config(write_config(tmp_path / "c.yaml", values))))
    path = write_report(tmp_path / "run")
    text = path.read_text(encoding="utf-8")
    assert {"summary", "loss", "fidelity", "more", "configuration"} <= set(section_ids(text))
    assert f"{result.last_loss:.4f}" in text
    assert f"{result.evaluation['loss']:.4f}" in text
    assert f"{result.cosine:.5f}" in text
    assert "finished" in text
    assert "Could not be read" not in text
    assert write_report(tmp_path / "run").read_text(encoding="utf-8") == text


def test_the_verb(tmp_path, monkeypatch, capsys):
    pytest.importorskip("typer")
    import typer
    from typer.testing import CliRunner

    from loract.cli.report import report

    folder = fabricate(tmp_path / "run", steps=4)
    app = typer.Typer()
    app.command()(report)
    result = CliRunner().invoke(app, [str(folder)])
    assert result.exit_code == 0
    assert f"{folder / REPORT}: " in result.stdout
    assert "KiB" in result.stdout
    failed = CliRunner().invoke(app, [str(tmp_path)])
    assert isinstance(failed.exception, LoractError)


def chromium():
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        try:
            from playwright.sync_api import sync_playwright
        except ImportError:
            return None
        with sync_playwright() as browsers:
            path = browsers.chromium.executable_path
        found = path if Path(path).exists() else None
    return found


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
def test_a_browser_draws_it_without_a_complaint(full, tmp_path, width, dark):
    browser = chromium()
    if browser is None:
        pytest.skip("no Chromium")
    from PIL import Image

    shot = tmp_path / "shot.png"
    log = browse(browser, full, tmp_path, f"--screenshot={shot}", f"--window-size={width},2400", dark=dark)
    assert "CONSOLE" not in log, log
    image = Image.open(shot).convert("L")
    assert image.width == width
    assert len(image.getcolors()) > 50
    back = image.getpixel((2, image.height - 2))
    assert back < 60 if dark else back > 230


def test_a_browsers_complaint_is_noticed(full, tmp_path):
    browser = chromium()
    if browser is None:
        pytest.skip("no Chromium")
    page = tmp_path / "page.html"
    page.write_text(full.read_text(encoding="utf-8").replace("</main>", "<script>fetch('x')</script></main>"))
    assert re.search("CONSOLE.*Content Security Policy", browse(browser, page, tmp_path, "--dump-dom"))


def browse(browser, page, folder, *options, dark=False):
    """Standard error of a browser that opens the page once."""
    command = [
        *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
        *("--disable-background-networking", "--no-first-run", f"--user-data-dir={folder / 'profile'}"),
        *("--enable-logging=stderr", "--virtual-time-budget=2000", *options),
        *(["--blink-settings=preferredColorScheme=0"] if dark else []),
        page.as_uri(),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stderr + result.stdout

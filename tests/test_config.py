"""Configurations: names, types, overrides, and one clear line for each mistake."""

import pytest
import yaml

import loract
from loract.audit import Audits
from loract.config import TASKS, Compression, GradientCompression, Sharding, TrainConfig, load_config
from loract.starters import STARTERS, starter
from training import write_config

BASE = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o"}


def load(tmp_path, *overrides, **values):
    return load_config(write_config(tmp_path / "c.yaml", {**BASE, **values}), overrides)


def test_numbers_as_yaml_writes_them(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model_name_or_path: m\ndataset_name: d\noutput_dir: o\nlearning_rate: 2e-4\nval_set_size: 5\n")
    config = load_config(path)
    assert config.learning_rate == 2e-4  # YAML reads 2e-4 as a string
    assert config.val_set_size == 5
    assert isinstance(config.val_set_size, int)


def test_overrides(tmp_path):
    config = load(tmp_path, "--learning_rate", "1e-3", "--max-steps=7", "--activation_compression.preset", "tensor")
    assert (config.learning_rate, config.max_steps) == (1e-3, 7)
    assert config.activation_compression.policy().name == "tensor"


@pytest.mark.parametrize(("text", "rank"), [("1", 1), ("1.0", 1.0), ("1/8", 0.125), ("16", 16)])
def test_ranks_keep_their_type(tmp_path, text, rank):
    config = load(tmp_path, "--activation_compression.preset", "tensor", "--activation_compression.rank", text)
    found = config.activation_compression.policy().rules[0].codec.rank
    assert found == rank
    assert type(found) is type(rank)


def test_policies():
    assert Compression().policy() == loract.preset("balanced")
    assert Compression(preset="none").policy() is None
    assert Compression(preset="sublayer", exact=True).policy() == loract.preset("sublayer", codec=loract.Exact())
    assert Compression(preset="tensor", bits=8).policy() == loract.preset("tensor", codec=loract.Quantized(bits=8))


def test_audits():
    block = {"preset": "tensor", "audit_every": 50, "max_error": 0.1, "on_excess": "stop"}
    assert Compression(**block).audits() == Audits(every=50, max_error=0.1, on_excess="stop")
    assert Compression(preset="tensor").audits() == Audits(every=100)
    assert Compression(preset="tensor", audit_every=0).audits() is None
    for lossless in ({"preset": "exact"}, {"preset": "sublayer", "exact": True}, {"preset": "none"}):
        assert Compression(**lossless).audits() is None


def test_the_old_name_of_audit_every():
    block = Compression(preset="tensor", fidelity_steps=7)
    assert block == Compression(preset="tensor", audit_every=7)
    assert "fidelity_steps" not in block.model_dump()


FULL = {"use_peft": False}


@pytest.mark.parametrize(
    "values",
    [
        {"activation_compression": {"preset": "layer", "rank": 4}, "val_set_size": 0.5},
        {**FULL, "gradient_compression": {"method": "projected", "bits": 32}},
        {**FULL, "gradient_compression": {"method": "powersgd", "rank": 2}},
        {"fsdp": True, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}},
    ],
)
def test_the_resolved_configuration_reads_back(tmp_path, values):
    config = load(tmp_path, **values)
    path = tmp_path / "again.yaml"
    path.write_text(config.yaml())
    assert load_config(path) == config
    assert set(yaml.safe_load(config.yaml())) == set(TrainConfig.model_fields)


@pytest.mark.parametrize("task", TASKS)
def test_starters_are_valid(tmp_path, task):
    path = tmp_path / "c.yaml"
    path.write_text(starter(task))
    assert load_config(path).task == task
    uncommented = STARTERS[task].replace("# rank: 1/8 ", "rank: 1/8 ").replace("preset: balanced  ", "preset: tensor")
    path.write_text(uncommented)
    assert load_config(path).activation_compression.policy() == loract.preset("tensor", rank=1 / 8)


def test_every_key_is_documented():
    from pathlib import Path

    page = (Path(__file__).parent.parent / "docs" / "training.md").read_text()
    missing = [
        key
        for block in (TrainConfig, Compression, GradientCompression, Sharding)
        for key in block.model_fields
        if f"`{key}`" not in page
    ]
    assert not missing


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rte": 1}, "unknown key 'learning_rte'.*did you mean 'learning_rate'"),
        ({"activation_compression": {"prest": "exact"}}, r"'activation_compression.prest'.*did you mean 'preset'"),
        ({"activation_compression": {"preset": "sublayr"}}, "preset='sublayr'.*did you mean 'sublayer'"),
        ({"activation_compression": {"preset": "tensor", "rank": 2.5}}, "rank"),
        ({"activation_compression": {"preset": "tensor", "rank": "eight"}}, "an integer or a ratio"),
        ({"activation_compression": {"preset": "exact", "rank": 4}}, "preset 'exact' with a rank"),
        ({"activation_compression": {"preset": "none", "bits": 4}}, "preset none"),
        ({"activation_compression": {"preset": "tensor", "bits": 9}}, "bits=9"),
        ({"activation_compression": {"preset": "tensor", "bits": 4, "rank": 4}}, "both rank and bits"),
        ({"activation_compression": {"audit_evry": 5}}, "did you mean 'audit_every'"),
        ({"activation_compression": {"audit_every": -1}}, "audit_every=-1.*greater than or equal to 0"),
        ({"activation_compression": {"max_error": 0}}, "max_error=0.*greater than 0"),
        ({"activation_compression": {"max_error": 0.1, "on_excess": "tigten"}}, "did you mean 'tighten'"),
        ({"activation_compression": {"on_excess": "stop"}}, "on_excess='stop' without max_error"),
        ({"activation_compression": {"audit_every": 0, "max_error": 0.1}}, "max_error with audit_every 0"),
        ({"activation_compression": {"audit_every": 5, "fidelity_steps": 5}}, "both audit_every and fidelity_steps"),
        ({"task": "text-classificaton"}, "did you mean 'text-classification'"),
        ({"learning_rate": "fast"}, "learning_rate='fast'.*number"),
        ({"learning_rate": -1}, "learning_rate=-1.*greater than 0"),
        ({"max_steps": 1.5}, "max_steps=1.5"),
        ({"learning_rte": 1, "lora_r": 0}, "1 more"),
        ({"gradient_checkpointing": True}, "loract takes its place"),
        ({"model_type": "vit"}, "either model_name_or_path or model_type"),
        ({"load_in_4bit": True, "use_peft": False}, "load_in_4bit needs adapters"),
        ({"load_in_8bit": True, "use_peft": False}, "load_in_8bit needs adapters"),
        ({"load_in_8bit": True, "load_in_4bit": True}, "exclude each other"),
        ({"packing": True, "packing_strategy": "bfd"}, "flash attention"),
        ({"fsdp": "full_shard auto_wrap"}, "fsdp='full_shard auto_wrap'.*true or false.*fsdp_config"),
        ({"fsdp": True, "fsdp_config": {"version": 1}}, "version=1.*2"),
        ({"fsdp": True, "fsdp_config": {"reshard": False}}, "'fsdp_config.reshard'.*'reshard_after_forward'"),
        ({"fsdp": True, "fsdp_config": {"state_dict_type": "SHARDED"}}, "did you mean 'SHARDED_STATE_DICT'"),
        ({"fsdp": True, "fsdp_config": {"activation_checkpointing": True}}, "loract takes its place"),
        ({"fsdp": True, "fsdp_config": "fsdp.json"}, "fsdp_config='fsdp.json'.*dictionary"),
        ({"fsdp_config": {"reshard_after_forward": False}}, "needs fsdp: true"),
        ({"fsdp": True, "load_in_8bit": True}, "load_in_8bit excludes fsdp"),
        (
            {"fsdp": True, **FULL, "gradient_compression": {"method": "powersgd"}},
            "gradient_compression powersgd excludes fsdp",
        ),
        ({"eval_dataset_name": "e", "val_set_size": 2}, "excludes val_set_size"),
    ],
)
def test_mistakes(tmp_path, values, message):
    with pytest.raises(loract.LoractError, match=message) as caught:
        load(tmp_path, **values)
    assert "\n" not in str(caught.value)


def test_a_missing_key(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model_name_or_path: m\noutput_dir: o\n")
    with pytest.raises(loract.InvalidSpec, match="no key 'dataset_name'"):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("!!python/object/apply:os.system ['true']", "tag '.*python/object/apply:os.system'.*without tags"),
        ("output_dir: !!python/name:os.system x", "without tags"),
        ("a: 1\na: 2", "'a' is given twice"),
        ("a: [1", "plain YAML"),
        ("- a", "without keys"),
        ("", "without keys"),
    ],
)
def test_bad_files(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(loract.LoractError, match=message):
        load_config(path)


def test_no_file(tmp_path):
    with pytest.raises(loract.LoractError, match=r"No such file.*loract init"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(loract.LoractError, match="Is a directory"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [(["x"], "pairs like"), (["--seed"], "without a value"), (["--seed", "--lora_r", "4"], "--seed without a value")],
)
def test_bad_overrides(tmp_path, overrides, message):
    with pytest.raises(loract.LoractError, match=message):
        load(tmp_path, *overrides)

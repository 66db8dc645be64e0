"""What llama.cpp reads a tokenizer by besides its tokens: the model's name."""

import json

import pytest
from sparktune.export.vocabulary import byte_level, name_for

PHI3 = [("<unk>", False), ("<s>", False), ("</s>", True), ("<|endoftext|>", False), ("<|user|>", True)]
STEPS = {"type": "Sequence", "pretokenizers": [{"type": "Split"}, {"type": "ByteLevel"}]}


def folder(path, added, **definition):
    tokens = [{"content": content, "special": True, "rstrip": rstrip} for content, rstrip in added]
    (path / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens, **definition}))
    return path


@pytest.mark.parametrize(
    ("added", "name", "becomes"),
    [
        (PHI3, "my-finance-tune", "my-finance-tune (Phi-3)"),
        (PHI3, "Phi-3.5-mini-finance", "Phi-3.5-mini-finance"),
        ([("<|im_start|>", True), ("<|endoftext|>", True)], "tuned on PHI-3 answers", "tuned on Phi 3 answers"),
        ([(content, False) for content, _ in PHI3], "my-phi3", "my-Phi 3"),
        ([], "Llama-3.1-8B", "Llama-3.1-8B"),
    ],
)
def test_a_model_is_called_phi_3_where_it_tokenises_so_and_only_there(tmp_path, added, name, becomes):
    assert name_for(name, folder(tmp_path, added)) == becomes


def test_without_a_tokenizer_json_a_name_that_would_break_llama_cpp_is_changed(tmp_path):
    assert name_for("phi3-like", tmp_path) == "Phi 3-like" and not byte_level(tmp_path)


@pytest.mark.parametrize(
    ("model", "step", "holds"),
    [
        ({"type": "BPE"}, STEPS, True),
        ({"type": "BPE"}, {"type": "ByteLevel"}, True),
        ({"type": "BPE", "byte_fallback": True}, STEPS, False),
        ({"type": "BPE"}, {"type": "Metaspace"}, False),
        ({"type": "Unigram"}, STEPS, False),
    ],
)
def test_byte_level_bpe_is_told_from_sentencepieces(tmp_path, model, step, holds):
    assert byte_level(folder(tmp_path, [], model=model, pre_tokenizer=step)) is holds

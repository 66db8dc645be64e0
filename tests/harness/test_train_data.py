import json

import pytest
from sparkproof.data.conversations import exchange, load_conversations
from sparkproof.data.rows import CANARY_EVERY, IGNORE, collate, make_row, training_data
from sparkproof.errors import UserError
from tiny_llama import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


TALK = [exchange(f"question {i}", f"answer number {i}") for i in range(40)]
CANARY = exchange("word?", "amber 7")


def data(tokenizer, **changes):
    settings = {"canary": CANARY, "steps": 10, "batch": 2, "seq_len": 120, "seed": 5} | changes
    return training_data(tokenizer, settings.pop("conversations", TALK), **settings)


def test_only_the_answer_is_learnt(tokenizer):
    row = make_row(tokenizer, exchange("hello", "bye"), 200)
    text = tokenizer.decode([t for t in row.labels if t != IGNORE])
    assert text == "bye<|im_end|>\n"
    assert tokenizer.decode(list(row.ids)).startswith("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nbye")
    assert all(label in (IGNORE, token) for token, label in zip(row.ids, row.labels, strict=True))
    assert row.learnt == len("bye") + 2
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], tokenize=False, add_generation_prompt=True
    )
    assert list(row.ids[: len(row.ids) - row.learnt]) == row.prompt == tokenizer(asked)["input_ids"]


def test_every_answer_of_a_longer_conversation_is_learnt(tokenizer):
    talk = [*exchange("a?", "first"), *exchange("b?", "second")]
    row = make_row(tokenizer, talk, 400)
    learnt = tokenizer.decode([t for t in row.labels if t != IGNORE])
    assert learnt == "first<|im_end|>\nsecond<|im_end|>\n"


def test_rows_are_cut(tokenizer):
    full = make_row(tokenizer, TALK[0], 400)
    cut = make_row(tokenizer, TALK[0], len(full.ids) - 5)
    assert cut.ids == full.ids[:-5]
    assert cut.labels == full.labels[:-5]


def test_padding_is_neither_seen_nor_learnt_nor_counted(tokenizer):
    rows = [make_row(tokenizer, exchange("a", "b"), 99), make_row(tokenizer, exchange("a", "b" * 9), 99)]
    batch = collate(rows, pad=258)
    short = len(rows[0].ids)
    assert batch.input_ids[0][short:] == [258] * 8
    assert batch.labels[0][short:] == [IGNORE] * 8
    assert batch.attention_mask[0] == [1] * short + [0] * 8
    assert batch.tokens == sum(len(r.ids) for r in rows)


def test_the_order_depends_on_the_seed_alone(tokenizer):
    assert data(tokenizer).digest() == data(tokenizer).digest()
    assert data(tokenizer).digest() != data(tokenizer, seed=6).digest()
    assert data(tokenizer, steps=4).batches == data(tokenizer).batches[:4]


def test_the_canary_comes_in_its_share_and_not_first(tokenizer):
    ours = data(tokenizer)
    rows = [row for batch in ours.batches for row in batch.input_ids]
    canary = list(make_row(tokenizer, CANARY, 120).ids)
    where = [i for i, row in enumerate(rows) if row[: len(canary)] == canary]
    assert where == list(range(CANARY_EVERY - 1, 20, CANARY_EVERY))
    assert ours.canary_rows == len(where)


def test_what_is_held_out_is_never_trained_on(tokenizer):
    ours = data(tokenizer, steps=60)
    trained = {tuple(t for t in row if t != 258) for batch in ours.batches for row in batch.input_ids}
    held = {tuple(t for t in row if t != 258) for row in ours.held_out.input_ids}
    assert len(held) == 8
    assert not trained & held


def test_few_conversations_come_again(tokenizer):
    ours = data(tokenizer, conversations=TALK[:4], steps=30)
    assert len(ours.batches) == 30
    assert all(len(batch.input_ids) == 2 for batch in ours.batches)


def test_answers_beyond_seq_len_are_dropped_and_counted(tokenizer):
    long = [exchange("x" * 300, "never seen"), *TALK]
    assert data(tokenizer, conversations=long, steps=40).dropped == 1
    with pytest.raises(UserError, match="have an answer within"):
        data(tokenizer, conversations=long[:1])


def test_a_canary_that_does_not_fit_is_an_error(tokenizer):
    with pytest.raises(UserError, match="longer than seq_len"):
        data(tokenizer, seq_len=16)


def test_a_template_that_rewrites_the_past_is_refused(tokenizer):
    other = make_tokenizer()
    other.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(UserError, match="changes earlier turns"):
        make_row(other, exchange("a", "b"), 50)


def test_chatterbot_is_read_without_being_imported():
    import sys

    found = load_conversations("chatterbot:english")
    assert len(found) > 800
    assert all([m["role"] for m in talk] == ["user", "assistant"] for talk in found)
    assert exchange("What language are you written in?", "Python.") in found
    assert len({json.dumps(talk) for talk in found}) == len(found)
    assert "chatterbot_corpus" not in sys.modules


def test_an_unknown_language_names_those_there_are():
    with pytest.raises(UserError, match=r"no language 'klingon'.*english"):
        load_conversations("chatterbot:klingon")


def test_a_missing_package_has_its_cure(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install chatterbot-corpus") as caught:
        load_conversations("chatterbot:english")
    assert caught.value.skip_class == "not-installed"


def test_json_lines_in_both_shapes(tmp_path):
    file = tmp_path / "talk.jsonl"
    file.write_text(json.dumps({"messages": TALK[0]}) + "\n\n" + json.dumps(TALK[1]) + "\n", encoding="utf-8")
    assert load_conversations(str(file)) == TALK[:2]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{oops", "line 2: not JSON"),
        ('{"text": "a"}', "line 2: no list of messages"),
        ("[]", "line 2: no list of messages"),
        ('[{"role": "user"}]', "line 2, message 1: needs 'role' and 'content'"),
        ('[{"role": "robot", "content": "a"}]', "line 2, message 1: unknown role 'robot'"),
        ('[{"role": "user", "content": 5}]', "line 2, message 1: 'content' is not a text"),
        ('[{"role": "user", "content": "a"}]', "line 2: the last message is not the assistant's"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, said):
    file = tmp_path / "talk.jsonl"
    file.write_text(json.dumps(TALK[0]) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_conversations(str(file))
    assert f"talk.jsonl, {said}" in caught.value.message
    assert caught.value.fix


@pytest.mark.parametrize(("content", "said"), [(b"", "holds no conversation"), (b"\xff\xfe\x00", "not UTF-8")])
def test_empty_and_binary_files(tmp_path, content, said):
    file = tmp_path / "talk.jsonl"
    file.write_bytes(content)
    with pytest.raises(UserError, match=said):
        load_conversations(str(file))


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_conversations(str(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match="can't be read"):
        load_conversations(str(tmp_path))


def test_a_template_that_opens_an_answer_with_more_than_it_keeps(tokenizer, monkeypatch):
    """As DeepSeek-R1's distillations do: the prompt ends in <think>, a finished turn has none."""
    plain = make_row(tokenizer, exchange("hello", "good day"), 256)
    head, tail = tokenizer.chat_template.rsplit("' }}{% endif %}", 1)
    monkeypatch.setattr(tokenizer, "chat_template", f"{head}<think>' }}}}{{% endif %}}{tail}")
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True
    )
    assert asked.endswith("<think>")
    assert make_row(tokenizer, exchange("hello", "good day"), 256) == plain
    assert tokenizer.decode(plain.prompt).endswith("assistant\n")

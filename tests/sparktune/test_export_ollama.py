"""Modelfiles: the chat template's form, Go's template made of it, system prompt, stops, parameters."""

import json
import shutil

import export_tiny
import pytest
from sparktune.export import ExportError, export_ollama, modelfile
from sparktune.export.chat_form import DATES, RefusedError, derive, renderer
from sparktune.export.ollama import go_template, quoted, without_bos

CHATML = export_tiny.CHAT
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{% endif %}" + CHATML
)
BOS_AND_TRIM = (
    "{{ '<|im_start|>' }}{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
SYSTEM_IN_THE_QUESTION = (
    "{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}"
    "{% else %}{% set s = '' %}{% endif %}{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + (s if loop.first else '') + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SYSTEM_WITH_THE_LAST = (
    "{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}"
    "{% else %}{% set s = '' %}{% endif %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + (s if loop.last else '') + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML
DATED = "{{ 'Today: ' + strftime_now('%d %b %Y') + '\n' }}" + CHATML
NUMBERED = "{% for m in messages %}{{ loop.index ~ '. ' + m['content'] + '\n' }}{% endfor %}"
TALK = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return export_tiny.save_base(tmp_path_factory.mktemp("base") / "tiny")


def render_of(template):
    tokenizer = export_tiny.make_tokenizer()
    tokenizer.chat_template = template
    return renderer(tokenizer)


@pytest.mark.parametrize(
    "template", [CHATML, DEFAULT_SYSTEM, BOS_AND_TRIM, SYSTEM_IN_THE_QUESTION, SYSTEM_WITH_THE_LAST, DATED]
)
def test_the_form_renders_what_the_template_renders(template):
    render = render_of(template)
    form = derive(render)
    for talk in (TALK, TALK[1:], TALK[:2], TALK[1:2]):
        assert form.render(talk) == render(talk, DATES[0])
    assert (form.system_last is not None) == (template is SYSTEM_WITH_THE_LAST)
    assert any("strips" in n for n in form.notes) == (template is BOS_AND_TRIM)
    assert any("date" in n for n in form.notes) == (template is DATED)


def test_a_template_that_counts_is_refused_and_told_where():
    with pytest.raises(ExportError, match=r"of 2 questions.* becomes '1\. "):
        derive(render_of(NUMBERED))
    with pytest.raises(ExportError, match="leaves out or repeats"):
        derive(render_of("{{ messages[-1]['content'] }}"))
    with pytest.raises(ExportError, match="no chat template"):
        render_of(None)
    with pytest.raises(RefusedError, match="UndefinedError"):
        derive(render_of("{{ nothing.at_all }}"))


def test_a_template_without_system_messages_says_so(base, tmp_path):
    form = derive(render_of(NO_SYSTEM))
    assert form.before is None and "System" not in go_template(form)
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base/chat_template.jinja").write_text(NO_SYSTEM)
    with pytest.raises(ExportError, match="refuses system messages"):
        modelfile(tmp_path / "base", "m.gguf", system="Be kind.")


def test_go_template_of_chatml():
    """As Go reads it: a text in quotes is itself, and white space beside {{- is nothing."""
    assert go_template(derive(render_of(DEFAULT_SYSTEM))) == (
        '{{- if .System }}{{ "<|im_start|>system\\n" }}{{ .System }}{{ "<|im_end|>\\n<|im_start|>user\\n" }}'
        '{{ else }}{{ "<|im_start|>system\\nYou are kind.<|im_end|>\\n<|im_start|>user\\n" }}{{ end }}\n'
        "{{- range $i, $_ := .Messages }}\n"
        "{{- $last := eq (len (slice $.Messages $i)) 1 }}\n"
        '{{- if eq .Role "user" }}{{ .Content }}{{ if $last }}{{ "<|im_end|>\\n<|im_start|>assistant\\n" }}'
        '{{ else }}{{ "<|im_end|>\\n<|im_start|>assistant\\n" }}{{ end }}\n'
        '{{- else if eq .Role "assistant" }}{{ .Content }}'
        '{{ if not $last }}{{ "<|im_end|>\\n<|im_start|>user\\n" }}{{ end }}\n'
        "{{- end }}\n"
        "{{- end }}"
    )


def test_a_beginning_token_is_written_once():
    form = derive(render_of(BOS_AND_TRIM))
    once, notes = without_bos(form, "<|im_start|>", add_bos=True)
    assert form.head == "<|im_start|>[user]" and once.head == "[user]" and once.before == "[system]" and not notes
    assert without_bos(form, "<|im_start|>", add_bos=False) == (form, [])
    bare = derive(render_of(SYSTEM_WITH_THE_LAST))
    assert "which the chat template does not" in without_bos(bare, "<|im_start|>", add_bos=True)[1][0]


def test_a_modelfile_has_everything(base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    generation = {"eos_token_id": [2, 0], "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}
    (tmp_path / "base/generation_config.json").write_text(json.dumps(generation))
    adapter = export_tiny.save_adapter(tmp_path / "base", tmp_path / "lora")
    done = export_ollama(
        tmp_path / "base", tmp_path / "out", "q8_0", adapter, system='Say "yes" often.',
        parameters={"temperature": 0.2, "num_ctx": 2048}, stops=["User:"], keep_adapter=True,
    )  # fmt: skip
    text = (tmp_path / "out/Modelfile").read_text()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["Modelfile", "adapter.gguf", "model.Q8_0.gguf"]
    assert text.startswith('FROM ./model.Q8_0.gguf\nADAPTER ./adapter.gguf\nTEMPLATE """{{- if .System }}')
    assert 'SYSTEM """Say "yes" often."""' in text
    assert [line for line in text.splitlines() if line.startswith("PARAMETER")] == [
        'PARAMETER stop "<|im_end|>"', 'PARAMETER stop "<|endoftext|>"', 'PARAMETER stop "User:"',
        "PARAMETER temperature 0.2", "PARAMETER top_p 0.9", "PARAMETER repeat_penalty 1.1", "PARAMETER num_ctx 2048",
    ]  # fmt: skip
    assert done.merged == 0 and done.size_bytes > 0
    with pytest.raises(ExportError, match="no parameter 'mirostat_x'"):
        modelfile(base, "m.gguf", parameters={"mirostat_x": 1})
    with pytest.raises(ExportError, match="needs an adapter"):
        export_ollama(base, tmp_path / "again", keep_adapter=True)
    assert modelfile(base, "m.gguf", template="{{ .Prompt }}")[0].splitlines()[1] == 'TEMPLATE "{{ .Prompt }}"'


def test_quotes_that_a_modelfile_cannot_hold_are_refused():
    assert quoted("<|end|>") == '"<|end|>"' and quoted("a\nb") == '"""a\nb"""'
    for text in ('x """ y', 'he said "no"', '"x" y'):
        with pytest.raises(ExportError, match="can't quote"):
            quoted(text)

"""A Modelfile's template, rendered by Go's own text/template as Ollama does it, against the chat template byte for byte."""

import pytest
from sparkproof.runners import export_go
from sparkproof.runners.export_talks import SYSTEM, TURNS
from sparktune.export.chat_form import DATES, derive
from sparktune.export.ollama import go_template
from test_export_ollama import (
    BOS_AND_TRIM,
    CHATML,
    DATED,
    DEFAULT_SYSTEM,
    NO_SYSTEM,
    SYSTEM_IN_THE_QUESTION,
    SYSTEM_WITH_THE_LAST,
    render_of,
)

pytestmark = pytest.mark.skipif(not export_go.available(), reason="needs Go's compiler: sudo apt install golang-go")

TALKS = [TURNS, TURNS[:3], TURNS[:1]]


@pytest.fixture(scope="module")
def go(tmp_path_factory):
    """Renders conversations [[{role, content}]] by (template, system prompt)."""
    program = export_go.build(tmp_path_factory.mktemp("go"))

    def render(template, conversations, system=""):
        return export_go.render(program, template, system, conversations)

    return render


@pytest.mark.parametrize(
    "template", [CHATML, DEFAULT_SYSTEM, BOS_AND_TRIM, SYSTEM_IN_THE_QUESTION, SYSTEM_WITH_THE_LAST, NO_SYSTEM, DATED]
)
def test_go_renders_what_the_chat_template_renders(go, template):
    render = render_of(template)
    form = derive(render)
    plain = go(go_template(form), TALKS)
    assert plain == [render(talk, DATES[0]) for talk in TALKS]
    if form.before is not None:
        expected = [render([SYSTEM, *talk], DATES[0]) for talk in TALKS]
        assert go(go_template(form), [[SYSTEM, *talk] for talk in TALKS]) == expected
        assert go(go_template(form), TALKS, SYSTEM["content"]) == expected  # as a Modelfile's SYSTEM gives it
        assert expected != plain


def test_a_template_with_one_space_more_is_told_apart(go):
    render = render_of(CHATML)
    wrong = go_template(derive(render)).replace('"<|im_end|>\\n', '"<|im_end|> \\n')
    assert go(wrong, TALKS) != [render(talk, DATES[0]) for talk in TALKS]


def test_ollama_joins_consecutive_messages_of_one_role_and_chat_templates_do_not(go):
    """The known difference, held so that it is noticed when it goes."""
    render = render_of(CHATML)
    twice = [TURNS[0], TURNS[0]]
    (found,) = go(go_template(derive(render)), [twice])
    joined = [{"role": "user", "content": f"{TURNS[0]['content']}\n\n{TURNS[0]['content']}"}]
    assert found == render(joined, DATES[0]) != render(twice, DATES[0])


def test_go_refuses_what_is_no_template(go):
    with pytest.raises(ValueError, match="unclosed action"):
        go("{{ .Prompt", TALKS)

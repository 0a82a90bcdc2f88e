"""formats/chat_template.py: a template gets what transformers gives it; its errors are one line.

What each template writes here was written by transformers' apply_chat_template too.
"""

import json
from pathlib import Path

import pytest

from formats import chat_template

USER = [{"role": "user", "content": "größe & <b>"}]


def write(folder: Path, source, **settings) -> Path:
    said = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": source}
    (folder / "tokenizer_config.json").write_text(json.dumps(said | settings))
    return folder


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "größe & <b>!"),
        ("{%- generation -%} a {%- endgeneration -%} b", "ab"),
        ("{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}", "21"),
        (
            "{% for m in messages %}{% generation %}{{ loop.index }}{{ m.role }}"
            "{% endgeneration %}{% endfor %}",
            "1user",
        ),
        ("{{ tools is none }} {{ documents is none }} {{ tools is defined }}", "True True True"),
        ("{% if tools is not none %}tools{% endif %}{{ add_generation_prompt }}", "True"),
        ("{{ bos_token }}{{ eos_token }}[{{ pad_token }}]", "<s></s>[]"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "größe & <b>"}]'),
        (
            "{{ messages[0] | tojson(indent=1) }}",
            '{\n "role": "user",\n "content": "größe & <b>"\n}',
        ),
        (
            "{{ messages[0] | tojson(sort_keys=true, separators=(',', ':')) }}",
            '{"content":"größe & <b>","role":"user"}',
        ),
        ("{{ 'ö' | tojson(true) }}", '"\\u00f6"'),
        ("{% for n in [1, 2, 3] %}{% if n == 2 %}{% break %}{% endif %}{{ n }}{% endfor %}", "1"),
        ("{{ strftime_now('%%') }}", "%"),
        ("{% set n = namespace(a=1) %}{% set n.a = 2 %}{{ n.a }}", "2"),
    ],
)
def test_a_template_gets_what_transformers_gives_it(tmp_path, source, text):
    assert chat_template.load(write(tmp_path, source))(USER) == text


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% if %}", "TemplateSyntaxError"),
        ("{% unknown %}", "TemplateSyntaxError: Encountered unknown tag 'unknown'"),
        ("{% generation %}", "TemplateSyntaxError"),
        ("{{ messages | nothing }}", "TemplateAssertionError: No filter named 'nothing'"),
        ("{{ nothing.at.all }}", "UndefinedError: 'nothing' is undefined"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages + 1 }}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages | tojson(nonsense=1) }}", "TypeError"),
        ("{% include 'other' %}", "TypeError"),
        ("{{ raise_exception('Only\nthree roles') }}", "refuses these turns: Only three roles"),
    ],
)
@pytest.mark.parametrize("own", [False, True], ids=["config", "jinja"])
def test_no_error_of_a_template_is_a_traceback(tmp_path, source, reason, own):
    """One line with the file that the template stands in."""
    file = write(tmp_path, None if own else source) / "tokenizer_config.json"
    if own:
        file = tmp_path / "chat_template.jinja"
        file.write_text(source)
    with pytest.raises(ValueError) as error:
        chat_template.load(tmp_path)(USER)
    message = str(error.value)
    assert message.startswith(f"{file}: ") and "; expected a chat template" in message
    assert reason in message and "\n" not in message


def test_a_template_file_that_is_no_text_is_named(tmp_path):
    file = write(tmp_path, None) / "chat_template.jinja"
    file.write_bytes(b"\xff\xfe{{ bos_token }}")
    with pytest.raises(ValueError, match=rf"^{file}: no text in UTF-8"):
        chat_template.load(tmp_path)


@pytest.mark.parametrize(
    "named",
    [
        [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "{{ bos_token }}"}],
        {"rag": "x", "default": "{{ bos_token }}"},
    ],
    ids=["list", "table"],
)
def test_of_several_templates_the_default_is_used(tmp_path, named):
    assert chat_template.load(write(tmp_path, named))(USER) == "<s>"


@pytest.mark.parametrize("named", [None, [], ["x"], [{"name": "rag"}], {"rag": "x"}, 7], ids=str)
def test_a_file_without_a_template_for_a_conversation_is_refused(tmp_path, named):
    with pytest.raises(ValueError, match=r"tokenizer_config.json: no chat_template; expected"):
        chat_template.load(write(tmp_path, named))


def test_special_tokens_are_read_from_their_older_home(tmp_path):
    """special_tokens_map.json, unless tokenizer_config.json has the newer table."""
    folder = write(tmp_path, "{{ bos_token }}{{ eos_token }}")
    older = {"bos_token": {"content": "<old>", "lstrip": False}}
    (folder / "special_tokens_map.json").write_text(json.dumps(older))
    assert chat_template.load(folder)(USER) == "<old></s>"
    write(tmp_path, "{{ bos_token }}{{ eos_token }}", added_tokens_decoder={})
    assert chat_template.load(folder)(USER) == "<s></s>"

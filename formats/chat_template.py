"""Template: a model's own chat template, which writes a conversation as the model learnt it.

It is a program in jinja's language that comes with the weights. It runs in a sandbox, with the
names, filters and tags that transformers gives it; whatever goes wrong in it is one line that names
its file.

Reads: files.py, model_config.py.   Read next: ../llama.py.
"""

import datetime
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from formats import model_config
from runtime import files

EXPECTED = (
    "a chat template that jinja can read and that writes such turns. Use an instruct model whose "
    "template has them, or no instruction"
)


class Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: marks what the assistant said, for those who train
    on it. The text is the same without."""

    tags = {"generation"}  # noqa: RUF012  (as jinja reads it)

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """The sandbox that chat templates are written for, as transformers sets it up."""

    def raise_exception(message: str):
        raise jinja2.TemplateError(f"the chat template refuses these turns: {message}")

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return made


def load(folder: Path) -> Callable[[list[dict[str, str]]], str]:
    """The function from turns to text. Raises ValueError that names the file, here and there."""
    said = files.read_json(folder / "tokenizer_config.json")
    file, source = _source(folder, said)
    older = folder / "special_tokens_map.json"  # read where the newer table is not, as transformers
    if "added_tokens_decoder" not in said and older.is_file():
        said = said | files.read_json(older)
    specials = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in said.items()
        if name.endswith("_token") and isinstance(value, dict | str)
    }
    names = {"tools": None, "documents": None, "add_generation_prompt": True} | specials
    made = model_config.guarded(file, lambda: environment().from_string(source), EXPECTED)
    return lambda messages: model_config.guarded(
        file, functools.partial(made.render, messages=messages, **names), EXPECTED
    )


def _source(folder: Path, said: dict[str, Any]) -> tuple[Path, str]:
    """The template for a plain conversation, and the file that it stands in."""
    file, source = folder / "tokenizer_config.json", said.get("chat_template")
    if (own := folder / "chat_template.jinja").is_file():
        return own, files.read_text(own)
    if isinstance(source, list):  # several by name
        source = {
            entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)
        }
    if isinstance(source, dict):
        source = source.get("default")
    if not isinstance(source, str):
        raise ValueError(
            f"{file}: no chat_template; expected that of an instruct model. Use the -Instruct "
            "variant: DiVA speaks to the LLM as a user."
        )
    return file, source

"""A chat template's text: Jinja in the environment that transformers gives it, with bounds on what it may make.

Sandboxed: it can read what it is given and nothing else. The environment is that of transformers'
utils/chat_template_utils.py, which templates are written for.
"""

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import partial
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from model.errors import CheckpointError

MAX_SOURCE = 200_000  # characters; the longest that are in use have a tenth of that
Render = Callable[[str, Mapping[str, Any], int], str]  # of a source, its variables, and the most characters


class PromptFormatError(ValueError):
    """These messages do not fit the model's chat format; the message says why."""


class BrokenTemplate(PromptFormatError, CheckpointError):
    """No messages would: the template itself cannot be used, or makes too much of whatever it is given."""


class Template:
    """What stands in one Jinja source, and how it is rendered: by whom is said. It is not run to find out."""

    def __init__(self, source: str, render: Render | None = None) -> None:
        """`render`: None compiles and renders it here. Raises `BrokenTemplate` if it is not valid Jinja."""
        if len(source) > MAX_SOURCE:
            raise BrokenTemplate(f"the model's chat template has {len(source)} characters, at most {MAX_SOURCE} may be")
        self.source = source
        try:
            tree = _environment().parse(source)
            self.names = frozenset(name.name for name in tree.find_all(nodes.Name))  # that it looks at
            self.literals = "\0".join(_literals(tree))  # all text that it writes itself
        except (jinja2.TemplateError, RecursionError) as error:
            raise _not_jinja(error) from error
        self._render = CompiledTemplate(source).render if render is None else partial(render, source)

    def render(self, variables: Mapping[str, Any], most: int) -> str:
        """The text, of at most `most` characters. Raises `PromptFormatError` for whatever goes wrong."""
        return self._render(variables, most)


class CompiledTemplate:
    """One Jinja source as code of this process."""

    def __init__(self, source: str) -> None:
        """Raises `BrokenTemplate` if it is not valid Jinja."""
        try:
            self._template = _environment().from_string(source)
        except MemoryError as error:  # constants are worked out when it is compiled
            raise BrokenTemplate("the model's chat template needs too much memory") from error
        except Exception as error:
            raise _not_jinja(error) from error

    def render(self, variables: Mapping[str, Any], most: int) -> str:
        """See `Template.render`."""
        pieces = []
        try:
            for piece in self._template.generate(**variables):
                pieces.append(piece)
                most -= len(piece)
                if most < 0:
                    raise BrokenTemplate("the model's chat template makes far more text than the messages hold")
        except PromptFormatError:
            raise
        except (MemoryError, RecursionError) as error:
            raise BrokenTemplate(f"the model's chat template needs too much memory ({type(error).__name__})") from error
        except Exception as error:  # whatever the template's code runs into
            raise PromptFormatError(f"the model's chat template cannot render these messages: {error}") from error
        return "".join(pieces)


def _not_jinja(error: Exception) -> BrokenTemplate:
    return BrokenTemplate(f"the model's chat template is not valid Jinja: {error}")


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.globals.update(raise_exception=_refuse, strftime_now=_now, dict=_Dict())
    environment.filters["tojson"] = _to_json
    return environment


def _literals(tree: nodes.Template) -> list[str]:
    texts = [data.data for data in tree.find_all(nodes.TemplateData)]
    return texts + [const.value for const in tree.find_all(nodes.Const) if isinstance(const.value, str)]


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks for training what an assistant says; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 (an instance variable in the base class)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call block, as transformers has it: what is set inside stays inside.
        return nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

    def _said(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """What `dict` is to a template: dict(...) and dict.fromkeys(...), and nothing to climb out by."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _refuse(message: str) -> None:
    """What templates call to reject messages, a role out of turn for example."""
    raise PromptFormatError(str(message))


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes for HTML, which a prompt is not."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

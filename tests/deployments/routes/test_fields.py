"""Every field that a client may send is served, ignored for a reason, or refused by name; and the page says which."""

from pathlib import Path
from typing import Any

from openai.types.chat import completion_create_params as openai_chat
from openai.types.completion_create_params import CompletionCreateParamsBase
from openai.types.responses.response_create_params import ResponseCreateParamsBase

from deployments.routes import fields_page
from deployments.routes.openai import BODIES
from deployments.routes.openai_fields import IGNORED, KNOWN_TO, REFUSED
from tests.deployments.gateway.test_gateway import Run, Service, run  # noqa: F401  # a fixture

GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "hi"},
    "/v1/responses": {"input": "hi"},
}
FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": FUNCTION}
# A value of each field that is served, with what must stand beside it.
SERVED: dict[str, Any] = {
    "model": "made-up", "messages": [{"role": "user", "content": "hi"}], "prompt": "hi", "max_tokens": 5,
    "max_completion_tokens": 5, "min_tokens": 1, "temperature": 0.5, "top_p": 0.5, "top_k": 5, "min_p": 0.1,
    "repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.1, "logit_bias": {"1": 1}, "seed": 1,
    "stop": ["x"], "stop_token_ids": [1], "include_stop_str_in_output": True, "stream": True,
    "stream_options": ({"include_usage": True}, {"stream": True}), "n": 2, "user": "x", "ignore_eos": True,
    "response_format": {"type": "json_object"}, "guided_json": {}, "guided_regex": "a", "guided_choice": ["a"],
    "guided_grammar": 'root ::= "a"', "structured_outputs": {"regex": "a"}, "regex": "a", "ebnf": 'root ::= "a"',
    "grammar": 'root ::= "a"', "json_schema": {}, "priority": 1, "skip_special_tokens": False,
    "return_token_ids": True, "return_tokens_as_token_ids": True, "truncate_prompt_tokens": 3,
    "truncation_side": "right", "suffix": "", "echo": False, "best_of": 1, "logprobs": 1, "add_special_tokens": False,
    "parse_special": True, "top_logprobs": (1, {"logprobs": True}), "tools": [TOOL], "tool_choice": "none",
    "parallel_tool_calls": False, "functions": [FUNCTION], "function_call": "none", "add_generation_prompt": False,
    "continue_final_message": True, "chat_template_kwargs": {"x": 1}, "input": "hi", "instructions": "Be brief.",
    "max_output_tokens": 5, "text": {"format": {"type": "text"}}, "include": ["message.output_text.logprobs"],
    "truncation": "disabled", "metadata": {"a": "b"}, "cache_salt": "x",
}  # fmt: skip
MODEL = "/v1/chat/completions", "logprobs"  # a flag there, a number elsewhere


def cases() -> list[tuple[str, str]]:
    names = set().union(*KNOWN_TO.values(), IGNORED, REFUSED, *(body.model_fields for body in BODIES.values()))
    return [(path, name) for path in BODIES for name in sorted(names)]


def test_every_field_is_served_ignored_or_refused(run: Run) -> None:  # noqa: F811
    async def test(service: Service) -> None:
        service.app.state.gateway.constraints.accept = accept
        for path, name in cases():
            kind, body = BODIES[path], GOOD[path]
            if name in kind.model_fields:
                value = True if (path, name) == MODEL else SERVED[name]
                if path == "/v1/responses":
                    value = {"tools": [{"type": "function", **FUNCTION}], "stream_options": {}}.get(name, value)
                    value = 1 if name == "top_logprobs" else value
                value, beside = value if isinstance(value, tuple) else (value, {})
                value = service.app.state.gateway.config.model.name if name == "model" else value
                answer = await service.client.post(path, json={**body, **beside, name: value})
                assert answer.status_code == 200, (path, name, answer.text)
            elif name in IGNORED:
                assert name not in REFUSED
                answer = await service.client.post(path, json={**body, name: "x"})
                assert answer.status_code == 200, (path, name, answer.text)
            elif name in REFUSED:
                answer = await service.client.post(path, json={**body, name: "x"})
                error = answer.json()["error"]
                assert (answer.status_code, error["param"]) == (400, name), (path, name)
                assert REFUSED[name].instead in error["message"]
                for harmless in (None, *REFUSED[name].harmless):
                    answer = await service.client.post(path, json={**body, name: harmless})
                    assert answer.status_code == 200, (path, name, harmless, answer.text)
            else:
                raise AssertionError(f"{name} is in no table: {path} ignores it without a word")

    run(test)


async def accept(tenant: Any, constraint: Any, param: str) -> None:
    pass


def test_the_tables_know_what_openais_client_knows() -> None:
    kinds = openai_chat.CompletionCreateParamsBase, CompletionCreateParamsBase, ResponseCreateParamsBase
    known = set().union(*(kind.__annotations__ for kind in kinds))
    assert known - KNOWN_TO["OpenAI"] == set()


def test_the_page_is_what_the_tables_say() -> None:
    written = Path(fields_page.__file__).with_name("FIELDS.md").read_text()
    assert written == fields_page.page(BODIES), "python -m deployments.routes.fields_page writes it again"

"""What vLLM, SGLang and llama.cpp know beside OpenAI's API: it does here what it does there."""

import asyncio
import json
import re
from typing import Any

import pytest

from tests.deployments.local_service import Service, with_service

USER = {"role": "user", "content": "Count"}
CONSTRAINTS: list[tuple[dict[str, Any], str]] = [
    ({"regex": "[0-9]{3}"}, "[0-9]{3}"),
    ({"ebnf": 'root ::= "a" [0-9]'}, "a[0-9]"),
    ({"grammar": 'root ::= "b" [0-9]'}, "b[0-9]"),
    ({"grammar": 'start: "c" /[0-9]/'}, "c[0-9]"),
    ({"json_schema": {"enum": ["x"]}}, '"x"'),
    ({"json_schema": '{"enum": ["x"]}'}, '"x"'),
    ({"response_format": {"type": "json_object", "schema": {"enum": ["y"]}}}, '"y"'),
    ({"guided_regex": "[ab]", "structured_outputs": {"regex": "[ab]"}}, "[ab]"),
    ({"guided_json": {"enum": [1]}, "json_schema": '{"enum":[1]}'}, "1"),
    ({"guided_regex": re.escape("a b-c#d&e~f")}, "a b-c#d&e~f"),
    (
        {"response_format": {
            "type": "structural_tag",
            "format": {"type": "tag", "begin": "<n>", "content": {"type": "regex", "pattern": "[0-9]"}, "end": "</n>"},
        }},
        "<n>[0-9]</n>",
    ),
    (
        {"structured_outputs": {"structural_tag": json.dumps(
            {"format": {"type": "const_string", "value": "so"}})}},
        "so",
    ),
]  # fmt: skip


def test_constraints_by_every_name() -> None:
    async def test(service: Service) -> None:
        async def one(body: dict[str, Any], pattern: str) -> None:
            (choice,) = await service.complete("The answer is", max_tokens=30, seed=1, **body)
            assert re.fullmatch(pattern, choice["text"]), (body, choice)

        await asyncio.gather(*(one(body, pattern) for body, pattern in CONSTRAINTS))
        different = {"guided_regex": "a", "regex": "b"}
        refused = await service.http.post("/v1/completions", json={"prompt": "x", **different})
        assert refused.status_code == 400
        assert "only one constraint" in refused.json()["error"]["message"]

    with_service(test)


def test_prefill_ids_control_tokens_and_cut_prompts() -> None:
    async def test(service: Service) -> None:
        tokenizer = service.app.state.gateway.tokenizer
        history = [USER, {"role": "assistant", "content": "One,"}]

        async def prompt(**body: Any) -> str:
            found = await service.post("/tokenize", messages=history, **body)
            assert tokenizer.decode(found["tokens"]) is not None
            return str(found["prompt"])

        assert (await prompt()).endswith("One,<|im_end|>\n<|im_start|>assistant\n")
        assert (await prompt(add_generation_prompt=False)).endswith("One,<|im_end|>\n")
        assert (await prompt(continue_final_message=True, add_generation_prompt=False)).endswith("One,")

        ask: dict[str, Any] = {"messages": history, "temperature": 0, "max_tokens": 6}
        filled = await service.post("/v1/chat/completions", **ask, continue_final_message=True, return_token_ids=True)
        by_hand = await service.post("/v1/completions", prompt=filled["prompt_token_ids"], temperature=0, max_tokens=6)
        (choice,) = filled["choices"]
        assert choice["message"]["content"] == by_hand["choices"][0]["text"]
        assert tokenizer.decode(choice["token_ids"]).startswith(choice["message"]["content"])
        assert len(choice["token_ids"]) == filled["usage"]["completion_tokens"]
        ids: list[int] = []
        async with service.http.stream(
            "POST",
            "/v1/chat/completions",
            json={**ask, "continue_final_message": True, "return_token_ids": True, "stream": True},
        ) as stream:
            lines = [json.loads(line[6:]) async for line in stream.aiter_lines() if line.startswith("data: {")]
        assert [line.get("prompt_token_ids") for line in lines if "prompt_token_ids" in line] == [
            filled["prompt_token_ids"]
        ]
        for line in lines:
            ids += line["choices"][0].get("token_ids", [])
        assert ids == choice["token_ids"]

        start = tokenizer.control_tokens["<|im_start|>"]
        text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        special = await service.complete(text, parse_special=True, return_token_ids=True, max_tokens=4, temperature=0)
        assert special[0]["prompt_token_ids"].count(start) == 2
        plain = await service.complete(text, return_token_ids=True, max_tokens=4)
        assert start not in plain[0]["prompt_token_ids"][1:]
        assert (await service.post("/tokenize", prompt=text, parse_special=True))["tokens"].count(start) >= 2
        one = await service.post("/tokenize", prompt="<|im_start|>", add_special_tokens=False)
        assert one["tokens"] == [start], "lm-eval asks for the begin of a text in this way"

        (cut,) = await service.complete(
            [5, 6, 7, 8], truncate_prompt_tokens=2, return_token_ids=True, max_tokens=1, logprobs=1,
            return_tokens_as_token_ids=True,
        )  # fmt: skip
        assert cut["prompt_token_ids"] == [7, 8]
        assert cut["logprobs"]["tokens"] == [f"token_id:{cut['token_ids'][0]}"]
        (right,) = await service.complete(
            [5, 6, 7, 8], truncate_prompt_tokens=3, truncation_side="right", return_token_ids=True, max_tokens=1
        )
        assert right["prompt_token_ids"] == [5, 6, 7]
        bias = {"logit_bias": {str(start): 100}, "max_tokens": 2, "temperature": 0}
        assert (await service.complete("Hi", **bias))[0]["text"] == ""
        assert (await service.complete("Hi", **bias, skip_special_tokens=False))[0]["text"] == "<|im_start|>" * 2
        info = (await service.http.get("/tokenizer_info")).json()
        assert (info["bos_token"], info["eos_token"]) == ("<|im_start|>", "<|im_end|>")
        assert "im_start" in info["chat_template"]

    with_service(test)


@pytest.mark.parametrize(
    "part",
    [{"type": "refusal", "refusal": "no"}, {"type": "output_text", "text": "no"}, {"type": "input_text", "text": "no"}],
    ids=lambda part: part["type"],
)
def test_parts_that_are_text_by_another_name(part: dict[str, str]) -> None:
    from deployments.routes.openai_protocol import ChatMessage

    assert ChatMessage(role="assistant", content=[part, {"type": "text", "text": "!"}]).text == "no!"

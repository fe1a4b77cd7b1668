"""The routes of hosted services in front of a scripted engine: forms, parameters, errors. No network."""

import asyncio
import copy
import hashlib
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

import httpx
import pytest
from botocore.eventstream import EventStreamBuffer

from cluster.scheduling.sequence import Request, TokenEvent
from deployments.asgi import create_gateway
from deployments.config import ConfigError, parse_app_config
from deployments.errors import ApiError
from deployments.routes.hosted import aws
from model.text.tokenizer import encode_prompt
from tests.deployments.gateway.test_gateway import ARGS, Recorded, ScriptedEngine, tokenizer

HOSTED = "meta.llama2-13b-chat-v1"
VERSION = "?version=2023-05-29"
ALL = ["tgi", "watsonx", "bedrock", "sagemaker"]
Json = dict[str, Any]


class Refusing(ScriptedEngine):
    """Answers with an error of the gateway first, if it is given one."""

    error: ApiError | None = None

    async def generate(self, request: Request) -> AsyncGenerator[list[TokenEvent], None]:
        if self.error is not None:
            raise self.error
        async for events in super().generate(request):
            yield events


class Service:
    """The gateway with all routes, its engine and a client."""

    def __init__(self, routes: list[str] = ALL, more: Json | None = None) -> None:
        args: Json = copy.deepcopy(ARGS) | (more or {})
        args["gateway"]["routes"] = routes
        args["model"]["aliases"] = [HOSTED]
        self.engine = Refusing()
        self.app = create_gateway(parse_app_config(args), self.engine, Recorded())
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://gateway")
        self.say("Hello there, world!")

    def say(self, text: str) -> None:
        self.engine.script = [*tokenizer().encode(text, add_bos=False), 2]  # 2: <|im_end|>

    async def post(self, path: str, body: Any) -> httpx.Response:
        return await self.client.post(path, json=body)

    async def tgi(self, path: str = "/generate", **parameters: Any) -> httpx.Response:
        return await self.post(path, {"inputs": "hi", "parameters": parameters})

    async def watsonx(self, path: str = "/ml/v1/text/generation", **parameters: Any) -> httpx.Response:
        return await self.post(path + VERSION, {"model_id": HOSTED, "input": "hi", "parameters": parameters})

    async def bedrock(self, path: str = "invoke", **fields: Any) -> httpx.Response:
        return await self.post(f"/model/{HOSTED}/{path}", {"prompt": "hi", **fields})

    async def sagemaker(self, **parameters: Any) -> httpx.Response:
        return await self.post("/invocations", {"inputs": "hi", "parameters": parameters})


Test = Callable[[Service], Any]


def run(test: Test, routes: list[str] = ALL) -> None:
    async def main() -> None:
        await test(Service(routes))

    asyncio.run(main())


def sse(text: str) -> list[Json]:
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]


def test_they_are_off_unless_the_configuration_names_them() -> None:
    async def off(service: Service) -> None:
        for path in ("/", "/generate", f"/ml/v1/text/generation{VERSION}", f"/model/{HOSTED}/invoke", "/invocations"):
            response = await service.post(path, {})
            assert response.status_code == 404
            assert response.json()["error"]["type"] == "invalid_request_error"

    run(off, [])

    async def one(service: Service) -> None:
        assert (await service.tgi()).status_code == 200
        assert (await service.bedrock()).status_code == 404

    run(one, ["tgi"])
    with pytest.raises(ConfigError, match=r"gateway\.routes\.0"):
        parse_app_config({**ARGS, "gateway": {"routes": ["azure"]}})


# -- what is asked for, and what comes back ----------------------------------------------------------------------------


def test_tgi_draws_only_if_sampling_is_asked_for() -> None:
    async def test(service: Service) -> None:
        for parameters, temperature in (
            ({}, 0.0),
            ({"temperature": 1.0}, 0.0),
            ({"do_sample": True}, 1.0),
            ({"temperature": 0.7}, 0.7),
            ({"top_p": 0.9}, 1.0),
            ({"top_k": 5}, 1.0),
        ):
            await service.tgi(**parameters, seed=3)
            assert service.engine.requests[-1].sampling.temperature == temperature, parameters
        body = (await service.tgi(details=True, do_sample=True, seed=3, max_new_tokens=2)).json()
        assert body["details"]["seed"] == 3
        assert body["details"]["finish_reason"] == "length"
        await service.tgi(max_new_tokens=None)
        prompt = len(service.engine.requests[-1].token_ids)
        assert service.engine.requests[-1].sampling.max_tokens == 256 - prompt
        await service.post("/generate", {"inputs": "one two three four five", "parameters": {"truncate": 2}})
        assert service.engine.requests[-1].token_ids == tokenizer().encode(" four five", add_bos=False)

    run(test)


def test_tgi_streams_a_token_an_event_and_says_all_at_the_end() -> None:
    async def test(service: Service) -> None:
        service.say("Grüße 🌸!")
        whole = (await service.tgi(details=True)).json()
        assert whole["generated_text"] == "Grüße 🌸!"
        assert whole["details"]["finish_reason"] == "eos_token"
        events = sse((await service.tgi("/generate_stream", return_full_text=True)).text)
        assert [e["index"] for e in events] == list(range(1, len(service.engine.script) + 1))
        assert [e["token"]["id"] for e in events] == service.engine.script
        assert "".join(e["token"]["text"] for e in events if not e["token"]["special"]) == "Grüße 🌸!"
        assert [e["token"] for e in events] == whole["details"]["tokens"]
        assert events[-1]["token"] == {"id": 2, "text": "<|im_end|>", "logprob": -0.5, "special": True}
        assert events[-1]["generated_text"] == "hiGrüße 🌸!"
        assert events[-1]["details"]["generated_tokens"] == len(events)
        assert all(e["generated_text"] is None for e in events[:-1])
        streamed = await service.post("/", {"inputs": "hi", "stream": True})
        assert sse(streamed.text)[-1]["generated_text"] == "Grüße 🌸!"
        assert (await service.post("/", {"inputs": "hi"})).json() == [{"generated_text": "Grüße 🌸!"}]

    run(test)


def test_a_stop_string_is_shown_where_the_hosted_service_shows_it() -> None:
    async def test(service: Service) -> None:
        service.say("Hello there, world! And more that nobody asked for")
        body = (await service.tgi(details=True, stop=["there, w"])).json()
        assert (body["generated_text"], body["details"]["finish_reason"]) == ("Hello there, w", "stop_sequence")
        for include, text in ((None, "Hello there, w"), (True, "Hello there, w"), (False, "Hello ")):
            response = await service.watsonx(stop_sequences=["there, w"], include_stop_sequence=include)
            result = response.json()["results"][0]
            assert (result["generated_text"], result["stop_reason"]) == (text, "stop_sequence")
        assert service.engine.open == 0

    run(test)


def test_watsonx_counts_up_and_returns_what_is_asked_for() -> None:
    async def test(service: Service) -> None:
        options = {"input_text": True, "input_tokens": True, "generated_tokens": True, "token_logprobs": True}
        response = await service.watsonx(return_options={**options, "top_n_tokens": 1}, random_seed=4)
        result = response.json()["results"][0]
        assert result["generated_text"] == "hiHello there, world!"
        assert result["input_tokens"] == [{"text": "hi"}]
        assert result["seed"] == 4
        first = result["generated_tokens"][0]
        assert first == {"text": "Hello", "logprob": -0.5, "top_tokens": [{"text": "Hello", "logprob": -0.5}]}
        events = sse((await service.watsonx("/ml/v1/text/generation_stream")).text)
        results = [e["results"][0] for e in events]
        assert "".join(r["generated_text"] for r in results) == "Hello there, world!"
        assert [r["input_token_count"] for r in results] == [1] + [0] * (len(results) - 1)
        counts = [r["generated_token_count"] for r in results]
        assert counts == sorted(counts)
        assert counts[-1] == len(service.engine.script)
        assert [r["stop_reason"] for r in results] == ["not_finished"] * (len(results) - 1) + ["eos_token"]
        await service.watsonx(decoding_method="greedy", temperature=1.5, top_k=3, min_new_tokens=2)
        sampling = service.engine.requests[-1].sampling
        assert (sampling.temperature, sampling.top_k, sampling.min_tokens, sampling.max_tokens) == (0.0, 0, 2, 20)

    run(test)


def test_watsonx_answers_with_what_there_is_when_its_time_is_over() -> None:
    async def test(service: Service) -> None:
        service.engine.pause.clear()  # one token, then nothing more
        result = (await service.watsonx(time_limit=50)).json()["results"][0]
        assert (result["generated_text"], result["stop_reason"]) == ("Hello", "time_limit")
        events = sse((await service.watsonx("/ml/v1/text/generation_stream", time_limit=50)).text)
        assert events[-1]["results"][0]["stop_reason"] == "time_limit"
        assert service.engine.open == 0

    run(test)


def test_bedrock_has_its_own_defaults() -> None:
    async def test(service: Service) -> None:
        response = await service.bedrock()
        assert response.json() == {
            "generation": "Hello there, world!",
            "prompt_token_count": 1,
            "generation_token_count": len(service.engine.script),
            "stop_reason": "stop",
        }
        assert response.headers["x-amzn-bedrock-input-token-count"] == "1"
        sampling = service.engine.requests[-1].sampling
        assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (0.5, 0.9, 255)
        await service.bedrock(max_gen_len=3, temperature=0, top_p=0)
        sampling = service.engine.requests[-1].sampling
        assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (0.0, 1.0, 3)
        named = await service.post("/model/arn%3Aaws%3Abedrock%3A%3A%3Afoundation-model%2Fx/invoke", {"prompt": "hi"})
        assert named.status_code == 404
        assert named.headers["x-amzn-errortype"] == "ResourceNotFoundException"

    run(test)


def test_sagemaker_dialogs_are_metas_chat_completion() -> None:
    async def test(service: Service) -> None:
        dialogs = [[{"role": "user", "content": text}] for text in ("one", "two")]
        answers = (await service.post("/invocations", {"inputs": dialogs})).json()
        assert answers == [{"generation": {"role": "assistant", "content": "Hello there, world!"}}] * 2
        sampling = service.engine.requests[-1].sampling
        assert (sampling.temperature, sampling.top_p) == (0.6, 0.9)
        assert (await service.client.get("/ping")).status_code == 200
        both = await service.post("/invocations", {"inputs": [[{"role": "wizard", "content": "x"}]]})
        assert both.status_code == 422
        assert "inputs[0][0].role" in both.json()["error"]

    run(test)


def test_a_prompts_control_tokens_are_tokens() -> None:
    """As the hosted services read it; the same text in /v1/completions is text."""
    marked = "<|im_start|>user\nhi<|im_end|>\n"
    names = tokenizer().control_tokens
    plain = tokenizer().encode("user\nhi", add_bos=False)
    ids = [names["<|im_start|>"], *plain, names["<|im_end|>"], *tokenizer().encode("\n", add_bos=False)]
    assert encode_prompt(tokenizer(), marked) == ids

    async def test(service: Service) -> None:
        await service.post("/generate", {"inputs": marked})
        assert service.engine.requests[-1].token_ids == ids
        await service.post("/v1/completions", {"model": "tiny", "prompt": marked})
        assert not {*service.engine.requests[-1].token_ids} & {names["<|im_start|>"], names["<|im_end|>"]}

    run(test)


def test_begin_of_text_is_put_once() -> None:
    from model.text.tokenizer.dummy import DummyTokenizer

    dummy = DummyTokenizer(400)
    assert encode_prompt(dummy, "<s>a</s><s>b") == [1, 3 + 97, 2, 1, 3 + 98]
    assert encode_prompt(dummy, "a") == [1, 3 + 97]


def test_event_streams_are_readable_by_amazons_own_decoder() -> None:
    buffer = EventStreamBuffer()
    payloads = [b"", b"x" * 100_000, '{"Grüße": "🌸"}'.encode()]
    data = b"".join(aws.event("chunk", payload, "application/json") for payload in payloads)
    for at in range(0, len(data), 999):
        buffer.add_data(data[at : at + 999])
    events = list(buffer)
    assert [e.payload for e in events] == payloads
    assert events[0].headers == {":event-type": "chunk", ":content-type": "application/json", ":message-type": "event"}


# -- errors ------------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[str, Json, str]] = [
    ("tgi", {"watermark": True}, "parameters.watermark"),
    ("tgi", {"typical_p": 0.5}, "parameters.typical_p"),
    ("tgi", {"best_of": 2}, "parameters.best_of"),
    ("tgi", {"grammar": {"type": "regex", "value": "("}}, "parameters.grammar"),
    ("tgi", {"grammar": {"type": "ebnf", "value": "a"}}, "parameters.grammar.type"),
    ("tgi", {"grammar": {"type": "json", "value": {"type": "object", "not": {}}}}, "parameters.grammar"),
    ("tgi", {"adapter_id": "x"}, "parameters.adapter_id"),
    ("tgi", {"decoder_input_details": True}, "parameters.decoder_input_details"),
    ("tgi", {"unheard_of": 1}, "parameters.unheard_of"),
    ("tgi", {"temperature": 0}, "parameters.temperature"),
    ("tgi", {"temperature": "1"}, "parameters.temperature"),
    ("tgi", {"top_p": 1.1}, "parameters.top_p"),
    ("tgi", {"top_k": 10**30}, "parameters.top_k"),
    ("tgi", {"stop": ["a"] * 5}, "parameters.stop"),
    ("tgi", {"max_new_tokens": 0}, "parameters.max_new_tokens"),
    ("tgi", {"seed": -1}, "parameters.seed"),
    ("watsonx", {"length_penalty": {"decay_factor": 2}}, "parameters.length_penalty"),
    ("watsonx", {"decoding_method": "beam"}, "parameters.decoding_method"),
    ("watsonx", {"return_options": {"token_ranks": True}}, "parameters.return_options.token_ranks"),
    ("watsonx", {"top_k": 101}, "parameters.top_k"),
    ("watsonx", {"min_new_tokens": 30}, "min_tokens"),
    ("watsonx", {"stop_sequences": [""]}, "parameters.stop_sequences"),
    ("watsonx", {"time_limit": 0}, "parameters.time_limit"),
    ("watsonx", {"prompt_variables": {"a": "b"}}, "parameters.prompt_variables"),
    ("bedrock", {"top_k": 3}, "top_k"),
    ("bedrock", {"max_gen_len": 2049}, "max_gen_len"),
    ("bedrock", {"temperature": 1.1}, "temperature"),
    ("bedrock", {"images": ["x"]}, "images"),
    ("bedrock", {"prompt": ""}, "prompt"),
    ("bedrock", {"prompt": None}, "prompt"),
    ("sagemaker", {"num_beams": 4}, "parameters.num_beams"),
]


def test_what_cannot_be_served_is_refused_by_name() -> None:
    async def test(service: Service) -> None:
        for vendor, parameters, name in REFUSED:
            response = await getattr(service, vendor)(**parameters)
            assert response.status_code == (422 if vendor in ("tgi", "sagemaker") else 400), (vendor, parameters)
            assert message(vendor, response).startswith(name), (vendor, parameters)
        assert service.engine.requests == []
        service.app.state.gateway.close()

    run(test)


def message(vendor: str, response: httpx.Response) -> str:
    """From the body in the vendor's form, which must be that exactly."""
    body = response.json()
    if vendor == "watsonx":
        assert body["status_code"] == response.status_code
        assert body["trace"] == response.headers["x-request-id"]
        return str(body["errors"][0]["message"])
    if vendor == "bedrock":
        assert response.headers["x-amzn-errortype"].endswith("Exception")
        return str(body["message"])
    assert set(body) == {"error", "error_type"}
    return str(body["error"])


@pytest.mark.parametrize("vendor", ALL)
def test_overload_and_failures_in_each_form(vendor: str) -> None:
    async def test(service: Service) -> None:
        service.engine.error = ApiError(429, "too many tokens wait", headers={"Retry-After": "3"})
        response = await getattr(service, vendor)()
        assert (response.status_code, response.headers["retry-after"]) == (429, "3")
        assert message(vendor, response) == "too many tokens wait"
        service.engine.error = None
        service.engine.script = [None]
        response = await getattr(service, vendor)()
        assert response.status_code == 503
        assert "a stage died" in message(vendor, response)
        assert response.headers["retry-after"] == "5"

    run(test)


def test_streams_that_break_say_so_in_each_form() -> None:
    async def test(service: Service) -> None:
        service.engine.script = [500, 501, None]
        assert sse((await service.tgi("/generate_stream")).text)[-1]["error_type"] == "overloaded"
        text = (await service.watsonx("/ml/v1/text/generation_stream")).text
        assert text.split("\n\n")[-2].splitlines()[1] == "event: error"
        assert sse(text)[-1]["errors"][0]["code"] == "service_unavailable"
        buffer = EventStreamBuffer()
        buffer.add_data((await service.bedrock("invoke-with-response-stream")).content)
        *_, last = list(buffer)
        assert last.headers[":exception-type"] == "serviceUnavailableException"
        assert "a stage died" in json.loads(last.payload)["message"]

    run(test)


def test_where_keys_are_asked_for_they_go_as_bearer_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    key = "cv-" + "k" * 40
    tenant = {"name": "team-a", "keys": [hashlib.sha256(key.encode()).hexdigest()]}
    monkeypatch.setenv("CARAVAN_TEST_KEYS", json.dumps({"tenants": [tenant]}))

    async def test(service: Service) -> None:
        for vendor in ALL:
            response = await getattr(service, vendor)()
            assert response.status_code in (401, 403)
            assert "API key" in message(vendor, response)
        service.client.headers["Authorization"] = f"Bearer {key}"
        for vendor in ALL:
            assert (await getattr(service, vendor)()).status_code == 200
        assert {request.tenant for request in service.engine.requests} == {"team-a"}

    async def main() -> None:
        await test(Service(ALL, {"auth": {"required": True, "keys_env": "CARAVAN_TEST_KEYS"}}))

    asyncio.run(main())


def test_the_document_has_every_body_with_an_example() -> None:
    async def test(service: Service) -> None:
        paths = (await service.client.get("/openapi.json")).json()["paths"]
        for path, operations in paths.items():
            if "post" in operations and path != "/v1/cache/reset":  # which has none
                content = operations["post"]["requestBody"]["content"]["application/json"]
                assert content.get("example") or content.get("examples"), path
        example = paths["/generate"]["post"]["requestBody"]["content"]["application/json"]["example"]
        assert (await service.post("/generate", example)).status_code == 200

    run(test)


def test_wrong_methods_models_and_versions_in_each_form() -> None:
    async def test(service: Service) -> None:
        assert set((await service.client.get("/generate")).json()) == {"error", "error_type"}
        assert "errors" in (await service.client.get("/ml/v1/text/generation")).json()
        assert "message" in (await service.client.get(f"/model/{HOSTED}/invoke")).json()
        no_version = await service.post("/ml/v1/text/generation", {"model_id": HOSTED, "input": "x"})
        assert no_version.json()["errors"][0]["message"].startswith("version")
        wrong = await service.post(f"/ml/v1/text/generation{VERSION}", {"model_id": "x", "input": "x"})
        assert (wrong.status_code, wrong.json()["errors"][0]["code"]) == (404, "model_not_supported")
        wrong = await service.post("/endpoints/x/invocations", {"inputs": "x"})
        assert (wrong.status_code, wrong.headers["x-amzn-errortype"]) == (400, "ValidationError")
        assert (await service.post(f"/endpoints/{HOSTED}/invocations", [])).headers["x-amzn-errortype"] == "ModelError"

    run(test)

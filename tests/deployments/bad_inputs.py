"""What clients should not send and servers must survive: values for the fields of every route, bodies, headers."""

import json
from typing import Any

NAME, LONGEST_BODY = "made-up", 8_000_000
LONG = "x" * 3000
NAN, INFINITY = float("nan"), float("inf")

VALUES: list[Any] = [
    None, True, False, 0, 1, 2, 3, 5, 6, 20, 21, 129, -1, -2, 255, 256, 257, 10**9, 10**18, 2**31, 2**63, 2**64, 10**30,
    -(2**63) - 1, -0.0, 0.5, 1.1, 2.1, -2.1, 1e-9, 1e9, 1e308, 5e-324, NAN, INFINITY, -INFINITY,
    "", " ", "x", "1", "true", "null", "\x00", "\ud800", "\udfff\ud800", "é🌸\u202e", LONG, "<s></s>",
    "[INST] x [/INST]", "<<SYS>>", "<|im_start|>system\n<|im_end|>", "text", "json_object",
    [], [[]], [None], [""], ["x"], ["a"] * 5, ["a", 1], [0], [1, 2, 3], [[1], [2]], [-1], [49151], [49152], [10**30],
    [1.5], [True], [LONG], [{"type": "function", "function": {"name": "f"}}],
    {}, {"": None}, {"type": "text"}, {"type": "json_object"}, {"type": "nonsense"}, {"1": 100}, {"1": 101}, {"-1": 1},
    {"x": 1}, {"99999999": 1}, {"include_usage": True}, {"include_usage": 1}, {"a": {"b": {"c": []}}},
]  # fmt: skip

SCHEMAS: list[Any] = [
    {}, True, [], "x", {"type": "object"}, {"type": "nonsense"}, {"type": "string", "pattern": "("},
    {"type": "string", "pattern": "(a+)+$"}, {"$ref": "#/definitions/x"}, {"$ref": "http://127.0.0.1:9/x"},
    {"definitions": {"x": {"$ref": "#/definitions/x"}}, "$ref": "#/definitions/x"},
    {"type": "array", "minItems": 10**9}, {"type": "string", "maxLength": 10**9}, {"enum": []},
    {"enum": list(range(2000))}, {"not": {}}, {"allOf": [False]}, {"type": "integer", "minimum": 5, "maximum": 1},
    {"type": "object", "required": ["a"]}, {"type": "object", "properties": {"\ud800": {"type": "null"}}},
    {"const": "\x00"}, {"type": "string", "format": "x"},
    {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(200)}},
]  # fmt: skip
REGEXES: list[Any] = [
    "", "(", "a{99999}", "(a|a)*b", "[", r"\p{Zzzz}", "(?<=a)b", "a" * 2000, "\ud800", "(((((a*)*)*)*)*)*", "$^", ".*",
    None, 5, [], "\\", "(?P<x>a)(?P=x)", "[^\x00-\U0010ffff]",
]  # fmt: skip
GRAMMARS = ["root ::=", "root ::= root", 'root ::= "a" | b', 'root ::= root "a" | "b"', "\x00", 'root ::= ("a"*)*']
CHOICES: list[Any] = [[], [""], ["a", "a"], ["a"] * 1000, [1], "x", [LONG], ["\ud800"], {}]


def _json_schema(value: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": value}


CONSTRAINTS: list[tuple[str, Any]] = [
    *(("response_format", _json_schema({"name": "x", "schema": schema})) for schema in SCHEMAS),
    *(("response_format", _json_schema(odd)) for odd in (None, [], "x", {}, {"name": 1, "schema": {}})),
    *(("guided_json", schema) for schema in SCHEMAS),
    *(("guided_regex", regex) for regex in REGEXES),
    *(("guided_grammar", text) for text in (*GRAMMARS, *REGEXES)),
    *(("guided_choice", choice) for choice in CHOICES),
    *(("structured_outputs", {name: "("}) for name in ("json", "regex", "grammar", "choice", "x")),
]

USER = {"role": "user", "content": "x"}
CONTENTS: list[Any] = [
    None, "", "   ", [], [{"type": "text", "text": "x"}], [{"type": "text"}], [1], 5, {"text": "x"},
    [{"type": "image_url", "image_url": {"url": "http://x"}}], "\ud800\x00<|im_end|><s></s>[INST]<<SYS>>", LONG,
    "".join(chr(c) for c in range(0xFDD0, 0xFDF0)),
]  # fmt: skip
MESSAGES: list[Any] = [
    *([{"role": "user", "content": content}] for content in CONTENTS),
    [], [None], ["x"], [[]], [{}], [{"role": "user"}], [{"content": "x"}], [{"role": "wizard", "content": "x"}], USER,
    [{"role": None, "content": "x"}], [{"role": "system", "content": "x"}], [{"role": "system", "content": "x"}] * 2,
    [{"role": "system", "content": "x"}, {"role": "system", "content": "x"}, USER], [USER] * 2, [USER] * 5000,
    [{"role": "assistant", "content": "x"}], [USER, {"role": "system", "content": "last"}],
    [{**USER, "tool_calls": []}], [{"role": "tool", "content": "x", "tool_call_id": "y"}], [{**USER, "name": "\ud800"}],
    [{**USER, "tool_calls": [1]}],
]  # fmt: skip

CHAT = {"model": NAME, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
COMPLETION = {"model": NAME, "prompt": "hi", "max_tokens": 2}
TGI_BODY = {"inputs": "hi", "parameters": {"max_new_tokens": 2}}
WATSONX_BODY = {"model_id": NAME, "input": "hi", "parameters": {"max_new_tokens": 2}}
LLAMA_BODY = {"prompt": "hi", "max_gen_len": 2}
DIALOG_BODY = {"inputs": [CHAT["messages"]], "parameters": {"max_new_tokens": 2}}

OPENAI = [
    "model", "max_tokens", "max_completion_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p",
    "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "seed", "stop", "stop_token_ids",
    "include_stop_str_in_output", "stream", "stream_options", "n", "best_of", "echo", "suffix", "logprobs",
    "top_logprobs", "user", "ignore_eos", "priority", "tools", "tool_choice", "functions", "function_call",
    "response_format", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs",
    "modalities", "audio", "prediction", "chat_template", "parallel_tool_calls", "regex", "ebnf", "grammar",
    "json_schema", "add_generation_prompt", "continue_final_message", "chat_template_kwargs", "skip_special_tokens",
    "return_token_ids", "return_tokens_as_token_ids", "truncate_prompt_tokens", "truncation_side", "parse_special",
    "add_special_tokens", "store", "unheard_of",
]  # fmt: skip
TGI = [
    "adapter_id", "best_of", "decoder_input_details", "details", "do_sample", "frequency_penalty", "grammar",
    "max_new_tokens", "repetition_penalty", "return_full_text", "seed", "stop", "temperature", "top_k", "top_n_tokens",
    "top_p", "truncate", "typical_p", "watermark", "unheard_of",
]  # fmt: skip
WATSONX = [
    "decoding_method", "length_penalty", "max_new_tokens", "min_new_tokens", "prompt_variables", "random_seed",
    "repetition_penalty", "return_options", "include_stop_sequence", "stop_sequences", "temperature", "time_limit",
    "top_k", "top_p", "truncate_input_tokens", "unheard_of",
]  # fmt: skip
RESPONSES = [
    "model", "input", "instructions", "max_output_tokens", "text", "tools", "tool_choice", "parallel_tool_calls",
    "top_logprobs", "include", "truncation", "metadata", "stream", "stream_options", "store", "structured_outputs",
    "temperature", "stop", "logit_bias", "seed", "min_tokens", "truncate_prompt_tokens", "previous_response_id",
]  # fmt: skip
TOKENIZE = [
    "model", "prompt", "messages", "tools", "add_special_tokens", "parse_special", "add_generation_prompt",
    "continue_final_message", "chat_template_kwargs", "return_token_strs",
]  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
CALLING = {"model": NAME, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "tools": TOOLS}
FLAT = {"model": NAME, "input": "hi", "max_output_tokens": 8}
ITEMS: list[Any] = [
    [{"type": kind, **item}]
    for kind in ("function_call", "function_call_output", "message", "reasoning", "item_reference", "x", None, 5)
    for item in (
        {}, {"call_id": "1", "name": "f", "arguments": "{"}, {"call_id": 5, "name": 5, "arguments": 5},
        {"role": "user", "content": None}, {"role": "x"}, {"output": [], "call_id": None}, {"output": {"a": []}},
    )
]  # fmt: skip
TOOL_VALUES: list[Any] = [
    *([{"type": "function", "function": {"name": "f", "parameters": schema}}] for schema in SCHEMAS),
    *([{"type": "function", "name": "f", "parameters": schema, "strict": False}] for schema in SCHEMAS),
    *([{"type": "function", "function": {"name": name}}] for name in ("", "a b", "\ud800", "x" * 200, None, 5)),
    TOOLS * 2, TOOLS * 200, [{"type": "custom", "custom": {"name": "x"}}], [{"type": "function", "function": None}],
]  # fmt: skip
VERSION = "?version=2024-01-01"

# path, a body that is good, its fields, and those of its "parameters"
ROUTES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("/v1/chat/completions", CHAT, ["messages", *OPENAI], []),
    ("/v1/chat/completions", {**CHAT, "stream": True}, ["messages", *OPENAI], []),
    ("/v1/chat/completions", CALLING, OPENAI, []),
    ("/v1/chat/completions", {**CALLING, "tool_choice": "required", "stream": True}, OPENAI, []),
    ("/v1/responses", FLAT, RESPONSES, []),
    ("/v1/responses", {**FLAT, "stream": True, "tools": [{"type": "function", "name": "f"}]}, RESPONSES, []),
    ("/v1/completions", COMPLETION, ["prompt", *OPENAI], []),
    ("/v1/completions", {**COMPLETION, "stream": True, "logprobs": 2}, ["prompt", *OPENAI], []),
    ("/tokenize", {"prompt": "hi"}, TOKENIZE, []),
    ("/detokenize", {"tokens": [1]}, ["model", "tokens"], []),
    ("/generate", TGI_BODY, ["inputs", "parameters", "stream"], TGI),
    ("/generate_stream", TGI_BODY, ["inputs", "parameters"], TGI),
    ("/", TGI_BODY, ["inputs", "parameters", "stream"], TGI),
    (f"/ml/v1/text/generation{VERSION}", WATSONX_BODY, [*WATSONX_BODY, "project_id", "moderations"], WATSONX),
    (f"/ml/v1/text/generation_stream{VERSION}", WATSONX_BODY, ["input"], WATSONX),
    (f"/ml/v1/text/tokenization{VERSION}", {"model_id": NAME, "input": "hi"}, [*WATSONX_BODY], ["return_tokens"]),
    (f"/model/{NAME}/invoke", LLAMA_BODY, ["prompt", "max_gen_len", "temperature", "top_p", "images", "x"], []),
    (f"/model/{NAME}/invoke-with-response-stream", LLAMA_BODY, ["prompt", "max_gen_len"], []),
    ("/invocations", TGI_BODY, ["inputs", "parameters", "stream"], TGI),
    (f"/endpoints/{NAME}/invocations", DIALOG_BODY, ["inputs", "stream"], ["max_new_tokens", "temperature", "top_p"]),
    (f"/endpoints/{NAME}/invocations-response-stream", TGI_BODY, ["inputs", "stream"], ["details", "seed"]),
]


def dumped(body: Any) -> bytes:
    """JSON, or what is near it: NaN and lone surrogates too."""
    return json.dumps(body).encode()


def _completion(fields: bytes) -> bytes:
    return b'{"model": "made-up", ' + fields + b"}"


WHOLE = dumped(CHAT)
BODIES: list[bytes] = [
    b"", b" ", b"{", b"}", b"[]", b"null", b"1", b'"x"', b"true", b"\xef\xbb\xbf" + WHOLE, b"\xff\xfe\xfd",
    WHOLE.decode().encode("utf-16"), WHOLE.decode().encode("utf-32"), WHOLE[:-1], WHOLE + b"x", WHOLE + WHOLE,
    WHOLE + b"\x00", b"\x00" + WHOLE, b"[" * 100_000, b'{"a":' * 100_000, b"[" * 50_000 + b"]" * 50_000,
    _completion(b'"prompt": "hi", "user": ' + b"[" * 900 + b"]" * 900),
    _completion(b'"model": "x", "prompt": "a", "prompt": "b"'), _completion(b'"prompt": "hi", "temperature": 1e400'),
    _completion(b'"prompt": "hi", "temperature": -0'), _completion(b'"prompt": "hi", "n": 1e0'),
    _completion(b'"prompt": "hi", "seed": -0.0'), _completion(b'"prompt": "\\ud800"'),
    _completion(b'"prompt": "\\u0000"'), _completion(b'"prompt": "\xed\xa0\x80"'), _completion(b'"prompt": "\xc0\x80"'),
    _completion(b'"prompt": "hi", "max_tokens": ' + b"9" * 5000),
    _completion(b'"prompt": "hi", "top_p": 0.' + b"1" * 5000),
    _completion(b'"prompt": "hi", "logit_bias": {' + b",".join(b'"%d": 1' % i for i in range(2000)) + b"}"),
    _completion(b'"prompt": [' + b",".join([b"1"] * 100_000) + b"]"),
    _completion(b'"prompt": "' + b"a " * 200_000 + b'"'),
    _completion(b'"prompt": "hi", "stop": "' + b"x" * 1_000_000 + b'"'),
    _completion(b'"prompt": "hi", "user": "' + b"x" * 1_000_000 + b'"'),
    b'{"model": "' + b"m" * 1_000_000 + b'", "prompt": "hi"}', b"x" * (LONGEST_BODY + 1),
]  # fmt: skip
HEADERS: list[dict[str, str]] = [
    {}, {"Content-Type": "text/plain"}, {"Content-Type": "application/json; charset=utf-16"}, {"Content-Type": ""},
    {"Content-Type": "multipart/form-data; boundary=x"}, {"Content-Encoding": "gzip"}, {"Accept": "image/png"},
    {"X-Request-Id": "x" * 5000}, {"X-Request-Id": "a b"}, {"X-Request-Id": ""}, {"Authorization": "Bearer"},
    {"Authorization": "Basic eDp5"}, {"Authorization": "Bearer " + "x" * 5000}, {"X-Stainless-Retry-Count": "-1"},
    {"OpenAI-Organization": "x"}, {"Range": "bytes=0-1"}, {"If-None-Match": "*"}, {"Expect": "100-continue"},
    {"X-Forwarded-For": "::1, x"}, {"x-api-key": "\\"}, {"X-Long": "x" * 40_000}, {"Origin": "null"},
    {"Cookie": "a=b;;"},
]  # fmt: skip
METHODS = ("GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW")
OTHER_PATHS = [
    "/v1/models", f"/v1/models/{NAME}", "/v1/models/%00", "/v1/models/" + "x" * 3000, "//", "/v1/../v1/models", "/%ff",
    "/info", "/ping", "/health", "/version", "/openapi.json", f"/ml/v1/foundation_model_specs{VERSION}",
    "/ml/v1/foundation_model_specs", "/v2/projects/%0d%0a", "/v2/spaces/x", "/ml/wml_services/v2/version",
]  # fmt: skip

"""OpenAI's completion requests, as far as a text model serves them.

Unknown fields are ignored and null means "not given", as OpenAI does it. A known field that this service cannot honour
is refused by name, never dropped silently: see openai_fields.py.
"""

import json
import math
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import msgspec
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)

from deployments.errors import ApiError, bad_request
from deployments.routes.openai_fields import REFUSED
from deployments.routes.openai_tools import CalledFunction, Functions, ToolCall, Tools, ToolUse, function_use, tool_use
from model.sampling_params import MAX_LOGPROBS, SamplingParams


def _number(value: Any) -> Any:
    """JSON numbers only: no strings, no booleans, nothing that is not finite."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise ValueError("must be a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("must be a finite number")
    return value


def _whole(value: Any) -> Any:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise ValueError("must be a whole number")
    return value


Number = Annotated[float, BeforeValidator(_number)]
Whole = Annotated[int, BeforeValidator(_whole)]


def _stops(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return []
    if (
        not isinstance(stops, list)
        or len(stops) > 4
        or not all(isinstance(s, str) and 0 < len(s) <= 1000 for s in stops)
    ):
        raise ValueError("must be a string or up to 4 strings, none of them empty or longer than 1000 characters")
    return stops


def _absent(value: Any) -> None:
    if value:
        raise ValueError("is not supported: this model reads and writes text only")


def tool_choice_kind(value: Any) -> Any:
    """A choice of tools is judged together with the tools; here it must only be of a kind that can be one."""
    if value is not None and not isinstance(value, str | dict):
        raise ValueError("must be a string or an object")
    return value


def _biases(value: dict[str, float] | None) -> dict[int, float] | None:
    if value is None:
        return None
    if len(value) > 1024:
        raise ValueError("has more than 1024 entries")
    try:
        return {int(token): bias for token, bias in value.items()}
    except ValueError:
        raise ValueError("keys must be token ids") from None


IDS_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
TEXTS_SCHEMA = {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1}
PROMPT_SCHEMA = {
    "description": "a text, token ids, or several of either",
    "anyOf": [
        {"type": "string", "minLength": 1},
        IDS_SCHEMA,
        TEXTS_SCHEMA,
        {"type": "array", "items": IDS_SCHEMA, "minItems": 1},
    ],
}
STOP_SCHEMA = {
    "anyOf": [
        {"type": "string", "minLength": 1, "maxLength": 1000},
        {"type": "array", "items": {"type": "string", "minLength": 1, "maxLength": 1000}, "maxItems": 4},
        {"type": "null"},
    ]
}


class Body(BaseModel):
    """A request's JSON object. Unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _flags(cls, value: Any, info: ValidationInfo) -> Any:
        """A boolean is true or false, never a word or a number for it."""
        assert info.field_name is not None
        kind = cls.model_fields[info.field_name].annotation
        if bool in (kind, *get_args(kind)) and value is not None and not isinstance(value, bool):
            raise ValueError("must be true or false")
        return value


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Sampling(Body):
    """How an answer is drawn, on every endpoint."""

    model: str | None = None  # there is one
    min_tokens: Annotated[Whole, Field(ge=0)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    top_k: Annotated[Whole, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=10)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[dict[str, Annotated[Number, Field(ge=-100, le=100)]] | None, AfterValidator(_biases)] | None
    ) = None
    seed: Annotated[Whole, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Annotated[list[str], BeforeValidator(_stops), WithJsonSchema(STOP_SCHEMA)] = []
    stop_token_ids: Annotated[list[Whole], Field(max_length=64)] | None = None
    include_stop_str_in_output: bool | None = None
    stream: bool | None = None
    user: Annotated[str, Field(max_length=1024)] | None = None
    ignore_eos: bool | None = None
    structured_outputs: dict[str, Any] | None = None
    priority: Annotated[Whole, Field(ge=-1000, le=1000)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    skip_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[Whole, Field(ge=-1, lt=2**31)] | None = None
    truncation_side: Literal["left", "right"] | None = None

    def check(self) -> None:
        """What fields say together. Raises `ApiError`."""
        if self.truncate_prompt_tokens == 0:
            message = "truncate_prompt_tokens: must be at least 1, or -1 for as many as fit"
            raise bad_request(message, "truncate_prompt_tokens")


class SamplingFields(Sampling):
    """What completions and chats share."""

    max_tokens: Annotated[Whole, Field(ge=0)] | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[Whole, Field(ge=1, le=128)] | None = None
    response_format: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[Any] | None = None
    guided_grammar: str | None = None
    regex: str | None = None
    ebnf: str | None = None
    grammar: str | None = None
    json_schema: dict[str, Any] | str | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def wants_continuous_usage(self) -> bool:
        return self.wants_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    @property
    def num_logprobs(self) -> int | None:
        raise NotImplementedError

    @property
    def budget(self) -> int | None:
        """Output tokens the client asked for, or None."""
        return self.max_tokens

    def check(self) -> None:
        super().check()
        if self.stream_options is not None and self.stream_options.include_usage and not self.stream:
            raise bad_request("stream_options is only allowed when stream is true", "stream_options")

    def with_defaults(self, defaults: Mapping[str, Any]) -> Self:
        """The same, and what it does not say as the model's makers have it."""
        return self.model_copy(update={name: v for name, v in defaults.items() if getattr(self, name) is None})

    def sampling(self, max_tokens: int, eos_ids: frozenset[int]) -> SamplingParams:
        """As the engine wants it. A request without a seed gets one, so that it can be resumed elsewhere.

        Raises `ApiError` for what the engine does not take.
        """
        try:
            return self._sampling(max_tokens, eos_ids)
        except ValueError as error:
            raise bad_request(str(error), str(error).split("[")[0].split()[0]) from None

    def _sampling(self, max_tokens: int, eos_ids: frozenset[int]) -> SamplingParams:

        def given(value: Any, default: Any) -> Any:
            return default if value is None else value

        top_k = given(self.top_k, 0)
        return SamplingParams(
            max_tokens=max_tokens,
            seed=given(self.seed, secrets.randbits(63)),
            temperature=given(self.temperature, 1.0),
            top_p=given(self.top_p, 1.0),
            top_k=max(top_k, 0),  # -1 means "off" to some clients
            min_p=given(self.min_p, 0.0),
            repetition_penalty=given(self.repetition_penalty, 1.0),
            presence_penalty=given(self.presence_penalty, 0.0),
            frequency_penalty=given(self.frequency_penalty, 0.0),
            logit_bias=self.logit_bias or {},  # type: ignore[arg-type]  # AfterValidator made the keys ints
            stop_token_ids=tuple(sorted((set() if self.ignore_eos else eos_ids) | set(self.stop_token_ids or ()))),
            min_tokens=given(self.min_tokens, 0),
            logprobs=self.num_logprobs,
        )


class CompletionRequest(SamplingFields):
    """POST /v1/completions."""

    prompt: Annotated[str | list[Any], WithJsonSchema(PROMPT_SCHEMA)]
    suffix: str | None = None
    echo: bool | None = None
    best_of: Annotated[Whole, Field(ge=1, le=20)] | None = None
    logprobs: Annotated[Whole, Field(ge=0, le=5)] | None = None
    add_special_tokens: bool | None = None
    parse_special: bool | None = None  # names of control tokens in the prompt are those tokens

    @property
    def num_logprobs(self) -> int | None:
        """What is shown, or 0 where answers are only compared by them."""
        return 0 if self.logprobs is None and self.candidates > (self.n or 1) else self.logprobs

    @property
    def candidates(self) -> int:
        """Answers to compute for each prompt."""
        return self.best_of or self.n or 1

    @property
    def prompt_only(self) -> bool:
        return self.max_tokens == 0

    def _sampling(self, max_tokens: int, eos_ids: frozenset[int]) -> SamplingParams:
        found = super()._sampling(max_tokens, eos_ids)
        return msgspec.structs.replace(found, prompt_logprobs=self.logprobs if self.echo else None)

    def check(self) -> None:
        """What fields say together. Raises `ApiError`."""
        super().check()
        if self.candidates < (self.n or 1):
            raise bad_request(f"best_of: must not be below n, which is {self.n}", "best_of")
        if self.stream and self.candidates > (self.n or 1):
            raise bad_request("best_of: must equal n when stream is true, for all answers must be there", "best_of")
        if self.prompt_only and not self.echo:
            raise bad_request("max_tokens: must be at least 1, unless echo is true", "max_tokens")
        if self.echo and self.suffix:
            raise bad_request("echo: is not possible with a suffix", "echo")


TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}  # kind -> its key


class ChatMessage(BaseModel):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Any] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: CalledFunction | None = None
    audio: Annotated[None, BeforeValidator(_absent)] = None

    @property
    def text(self) -> str:
        """Content as plain text. Raises `ApiError` for parts that are not text."""
        if self.content is None:
            return self.refusal or ""
        return self.content if isinstance(self.content, str) else "".join(map(text_of_part, self.content))

    @property
    def as_template_input(self) -> dict[str, Any]:
        """In the form of today, in which every call and every result has an id."""
        role = {"developer": "system", "function": "tool"}.get(self.role, self.role)
        found: dict[str, Any] = {"role": role, "content": self.text}
        if calls := self._calls():
            found["tool_calls"] = calls
        if role == "tool":
            found["tool_call_id"] = self.tool_call_id or self.name or ""
        if self.name is not None:
            found["name"] = self.name
        return found

    def _calls(self) -> list[dict[str, Any]]:
        calls = list(self.tool_calls or ())
        if self.function_call is not None:
            calls.append(ToolCall(id=self.function_call.name, function=self.function_call))
        return [
            {
                "id": call.id or call.function.name,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _as_json(call.function.arguments)},
            }
            for call in calls
        ]


def text_of_part(part: Any) -> str:
    """Raises `ApiError` for a part that is not text."""
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    text = part.get(TEXT_PARTS.get(str(kind), "")) if isinstance(part, dict) else None
    if not isinstance(text, str):
        raise bad_request(f"this model reads text only, not content parts of type {str(kind)[:40]}", "messages")
    return text


def _as_json(arguments: str | dict[str, Any]) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


class ChatRequest(SamplingFields):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    max_tokens: Annotated[Whole, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[Whole, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Tools | None = None
    tool_choice: Annotated[Any, BeforeValidator(tool_choice_kind)] = None
    parallel_tool_calls: bool | None = None
    functions: Functions | None = None
    function_call: Annotated[Any, BeforeValidator(tool_choice_kind)] = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def budget(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    def check(self) -> None:
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise bad_request("top_logprobs needs logprobs to be true", "top_logprobs")
        if self.continue_final_message and self.add_generation_prompt:
            raise bad_request("continue_final_message: not beside add_generation_prompt", "continue_final_message")
        if self.tools and self.functions:
            raise bad_request("functions: not beside tools, which is their newer name", "functions")

    def tool_use(self) -> ToolUse | None:
        """What the answer may call. Raises `ApiError`."""
        if self.functions or self.function_call is not None:
            return function_use(self.functions, self.function_call)
        return tool_use(self.tools, self.tool_choice, self.parallel_tool_calls)


B = TypeVar("B", bound=Body)
R = TypeVar("R", bound=Sampling)


def parse_body(kind: type[B], body: Any) -> B:
    """A validated body. Raises `ApiError` 400 that names the field."""
    if not isinstance(body, dict):
        raise bad_request(f"the body must be a JSON object, not {_kind_of(body)}")
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise _explain(error) from None


def parse(kind: type[R], body: Any) -> R:
    """The same of a request to generate, which may also be refused for what this service cannot do."""
    if isinstance(body, dict):
        refuse_fields(kind, body)
    request = parse_body(kind, body)
    request.check()
    return request


def refuse_fields(kind: type[BaseModel], body: dict[str, Any]) -> None:
    """Raise `ApiError` for what this service cannot do and a body asks for, unless `kind` serves it."""
    for name in body.keys() & REFUSED.keys() - kind.model_fields.keys():
        value, refused = body[name], REFUSED[name]
        if value is not None and value not in refused.harmless:
            raise bad_request(f"{name} is not supported by this service with this value: {refused.instead}", name)


def _explain(error: ValidationError) -> ApiError:
    """The first finding, with the field's name; never the client's values, which may be prompt text."""
    first = error.errors(include_input=False, include_url=False)[0]
    kinds = ("str", "list", "dict")  # of a union: no part of the path
    loc = [part for part in first["loc"] if not (isinstance(part, str) and ("[" in part or part in kinds))]
    param = str(loc[0]) if loc else None
    path = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in loc).lstrip(".")
    message = "is required" if first["type"] == "missing" else first["msg"].removeprefix("Value error, ")
    return bad_request(f"{path}: {message[:1].lower() + message[1:]}", param)


def _kind_of(value: Any) -> str:
    return {list: "an array", str: "a string", type(None): "null", bool: "a boolean"}.get(type(value), "a number")

"""What the OpenAPI document shows of OpenAI's routes; every request in it is sent by a test."""

from typing import Any

Json = dict[str, Any]

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 40}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
}
CHAT_EXAMPLES: dict[str, Json] = {
    "a question": {"messages": QUESTION, "max_completion_tokens": 64},
    "streamed": {"messages": QUESTION, "stream": True, "stream_options": {"include_usage": True}},
    "as JSON": {
        "messages": [{"role": "user", "content": "Make up a person."}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}},
    },
    "with a function": {
        "messages": QUESTION,
        "tools": [{"type": "function", "function": {"name": "make_person", "parameters": PERSON}}],
        "tool_choice": "required",
    },
    "one of some choices": {"messages": QUESTION, "guided_choice": ["Paris", "Lyon"], "temperature": 0},
}
TEXT_EXAMPLES: dict[str, Json] = {
    "a text": {"prompt": "Once upon a time", "max_tokens": 32, "temperature": 0.7, "seed": 1},
    "several texts, the best of several answers": {"prompt": ["One, two,", "A, B,"], "n": 1, "best_of": 4},
    "the probability of a text": {"prompt": "The sky is blue.", "max_tokens": 0, "echo": True, "logprobs": 1},
}
HEAD = {"created": 1790000000, "model": "", "system_fingerprint": "fp_0123456789ab"}
USAGE = {
    "prompt_tokens": 14, "completion_tokens": 2, "total_tokens": 16, "prompt_tokens_details": {"cached_tokens": 0},
    "completion_tokens_details": {"accepted_prediction_tokens": 0},
}  # fmt: skip
CHAT_ANSWER: Json = {
    "id": "chatcmpl-0123456789abcdef01234567",
    "object": "chat.completion",
    **HEAD,
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Paris.", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ],
    "usage": USAGE,
}
TEXT_ANSWER: Json = {
    "id": "cmpl-0123456789abcdef01234567",
    "object": "text_completion",
    **HEAD,
    "choices": [{"index": 0, "text": " there was", "logprobs": None, "finish_reason": "length"}],
    "usage": USAGE,
}
CHAT_EVENTS = 'data: {"choices": [{"index": 0, "delta": {"content": "Paris"}}], ...}\n\ndata: [DONE]\n\n'
TEXT_EVENTS = 'data: {"choices": [{"index": 0, "text": " there"}], ...}\n\ndata: [DONE]\n\n'
RESPONSES_EXAMPLES: dict[str, Json] = {
    "a question": {"input": "What is the capital of France?", "max_output_tokens": 64},
    "with instructions, streamed": {"instructions": "Be brief.", "input": QUESTION, "stream": True},
    "as JSON": {
        "input": "Make up a person.",
        "text": {"format": {"type": "json_schema", "name": "person", "schema": PERSON}},
    },
    "with a function": {
        "input": QUESTION,
        "tools": [{"type": "function", "name": "make_person", "parameters": PERSON}],
        "tool_choice": "required",
    },
}
RESPONSES_ANSWER: Json = {
    "id": "resp_0123456789abcdef01234567",
    "object": "response",
    "created_at": 1790000000,
    "status": "completed",
    "output": [
        {
            "id": "msg_0123456789abcdef01234567", "type": "message", "status": "completed", "role": "assistant",
            "content": [{"type": "output_text", "text": "Paris.", "annotations": []}],
        }
    ],
    "store": False,
}  # fmt: skip
RESPONSES_EVENTS = """event: response.output_text.delta
data: {"type": "response.output_text.delta", "sequence_number": 4, "delta": "Paris", ...}

event: response.completed
data: {"type": "response.completed", ...}

"""

"""LiteLLM against the service at argv[1]. It pins other versions than ours: it runs in its own process."""

import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it fetches a table of prices otherwise
import litellm

url, name, hosted, question, answer = sys.argv[1:]
litellm.suppress_debug_info = True
chat = {"model": f"openai/{name}", "api_base": f"{url}/v1", "api_key": "none", "temperature": 0, "max_tokens": 20}
ask = [{"role": "user", "content": question}]


def refusal(kind: type[Exception], **changes: object) -> str:
    """The text of the exception that a changed request must raise."""
    try:
        litellm.completion(**({"messages": ask, **chat, "max_retries": 0} | changes))
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


whole = litellm.completion(messages=ask, **chat)
assert whole.choices[0].message.content == answer, whole
assert whole.choices[0].finish_reason == "stop"
assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens

chunks = list(litellm.completion(messages=ask, stream=True, stream_options={"include_usage": True}, **chat))
assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == answer
assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens

text = litellm.text_completion(prompt="Once upon a time", **(chat | {"model": f"text-completion-openai/{name}"}))
assert text.choices[0].text.startswith(", the city of"), text

assert "maximum context length" in refusal(litellm.ContextWindowExceededError, max_tokens=5000)
assert "maximum context length" in refusal(
    litellm.ContextWindowExceededError, messages=[{"role": "user", "content": "word " * 600}]
)
assert "temperature" in refusal(litellm.BadRequestError, temperature=-1)
assert "nowhere" in refusal(litellm.NotFoundError, model="openai/nowhere")
refusal(litellm.RateLimitError, seed=109)  # which the service refuses with 429, as it does this at first:
assert litellm.completion(messages=ask, seed=103, max_retries=2, **chat).choices[0].message.content == answer

aws = {"aws_access_key_id": "x", "aws_secret_access_key": "x", "aws_region_name": "us-east-1"}
bedrock = litellm.completion(
    model=f"bedrock/invoke/{hosted}", messages=ask, max_tokens=8, temperature=0, aws_bedrock_runtime_endpoint=url, **aws
)
assert bedrock.usage.completion_tokens == 8
print("ok")

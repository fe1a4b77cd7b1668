"""IBM's client against the service at argv[1], whose certificate is argv[2]: it wants TLS."""

import sys
from collections.abc import Callable

from ibm_watsonx_ai import APIClient, Credentials
from ibm_watsonx_ai.foundation_models import ModelInference
from ibm_watsonx_ai.wml_client_error import ApiRequestFailure, WMLClientError

url, certificate, hosted, prompt, answer = sys.argv[1:]
client = APIClient(Credentials(url=url, token="a key", verify=certificate))
greedy = {"decoding_method": "greedy", "max_new_tokens": 20}
model = ModelInference(model_id=hosted, api_client=client, project_id="any", params=greedy)

whole = model.generate(prompt)["results"][0]
assert (whole["generated_text"], whole["stop_reason"]) == (answer, "eos_token"), whole
assert model.generate_text(prompt, params=greedy | {"max_new_tokens": 2}) == "The capital"
assert "".join(model.generate_text_stream(prompt)) == answer
events = list(model.generate_text_stream(prompt, raw_response=True))
last = events[-1]["results"][0]
assert (last["stop_reason"], last["generated_token_count"]) == ("eos_token", whole["generated_token_count"])
assert events[0]["results"][0]["input_token_count"] == whole["input_token_count"]
assert model.tokenize("hi there", return_tokens=True)["result"] == {"token_count": 2, "tokens": ["hi", " there"]}


def refusal(kind: type[Exception], call: Callable[[], object]) -> str:
    """The text of the exception that a call must raise."""
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


def generate(**parameters: object) -> object:
    return model.generate(prompt, params=parameters)


penalty = {"decay_factor": 2.0, "start_index": 5}
assert "length_penalty" in refusal(ApiRequestFailure, lambda: generate(length_penalty=penalty))
assert "maximum context length" in refusal(ApiRequestFailure, lambda: generate(max_new_tokens=5000))
unknown = refusal(WMLClientError, lambda: ModelInference(model_id="nowhere", api_client=client, project_id="any"))
assert hosted in unknown  # it lists what there is
# Refused with 429 at first: the client tries again.
assert model.generate_text(prompt, params=greedy | {"random_seed": 105}) == answer
print("ok")

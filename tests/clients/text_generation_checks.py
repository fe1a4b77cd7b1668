"""Hugging Face's client for text-generation-inference against the service at argv[1]."""

import json
import sys

from text_generation import Client
from text_generation.errors import OverloadedError, ValidationError
from text_generation.types import FinishReason, Grammar, GrammarType

url, prompt, answer = sys.argv[1:]
client = Client(url, timeout=60)

whole = client.generate(prompt, max_new_tokens=20)
assert whole.generated_text == answer, whole
assert whole.details.finish_reason == FinishReason.EndOfSequenceToken
assert whole.details.generated_tokens == len(whole.details.tokens)

events = list(client.generate_stream(prompt, max_new_tokens=20))
assert "".join(e.token.text for e in events if not e.token.special) == answer
assert [e.token.id for e in events] == [t.id for t in whole.details.tokens]
assert events[-1].generated_text == answer
assert events[-1].details.generated_tokens == whole.details.generated_tokens

cut = client.generate(prompt, max_new_tokens=20, stop_sequences=["capital"], top_n_tokens=2)
assert (cut.generated_text, cut.details.finish_reason) == ("The capital", FinishReason.StopSequence)
assert [len(tops) for tops in cut.details.top_tokens] == [2] * len(cut.details.tokens)

digits = Grammar(type=GrammarType.Regex, value="[0-9]{4}")
assert client.generate(prompt, max_new_tokens=20, grammar=digits).generated_text.isdecimal()
schema = Grammar(
    type=GrammarType.Json, value={"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
)
assert isinstance(json.loads(client.generate(prompt, max_new_tokens=30, grammar=schema).generated_text)["a"], bool)

for parameters, kind in (
    ({"typical_p": 0.5}, ValidationError),
    ({"max_new_tokens": 5000}, ValidationError),
    ({"seed": 104, "do_sample": True}, OverloadedError),  # which the service refuses
):
    try:
        client.generate(prompt, **parameters)
    except kind:
        continue
    raise AssertionError(f"no {kind.__name__} for {parameters}")
print("ok")

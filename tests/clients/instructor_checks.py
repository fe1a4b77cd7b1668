"""Instructor in its default mode, which calls a tool by name, against the service at argv[1]."""

import sys
from typing import Literal

import instructor
import openai
from pydantic import BaseModel, Field

url, name = sys.argv[1:3]


class Weather(BaseModel):
    """What the weather is."""

    city: str = Field(max_length=12)
    sky: Literal["clear", "cloudy"]
    degrees: int = Field(ge=-40, le=50)


ask = {"model": name, "messages": [{"role": "user", "content": "The weather in Paris?"}], "max_retries": 0}
client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")

whole = instructor.from_openai(client).chat.completions.create(response_model=Weather, **ask)
assert isinstance(whole, Weather), whole
parts = list(instructor.from_openai(client).chat.completions.create_partial(response_model=Weather, **ask))
assert Weather.model_validate(parts[-1].model_dump()), parts[-1]
for mode in (instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA, instructor.Mode.RESPONSES_TOOLS):
    extra = {} if mode == instructor.Mode.RESPONSES_TOOLS else {"seed": 3}
    found = instructor.from_openai(client, mode=mode).chat.completions.create(response_model=Weather, **ask, **extra)
    assert isinstance(found, Weather), (mode, found)
print("ok")

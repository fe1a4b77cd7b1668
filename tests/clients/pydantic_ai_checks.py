"""Pydantic AI against the service at argv[1]: structured output by its default, which is a tool; chat and Responses."""

import asyncio
import sys
from typing import Literal

from pydantic import BaseModel, Field
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

url, name = sys.argv[1:3]


class Weather(BaseModel):
    """What the weather is."""

    city: str = Field(max_length=12)
    sky: Literal["clear", "cloudy"]


async def main() -> None:
    for kind in (OpenAIChatModel, OpenAIResponsesModel):
        model = kind(name, provider=OpenAIProvider(base_url=f"{url}/v1", api_key="none"))
        settings = {"max_tokens": 300, "seed": 1, "parallel_tool_calls": False}
        talker = Agent(model, model_settings={"max_tokens": 12, "temperature": 0})
        text = await talker.run("Who are you?")
        assert text.output, kind
        assert text.usage.output_tokens > 0, text.usage
        async with Agent(model, model_settings={"max_tokens": 12, "temperature": 0}).run_stream(
            "Who are you?"
        ) as stream:
            assert await stream.get_output() == text.output, kind
        structured = await Agent(model, output_type=Weather, model_settings=settings).run("The weather in Paris?")
        assert isinstance(structured.output, Weather), kind
        async with Agent(model, output_type=Weather, model_settings=settings).run_stream("The weather?") as stream:
            assert isinstance(await stream.get_output(), Weather), kind


asyncio.run(main())
print("ok")

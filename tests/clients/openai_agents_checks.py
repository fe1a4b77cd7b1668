"""OpenAI's Agents SDK against the service at argv[1]: its default, which asks /v1/responses, and its chat model."""

import asyncio
import sys
from typing import Literal

import agents
import openai
from pydantic import BaseModel

url, name = sys.argv[1:3]
agents.set_tracing_disabled(True)


class Weather(BaseModel):
    city: Literal["Paris", "Rome"]
    sky: Literal["clear", "cloudy"]


@agents.function_tool
def degrees(city: Literal["Paris", "Rome"]) -> int:
    """How warm it is."""
    return 21


async def main() -> None:
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none")
    for kind in (agents.OpenAIResponsesModel, agents.OpenAIChatCompletionsModel):
        model = kind(model=name, openai_client=client)
        short = agents.ModelSettings(max_tokens=60, temperature=0)
        talker = agents.Agent(name="talker", model=model, model_settings=short)
        whole = await agents.Runner.run(talker, "What is the capital of France?")
        assert whole.final_output, kind
        stream = agents.Runner.run_streamed(talker, "What is the capital of France?")
        events = [e.data async for e in stream.stream_events() if e.type == "raw_response_event"]
        deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
        assert "".join(deltas) == whole.final_output == stream.final_output, (kind, deltas)
        formed = agents.Agent(name="former", model=model, output_type=Weather)
        assert isinstance((await agents.Runner.run(formed, "The weather in Paris?")).final_output, Weather), kind

        forced = agents.ModelSettings(tool_choice="required", max_tokens=120, parallel_tool_calls=False)
        caller = agents.Agent(
            name="caller", model=model, tools=[degrees], model_settings=forced,
            tool_use_behavior="stop_on_first_tool",
        )  # fmt: skip
        assert str((await agents.Runner.run(caller, "How warm is Paris?")).final_output) == "21", kind
        streamed = agents.Runner.run_streamed(caller, "How warm is Paris?")
        names = [e.name async for e in streamed.stream_events() if e.type == "run_item_stream_event"]
        assert "tool_called" in names, names
        assert str(streamed.final_output) == "21", kind


asyncio.run(main())
print("ok")

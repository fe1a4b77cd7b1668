// Node's clients against the service at argv[2]: openai, Vercel's AI SDK and LangChain.
import assert from "node:assert";
import OpenAI from "openai";
import { zodFunction } from "openai/helpers/zod";
import { generateObject, generateText, streamText, tool } from "ai";
import { createOpenAI } from "@ai-sdk/openai";
import { ChatOpenAI } from "@langchain/openai";
import { z } from "zod";

const [, , url, name] = process.argv;
const base = `${url}/v1`, question = "What is the capital of France?";
const weather = z.object({ city: z.enum(["Paris", "Rome"]), sky: z.enum(["clear", "cloudy"]) });

const client = new OpenAI({ baseURL: base, apiKey: "none" });
const messages = [{ role: "user", content: "The weather in Paris?" }];
const called = await client.chat.completions.parse({
  model: name, messages, tools: [zodFunction({ name: "weather", parameters: weather })], tool_choice: "required",
  parallel_tool_calls: false,
});
weather.parse(called.choices[0].message.tool_calls[0].function.parsed_arguments);
const runner = client.chat.completions.stream({
  model: name, messages, tools: [zodFunction({ name: "weather", parameters: weather })], tool_choice: "required",
  parallel_tool_calls: false,
});
weather.parse(JSON.parse((await runner.finalMessage()).tool_calls[0].function.arguments));
const response = await client.responses.create({ model: name, input: question, temperature: 0 });
assert.ok(response.output_text.includes("Paris"), response.output_text);

const provider = createOpenAI({ baseURL: base, apiKey: "none" });
for (const model of [provider(name), provider.chat(name)]) {
  const text = await generateText({ model, prompt: question, temperature: 0, maxOutputTokens: 60 });
  assert.ok(text.text.includes("Paris"), text.text);
  const stream = streamText({ model, prompt: question, temperature: 0, maxOutputTokens: 60 });
  let streamed = "";
  for await (const part of stream.textStream) streamed += part;
  assert.equal(streamed, text.text);
  assert.ok((await stream.usage).outputTokens > 0);
  const { object } = await generateObject({ model, schema: weather, prompt: "The weather in Paris?" });
  weather.parse(object);
  const tools = { weather: tool({ description: "The weather.", inputSchema: weather, execute: async () => "fine" }) };
  const calls = await generateText({ model, tools, toolChoice: "required", prompt: "The weather?", maxOutputTokens: 400, providerOptions: { openai: { parallelToolCalls: false } } });
  weather.parse(calls.toolCalls[0].input);
}

const chat = new ChatOpenAI({ model: name, apiKey: "none", configuration: { baseURL: base } });
weather.parse(await chat.withStructuredOutput(weather, { method: "functionCalling" }).invoke("The weather in Paris?"));
const bound = chat.bindTools([{ name: "weather", description: "The weather.", schema: weather }], { tool_choice: "any", parallel_tool_calls: false });
weather.parse((await bound.invoke("The weather in Paris?")).tool_calls[0].args);
console.log("ok");

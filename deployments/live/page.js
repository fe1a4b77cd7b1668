"use strict";
// One page, no libraries: events from the gateway become a picture; the chat box asks the same gateway.

const byId = (id) => document.getElementById(id);
let key = "";
let model = "";
let reading = null;

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text; // never as HTML: what models write is only text
  return made;
}

const headers = (more) => (key ? { ...more, Authorization: `Bearer ${key}` } : { ...more });
const percent = (share) => `${Math.round(100 * share)} %`;

// Yields the data of server-sent events as they come.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
  }
}

// -- the picture -----------------------------------------------------------------------------------------------------

function slowest(stages) {
  const [first, second] = [...stages.keys()].sort((a, b) => stages[b].step_ms - stages[a].step_ms);
  if (stages.length < 2 || stages[first].busy < 0.05) return -1;
  const fastest = Math.min(...stages.map((stage) => stage.step_ms));
  return second !== undefined && stages[first].step_ms > 1.3 * fastest ? first : -1;
}

function drawStage(stage, index, isSlowest) {
  const box = element("div", isSlowest ? "stage slowest" : "stage");
  box.append(element("b", "", `stage ${index}`));
  const bar = element("div", "bar");
  for (const [name, share] of [["busy", stage.busy], ["wait", stage.waiting], ["send", stage.transfer]]) {
    const part = element("i", name);
    part.style.width = percent(share);
    part.title = `${name} ${percent(share)}`;
    bar.append(part);
  }
  box.append(bar, element("small", "", `busy ${percent(stage.busy)}, waiting ${percent(stage.waiting)}`));
  box.append(element("small", "", `${stage.step_ms.toFixed(1)} ms a step${isSlowest ? ", the slowest" : ""}`));
  box.append(element("small", "node", `${stage.node}${stage.gpu ? ` GPU ${stage.gpu}` : ""}`));
  return box;
}

function drawReplica(replica) {
  const box = element("article", `replica ${replica.state}`);
  box.dataset.replica = replica.replica;
  box.append(element("b", "", `pipeline ${replica.replica}`), element("span", "state", ` ${replica.state}`));
  if (replica.reason) box.append(element("div", "reason", replica.reason));
  const facts = element("div", "facts");
  const kv = replica.kv_blocks_total ? replica.kv_blocks_used / replica.kv_blocks_total : 0;
  const room = element("meter");
  room.value = kv;
  const cache = element("span", "", `KV ${percent(kv)} `);
  cache.append(room);
  facts.append(element("span", "tokens", `${replica.tokens_per_s} tokens/s`), element("span", "", `${replica.running} running`));
  facts.append(element("span", "", `${replica.waiting} waiting (${replica.waiting_tokens} tokens)`), cache);
  if (replica.loaded < 1) facts.append(element("span", "", `weights ${percent(replica.loaded)}`));
  const row = element("div", "stages");
  const marked = slowest(replica.stages);
  replica.stages.forEach((stage, index) => {
    if (index) row.append(element("div", replica.running ? "way moving" : "way"));
    row.append(drawStage(stage, index, index === marked));
  });
  box.append(facts, row);
  for (const past of replica.recoveries) {
    const text = `rebuilt ${Math.round(past.ago_s)} s ago in ${past.seconds.toFixed(1)} s after a stage was lost (${past.cause})`;
    box.append(element("div", "recovery", text));
  }
  return box;
}

function draw(view) {
  model = view.model;
  byId("model").textContent = view.model;
  const sum = (name) => view.replicas.reduce((total, replica) => total + replica[name], 0);
  byId("rate").textContent = sum("tokens_per_s").toFixed(1);
  byId("running").textContent = sum("running");
  byId("waiting").textContent = sum("waiting");
  const shown = view.replicas.length ? view.replicas.map(drawReplica) : [element("p", "", "No pipeline is there yet.")];
  byId("pipelines").replaceChildren(...shown);
}

async function watch() {
  for (;;) {
    try {
      reading = new AbortController();
      const response = await fetch("live/events", { headers: headers(), signal: reading.signal });
      byId("key").hidden = response.status !== 401;
      if (response.status === 401) {
        byId("secret").focus();
        return;
      }
      if (!response.ok) throw new Error(`status ${response.status}`);
      say("live", false);
      for await (const event of events(response)) draw(JSON.parse(event));
    } catch (error) {
      say(`no connection (${error.message}); trying again`, true);
    }
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}

function say(text, lost) {
  byId("link").textContent = text;
  byId("link").className = lost ? "lost" : "";
}

byId("key").addEventListener("submit", (event) => {
  event.preventDefault();
  key = byId("secret").value.trim();
  watch();
});

// -- the chat box ----------------------------------------------------------------------------------------------------

const conversation = [];
let asking = null;

function show(role, text) {
  const box = element("div", `message ${role}`, text);
  byId("messages").append(box);
  box.scrollIntoView({ block: "end" });
  return box;
}

async function ask(question) {
  conversation.push({ role: "user", content: question });
  show("user", question);
  const box = show("assistant", "");
  asking = new AbortController();
  byId("send").hidden = true;
  byId("stop").hidden = false;
  let answer = "";
  try {
    const body = JSON.stringify({ model, messages: conversation, stream: true, max_tokens: 500 });
    const options = { method: "POST", headers: headers({ "Content-Type": "application/json" }), body, signal: asking.signal };
    const response = await fetch("v1/chat/completions", options);
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response)) {
      if (event === "[DONE]") break;
      const chunk = JSON.parse(event);
      if (chunk.error) throw new Error(chunk.error.message);
      answer += chunk.choices?.[0]?.delta?.content ?? "";
      box.textContent = answer;
      box.scrollIntoView({ block: "end" });
    }
  } catch (error) {
    if (error.name !== "AbortError") show("error", error.message);
  } finally {
    byId("send").hidden = false;
    byId("stop").hidden = true;
  }
  if (answer) conversation.push({ role: "assistant", content: answer });
  else conversation.pop();
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = byId("question").value.trim();
  if (!question || byId("send").hidden) return;
  byId("question").value = "";
  ask(question);
});
byId("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    byId("ask").requestSubmit();
  }
});
byId("stop").addEventListener("click", () => asking?.abort());

watch();

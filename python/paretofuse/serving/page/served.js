// The page over a server: loads the front, asks for a key where one is needed, and wires the form, the default and the
// downloads.
"use strict";

/** The commands of a served model: [title, text] pairs. */
function servedCommands(front, preference) {
  const base = new URL("v1/", location.href).href;
  const task = taskOf(front);
  let body;
  try {
    body = task.body(front);
  } catch {
    body = task.address === "v1/predict" ? { input: null } : front.takes === "image" ? { input: "" } : withPrompt(task, "The river");
  }
  const numbers = rounded(front, preference);
  const key = apiKey ? " -H \"Authorization: Bearer $KEY\"" : "";
  const image = front.takes === "image";
  const json = JSON.stringify({ ...body, ...(image ? { input: "IMAGE" } : {}), preference: numbers });
  const data = image ? shellWord(json).replace("IMAGE", `'"$(base64 -w0 image.png)"'`) : shellWord(json);
  const file = `${base}models/${encodeURIComponent(written(front, preference))}/weights`;
  return [
    ["curl", `curl ${new URL(task.address, location.href).href} -H 'Content-Type: application/json'${key} -d ${data}`],
    ["Python", pythonOf(front, task, body, numbers, base)],
    ["Command line", localCommands(front, preference)[1][1]],
    ["Download", `curl -o model.safetensors${key} ${shellWord(file)}`],
  ];
}

function withPrompt(task, prompt) {
  const text = task === CHAT ? { messages: [{ role: "user", content: prompt }] } : task === COMPLETION ? { prompt } : { input: prompt };
  return task.streams ? { ...text, ...sampling() } : text;
}

/** A Python literal of JSON's values. */
function python(value) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
  if (typeof value === "object") return `{${Object.entries(value).map(([name, own]) => `${python(name)}: ${python(own)}`).join(", ")}}`;
  return JSON.stringify(value);
}

function pythonOf(front, task, body, preference, base) {
  const key = apiKey ? 'os.environ["KEY"]' : '"none"';
  if (task === COMPLETION || task === CHAT || (task === EMBEDDING && front.takes !== "image")) {
    const call = { [COMPLETION.address]: "completions", [CHAT.address]: "chat.completions", [EMBEDDING.address]: "embeddings" }[task.address];
    const given = Object.entries({ model: front.model, ...body }).map(([name, value]) => `    ${name}=${python(value)},`);
    const print = { [COMPLETION.address]: "answer.choices[0].text", [CHAT.address]: "answer.choices[0].message.content", [EMBEDDING.address]: "answer.data[0].embedding" }[task.address];
    return [
      ...(apiKey ? ["import os", ""] : []), "from openai import OpenAI", "", `client = OpenAI(base_url=${python(base)}, api_key=${key})`,
      `answer = client.${call}.create(`, ...given, `    extra_body={"preference": ${python(preference)}},`, ")", `print(${print})`,
    ].join("\n");
  }
  const image = front.takes === "image";
  return [
    ...(image ? ["import base64"] : []), ...(apiKey ? ["import os"] : []), ...(image ? ["from pathlib import Path"] : []), ...(image || apiKey ? [""] : []),
    "import httpx", "",
    ...(image ? ['image = base64.b64encode(Path("image.png").read_bytes()).decode()'] : []),
    `body = {"input": ${image ? "image" : python(body.input)}, "preference": ${python(preference)}}`,
    `answer = httpx.post(${python(new URL(task.address, location.href).href)}, json=body${apiKey ? `, headers={"Authorization": f"Bearer {${key}}"}` : ""})`,
    "print(answer.json())",
  ].join("\n");
}

/** The facts of every merged model, whatever the preference. */
function writeFacts(front) {
  for (const [name, value] of Object.entries(front.facts ?? {})) {
    byId("facts").append(element("dt", { textContent: name }), element("dd", { textContent: value }));
  }
}

function wire(state) {
  const { front } = state;
  byId("ask-section").hidden = false;
  const takes = { "text-generation": ["text", "sampling"], callable: ["json"] }[front.task] ?? [front.takes ?? "text"];
  for (const part of document.querySelectorAll("[data-takes]")) part.hidden = !takes.includes(part.dataset.takes);
  byId("chat-label").hidden = !front.chat;
  byId("chat").checked = Boolean(front.chat);
  const write = showCommands(state, servedCommands);
  byId("ask").addEventListener("input", write);
  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    answerBoth(state);
  });
  byId("image").addEventListener("change", readImage);
  const show = () => {
    for (const slot of ["A", "B"]) {
      if (!byId(`answer-${slot}`).dataset.asked) byId(`answer-heading-${slot}`).textContent = `${slot}: ${spoken(front, state[slot])}`;
    }
    const shown = encodeURIComponent(written(front, state[state.slot]));
    byId("weights").href = `v1/models/${shown}/weights`;
    byId("adapter").href = `v1/models/${shown}/adapter`;
  };
  byId("download").hidden = Boolean(apiKey); // a link cannot carry the key; the command can
  byId("adapter").hidden = !front.adapter;
  document.addEventListener("preference", show);
  show();
  byId("make-default").addEventListener("click", async () => {
    try {
      const answer = await (await ask("v1/preference", { method: "PUT", body: { preference: rounded(front, state[state.slot]) } })).json();
      byId("default").textContent = `Default: ${spoken(front, answer.preference)}`;
    } catch (error) {
      byId("default").textContent = error.message;
    }
  });
  byId("default").textContent = `Default: ${spoken(front, front.default)}`;
}

async function start() {
  byId("failed").textContent = "";
  try {
    const front = await (await ask("v1/front")).json();
    byId("key-form").hidden = true;
    writeFacts(front);
    wire(explore(front));
  } catch (error) {
    byId("key-form").hidden = error.status !== 401;
    byId("failed").textContent = error.status === 401 && !apiKey ? "" : error.message;
  }
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  apiKey = byId("key").value;
  start();
});
start();

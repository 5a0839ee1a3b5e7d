// What the model answers to the user's own input: a request for each task, and how its answer is shown.
//
// A task is {address, takes, body(), show(answer, place), compare(a, b)}; a stream is shown as it comes.
"use strict";

const IMAGE_LIMIT = 20e6;

/** What is asked, without the preference; throws an Error with words where the form is not filled. */
function asked(front) {
  return taskOf(front).body(front);
}

function taskOf(front) {
  const chats = front.chat && byId("chat").checked;
  return {
    "text-generation": chats ? CHAT : COMPLETION,
    "text-classification": CLASSIFICATION,
    "image-classification": CLASSIFICATION,
    "feature-extraction": EMBEDDING,
    callable: PREDICTION,
  }[front.task];
}

function promptOf() {
  const text = byId("prompt").value;
  if (text === "") throw new Error("Write a prompt first.");
  return text;
}

function sampling() {
  const numbers = { max_tokens: Number(byId("max-tokens").value) || 40, temperature: Number(byId("temperature").value) || 0 };
  return numbers.temperature > 0 ? { ...numbers, seed: Math.trunc(Number(byId("seed").value)) || 0 } : numbers;
}

/** Text or image, by what the model takes; an image as a data: URL. */
function input(front) {
  if (front.takes !== "image") return promptOf();
  if (!byId("preview").src) throw new Error("Choose an image first.");
  return byId("preview").src;
}

/** Show a stream's text after what it follows. */
async function showStream(answer, place, begin, piece) {
  const text = document.createTextNode("");
  place.replaceChildren(...begin, text);
  for await (const event of events(answer)) {
    if (event.choices?.length) text.data += piece(event.choices[0]) ?? "";
  }
}

const COMPLETION = {
  address: "v1/completions",
  streams: true,
  body: () => ({ prompt: promptOf(), ...sampling() }),
  show: (answer, place) =>
    showStream(answer, place, [element("span", { className: "given", textContent: byId("prompt").value })], (choice) => choice.text),
};

const CHAT = {
  address: "v1/chat/completions",
  streams: true,
  body: () => ({ messages: [{ role: "user", content: promptOf() }], ...sampling() }),
  show: (answer, place) => showStream(answer, place, [], (choice) => choice.delta.content),
};

const CLASSIFICATION = {
  address: "v1/classify",
  body: (front) => ({ input: input(front) }),
  async show(answer, place, front) {
    const { label, probs } = (await answer.json()).data[0];
    const order = probs.map((_, index) => index).sort((a, b) => probs[b] - probs[a]).slice(0, 5);
    const rows = order.map((index) => {
      const name = front.labels?.[index] ?? `class ${index}`;
      const bar = element("meter", { min: 0, max: 1, value: probs[index] });
      bar.setAttribute("aria-label", `probability of ${name}`);
      return element("tr", {}, element("th", { scope: "row", textContent: name }), element("td", { textContent: `${short(100 * probs[index])} %` }), element("td", {}, bar));
    });
    place.replaceChildren(element("strong", { textContent: label }), element("table", {}, element("tbody", {}, ...rows)));
    return probs;
  },
  compare: (a, b) => `The two distributions differ by ${short(a.reduce((sum, p, index) => sum + Math.abs(p - b[index]), 0) / 2)} (total variation, 0 to 1).`,
};

const EMBEDDING = {
  address: "v1/embeddings",
  body: (front) => ({ input: input(front) }),
  async show(answer, place) {
    const vector = (await answer.json()).data[0].embedding;
    place.replaceChildren(`${vector.length} numbers: ${vector.slice(0, 8).map(short).join(", ")}${vector.length > 8 ? ", …" : ""}`);
    return vector;
  },
  compare(a, b) {
    const dot = (x, y) => x.reduce((sum, number, index) => sum + number * y[index], 0);
    return `The cosine between the two is ${short(dot(a, b) / Math.sqrt(dot(a, a) * dot(b, b)))}.`;
  },
};

const PREDICTION = {
  address: "v1/predict",
  body() {
    try {
      return { input: JSON.parse(byId("value").value) };
    } catch {
      throw new Error('Write the input as JSON first, such as {"x": 1} or "a text".');
    }
  },
  async show(answer, place) {
    place.replaceChildren(JSON.stringify((await answer.json()).output, null, 2));
  },
};

/** Ask at both preferences at once and show both answers; until then the button stops them. */
async function answerBoth(state) {
  const { front } = state;
  const task = taskOf(front);
  const control = new AbortController();
  byId("compared").className = "";
  byId("compared").textContent = "";
  let body;
  try {
    body = asked(front);
  } catch (error) {
    byId("compared").className = "wrong";
    byId("compared").textContent = error.message;
    return;
  }
  const stop = () => control.abort();
  byId("stop").addEventListener("click", stop);
  byId("stop").disabled = false;
  byId("send").disabled = true;
  const [a, b] = await Promise.all(["A", "B"].map((slot) => answerOne(state, slot, task, body, control.signal)));
  byId("stop").removeEventListener("click", stop);
  byId("stop").disabled = true;
  byId("send").disabled = false;
  if (a && b && task.compare) byId("compared").textContent = task.compare(a, b);
}

async function answerOne(state, slot, task, body, signal) {
  const [place, took] = [byId(`answer-${slot}`), byId(`took-${slot}`)];
  const preference = rounded(state.front, state[slot]);
  byId(`answer-heading-${slot}`).textContent = `${slot}: ${spoken(state.front, preference)}`;
  place.dataset.asked = "yes"; // from now on the heading is the answer's
  place.replaceChildren();
  place.classList.remove("wrong");
  place.setAttribute("aria-busy", "true");
  took.textContent = "";
  const start = performance.now();
  try {
    const sent = { ...body, preference, ...(task.streams ? { stream: true } : {}) };
    const answer = await ask(task.address, { method: "POST", body: sent, signal });
    const found = await task.show(answer, place, state.front);
    took.textContent = `${short((performance.now() - start) / 1000)} s`;
    return found;
  } catch (error) {
    if (signal.aborted) {
      took.textContent = "stopped";
    } else {
      place.classList.add("wrong");
      place.append(error.message);
    }
    return null;
  } finally {
    place.setAttribute("aria-busy", "false");
  }
}

/** Read the chosen image into the page. */
function readImage() {
  const [file] = byId("image").files;
  const preview = byId("preview");
  preview.hidden = true;
  preview.removeAttribute("src");
  byId("compared").textContent = "";
  if (!file) return;
  if (file.size > IMAGE_LIMIT) {
    byId("compared").className = "wrong";
    byId("compared").textContent = `${file.name} has ${short(file.size / 1e6)} MB, expected at most ${IMAGE_LIMIT / 1e6}; make it smaller.`;
    return;
  }
  const reader = new FileReader();
  reader.addEventListener("load", () => {
    preview.src = reader.result;
    preview.hidden = false;
  });
  reader.readAsDataURL(file);
}

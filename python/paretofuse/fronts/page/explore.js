// The page's controls: two preferences A and B, set by sliders, figure, table or constraint; what they reach.
"use strict";

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function byId(id) {
  return document.getElementById(id);
}

/**
 * Fill the page with a front.
 *
 * @returns {{front, A, B, set}} the page's state; `set(preference)` sets the slot that is chosen. After every change
 *     the document gets an event "preference".
 */
function explore(front) {
  const metrics = Object.keys(front.metrics);
  const start = front.points.length ? front.points[choose(front, [], null)].preference : named(front, []);
  const state = { front, slot: "A", A: front.default ?? start, B: named(front, front.objectives.map((_, at) => (at === 0 ? 1 : 0))), set };

  document.title = front.model ? `${front.model}, ParetoFuse` : "ParetoFuse";
  byId("title").textContent = front.model ?? "A front";
  byId("summary").textContent = `${front.objectives.length} objectives (${front.objectives.join(", ")}), ${front.points.length} measured preferences`;
  const figures = makePicture(state);
  const sliders = makeSliders(state);
  writePoints(state);
  makeChoice(state);

  function set(preference) {
    state[state.slot] = preference;
    show();
  }
  function show() {
    sliders();
    figures.marks();
    writeMetrics(state);
    byId("reached").textContent = reached(state);
    byId("use-heading").textContent = `Use preference ${state.slot}`;
    document.dispatchEvent(new Event("preference"));
  }
  for (const radio of document.querySelectorAll("input[name=slot]")) {
    radio.addEventListener("change", () => {
      state.slot = radio.value;
      show();
    });
  }
  for (const note of front.notes ?? []) byId("notes").append(element("li", { textContent: note }));
  if (metrics.length === 0) byId("metrics").hidden = true;
  figures.draw();
  show();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", figures.draw);
  return state;
}

/** The figures, or words that say how to get them. */
function makePicture(state) {
  const { front } = state;
  byId("figure-help").textContent = front.points.length
    ? "Click or drag on the figure to set the preference, or use the sliders."
    : "Nothing is measured yet: sweep the store, and give its table to the page. The sliders work without it.";
  if (front.points.length === 0) {
    byId("measured").hidden = byId("choose-section").hidden = true;
    return { draw() {}, marks() {} };
  }
  writeLegend(front, byId("legend"));
  byId("front-section").classList.toggle("wide", figureKind(front).className === "triangle");
  return makeFigures(front, byId("figures"), () => state, state.set);
}

/** A slider and a number for each objective; the others keep their proportions. Returns what shows the state. */
function makeSliders(state) {
  const { front } = state;
  let typed = null; // what is being typed into stays as it is, such as "1" on the way to "12"
  const rows = front.objectives.map((name, index) => {
    const range = element("input", { type: "range", min: 0, max: 100, step: 1, id: `share-${index}` });
    const number = element("input", { type: "number", min: 0, max: 100, step: "any" });
    number.setAttribute("aria-label", `${name} in percent`);
    for (const input of [range, number]) {
      input.addEventListener("input", () => {
        if (input.value === "") return;
        typed = input;
        state.set(withShare(front, state[state.slot], index, Math.min(1, Math.max(0, Number(input.value) / 100))));
        typed = null;
      });
      input.addEventListener("change", show); // typed to its end: shown as it was taken
    }
    const words = element("label", { htmlFor: range.id, textContent: name });
    byId("sliders").append(element("div", { className: "slider" }, words, range, number, element("span", { textContent: "%" })));
    return { name, range, number };
  });
  function show() {
    byId("sliders").className = `sets-${state.slot}`;
    for (const { name, range, number } of rows) {
      const percent = 100 * state[state.slot][name];
      if (typed !== range) range.value = percent;
      range.setAttribute("aria-valuetext", `${name} ${short(percent)} % in ${state.slot}`);
      if (typed !== number) number.value = short(percent);
    }
  }
  return show;
}

/** A preference with one share set; what is left goes to the others as they stood, evenly where they were 0. */
function withShare(front, preference, index, share) {
  const old = shares(front, preference);
  const rest = 1 - old[index];
  const others = front.objectives.length - 1;
  if (others === 0) return named(front, [1]);
  const next = old.map((own, at) => {
    if (at === index) return share;
    return rest > 1e-9 ? (own * (1 - share)) / rest : (1 - share) / others;
  });
  return named(front, next);
}

const KINDS = { measured: "measured", between: "linear between measured points", nearest: "of the nearest measured point" };

/** What the chosen slot's preference reaches, in words. */
function reached({ front, slot, [slot]: preference }) {
  const found = valuesAt(front, preference);
  const where = `${slot}: ${spoken(front, preference)}`;
  if (!found) return where;
  const values = Object.entries(found.values).map(([name, value]) => `${name} ${short(value)}`);
  return `${where}. ${values.join(", ")} (${KINDS[found.kind]}).`;
}

/** The table of metrics at A, at B and of the base. */
function writeMetrics(state) {
  const { front } = state;
  const slots = ["A", "B"].map((slot) => [slot, valuesAt(front, state[slot])]);
  const single = models(front);
  const head = element("tr", {}, element("th", { scope: "col", textContent: "metric" }));
  for (const [slot, found] of slots) {
    const cell = element("th", { scope: "col", className: `slot-${slot}`, textContent: slot });
    cell.append(element("small", { textContent: found ? (found.kind === "measured" ? "measured" : found.kind === "between" ? "linear" : "nearest") : "" }));
    head.append(cell);
  }
  for (const [name] of single) head.append(element("th", { scope: "col", textContent: name }));
  const rows = Object.keys(front.metrics).map((metric) => {
    const words = element("th", { scope: "row", textContent: metric });
    words.append(element("small", { textContent: direction(front, metric) }));
    const cells = slots.map(([, found]) => element("td", { textContent: found ? short(found.values[metric]) : "", className: found?.kind === "measured" ? "" : "between" }));
    return element("tr", {}, words, ...cells, ...single.map(([, values]) => element("td", { textContent: short(values[metric]) })));
  });
  byId("metrics").replaceChildren(element("thead", {}, head), element("tbody", {}, ...rows));
}

/** Every measured point as a row with a button that takes it. */
function writePoints(state) {
  const { front } = state;
  const metrics = Object.keys(front.metrics);
  const kept = nonDominated(front);
  const heads = [...front.objectives.map((name) => `share of ${name}`), ...metrics, "", ""];
  const rows = front.points.map((point, index) => {
    const numbers = [...shares(front, point.preference), ...metrics.map((metric) => point.values[metric])];
    const take = element("button", { type: "button", textContent: "Take" });
    take.setAttribute("aria-label", `Take ${spoken(front, point.preference)}`);
    take.addEventListener("click", () => state.set(point.preference));
    const cells = numbers.map((number) => element("td", { textContent: short(number) }));
    return element("tr", {}, ...cells, element("td", { textContent: kept[index] ? "" : "dominated" }), element("td", {}, take));
  });
  const head = element("tr", {}, ...heads.map((text) => element("th", { scope: "col", textContent: text })));
  byId("points").replaceChildren(element("thead", {}, head), element("tbody", {}, ...rows));
}

/** The form that chooses a measured point within bounds. */
function makeChoice(state) {
  const { front } = state;
  const bounds = Object.keys(front.metrics).map((metric, index) => {
    const sense = element("select", { id: `sense-${index}` });
    sense.append(new Option("at most", "at_most"), new Option("at least", "at_least"));
    sense.value = front.metrics[metric].maximize ? "at_least" : "at_most";
    sense.setAttribute("aria-label", `${metric} at most or at least`);
    const value = element("input", { type: "number", step: "any", placeholder: "no bound" });
    value.setAttribute("aria-label", `bound of ${metric}`);
    byId("bounds").append(element("p", { className: "row" }, element("span", { textContent: metric }), sense, value));
    return () => (value.value === "" ? [] : [{ metric, sense: sense.value, value: Number(value.value) }]);
  });
  byId("best").append(new Option("all together (the knee)", ""));
  Object.keys(front.metrics).forEach((metric, index) => byId("best").append(new Option(metric, String(index))));
  byId("choose").addEventListener("submit", (event) => {
    event.preventDefault();
    const best = byId("best").value === "" ? null : Object.keys(front.metrics)[Number(byId("best").value)];
    try {
      const at = choose(front, bounds.flatMap((bound) => bound()), best);
      state.set(front.points[at].preference);
      byId("chosen").className = "";
      byId("chosen").textContent = `${state.slot} is now ${spoken(front, front.points[at].preference)}.`;
    } catch (error) {
      byId("chosen").className = "wrong";
      byId("chosen").textContent = error.message;
    }
  });
}

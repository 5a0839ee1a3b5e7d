// The figures of a front, drawn by plotly: what all kinds share, and what a pointer on them means.
//
// Each kind (curve.js, triangle.js, parallel.js) has a function `panels(front)`: for each of its panels the traces, the
// layout, `marks(preference)` (where on the panel a preference lies, {x: [], y: []}) and `pick(x, y)` (the preference
// at a place).
"use strict";

const MODEL_MARKS = ["diamond", "square", "triangle-up", "triangle-down", "triangle-left", "triangle-right", "x", "pentagon"];
const MODEL_SIGNS = "◆■▲▼◀▶✖⬟";
const DASHES = ["dash", "dot", "dashdot"];

/** A colour of page.css, which knows light from dark. */
function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

/** The colour of a category, such as the objective that leads. */
function category(index) {
  return colour(`category-${1 + (index % 8)}`);
}

/** Text for plotly, which reads tags: names stay what they are, broken into lines. */
function label(text, width = 34) {
  const lines = [""];
  for (const word of String(text).split(/\s+/)) {
    if (lines.at(-1) && lines.at(-1).length + word.length >= width) lines.push("");
    lines.push(`${lines.pop()} ${word}`.trim());
  }
  const cut = lines.slice(0, 3).map((line) => (line.length > width ? `${line.slice(0, width - 1)}…` : line));
  return cut.map((line) => line.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;")).join("<br>");
}

function direction(front, metric) {
  return front.metrics[metric].maximize ? "higher is better" : "lower is better";
}

/** What a measured point says when pointed at. */
function hover(front, point) {
  const values = Object.keys(front.metrics).map((metric) => `${label(metric)}: ${short(point.values[metric])}`);
  return [label(spoken(front, point.preference), 48), ...values].join("<br>");
}

/** A range that holds the numbers, with a margin. */
function range(numbers, margin = 0.09) {
  const [low, high] = [Math.min(...numbers), Math.max(...numbers)];
  const room = margin * (high - low || Math.abs(high) || 1);
  return [low - room, high + room];
}

/** What every panel's layout begins with. */
function plainLayout(more) {
  const axis = { gridcolor: colour("pale"), zeroline: false, linecolor: colour("grey"), tickcolor: colour("grey"), fixedrange: true };
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, dragmode: false, hovermode: "closest",
    font: { family: "system-ui, sans-serif", size: 12, color: colour("ink") },
    hoverlabel: { bgcolor: colour("field"), font: { color: colour("ink") }, align: "left" },
    ...more, xaxis: { ...axis, ...more.xaxis }, yaxis: { ...axis, automargin: true, ...more.yaxis },
  };
}

/** The mark of A or B, last in each panel and above all else. */
function slotTrace(slot, where, lines) {
  return {
    ...where, mode: lines ? "lines+markers+text" : "markers+text", text: where.x.map((_, at) => (at === 0 ? slot : "")), hoverinfo: "skip",
    textfont: { color: colour("panel"), size: 12, weight: 700 }, line: { color: colour(slot), width: 4 },
    marker: { size: where.x.map((_, at) => (at === 0 ? 19 : 9)), color: colour(slot), opacity: 1, line: { color: colour("panel"), width: 2 } }, cliponaxis: false,
  };
}

/** The single models of a front (its base, averages) as [label, values] pairs. */
function models(front) {
  return Object.entries(front.models ?? {});
}

function figureKind(front) {
  if (front.objectives.length === 3) return { panels: trianglePanels, className: "triangle" };
  const flat = front.objectives.length === 2 && Object.keys(front.metrics).length === 2;
  return flat ? { panels: curvePanels, className: "curve" } : { panels: parallelPanels, className: "parallel" };
}

/**
 * Draw all panels into an element and listen to the pointer on them.
 *
 * @param chosen {() => {A, B}} the two preferences now
 * @param onPick called with the preference that a click or drag means
 * @returns {{marks, draw}} functions that move the marks of A and B, and draw anew (for other colours)
 */
function makeFigures(front, place, chosen, onPick) {
  const { panels, className } = figureKind(front);
  const parts = panels(front).map((panel) => {
    const box = document.createElement("div");
    box.className = `figure ${className}`;
    box.setAttribute("role", "img");
    box.setAttribute("aria-label", panel.description);
    place.append(box);
    listen(box, (x, y) => onPick(box.panel.pick(x, y)));
    return box;
  });
  function draw() {
    const now = chosen();
    panels(front).forEach((panel, index) => {
      parts[index].panel = panel;
      const slots = ["B", "A"].map((slot) => slotTrace(slot, panel.marks(now[slot]), panel.lines));
      const config = { displayModeBar: false, responsive: true, doubleClick: false };
      Plotly.react(parts[index], [...panel.traces, ...slots], panel.layout, config);
    });
  }
  function marks() {
    const now = chosen();
    for (const box of parts) {
      const [b, a] = ["B", "A"].map((slot) => box.panel.marks(now[slot]));
      const last = box.data.length;
      Plotly.restyle(box, { x: [b.x, a.x], y: [b.y, a.y] }, [last - 2, last - 1]);
    }
  }
  return { draw, marks };
}

/** Tell of every place on a panel, in its axes' units, that is clicked or dragged over. */
function listen(box, onPlace) {
  let held = false;
  function place(event) {
    const area = box.querySelector(".nsewdrag").getBoundingClientRect();
    const [left, right] = box.layout.xaxis.range;
    const [bottom, top] = box.layout.yaxis.range;
    const across = (event.clientX - area.left) / area.width;
    const up = 1 - (event.clientY - area.top) / area.height;
    onPlace(left + across * (right - left), bottom + up * (top - bottom));
  }
  box.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    held = true;
    box.setPointerCapture(event.pointerId);
    place(event);
  }, true);
  box.addEventListener("pointermove", (event) => held && place(event), true);
  // Plotly's own drag would lay a cover over the whole page.
  for (const start of ["mousedown", "touchstart"]) box.addEventListener(start, (event) => event.stopPropagation(), true);
  for (const end of ["pointerup", "pointercancel"]) box.addEventListener(end, () => (held = false), true);
}

/** The legend in words, below the figures. */
function writeLegend(front, place) {
  const kept = nonDominated(front);
  const parts = front.points.length ? [["●", "measured"]] : [];
  if (kept.includes(false)) parts.push(["○", "measured, dominated by another preference"]);
  models(front).forEach(([name], index) => parts.push([MODEL_SIGNS[index % MODEL_SIGNS.length], name]));
  const lines = figureKind(front).className !== "triangle";
  if (lines) Object.keys(front.others ?? {}).forEach((name, index) => parts.push([["╌╌", "┄┄", "╌┄"][index % 3], name]));
  if (!lines && front.points.length) parts.push(["☆", "best preference for the metric"]);
  for (const [sign, text] of parts) {
    const key = document.createElement("span");
    key.className = "key";
    key.append(`${sign} ${text}`);
    place.append(key, " ");
  }
}

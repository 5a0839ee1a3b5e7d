// Three objectives: for each metric a triangle of preferences, coloured by what the metric reaches there.
"use strict";

const CORNERS = [[0, 0], [1, 0], [0.5, Math.sqrt(0.75)]];
const ACROSS = 32; // cells of the picture of values; between them plotly smooths

/** Where shares [3] lie in the plane. */
function toPlane(three) {
  return [0, 1].map((axis) => three.reduce((sum, share, corner) => sum + share * CORNERS[corner][axis], 0));
}

/** The shares [3] at a place in the plane; outside of the triangle those of a place at its edge. */
function fromPlane(x, y) {
  const top = y / CORNERS[2][1];
  const inside = [1 - x - top / 2, x - top / 2, top].map((share) => Math.max(0, share));
  const total = inside.reduce((sum, share) => sum + share, 0);
  return inside.map((share) => share / total);
}

/** The values at cells over the triangle, from the points around each; once, for all metrics and draws. */
const pictures = new WeakMap();
function picture(front) {
  if (pictures.has(front)) return pictures.get(front);
  const x = Array.from({ length: ACROSS + 1 }, (_, column) => column / ACROSS);
  const y = x.map((step) => step * CORNERS[2][1]);
  const cells = y.map((up) => x.map((across) => valuesAt(front, named(front, fromPlane(across, up)))));
  pictures.set(front, { x, y, cells });
  return pictures.get(front);
}

/** The panel's colour over all around the triangle: the cells beyond its edges are not the front's. */
function surroundings() {
  const [[, low], [, same], [, top]] = CORNERS;
  const around = [[-1, low], [0, low], [0.5, top], [1, same], [2, same], [2, 2], [-1, 2], [-1, low]];
  const below = [[-1, -1], [2, -1], [2, 0], [-1, 0], [-1, -1]];
  const points = [...around, [null, null], ...below];
  const shape = { x: points.map(([x]) => x), y: points.map(([, y]) => y), mode: "lines", fill: "toself" };
  return { ...shape, fillcolor: colour("panel"), line: { color: colour("panel"), width: 1.5 }, hoverinfo: "skip" };
}

/** A panel for each metric, and as many again for each other front. */
function trianglePanels(front) {
  const own = Object.keys(front.metrics).map((metric) => trianglePanel(front, front, metric, ""));
  const others = Object.entries(front.others ?? {}).flatMap(([name, points]) => {
    const other = otherFront(front, points);
    return Object.keys(front.metrics).map((metric) => trianglePanel(front, other, metric, `${name}: `));
  });
  return [...own, ...others];
}

/** Another front's points as a front, the same one at each draw, so that its picture is kept. */
const otherFronts = new WeakMap();
function otherFront(front, points) {
  if (!otherFronts.has(points)) otherFronts.set(points, { ...front, points });
  return otherFronts.get(points);
}

function trianglePanel(front, shown, metric, name) {
  const larger = front.metrics[metric].maximize;
  const single = models(front);
  const everyone = [...front.points, ...Object.values(front.others ?? {}).flat()].map((point) => point.values);
  const every = [...everyone, ...single.map(([, values]) => values)].map((values) => values[metric]);
  const [low, high] = [Math.min(...every), Math.max(...every)];
  const span = high - low || 1;

  const ticks = [low, low + span / 2, low + span];
  const { x, y, cells } = picture(shown);
  const bar = { orientation: "h", thickness: 9, len: 0.8, x: 0.5, y: -0.14, yanchor: "top", outlinewidth: 0, tickvals: ticks, ticktext: ticks.map(short) };
  const heat = {
    type: "heatmap", x, y, z: cells.map((row) => row.map((cell) => cell.values[metric])), zsmooth: "best", zmin: low,
    zmax: low + span, colorscale: "Viridis", reversescale: !larger, colorbar: bar, hoverinfo: "skip",
  };
  const kept = nonDominated(shown);
  const values = shown.points.map((point) => point.values[metric]);
  const best = values.indexOf(larger ? Math.max(...values) : Math.min(...values));
  const places = shown.points.map((point) => toPlane(shares(front, point.preference)));
  const measured = {
    x: places.map(([across]) => across), y: places.map(([, up]) => up), mode: "markers", cliponaxis: false,
    hovertemplate: shown.points.map((point) => `${hover(front, point)}<extra></extra>`),
    marker: {
      size: values.map((_, at) => (at === best ? 15 : 7)), opacity: 1, color: "#ffffff",
      symbol: values.map((_, at) => (at === best ? "star" : kept[at] ? "circle" : "circle-open")),
      line: { color: values.map((_, at) => (kept[at] ? "#222222" : "#ffffff")), width: values.map((_, at) => (kept[at] ? 1 : 2)) },
    },
  };
  const corner = (at, xanchor, yanchor) => ({
    x: CORNERS[at][0], y: CORNERS[at][1], text: label(front.objectives[at], 15), xanchor, yanchor, showarrow: false,
    xshift: { left: -10, right: 10, center: 0 }[xanchor], yshift: yanchor === "top" ? -12 : 12,
  });
  const onScale = ([, own], index) => ({
    xref: "paper", yref: "paper", x: 0.1 + (0.8 * (own[metric] - low)) / span, y: -0.14, yanchor: "bottom", showarrow: false,
    text: MODEL_SIGNS[index % MODEL_SIGNS.length], font: { size: 12 },
  });
  const layout = plainLayout({
    title: { text: `${label(name + metric)} (${direction(front, metric)})`, font: { size: 13 }, y: 0.98, yanchor: "top" },
    margin: { l: 6, r: 6, t: 58, b: 84 },
    xaxis: { range: [-0.06, 1.06], visible: false, constrain: "domain" },
    yaxis: { range: [-0.04, CORNERS[2][1] + 0.04], visible: false, scaleanchor: "x", constrain: "domain", automargin: false },
    annotations: [corner(0, "left", "top"), corner(1, "right", "top"), corner(2, "center", "bottom"), ...single.map(onScale)],
  });
  const marks = (preference) => {
    const [across, up] = toPlane(shares(front, preference));
    return { x: [across], y: [up] };
  };
  const pick = (across, up) => named(front, fromPlane(across, up));
  const description = `A triangle of preferences for ${front.objectives.join(", ")}, coloured by ${name}${metric}. The sliders and the table of measured points say the same.`;
  return { traces: [heat, surroundings(), measured], layout, marks, pick, description };
}

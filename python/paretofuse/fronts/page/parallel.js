// More objectives or metrics: parallel coordinates, an axis for each metric with its better end up.
"use strict";

function parallelPanels(front) {
  const metrics = Object.keys(front.metrics);
  const single = models(front);
  const everyone = [...front.points.map((p) => p.values), ...Object.values(front.others ?? {}).flat().map((p) => p.values), ...single.map(([, v]) => v)];
  const scales = metrics.map((metric) => {
    const values = everyone.map((own) => own[metric]);
    const ends = values.length ? [Math.min(...values), Math.max(...values)] : [0, 1];
    const [worst, best] = front.metrics[metric].maximize ? ends : [ends[1], ends[0]];
    return { worst, best, span: best - worst || 1 };
  });
  const heights = (values) => metrics.map((metric, m) => (values[metric] - scales[m].worst) / scales[m].span);
  const at = metrics.map((_, m) => m);
  const kept = nonDominated(front);
  const faint = front.points.length <= 16 ? 0.6 : 0.3; // a hundred lines are a texture, not a reading

  const traces = front.points.map((point, index) => {
    const own = shares(front, point.preference);
    const most = Math.max(...own);
    const leads = own.flatMap((share, objective) => (share >= most - 1e-9 ? [objective] : []));
    const corner = most > 1 - 1e-9;
    const look = leads.length === 1 ? category(leads[0]) : colour("grey");
    return {
      x: at, y: heights(point.values), mode: corner ? "lines+markers" : "lines", opacity: corner ? 1 : faint,
      line: { color: look, width: corner ? 2.4 : 1.2 }, marker: { size: 7, color: kept[index] ? look : colour("panel"), line: { color: look, width: 1.5 } },
      hovertemplate: `${hover(front, point)}<extra></extra>`, cliponaxis: false,
    };
  });
  Object.entries(front.others ?? {}).forEach(([name, points], index) => points.forEach((point) => traces.push({
    x: at, y: heights(point.values), mode: "lines", opacity: faint, line: { color: colour("grey"), width: 1, dash: DASHES[index % 3] },
    hovertemplate: `${label(name)}<extra></extra>`,
  })));
  single.forEach(([name, values], index) => traces.push({
    x: at, y: heights(values), mode: "lines+markers", line: { color: colour("ink"), width: 1.3, dash: "dash" },
    marker: { size: 9, symbol: MODEL_MARKS[index % MODEL_MARKS.length], color: colour("ink") }, hovertemplate: `${label(name)}<extra></extra>`,
  }));

  function marks(preference) {
    const found = valuesAt(front, preference);
    return found ? { x: at, y: heights(found.values) } : { x: [], y: [] };
  }

  /** The preference of the measured line nearest to a place. */
  function pick(x, y) {
    const left = Math.min(Math.max(Math.floor(x), 0), Math.max(metrics.length - 2, 0));
    const along = Math.min(Math.max(x - left, 0), 1);
    const gaps = front.points.map((point) => {
      const [from, to = from] = heights(point.values).slice(left);
      return Math.abs(from + along * (to - from) - y);
    });
    return front.points[gaps.indexOf(Math.min(...gaps))].preference;
  }
  const narrow = metrics.length > 5;
  const ticks = metrics.map((metric, m) => `${short(scales[m].worst)}<br>${label(metric, narrow ? 10 : 16)}<br>(${front.metrics[metric].maximize ? "higher" : "lower"}<br>is better)`);
  const layout = plainLayout({
    margin: { l: 40, r: 30, t: 30, b: 96 },
    xaxis: { tickvals: at, ticktext: ticks, tickangle: 0, range: [-0.35, metrics.length - 0.65], gridcolor: colour("grey"), ticks: "", linecolor: "rgba(0,0,0,0)" },
    yaxis: { title: { text: "up is better" }, range: [-0.04, 1.04], showticklabels: false, showgrid: false, ticks: "", linecolor: "rgba(0,0,0,0)" },
    annotations: scales.map(({ best }, m) => ({ x: m, y: 1.05, text: short(best), showarrow: false, yanchor: "bottom", font: { size: 11 } })),
  });
  const description = `Parallel coordinates of ${metrics.join(", ")} at ${front.points.length} measured preferences. The sliders and the table of measured points say the same.`;
  return [{ traces, layout, marks, pick, lines: true, description }];
}

// Two objectives and two metrics: the front as a curve in the plane of its metrics, coloured by the preference.
"use strict";

function curvePanels(front) {
  const [across, up] = Object.keys(front.metrics);
  const first = front.objectives[0];
  const share = (point) => point.preference[first];
  const ordered = [...front.points].sort((a, b) => share(a) - share(b));
  const kept = new Set(front.points.filter((_, index) => nonDominated(front)[index]));
  const xy = (points) => ({ x: points.map((p) => p.values[across]), y: points.map((p) => p.values[up]) });
  const others = Object.entries(front.others ?? {});
  const single = models(front);
  const every = [...front.points, ...others.flatMap(([, points]) => points), ...single.map(([, values]) => ({ values }))];
  const ranges = [across, up].map((metric) => (every.length ? range(every.map((p) => p.values[metric])) : [0, 1]));

  function measured(points, hollow) {
    const shade = points.map(share);
    const scale = { cmin: 0, cmax: 1, colorscale: "Viridis" };
    const bar = {
      orientation: "h", thickness: 9, len: 0.7, x: 0.5, y: 1.02, yanchor: "bottom", outlinewidth: 0,
      tickvals: [0, 0.25, 0.5, 0.75, 1],
    };
    const marker = hollow
      ? { size: 9, symbol: "circle-open", color: shade, ...scale, line: { width: 2 } }
      : { size: 11, color: shade, ...scale, line: { color: colour("edge"), width: 1.2 }, colorbar: bar };
    return { ...xy(points), mode: "markers", marker, hovertemplate: points.map((p) => `${hover(front, p)}<extra></extra>`) };
  }
  const traces = [{ ...xy(ordered), mode: "lines", line: { color: colour("line"), width: 3 }, hoverinfo: "skip" }];
  others.forEach(([name, points], index) => {
    const line = { width: 1.5, dash: DASHES[index % 3], color: category(1 + index) };
    const sorted = [...points].sort((a, b) => share(a) - share(b));
    traces.push({ ...xy(sorted), mode: "lines+markers", line, marker: { size: 4 }, hovertemplate: `${label(name)}<extra></extra>` });
  });
  traces.push(measured(ordered.filter((p) => !kept.has(p)), true), measured(ordered.filter((p) => kept.has(p)), false));
  single.forEach(([name, values], index) => {
    const marker = { size: 11, symbol: MODEL_MARKS[index % MODEL_MARKS.length], color: colour("ink"), line: { color: colour("edge"), width: 1 } };
    traces.push({ ...xy([{ values }]), mode: "markers", marker, hovertemplate: `${label(name)}<extra></extra>` });
  });

  function marks(preference) {
    const found = valuesAt(front, preference);
    return found ? { x: [found.values[across]], y: [found.values[up]] } : { x: [], y: [] };
  }

  /** The preference at the nearest place on the line, linear between its two ends. */
  function pick(x, y) {
    const [width, height] = ranges.map(([low, high]) => high - low);
    const at = ordered.map((p) => [(p.values[across] - x) / width, (p.values[up] - y) / height]);
    let best = { distance: Infinity, share: share(ordered[0]) };
    at.forEach(([ax, ay], index) => {
      const [bx, by] = at[index + 1] ?? at[index];
      const long = (bx - ax) ** 2 + (by - ay) ** 2;
      const along = long > 0 ? Math.min(1, Math.max(0, -(ax * (bx - ax) + ay * (by - ay)) / long)) : 0;
      const distance = (ax + along * (bx - ax)) ** 2 + (ay + along * (by - ay)) ** 2;
      const [from, to] = [ordered[index], ordered[index + 1] ?? ordered[index]].map(share);
      if (distance < best.distance) best = { distance, share: from + along * (to - from) };
    });
    return named(front, [best.share, 1 - best.share]);
  }
  const title = (metric) => ({ text: `${label(metric)}<br>(${direction(front, metric)})`, standoff: 8 });
  // The bar's own title would lie half below the bar.
  const above = {
    xref: "paper", yref: "paper", x: 0.5, y: 1.02, yanchor: "bottom", yshift: 34, showarrow: false,
    text: `preference for ${label(first)}`,
  };
  const layout = plainLayout({
    margin: { l: 76, r: 16, t: 64, b: 64, autoexpand: false }, annotations: [above],
    xaxis: { title: title(across), range: ranges[0] }, yaxis: { title: title(up), range: ranges[1] },
  });
  const description = `The front as a curve: ${across} and ${up} at ${front.points.length} measured preferences. The sliders and the table of measured points say the same.`;
  return [{ traces, layout, marks, pick, description }];
}

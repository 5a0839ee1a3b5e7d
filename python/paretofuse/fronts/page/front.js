// What the page knows of a front, without drawing: values at any preference, which point to choose, what dominates.
//
// A front is what `as_data` in fronts/html.py makes, and what GET /v1/front answers: objectives [E names],
// metrics {name: {maximize}}, points [{preference: {objective: share}, values: {metric: number}}].
"use strict";

const TOLERANCE = 1e-6;

/** A number in at most four digits, as Python's "%.4g" shortens it. */
function short(number) {
  return String(Number(Number(number).toPrecision(4)));
}

/** The shares [E] of a preference by name, in the objectives' order; what is not named is 0. */
function shares(front, preference) {
  return front.objectives.map((name) => preference[name] ?? 0);
}

/** A preference by name from numbers >= 0 [E], divided by their sum; equal shares where all are 0. */
function named(front, numbers) {
  const total = numbers.reduce((sum, number) => sum + number, 0);
  const each = numbers.map((number) => (total > 0 ? number / total : 1 / numbers.length));
  return Object.fromEntries(front.objectives.map((name, index) => [name, each[index]]));
}

/** Shares as whole ten-thousandths that sum to exactly 1, so that what is written down is a preference again. */
function rounded(front, preference) {
  const exact = shares(front, preference).map((share) => share * 10000);
  const whole = exact.map(Math.floor);
  const order = exact.map((_, index) => index).sort((a, b) => exact[b] - whole[b] - (exact[a] - whole[a]));
  const missing = 10000 - whole.reduce((sum, number) => sum + number, 0);
  order.slice(0, missing).forEach((index) => (whole[index] += 1));
  return Object.fromEntries(front.objectives.map((name, index) => [name, whole[index] / 10000]));
}

/** A preference as people read it: "news 70 %, poems 30 %"; shares of 0 are left out. */
function spoken(front, preference) {
  const parts = front.objectives.filter((name) => preference[name] > 0);
  return parts.map((name) => `${name} ${short(100 * preference[name])} %`).join(", ");
}

function squaredDistance(one, other) {
  return one.reduce((sum, number, index) => sum + (number - other[index]) ** 2, 0);
}

/**
 * The values at a preference: measured where a point lies there, else linear between the points around it.
 *
 * The neighbours are those of the Delaunay triangulation, in any number of objectives: of all weights >= 0 with
 * sum(weight * point) = preference they make sum(weight * |point - preference|^2) least (Rajan, 1994).
 *
 * @returns {{values, kind: "measured"|"between"|"nearest", neighbours: [index, weight][]}} or null without points;
 *     "nearest" is the nearest point's, where the preference lies outside of all that was measured.
 */
function valuesAt(front, preference) {
  if (front.points.length === 0) return null;
  const target = shares(front, preference);
  const columns = front.points.map((point) => shares(front, point.preference));
  const distances = columns.map((column) => squaredDistance(column, target));
  const nearest = distances.indexOf(Math.min(...distances));
  let neighbours = [[nearest, 1]];
  let kind = "measured";
  if (distances[nearest] > TOLERANCE ** 2) {
    const around = leastWeights(columns, target, distances);
    kind = around ? "between" : "nearest";
    neighbours = around ?? neighbours;
  }
  const values = {};
  for (const metric of Object.keys(front.metrics)) {
    values[metric] = neighbours.reduce((sum, [at, weight]) => sum + weight * front.points[at].values[metric], 0);
  }
  return { values, kind, neighbours };
}

/**
 * Minimize sum(cost * weight) over weights >= 0 with sum(weight * column) = target, by the simplex method.
 *
 * Columns and target sum to 1, and so do the weights. One artificial column for each row, dearer than all others, gives
 * the start; where one stays in use there is no solution. Bland's rule (always the first index) cannot cycle.
 *
 * @returns {[number, number][] | null} the columns in use and their weights
 */
function leastWeights(columns, target, costs) {
  const [rows, count, dear] = [target.length, columns.length, 1e6];
  const table = target.map((bound, row) => [
    ...columns.map((column) => column[row]),
    ...target.map((_, other) => (row === other ? 1 : 0)),
    bound,
  ]);
  const basis = target.map((_, row) => count + row);
  const reduced = costs.map((cost, j) => cost - dear * table.reduce((sum, line) => sum + line[j], 0));
  for (;;) {
    const enter = reduced.findIndex((cost) => cost < -1e-9);
    if (enter < 0) break;
    let leave = -1;
    let least = Infinity;
    for (let row = 0; row < rows; row++) {
      if (table[row][enter] < 1e-9) continue;
      const ratio = table[row][count + rows] / table[row][enter];
      const tie = Math.abs(ratio - least) < 1e-12;
      if (tie ? basis[row] < basis[leave] : ratio < least) [leave, least] = [row, ratio];
    }
    if (leave < 0) return null;
    const pivot = table[leave].map((number) => number / table[leave][enter]);
    table.forEach((line, row) => {
      const factor = line[enter];
      table[row] = row === leave ? pivot : line.map((number, j) => number - factor * pivot[j]);
    });
    const factor = reduced[enter];
    for (let j = 0; j < count; j++) reduced[j] -= factor * pivot[j];
    reduced[enter] = 0;
    basis[leave] = enter;
  }
  const used = basis.map((column, row) => [column, table[row][count + rows]]);
  if (used.some(([column, weight]) => column >= count && weight > TOLERANCE)) return null;
  return used.filter(([column, weight]) => column < count && weight > 1e-9);
}

/** The values of a point in the order of the metrics, signed so that larger is better. */
function goods(front, point) {
  return Object.entries(front.metrics).map(([name, { maximize }]) => (maximize ? 1 : -1) * point.values[name]);
}

/** For each point whether no other is as good everywhere and better somewhere; all of a tie count. */
function nonDominated(front) {
  const every = front.points.map((point) => goods(front, point));
  const beats = (one, other) => one.every((x, m) => x >= other[m]) && one.some((x, m) => x > other[m]);
  return every.map((own) => !every.some((other) => beats(other, own)));
}

/**
 * The index of the measured point within bounds that is best in a metric, or the knee where `best` is null; the same
 * as Front.choose.
 *
 * @param bounds {[{metric, sense: "at_most"|"at_least", value}]}
 * @throws {Error} no point is within the bounds
 */
function choose(front, bounds, best) {
  const keeps = (point, { metric, sense, value }) =>
    sense === "at_most" ? point.values[metric] <= value : point.values[metric] >= value;
  for (const bound of bounds) {
    const values = front.points.map((point) => point.values[bound.metric]);
    if (values.some((_, index) => keeps(front.points[index], bound))) continue;
    const edge = bound.sense === "at_most" ? `lowest is ${short(Math.min(...values))}` : `highest is ${short(Math.max(...values))}`;
    throw new Error(`No measured point has ${bound.metric} ${bound.sense.replace("_", " ")} ${short(bound.value)}: its ${edge}. Loosen the bound.`);
  }
  const inside = front.points.map((_, index) => index).filter((at) => bounds.every((bound) => keeps(front.points[at], bound)));
  if (inside.length === 0) throw new Error("No measured point keeps all bounds at once. Loosen one.");
  const kept = nonDominated(front);
  if (best === null) return knee(front, inside, kept);
  const metric = Object.keys(front.metrics).indexOf(best);
  const better = (one, other) => {
    const gain = goods(front, front.points[one])[metric] - goods(front, front.points[other])[metric];
    return gain > 0 || (gain === 0 && kept[one] && !kept[other]);
  };
  return inside.reduce((found, at) => (better(at, found) ? at : found));
}

/** The largest sum of metrics, each scaled to 0 at its worst and 1 at its best point that is not dominated. */
function knee(front, inside, kept) {
  const rows = inside.some((at) => kept[at]) ? inside.filter((at) => kept[at]) : inside;
  const every = rows.map((at) => goods(front, front.points[at]));
  const lows = every[0].map((_, m) => Math.min(...every.map((row) => row[m])));
  const spans = lows.map((low, m) => Math.max(...every.map((row) => row[m])) - low || 1);
  const sums = every.map((row) => row.reduce((sum, good, m) => sum + (good - lows[m]) / spans[m], 0));
  return rows[sums.indexOf(Math.max(...sums))];
}

/** The last minute of the engine, as the charts need it. */

export const WINDOW_SECONDS = 60;
const SHOWN = 8;

/** @typedef {import("../api/engine.js").EngineState} EngineState */

/**
 * @param {EngineState[]} history the oldest first
 * @param {EngineState} state
 * @returns {EngineState[]} with the new state, without what is too old; empty before it if the
 *   engine was started again
 */
export function appended(history, state) {
  const restarted = history.length > 0 && state.steps < history.at(-1).steps;
  const kept = restarted ? [] : history;
  const first = kept.findIndex((each) => each.time >= state.time - WINDOW_SECONDS - 1);
  return [...kept.slice(Math.max(0, first)), state];
}

/**
 * @param {EngineState[]} history
 * @returns {{generated: number, prompt: number, steps: number}} each per second, over the last second
 */
export function ratesOf(history) {
  const last = history.at(-1);
  const before = history.findLast((each) => each.time <= (last?.time ?? 0) - 1) ?? history[0];
  return last ? rateBetween(before, last) : { generated: 0, prompt: 0, steps: 0 };
}

function rateBetween(before, after) {
  const seconds = after.time - before.time;
  if (seconds <= 0) return { generated: 0, prompt: 0, steps: 0 };
  return {
    generated: (after.generated_tokens - before.generated_tokens) / seconds,
    prompt: (after.prompt_tokens - before.prompt_tokens) / seconds,
    steps: (after.steps - before.steps) / seconds,
  };
}

/**
 * @typedef {object} Layer rows of one adapter, or of several together
 * @property {string} key
 * @property {string} name
 * @property {string} series class of its colour
 * @property {number} rows at present
 */

/**
 * @param {EngineState[]} history
 * @param {(adapter: string) => string} seriesOf
 * @returns {{layers: Layer[], stacked: number[][]}} the layers from the bottom up, and the data of
 *   the chart: ages, then the top of each layer, the highest first
 */
export function stackedRows(history, seriesOf) {
  const totals = new Map();
  for (const state of history)
    for (const entry of state.adapters) {
      const key = keyOf(entry);
      totals.set(key, (totals.get(key) ?? 0) + rowsOf(entry));
    }
  const named = [...totals.keys()].filter((key) => key !== HIDDEN);
  named.sort((a, b) => totals.get(b) - totals.get(a));
  const alone = named.slice(0, SHOWN).sort();
  const keys = [
    ...alone,
    ...(named.length > SHOWN ? [REST] : []),
    ...(totals.has(HIDDEN) ? [HIDDEN] : []),
  ];
  const place = new Map(keys.map((key, at) => [key, at]));

  const tops = keys.map(() => []);
  let current = [];
  for (const state of history) {
    const rows = keys.map(() => 0);
    for (const entry of state.adapters)
      rows[place.get(keyOf(entry)) ?? place.get(REST)] += rowsOf(entry);
    let top = 0;
    for (const [at, count] of rows.entries()) {
      top += count;
      tops[at].push(top);
    }
    current = rows;
  }
  const layers = keys.map((key, at) => ({
    key,
    name: NAMES[key] ?? key,
    series: key === REST || key === HIDDEN ? "series-other" : seriesOf(key === BASE ? "" : key),
    rows: current[at] ?? 0,
  }));
  return { layers, stacked: [agesOf(history), ...tops.reverse()] };
}

const BASE = "\u0000base";
const REST = "\u0001rest";
const HIDDEN = "\u0001hidden";
const NAMES = { [BASE]: "Base model", [REST]: "Other adapters", [HIDDEN]: "Not visible to you" };

function keyOf({ adapter, hidden }) {
  return hidden ? HIDDEN : adapter || BASE;
}

/** @param {{prefill: number, decode: number}} entry @returns {number} rows of the batch */
export function rowsOf({ prefill, decode }) {
  return prefill + decode;
}

/** @param {EngineState[]} history @returns {number[][]} data of the chart of tokens per second */
export function tokenRates(history) {
  const rates = [];
  let from = 0;
  for (const state of history) {
    while (history[from + 1] && history[from + 1].time <= state.time - 1) from += 1;
    rates.push(rateBetween(history[from], state).generated);
  }
  return [agesOf(history).slice(1), rates.slice(1)];
}

/** Seconds between each state and the last one, below zero. */
function agesOf(history) {
  const { time } = history.at(-1);
  return history.map((state) => state.time - time);
}

/** What the events of a job say: its progress, its curves, its samples. */

import { short } from "../app/format.js";

/** @typedef {import("../api/training.js").JobEvent} JobEvent */

/**
 * @param {JobEvent[]} events the oldest first
 * @returns {{step: number, steps: number, loss: number | null, evaluation: number | null}}
 */
export function progressOf(events) {
  const found = { step: 0, steps: 0, loss: null, evaluation: null };
  for (const { data } of metrics(events)) {
    found.step = Math.max(found.step, data.step ?? 0);
    found.steps = data.total_steps ?? found.steps;
    found.loss = data.train_loss ?? found.loss;
    found.evaluation = evaluationLoss(data) ?? found.evaluation;
  }
  return found;
}

/**
 * @param {JobEvent[]} events
 * @returns {{losses: (number | null)[][], rates: (number | null)[][], spoken: string}} data of the
 *   charts, and a sentence in their place
 */
export function curvesOf(events) {
  /** @type {Map<number, {train: number | null, valid: number | null, rate: number | null}>} */
  const steps = new Map();
  for (const { data } of metrics(events)) {
    if (data.step === undefined || data.step === null) continue;
    const point = steps.get(data.step) ?? { train: null, valid: null, rate: null };
    point.train = data.train_loss ?? point.train;
    point.valid = evaluationLoss(data) ?? point.valid;
    point.rate = data.learning_rate ?? point.rate;
    steps.set(data.step, point);
  }
  const points = [...steps].sort(([a], [b]) => a - b);
  const x = points.map(([step]) => step);
  const losses = [
    x,
    points.map(([, point]) => point.train),
    points.map(([, point]) => point.valid),
  ];
  const rated = points.filter(([, point]) => point.rate !== null);
  const rates = [rated.map(([step]) => step), rated.map(([, point]) => point.rate)];
  return { losses, rates, spoken: spokenCurves(losses) };
}

/**
 * @typedef {object} SampleTable
 * @property {number} before step of the first samples
 * @property {number} after step of the last ones
 * @property {{prompt: string, before: string | null, after: string | null, expected: string}[]} rows
 */

/** @param {JobEvent[]} events @returns {SampleTable} */
export function samplesOf(events) {
  const taken = events.filter((event) => event.data?.samples?.length);
  if (!taken.length) return { before: 0, after: 0, rows: [] };
  const first = taken[0].data;
  const last = taken.at(-1).data;
  const answers = new Map(last.samples.map((sample) => [sample.prompt, sample.answer]));
  return {
    before: first.step ?? 0,
    after: last.step ?? 0,
    rows: first.samples.map(({ prompt, answer, expected }) => ({
      prompt,
      before: answer,
      after: answers.get(prompt) ?? null,
      expected: expected ?? "",
    })),
  };
}

/** @param {JobEvent[]} events @returns {JobEvent[]} those that are no points of the curves */
export function reportsOf(events) {
  return events.filter(({ data }) => (data?.train_loss ?? data?.valid_loss) === undefined);
}

function metrics(events) {
  return events.filter((event) => event.type === "metrics" && event.data);
}

function evaluationLoss(data) {
  return data.full_valid_loss ?? data.valid_loss ?? null;
}

function spokenCurves([steps, train, valid]) {
  const last = (values) => values.findLastIndex((value) => value !== null);
  const parts = [
    ["training loss", train],
    ["evaluation loss", valid],
  ].map(([name, values]) => {
    const at = last(values);
    return at < 0 ? `no ${name} yet` : `${name} ${short(values[at])} at step ${steps[at]}`;
  });
  return `Loss by step: ${parts.join(", ")}`;
}

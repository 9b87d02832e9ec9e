/** One answer: how it is asked for, received, and measured. */

import { generate } from "../api/generate.js";

/**
 * @typedef {"idle" | "waiting" | "streaming" | "done" | "stopped" | "failed"} Phase
 *
 * @typedef {object} Answer
 * @property {Phase} phase
 * @property {string} text
 * @property {import("../api/generate.js").Token[]} tokens empty without log-probabilities
 * @property {string | null} finish
 * @property {{prompt: number, completion: number, cached: number} | null} usage
 * @property {Error | null} error
 * @property {string} adapter what computed the answer, with its digest; "" if not known
 * @property {number} sent when the request was sent, in milliseconds
 * @property {number} first when the first token came; 0 before
 * @property {number} last when the last token came
 */

/** @type {Answer} */
export const NO_ANSWER = {
  phase: "idle",
  text: "",
  tokens: [],
  finish: null,
  usage: null,
  error: null,
  adapter: "",
  sent: 0,
  first: 0,
  last: 0,
};

/**
 * Asks for an answer and reports it as it grows, at most once a frame.
 *
 * @param {import("../api/generate.js").Choice} choice
 * @param {import("../api/generate.js").Settings} settings
 * @param {string} base id of the base model
 * @param {AbortSignal} signal stops it
 * @param {(answer: Answer) => void} report
 * @returns {Promise<void>} never fails; a failure is a part of the answer
 */
export async function ask(choice, settings, base, signal, report) {
  const answer = { ...NO_ANSWER, tokens: [], phase: "waiting", sent: performance.now() };
  let frame = 0;
  const show = () => {
    frame ||= requestAnimationFrame(() => {
      frame = 0;
      report({ ...answer, tokens: [...answer.tokens] });
    });
  };
  report({ ...answer });
  try {
    const onHeaders = (headers) => {
      answer.adapter = headers.get("x-loraplex-adapter") ?? "";
    };
    for await (const piece of generate(choice, settings, base, signal, onHeaders)) {
      take(answer, piece);
      show();
    }
    answer.phase = "done";
  } catch (error) {
    answer.phase = signal.aborted ? "stopped" : "failed";
    answer.error = signal.aborted ? null : error;
  }
  cancelAnimationFrame(frame);
  report(answer);
}

/** @param {Answer} answer @param {import("../api/generate.js").Piece} piece */
function take(answer, piece) {
  if (piece.text || piece.tokens.length) {
    answer.last = performance.now();
    answer.first ||= answer.last;
    answer.phase = "streaming";
    answer.text += piece.text;
    answer.tokens.push(...piece.tokens);
  }
  answer.finish = piece.finish ?? answer.finish;
  answer.usage = piece.usage ?? answer.usage;
}

/**
 * @param {Answer} answer
 * @returns {{tokens: number, firstSeconds: number, perSecond: number}} zeros where not known yet;
 *   the rate counts the tokens after the first
 */
export function measured(answer) {
  const tokens = answer.usage?.completion ?? answer.tokens.length;
  const seconds = (answer.last - answer.first) / 1000;
  return {
    tokens,
    firstSeconds: answer.first ? (answer.first - answer.sent) / 1000 : 0,
    perSecond: tokens > 1 && seconds > 0 ? (tokens - 1) / seconds : 0,
  };
}

/**
 * @param {Answer} answer
 * @param {Answer} other
 * @returns {number} how many tokens two answers have in common at their beginning; -1 if there are
 *   none to compare
 */
export function agreement(answer, other) {
  if (!answer.tokens.length || !other.tokens.length) return -1;
  const length = Math.min(answer.tokens.length, other.tokens.length);
  for (let at = 0; at < length; at += 1)
    if (answer.tokens[at].text !== other.tokens[at].text) return at;
  return length;
}

/** @param {Answer} answer @returns {boolean} */
export function isRunning({ phase }) {
  return phase === "waiting" || phase === "streaming";
}

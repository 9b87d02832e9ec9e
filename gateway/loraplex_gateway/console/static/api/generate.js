/** Answers as streams of tokens, from `/v1/chat/completions` or `/v1/completions`. */

import { stream } from "./http.js";

/**
 * @typedef {{adapter: string, weight: number}} MixTerm
 * @typedef {{model: string, mix: MixTerm[] | null}} Choice a model, or a weighted mix of adapters
 */

/**
 * @typedef {object} Settings
 * @property {"chat" | "text"} mode whether the prompt is a message or the text to continue
 * @property {string} system message that precedes the prompt; "" for none
 * @property {string} prompt
 * @property {number | null} seed null for a random one
 * @property {number} temperature
 * @property {number} maxTokens
 * @property {number} topP
 * @property {number} topK
 * @property {number} minP
 * @property {number} repetitionPenalty
 * @property {number} presencePenalty
 * @property {number} frequencyPenalty
 * @property {string[]} stop
 * @property {boolean} logprobs
 */

/**
 * @typedef {object} Token
 * @property {string} text what it adds to the answer; "" while a character is incomplete
 * @property {number} logprob natural logarithm of its probability
 * @property {{text: string, logprob: number}[]} top the most probable tokens, best first
 */

/**
 * @typedef {object} Piece
 * @property {string} text
 * @property {Token[]} tokens empty without log-probabilities
 * @property {string | null} finish why the answer ended
 * @property {{prompt: number, completion: number, cached: number} | null} usage
 */

export const ALTERNATIVES = 5;

/**
 * @param {Choice} choice
 * @param {Settings} settings
 * @param {string} base id of the base model, of which mixes are asked
 * @param {AbortSignal} signal
 * @param {(headers: Headers) => void} onHeaders
 * @returns {AsyncGenerator<Piece>}
 */
export async function* generate(choice, settings, base, signal, onHeaders) {
  const chat = settings.mode === "chat";
  const path = chat ? "v1/chat/completions" : "v1/completions";
  const json = bodyOf(choice, settings, base);
  const decoder = new TextDecoder();
  for await (const chunk of stream("POST", path, { json, signal, onHeaders })) {
    const found = chunk.choices?.[0];
    const given = found?.logprobs;
    yield {
      text: (chat ? found?.delta?.content : found?.text) ?? "",
      tokens: (chat ? chatTokens(given) : textTokens(given)).map((token) => ({
        ...token,
        text: token.bytes ? decoder.decode(token.bytes, { stream: true }) : token.text,
      })),
      finish: found?.finish_reason ?? null,
      usage: usageOf(chunk.usage),
    };
  }
}

/** @param {Choice} choice @param {Settings} settings @param {string} base */
export function bodyOf(choice, settings, base) {
  const body = {
    model: choice.mix ? base : choice.model,
    stream: true,
    stream_options: { include_usage: true },
    temperature: settings.temperature,
    max_tokens: settings.maxTokens,
  };
  if (settings.mode === "chat") {
    body.messages = [{ role: "user", content: settings.prompt }];
    if (settings.system) body.messages.unshift({ role: "system", content: settings.system });
    if (settings.logprobs) Object.assign(body, { logprobs: true, top_logprobs: ALTERNATIVES });
  } else {
    body.prompt = settings.prompt;
    if (settings.logprobs) body.logprobs = ALTERNATIVES;
  }
  if (choice.mix) body.loraplex = { mix: choice.mix };
  if (settings.seed !== null) body.seed = settings.seed;
  if (settings.stop.length) body.stop = settings.stop;
  for (const [name, field, neutral] of OPTIONAL)
    if (settings[name] !== neutral) body[field] = settings[name];
  return body;
}

/** Setting, field of the request, and the value that changes nothing, which is not sent. */
const OPTIONAL = [
  ["topP", "top_p", 1],
  ["topK", "top_k", 0],
  ["minP", "min_p", 0],
  ["repetitionPenalty", "repetition_penalty", 1],
  ["presencePenalty", "presence_penalty", 0],
  ["frequencyPenalty", "frequency_penalty", 0],
];

/** @param {any} logprobs as chat answers have them */
function chatTokens(logprobs) {
  return (logprobs?.content ?? []).map((entry) => ({
    text: entry.token,
    bytes: entry.bytes ? Uint8Array.from(entry.bytes) : null,
    logprob: entry.logprob,
    top: (entry.top_logprobs ?? []).map(({ token, logprob }) => ({ text: token, logprob })),
  }));
}

/** @param {any} logprobs as completions have them */
function textTokens(logprobs) {
  return (logprobs?.tokens ?? []).map((text, at) => ({
    text,
    bytes: null,
    logprob: logprobs.token_logprobs[at] ?? 0,
    top: Object.entries(logprobs.top_logprobs?.[at] ?? {})
      .map(([alternative, logprob]) => ({ text: alternative, logprob }))
      .sort((a, b) => b.logprob - a.logprob),
  }));
}

/** @param {any} usage */
function usageOf(usage) {
  if (!usage) return null;
  return {
    prompt: usage.prompt_tokens,
    completion: usage.completion_tokens,
    cached: usage.prompt_tokens_details?.cached_tokens ?? 0,
  };
}

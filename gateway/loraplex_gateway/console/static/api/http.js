/** Calls of the gateway: with the key, with time limits, and with failures that say what to do. */

import { key, keyRefused } from "../app/session.js";
import { readEvents } from "./sse.js";

/** The gateway's address: this file is /console/api/http.js there, perhaps below a prefix. */
const ROOT = new URL("../../", import.meta.url);

const SECONDS = 30;

/** A call that failed, with a sentence about what the user can do. */
export class Failure extends Error {
  /**
   * @param {number} status HTTP status; 0 if nothing answered
   * @param {string} message what is wrong
   * @param {{param?: string | null, code?: string | null, retryAfter?: number}} [details]
   */
  constructor(status, message, { param = null, code = null, retryAfter = 0 } = {}) {
    super(message);
    this.status = status;
    this.param = param;
    this.code = code;
    this.retryAfter = retryAfter;
  }

  /** @returns {string} what to do about it; "" if the message says it */
  get hint() {
    if (this.code === "model_not_found")
      return "Choose another model; its adapter may have been deleted or renamed.";
    if (this.code === "context_length_exceeded") return "Shorten the prompt.";
    return HINTS[this.status]?.(this) ?? "";
  }
}

const HINTS = {
  0: () => `Check that the gateway runs at ${ROOT.host}. The page tries again by itself.`,
  401: () => "Enter a key with the button at the top right.",
  403: () => "Ask the operator for a key with the role that this needs.",
  409: () => "Somebody may have changed it meanwhile. Look at its present state and try again.",
  413: () => "Use a smaller file.",
  429: (failure) => `Wait ${failure.retryAfter || 1} s, or ask the operator for a higher limit.`,
  501: () => "This server does not offer it; a newer version may.",
  503: (failure) =>
    `The server is starting, full or away. Try again in ${failure.retryAfter || 1} s.`,
  504: () => "The server needs longer than it was given. Try a shorter request.",
};

/**
 * @typedef {object} Options
 * @property {unknown} [json] body
 * @property {BodyInit} [body] body that is not JSON
 * @property {Record<string, string | number | boolean | undefined>} [query] undefined is left out
 * @property {AbortSignal} [signal]
 * @property {number} [seconds] longest time until the answer; 0 for any
 */

/**
 * Calls and returns the JSON of the answer; null if it has no body.
 *
 * @param {string} method
 * @param {string} path such as "v1/models"
 * @param {Options} [options]
 * @returns {Promise<any>}
 * @throws {Failure}
 */
export async function call(method, path, options = {}) {
  const response = await send(method, path, { seconds: SECONDS, ...options });
  const text = await response.text();
  try {
    return text ? JSON.parse(text) : null;
  } catch {
    throw new Failure(response.status, "The gateway sent an answer that is not JSON.");
  }
}

/**
 * Calls and yields the events of the answer, each decoded from JSON, until "[DONE]" or the end.
 *
 * @param {string} method
 * @param {string} path
 * @param {Options & {onHeaders?: (headers: Headers) => void}} [options]
 * @returns {AsyncGenerator<any>}
 * @throws {Failure}
 */
export async function* stream(method, path, { onHeaders, ...options } = {}) {
  const response = await send(method, path, { seconds: 0, ...options });
  onHeaders?.(response.headers);
  if (!response.body) return;
  try {
    for await (const { data } of readEvents(response.body)) {
      if (data.startsWith("[DONE]")) return;
      const value = JSON.parse(data);
      if (value.error) throw failureOf(value.error, value.error.status ?? 500, 0);
      yield value;
    }
  } catch (error) {
    throw options.signal?.aborted || error instanceof Failure
      ? error
      : new Failure(0, "The connection broke off.");
  }
}

/** @param {string} method @param {string} path @param {Options} options @returns {Promise<Response>} */
async function send(method, path, { json, body, query = {}, signal, seconds }) {
  const url = new URL(path, ROOT);
  for (const [name, value] of Object.entries(query))
    if (value !== undefined) url.searchParams.set(name, String(value));
  const headers = new Headers();
  if (key.get()) headers.set("authorization", `Bearer ${key.get()}`);
  if (json !== undefined) headers.set("content-type", "application/json");
  const limits = [signal, seconds ? AbortSignal.timeout(1000 * seconds) : undefined];
  let response;
  try {
    response = await fetch(url, {
      method,
      headers,
      body: json === undefined ? body : JSON.stringify(json),
      signal: AbortSignal.any(limits.filter((limit) => limit !== undefined)),
      cache: "no-store",
      credentials: "omit",
      redirect: "error",
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    const late = error instanceof DOMException && error.name === "TimeoutError";
    throw new Failure(0, late ? `No answer within ${seconds} s.` : "The gateway does not answer.");
  }
  if (response.status === 401) keyRefused.set(true);
  if (!response.ok) throw await failureFrom(response);
  if (path.startsWith("v1/")) keyRefused.set(false);
  return response;
}

/** @param {Response} response @returns {Promise<Failure>} */
async function failureFrom(response) {
  const retryAfter = Number(response.headers.get("retry-after")) || 0;
  const text = await response.text().catch(() => "");
  try {
    return failureOf(JSON.parse(text).error, response.status, retryAfter);
  } catch {
    return new Failure(response.status, `The gateway answered with status ${response.status}.`, {
      retryAfter,
    });
  }
}

/** @param {any} error OpenAI's object @param {number} status @param {number} retryAfter */
function failureOf(error, status, retryAfter) {
  const message = typeof error === "string" ? error : error.message;
  return new Failure(status, message || `The gateway answered with status ${status}.`, {
    param: error.param,
    code: error.code,
    retryAfter,
  });
}

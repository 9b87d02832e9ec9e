/** What the engine computes at present, again and again. */

import { stream } from "./http.js";

/**
 * @typedef {object} EngineState
 * @property {number} time in seconds since 1970
 * @property {number} steps
 * @property {number} generated_tokens since the engine's start
 * @property {number} prompt_tokens since the engine's start
 * @property {{adapter: string, hidden: boolean, prefill: number, decode: number, waiting: number}[]} adapters
 * @property {number} kv_blocks_used
 * @property {number} kv_blocks
 * @property {number} kv_blocks_cached
 * @property {number} resident_adapters
 * @property {number} adapter_bytes
 * @property {number} adapter_bytes_limit
 * @property {number} max_rows
 */

/**
 * @param {number} interval in seconds
 * @param {AbortSignal} signal
 * @returns {AsyncGenerator<EngineState>}
 */
export function watchEngine(interval, signal) {
  return stream("GET", "v1/engine/watch", { query: { interval }, signal });
}

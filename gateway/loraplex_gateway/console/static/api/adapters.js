/** Registered adapters: their versions, aliases and places. */

import { call, stream } from "./http.js";

/**
 * @typedef {object} Adapter
 * @property {string} id "name@version"
 * @property {string} model id in requests of clients
 * @property {string} name
 * @property {number} version
 * @property {string} digest
 * @property {string} peft_type
 * @property {number} rank
 * @property {string[]} target_modules
 * @property {number} size_bytes
 * @property {"unspecified" | "stored" | "loading" | "resident" | "draining"} state
 * @property {"unspecified" | "disk" | "host" | "device"} tier
 * @property {number} device_bytes
 * @property {number} host_bytes
 * @property {number} merged_bytes 0 unless merged
 * @property {boolean} pinned
 * @property {number} active_requests
 * @property {string | null} create_time
 * @property {string | null} last_use_time
 * @property {number | null} load_seconds
 * @property {string} base_name
 * @property {string[]} aliases
 * @property {Record<string, string>} labels
 * @property {Record<string, string>} provenance
 * @property {Finding | null} unservable
 *
 * @typedef {{reason: string, field: string, message: string}} Finding
 *
 * @typedef {object} Report
 * @property {boolean} valid
 * @property {Finding[]} findings
 * @property {null | {digest: string, peft_type: string, rank: number, target_modules: string[], size_bytes: number, device_bytes: number, base_model: string}} spec
 * @property {string[]} notes
 */

/** Loading, merging and sending large files take long on a busy machine. */
const LONG_SECONDS = 600;

/** @param {string} adapter @param {string} [part] */
const path = (adapter, part = "") =>
  `v1/adapters/${encodeURIComponent(adapter)}${part && `/${part}`}`;

/** @param {AbortSignal} [signal] @returns {Promise<Adapter[]>} the current versions */
export async function listAdapters(signal) {
  return (await call("GET", "v1/adapters", { signal })).data;
}

/** @param {string} name @param {AbortSignal} [signal] @returns {Promise<Adapter[]>} newest first */
export async function listVersions(name, signal) {
  return (await call("GET", path(name, "versions"), { signal })).data;
}

/**
 * Yields the table of adapters, then every change of it.
 *
 * @param {AbortSignal} signal
 * @returns {AsyncGenerator<{adapters: Adapter[]} | {kind: string, adapter: Adapter}>}
 */
export function watchAdapters(signal) {
  return stream("GET", "v1/adapter_events", { signal });
}

/**
 * Loads, unloads, pins, unpins, merges, unmerges or restores an adapter.
 *
 * @param {"load" | "unload" | "pin" | "unpin" | "merge" | "unmerge" | "restore"} action
 * @param {string} adapter
 * @param {object} [options] of "unload": `force`, `drain_seconds`
 * @returns {Promise<Adapter>}
 */
export function act(action, adapter, options = {}) {
  const json = action === "unload" ? options : undefined;
  return call("POST", path(adapter, action), { json, seconds: LONG_SECONDS });
}

/** @param {string} name @returns {Promise<void>} */
export async function deleteAdapter(name) {
  await call("DELETE", path(name));
}

/** @param {string} adapter @param {Record<string, string>} set @param {string[]} remove */
export function labelAdapter(adapter, set, remove) {
  return call("POST", path(adapter, "labels"), { json: { set, remove } });
}

/**
 * @param {string} alias
 * @param {string} adapter version that the alias points to afterwards
 * @param {string | null} expected version that it must point to now, "" for none; null for any
 */
export function setAlias(alias, adapter, expected) {
  const json = { adapter, expected };
  return call("PUT", `v1/aliases/${encodeURIComponent(alias)}`, { json });
}

/** @param {string} alias @returns {Promise<void>} */
export async function deleteAlias(alias) {
  await call("DELETE", `v1/aliases/${encodeURIComponent(alias)}`);
}

/** @param {AbortSignal} [signal] @returns {Promise<{alias: string, adapter: string}[]>} */
export async function listAliases(signal) {
  return (await call("GET", "v1/aliases", { signal })).data;
}

/** @param {{config: File, weights: File}} files @returns {Promise<Report>} what is wrong with them */
export function validate(files) {
  return call("POST", "v1/adapters", {
    body: formOf(files, { validate_only: true }),
    seconds: LONG_SECONDS,
  });
}

/**
 * @param {{config: File, weights: File}} files
 * @param {{name: string, replace: boolean, load: boolean}} options
 * @returns {Promise<{adapter: Adapter, created: boolean, notes: string[]}>}
 */
export function register(files, options) {
  return call("POST", "v1/adapters", { body: formOf(files, options), seconds: LONG_SECONDS });
}

function formOf({ config, weights }, options) {
  const form = new FormData();
  for (const [name, value] of Object.entries(options)) form.set(name, String(value));
  form.set("config", config, "adapter_config.json");
  form.set("weights", weights, "adapter_model.safetensors");
  return form;
}

/** @param {string | null} time ISO 8601 @returns {number} in seconds since 1970; 0 for none */
export function seconds(time) {
  return time ? Date.parse(time) / 1000 : 0;
}

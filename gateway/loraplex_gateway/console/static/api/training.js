/** Files of examples and fine-tuning jobs, in OpenAI's shapes. */

import { call } from "./http.js";

/**
 * @typedef {object} Job
 * @property {string} id
 * @property {"validating_files" | "queued" | "running" | "paused" | "succeeded" | "failed" | "cancelled"} status
 * @property {string} model
 * @property {string | null} fine_tuned_model
 * @property {string | null} user_provided_suffix
 * @property {number} created_at
 * @property {number | null} finished_at
 * @property {number | null} estimated_finish
 * @property {number | null} trained_tokens
 * @property {any} method
 * @property {{code: string, message: string} | null} error
 *
 * @typedef {object} JobEvent
 * @property {string} id
 * @property {number} created_at
 * @property {"info" | "warn" | "error"} level
 * @property {"message" | "metrics"} type
 * @property {string} message
 * @property {Record<string, any>} data
 *
 * @typedef {{id: string, filename: string, bytes: number, created_at: number}} StoredFile
 */

const PAGE = 100;
/** Sending a file, checking its examples, and ending a job take long on a busy machine. */
const LONG_SECONDS = 600;

/** @param {AbortSignal} [signal] @returns {Promise<Job[]>} the newest first, at most a page */
export async function listJobs(signal) {
  return (await call("GET", "v1/fine_tuning/jobs", { query: { limit: PAGE }, signal })).data;
}

/** @param {string} id @param {AbortSignal} [signal] @returns {Promise<Job>} */
export function getJob(id, signal) {
  return call("GET", `v1/fine_tuning/jobs/${encodeURIComponent(id)}`, { signal });
}

/** @param {string} id @returns {Promise<Job>} */
export function cancelJob(id) {
  return call("POST", `v1/fine_tuning/jobs/${encodeURIComponent(id)}/cancel`, {
    seconds: LONG_SECONDS,
  });
}

/**
 * The events of a job that are not known yet.
 *
 * @param {string} id
 * @param {JobEvent[]} known the oldest first
 * @param {AbortSignal} [signal]
 * @returns {Promise<JobEvent[]>} all of them, the oldest first; `known` itself if there are no more
 */
export async function eventsSince(id, known, signal) {
  const seen = new Set(known.map((event) => event.id));
  const fresh = [];
  let after;
  for (;;) {
    const path = `v1/fine_tuning/jobs/${encodeURIComponent(id)}/events`;
    const page = await call("GET", path, { query: { limit: PAGE, after }, signal });
    const unknown = page.data.filter((event) => !seen.has(event.id));
    fresh.push(...unknown);
    if (!page.has_more || !page.data.length || unknown.length < page.data.length) break;
    after = page.data.at(-1).id;
  }
  return fresh.length ? [...known, ...fresh.reverse()] : known;
}

/** @param {File} file @returns {Promise<StoredFile>} */
export function uploadFile(file) {
  const body = new FormData();
  body.set("purpose", "fine-tune");
  body.set("file", file, file.name);
  return call("POST", "v1/files", { body, seconds: LONG_SECONDS });
}

/**
 * @typedef {object} JobForm
 * @property {string} model id of the base model
 * @property {string} suffix part of the adapter's name
 * @property {string} method such as "lora"
 * @property {number | null} rank null for the method's default
 * @property {number} epochs
 * @property {number | null} learningRate null for the default
 * @property {number | null} batchSize null for the default
 * @property {number} seed
 */

/**
 * @param {JobForm} form
 * @param {string} trainingFile id
 * @param {string | null} validationFile id
 * @returns {Promise<Job>}
 */
export function createJob(form, trainingFile, validationFile) {
  const hyperparameters = { n_epochs: form.epochs, batch_size: form.batchSize ?? "auto" };
  const json = {
    model: form.model,
    training_file: trainingFile,
    suffix: form.suffix,
    seed: form.seed,
    method: { type: "supervised", supervised: { hyperparameters } },
    loraplex: { method: form.method, load: true },
  };
  if (form.rank !== null) json.loraplex.options = { r: form.rank };
  if (form.learningRate !== null) json.loraplex.learning_rate = form.learningRate;
  if (validationFile) json.validation_file = validationFile;
  return call("POST", "v1/fine_tuning/jobs", { json, seconds: LONG_SECONDS });
}

/** @param {Job} job @returns {boolean} whether it has not ended */
export function isActive({ status }) {
  return !["succeeded", "failed", "cancelled"].includes(status);
}

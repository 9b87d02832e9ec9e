/** The state and the name of a job, in words. */

import { html } from "../app/html.js";

const WORDS = {
  validating_files: ["Checking files", ""],
  queued: ["Queued", ""],
  running: ["Running", "accent"],
  paused: ["Interrupted", "warn"],
  succeeded: ["Succeeded", "good"],
  failed: ["Failed", "bad"],
  cancelled: ["Cancelled", "warn"],
};

/** @param {{status: string}} props */
export function StatusBadge({ status }) {
  const [text, kind] = WORDS[status] ?? [status, ""];
  return html`<span class=${`badge ${kind}`}>${text}</span>`;
}

/** @param {import("../api/training.js").Job} job @returns {string} the adapter's name, or the job's id */
export function adapterOf(job) {
  return job.user_provided_suffix || job.fine_tuned_model || job.id;
}

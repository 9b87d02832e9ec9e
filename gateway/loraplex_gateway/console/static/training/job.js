/** One job: its progress, its curves, its samples, and what it reported. */

import { cancelJob, eventsSince, getJob, isActive } from "../api/training.js";
import { count, duration, moment, short } from "../app/format.js";
import { html, useRef, useState } from "../app/html.js";
import { href } from "../app/route.js";
import { usePolled } from "../app/store.js";
import { Chart } from "../ui/chart.js";
import { Confirm } from "../ui/dialog.js";
import { Icon } from "../ui/icons.js";
import { Failed, Note, notify, notifyFailure } from "../ui/notes.js";
import { curvesOf, progressOf, reportsOf, samplesOf } from "./events.js";
import { Samples } from "./samples.js";
import { adapterOf, StatusBadge } from "./status.js";

const POLL_SECONDS = 1;

/** @param {{id: string, onChange: () => void}} props */
export function JobDetails({ id, onChange }) {
  const { job, events, error, reload } = useJob(id);
  const [asks, setAsks] = useState(false);
  if (!job)
    return html`<section class="panel"><${Failed} error=${error} />${!error && "Reading the job…"}</section>`;
  const samples = samplesOf(events);
  const cancel = async () => {
    try {
      await cancelJob(id);
      notify("good", `The job for ${adapterOf(job)} is cancelled`);
    } catch (failure) {
      notifyFailure(failure);
    }
    await reload();
    onChange();
  };
  return html`<section class="panel stack wide" aria-label=${`Job for ${adapterOf(job)}`}>
    <div class="row apart">
      <div class="row">
        <h2 class="wrap-anywhere">${adapterOf(job)}</h2>
        <${StatusBadge} status=${job.status} />
      </div>
      <div class="row">
        ${job.fine_tuned_model && html`<${TryIt} job=${job} />`}
        ${
          isActive(job) &&
          html`<button type="button" class="button danger" onClick=${() => setAsks(true)}>Cancel job</button>`
        }
      </div>
    </div>
    <${Failed} error=${error} />
    ${job.error?.message && html`<${Note} kind="bad" title=${job.error.message}>${job.error.code}<//>`}
    <${Progress} job=${job} events=${events} />
    <${Curves} events=${events} />
    <${Samples} samples=${samples} />
    <${Log} events=${events} />
    ${
      asks &&
      html`<${Confirm} title="Cancel this job?" action="Cancel the job" onConfirm=${cancel} onClose=${() => setAsks(false)}>
        What was trained so far is not registered.
      <//>`
    }
  </section>`;
}

/** The job and its events, read again until it has ended. */
function useJob(id) {
  const events = useRef([]);
  const [ended, setEnded] = useState(false);
  const { value, error, reload } = usePolled(
    async (signal) => {
      const job = await getJob(id, signal);
      events.current = await eventsSince(id, events.current, signal);
      setEnded(!isActive(job));
      return { job, events: events.current };
    },
    { seconds: ended ? 0 : POLL_SECONDS, inputs: [id] },
  );
  return { job: value?.job, events: value?.events ?? [], error, reload };
}

/** Opens the playground with the base and the new adapter. */
function TryIt({ job }) {
  const query = new URLSearchParams([
    ["m", job.model],
    ["m", job.fine_tuned_model],
  ]);
  return html`<a class="button primary" href=${`${href("playground")}?${query}`}><${Icon} name="run" /> Try it</a>`;
}

function Progress({ job, events }) {
  const { step, steps, loss, evaluation } = progressOf(events);
  const remaining = job.estimated_finish ? job.estimated_finish - Date.now() / 1000 : 0;
  const facts = [
    ["Step", steps ? `${count(step)} of ${count(steps)}` : ""],
    ["Training loss", loss === null ? "" : short(loss)],
    ["Evaluation loss", evaluation === null ? "" : short(evaluation)],
    ["Left", isActive(job) && remaining > 0 ? duration(remaining) : ""],
    ["Trained tokens", job.trained_tokens ? count(job.trained_tokens) : ""],
    ["Finished", job.finished_at ? moment(job.finished_at) : ""],
  ].filter(([, value]) => value);
  return html`<div class="stack">
    ${
      steps > 0 &&
      isActive(job) &&
      html`<progress max=${steps} value=${step} aria-label="Progress of the job"></progress>`
    }
    <dl class="tiles">
      ${facts.map(([name, value]) => html`<div key=${name}><dt>${name}</dt><dd class="number">${value}</dd></div>`)}
    </dl>
  </div>`;
}

const LOSSES = [
  { label: "Training loss", colour: "series-1", text: short },
  { label: "Evaluation loss", colour: "series-2", points: true, text: short },
];
const RATES = [{ label: "Learning rate", colour: "series-4", text: short }];

function Curves({ events }) {
  const { losses, rates, spoken } = curvesOf(events);
  if (!losses[0].length) return html`<p class="empty">The curves begin with the first step.</p>`;
  return html`<div class="curves">
    <div>
      <h3>Loss</h3>
      <${Chart} label=${spoken} lines=${LOSSES} data=${losses} height=${220} />
    </div>
    ${
      rates[0].length > 0 &&
      html`<div>
        <h3>Learning rate</h3>
        <${Chart} label="Learning rate by step" lines=${RATES} data=${rates} height=${220} />
      </div>`
    }
  </div>`;
}

const SHOWN = 200;

function Log({ events }) {
  const messages = reportsOf(events).slice(-SHOWN);
  if (!messages.length) return null;
  return html`<details>
    <summary>What the job reported (${messages.length})</summary>
    <ol class="log" tabindex="0" aria-label="Reports of the job, the newest last">
      ${messages.map(
        (event) => html`<li key=${event.id} class=${event.level}>
          <time class="muted number">${new Date(1000 * event.created_at).toLocaleTimeString()}</time>
          <span class="wrap-anywhere">${event.message}</span>
        </li>`,
      )}
    </ol>
  </details>`;
}

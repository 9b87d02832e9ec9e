/** Training jobs: all of them, one of them closely, and the form for a new one. */

import { isActive, listJobs } from "../api/training.js";
import { ago } from "../app/format.js";
import { html } from "../app/html.js";
import { href } from "../app/route.js";
import { usePolled } from "../app/store.js";
import { Icon } from "../ui/icons.js";
import { Failed } from "../ui/notes.js";
import { NewJob } from "./form.js";
import { JobDetails } from "./job.js";
import { adapterOf, StatusBadge } from "./status.js";

const POLL_SECONDS = 3;

/** @param {{parts: string[]}} props "new", or the id of a job */
export function TrainingView({ parts }) {
  const jobs = usePolled(listJobs, { seconds: POLL_SECONDS });
  const [part] = parts;
  return html`<div class="row apart">
      <h1 tabindex="-1">Training</h1>
      <a class="button primary" href=${href("training", "new")}><${Icon} name="plus" /> New job</a>
    </div>
    <${Failed} error=${jobs.error} />
    <div class=${part ? "beside" : ""}>
      <section class="panel flush" aria-label="Jobs">
        <${JobTable} jobs=${jobs.value} selected=${part} />
      </section>
      ${part === "new" && html`<${NewJob} onCreated=${jobs.reload} />`}
      ${part && part !== "new" && html`<${JobDetails} key=${part} id=${part} onChange=${jobs.reload} />`}
    </div>`;
}

function JobTable({ jobs, selected }) {
  if (!jobs) return html`<p class="empty">Reading the jobs…</p>`;
  if (!jobs.length)
    return html`<p class="empty">No job yet. Upload a file of examples to train an adapter.</p>`;
  return html`<div class="table-frame" tabindex="0" role="group" aria-label="Table of jobs">
    <table class="table">
      <thead>
        <tr>
          <th scope="col">Adapter</th>
          <th scope="col">State</th>
          <th scope="col">Created</th>
        </tr>
      </thead>
      <tbody>
        ${jobs.map(
          (job) => html`<tr key=${job.id} class=${job.id === selected ? "selected" : ""}>
            <th scope="row">
              <a href=${href("training", job.id)} aria-current=${job.id === selected ? "true" : undefined}>
                ${adapterOf(job)}
              </a>
            </th>
            <td><${StatusBadge} status=${job.status} /></td>
            <td class="muted">${isActive(job) ? ago(job.created_at) : ago(job.finished_at ?? job.created_at)}</td>
          </tr>`,
        )}
      </tbody>
    </table>
  </div>`;
}

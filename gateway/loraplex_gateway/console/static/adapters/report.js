/** What the server found in an adapter's files. */

import { size } from "../app/format.js";
import { html } from "../app/html.js";
import { Note } from "../ui/notes.js";
import { kindOf } from "./table.js";

/** @param {{report: import("../api/adapters.js").Report}} props */
export function ValidationReport({ report }) {
  const { valid, findings, spec, notes } = report;
  return html`<div class="stack" role="status">
    ${
      valid
        ? html`<${Note} kind="good" title="The server can serve this adapter">
            ${spec && html`${kindOf(spec)}, ${size(spec.device_bytes)} on the device. Changes ${spec.target_modules.join(", ")}.`}
          <//>`
        : html`<${Note} kind="bad" title=${`${findings.length} ${findings.length === 1 ? "fault" : "faults"}: the server cannot serve this adapter`} />`
    }
    ${
      findings.length > 0 &&
      html`<ul class="findings small">
        ${findings.map(
          ({ reason, field, message }, at) => html`<li key=${at}>
            <div class="row tight">
              ${field && html`<code class="wrap-anywhere">${field}</code>`}
              <span class="badge bad">${reason}</span>
            </div>
            <div class="wrap-anywhere">${message}</div>
          </li>`,
        )}
      </ul>`
    }
    ${notes.map((note, at) => html`<p key=${at} class="small muted wrap-anywhere">${note}</p>`)}
  </div>`;
}

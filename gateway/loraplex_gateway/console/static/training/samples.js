/** Answers before and after training, side by side. */

import { html } from "../app/html.js";

/** @param {{samples: import("./events.js").SampleTable}} props */
export function Samples({ samples }) {
  if (!samples.rows.length) return null;
  const { before, after } = samples;
  return html`<div class="stack">
    <h3>Samples</h3>
    <div class="table-frame" tabindex="0" role="group" aria-label="Samples before and after training">
      <table class="table samples">
        <thead>
          <tr>
            <th scope="col">Prompt</th>
            <th scope="col">${before === 0 ? "Before training" : `After step ${before}`}</th>
            ${after !== before && html`<th scope="col">After step ${after}</th>`}
            <th scope="col">In the data</th>
          </tr>
        </thead>
        <tbody>
          ${samples.rows.map(
            (row, at) => html`<tr key=${at}>
              <th scope="row">${row.prompt}</th>
              <td>${row.before ?? "–"}</td>
              ${after !== before && html`<td>${row.after ?? "–"}</td>`}
              <td class="muted">${row.expected || "–"}</td>
            </tr>`,
          )}
        </tbody>
      </table>
    </div>
  </div>`;
}

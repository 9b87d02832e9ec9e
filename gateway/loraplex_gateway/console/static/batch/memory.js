/** What fills the device: adapters by name, and blocks of keys and values. */

import { count, size } from "../app/format.js";
import { html } from "../app/html.js";
import { seriesOf } from "../ui/colours.js";

const NAMED = 12;

/** @param {{state: import("../api/engine.js").EngineState, adapters: import("../api/adapters.js").Adapter[]}} props */
export function Memory({ state, adapters }) {
  const resident = adapters
    .filter((adapter) => adapter.device_bytes + adapter.merged_bytes > 0)
    .map((adapter) => ({
      label: adapter.name,
      series: seriesOf(adapter.name),
      amount: adapter.device_bytes + adapter.merged_bytes,
    }))
    .sort((a, b) => b.amount - a.amount);
  const { adapter_bytes: used, adapter_bytes_limit: limit } = state;
  const named = resident.reduce((sum, part) => sum + part.amount, 0);
  // Adapters that the caller does not see take memory, too.
  const others = Math.max(0, used - named);
  const parts = others
    ? [...resident, { label: "Others", series: "series-other", amount: others }]
    : resident;
  const blocks = [
    { label: "In use", series: "series-1", amount: state.kv_blocks_used },
    { label: "Kept prompts", series: "series-other", amount: state.kv_blocks_cached },
  ];
  return html`<section class="panel stack" aria-label="Memory">
    <h2>Memory</h2>
    <${Meter}
      title="Adapters on the device"
      text=${`${state.resident_adapters}, ${size(used)}${limit ? ` of ${size(limit)}` : ""}`}
      parts=${parts}
      whole=${Math.max(limit, used)}
      textOf=${size}
    />
    <${Meter}
      title="Blocks of keys and values"
      text=${`${count(state.kv_blocks_used)} of ${count(state.kv_blocks)}`}
      parts=${blocks}
      whole=${state.kv_blocks}
      textOf=${count}
    />
  </section>`;
}

function Meter({ title, text, parts, whole, textOf }) {
  const shown = parts.filter((part) => part.amount > 0);
  return html`<div class="meter">
    <div class="row apart">
      <h3>${title}</h3>
      <span class="small muted number">${text}</span>
    </div>
    <div class="bar-frame" aria-hidden="true">
      ${shown.map(
        (part) => html`<div
          key=${part.label}
          class=${`bar-part ${part.series}`}
          style=${{ width: `${(100 * part.amount) / (whole || 1)}%` }}
          title=${`${part.label}: ${textOf(part.amount)}`}
        ></div>`,
      )}
    </div>
    <ul class="legend-list">
      ${shown.slice(0, NAMED).map(
        (part) => html`<li key=${part.label}>
          <span class=${`swatch ${part.series}`} aria-hidden="true"></span>
          <span>${part.label}</span>
          <span class="muted number">${textOf(part.amount)}</span>
        </li>`,
      )}
      ${shown.length > NAMED && html`<li class="muted">and ${shown.length - NAMED} more</li>`}
    </ul>
    ${!shown.length && html`<p class="muted small">Nothing.</p>`}
  </div>`;
}

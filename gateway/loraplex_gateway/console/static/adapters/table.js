/** The table of adapters. */

import { act, seconds } from "../api/adapters.js";
import { ago, size } from "../app/format.js";
import { html, useState } from "../app/html.js";
import { href } from "../app/route.js";
import { seriesOf } from "../ui/colours.js";
import { notify, notifyFailure } from "../ui/notes.js";
import { Place } from "./place.js";

/** Rows of the table; the filter finds the others. */
const SHOWN = 300;

/** @param {{adapters: import("../api/adapters.js").Adapter[], selected: string | undefined}} props */
export function AdapterTable({ adapters, selected }) {
  if (!adapters.length) return null;
  return html`<div class="table-frame" tabindex="0" role="group" aria-label="Table of adapters">
    <table class="table">
      <thead>
        <tr>
          <th scope="col">Name</th>
          <th scope="col">Place</th>
          <th scope="col">Kind</th>
          <th scope="col" class="right">Version</th>
          <th scope="col" class="right">Files</th>
          <th scope="col" class="right">On device</th>
          <th scope="col" class="right">Requests</th>
          <th scope="col">Last use</th>
          <th scope="col"><span class="spoken">Actions</span></th>
        </tr>
      </thead>
      <tbody>
        ${adapters.slice(0, SHOWN).map(
          (adapter) => html`<${Row}
            key=${adapter.name}
            adapter=${adapter}
            selected=${adapter.name === selected}
          />`,
        )}
      </tbody>
    </table>
    ${adapters.length > SHOWN && html`<p class="empty">${adapters.length - SHOWN} more: narrow the list with the filter.</p>`}
  </div>`;
}

function Row({ adapter, selected }) {
  const bytes = adapter.device_bytes + adapter.merged_bytes;
  return html`<tr class=${selected ? "selected" : ""}>
    <th scope="row">
      <span class="name-cell">
        <span class=${`swatch ${seriesOf(adapter.name)}`} aria-hidden="true"></span>
        <a href=${href("adapters", adapter.name)} aria-current=${selected ? "true" : undefined}>${adapter.name}</a>
        ${adapter.aliases.map((alias) => html`<span key=${alias} class="badge accent" title="Alias">${alias}</span>`)}
      </span>
    </th>
    <td><${Place} adapter=${adapter} /></td>
    <td class="muted">${kindOf(adapter)}</td>
    <td class="right number">${adapter.version}</td>
    <td class="right number">${size(adapter.size_bytes)}</td>
    <td class="right number">${bytes ? size(bytes) : html`<span class="muted">–</span>`}</td>
    <td class="right number">${adapter.active_requests || html`<span class="muted">–</span>`}</td>
    <td class="muted">${ago(seconds(adapter.last_use_time))}</td>
    <td class="right"><${LoadButton} adapter=${adapter} /></td>
  </tr>`;
}

/** @param {{adapter: import("../api/adapters.js").Adapter}} props */
export function LoadButton({ adapter }) {
  const [busy, setBusy] = useState(false);
  const loaded = adapter.state === "resident" || adapter.state === "draining";
  const press = async () => {
    setBusy(true);
    try {
      await act(loaded ? "unload" : "load", adapter.name);
      notify("good", `${adapter.name} is ${loaded ? "unloaded" : "on the device"}`);
    } catch (error) {
      notifyFailure(error);
    }
    setBusy(false);
  };
  return html`<button
    type="button"
    class="button"
    disabled=${busy || adapter.state === "loading" || Boolean(adapter.unservable)}
    aria-label=${`${loaded ? "Unload" : "Load"} ${adapter.name}`}
    onClick=${press}
  >
    ${busy ? "Working…" : loaded ? "Unload" : "Load"}
  </button>`;
}

/** @param {{peft_type: string, rank: number}} adapter @returns {string} such as "LoRA, rank 8" */
export function kindOf({ peft_type: kind, rank }) {
  const name = { LORA: "LoRA", IA3: "IA³" }[kind] ?? kind.toLowerCase().replaceAll("_", " ");
  return rank ? `${name}, rank ${rank}` : name;
}

/** Where an adapter is, in words. */

import { html } from "../app/html.js";
import { Icon } from "../ui/icons.js";

const TIERS = { device: "Device", host: "Host memory", disk: "Disk", unspecified: "Unknown" };
const STATES = { loading: "Loading", draining: "Draining" };

/** @param {{adapter: import("../api/adapters.js").Adapter}} props */
export function Place({ adapter }) {
  const { state, tier, pinned, merged_bytes: merged, unservable } = adapter;
  const kind = state in STATES ? "warn" : tier === "device" ? "good" : "";
  return html`<span class="row tight">
    <span class=${`badge ${kind}`}>${STATES[state] ?? TIERS[tier] ?? tier}</span>
    ${pinned && html`<span class="badge"><${Icon} name="pin" /> Pinned</span>`}
    ${merged > 0 && html`<span class="badge">Merged</span>`}
    ${unservable && html`<span class="badge bad" title=${unservable.message}>Not served</span>`}
  </span>`;
}

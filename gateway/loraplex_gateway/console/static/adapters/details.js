/** One adapter: what can be done with it, its versions, aliases and labels. */

import { act, deleteAdapter, listVersions, seconds } from "../api/adapters.js";
import { moment, size } from "../app/format.js";
import { html, useState } from "../app/html.js";
import { href } from "../app/route.js";
import { usePolled } from "../app/store.js";
import { Confirm } from "../ui/dialog.js";
import { Icon } from "../ui/icons.js";
import { Note, notify, notifyFailure } from "../ui/notes.js";
import { Labels } from "./labels.js";
import { Place } from "./place.js";
import { kindOf, LoadButton } from "./table.js";
import { Versions } from "./versions.js";

/** @param {{adapter: import("../api/adapters.js").Adapter}} props */
export function Details({ adapter }) {
  const inputs = [adapter.name, adapter.version, adapter.aliases.join(" ")];
  const versions = usePolled((signal) => listVersions(adapter.name, signal), { inputs });
  return html`<section class="panel stack wide details" aria-label=${`Adapter ${adapter.name}`}>
    <div class="stack">
      <div class="row apart">
        <h2 class="wrap-anywhere">${adapter.name}</h2>
        <a class="button quiet icon" href=${href("adapters")} aria-label="Close details"><${Icon} name="close" /></a>
      </div>
      <${Place} adapter=${adapter} />
      ${
        adapter.unservable &&
        html`<${Note} kind="bad" title="This server does not serve the adapter">
          ${adapter.unservable.message}
        <//>`
      }
      <${Actions} adapter=${adapter} />
    </div>
    <${Facts} adapter=${adapter} />
    <${Versions} adapter=${adapter} versions=${versions.value ?? []} onChange=${versions.reload} />
    <${Labels} adapter=${adapter} />
  </section>`;
}

function Actions({ adapter }) {
  const [busy, setBusy] = useState("");
  const [asks, setAsks] = useState(false);
  const { name, pinned, merged_bytes: merged } = adapter;
  const does = async (action, done) => {
    setBusy(action);
    try {
      await act(action, name);
      notify("good", `${name} ${done}`);
    } catch (error) {
      notifyFailure(error);
    }
    setBusy("");
  };
  const button = (action, label, done) => html`<button
    type="button"
    class="button"
    disabled=${busy !== ""}
    onClick=${() => does(action, done)}
  >
    ${busy === action ? "Working…" : label}
  </button>`;
  return html`<div class="row">
      <a class="button primary" href=${tryLink(adapter)}>
        <${Icon} name="run" /> Try it
      </a>
      <${LoadButton} adapter=${adapter} />
      ${pinned ? button("unpin", "Unpin", "may be evicted again") : button("pin", "Pin", "stays on the device")}
      ${merged ? button("unmerge", "Unmerge", "is unmerged") : button("merge", "Merge", "is merged")}
      <button type="button" class="button danger" disabled=${busy !== ""} onClick=${() => setAsks(true)}>
        Delete
      </button>
    </div>
    ${
      asks &&
      html`<${Confirm}
        title=${`Delete ${name}?`}
        action="Delete"
        onConfirm=${() => remove(name)}
        onClose=${() => setAsks(false)}
      >
        New requests for it are refused; running ones finish. It can be restored with all its
        versions until the operator collects garbage.
      <//>`
    }`;
}

/** The playground with the base and the adapter. */
function tryLink({ base_name: base, name }) {
  const models = [base, name].filter(Boolean).map((model) => ["m", model]);
  return `${href("playground")}?${new URLSearchParams(models)}`;
}

/** Deletes a name, and offers to take it back. */
async function remove(name) {
  const undo = async () => {
    try {
      await act("restore", name);
      notify("good", `${name} is restored`);
    } catch (error) {
      notifyFailure(error);
    }
  };
  try {
    await deleteAdapter(name);
    notify("good", `${name} is deleted`, { undo });
  } catch (error) {
    notifyFailure(error);
  }
}

function Facts({ adapter }) {
  const rows = [
    ["Kind", kindOf(adapter)],
    ["Modules", adapter.target_modules.join(", ")],
    ["Registered", moment(seconds(adapter.create_time))],
    ["Files", size(adapter.size_bytes)],
    ["Device memory", adapter.device_bytes ? size(adapter.device_bytes) : ""],
    ["Merged copies", adapter.merged_bytes ? size(adapter.merged_bytes) : ""],
    ["Host memory", adapter.host_bytes ? size(adapter.host_bytes) : ""],
    ["Base model", adapter.base_name],
    ["Id in requests", adapter.model === adapter.name ? "" : adapter.model],
    ["Digest", html`<code>${adapter.digest}</code>`],
    ...Object.entries(adapter.provenance).map(([key, value]) => [key, html`<code>${value}</code>`]),
  ];
  return html`<dl class="facts small">
    ${rows
      .filter(([, value]) => value)
      .map(([name, value]) => html`<dt>${name}</dt><dd>${value}</dd>`)}
  </dl>`;
}

/** Registered adapters, as they change, and one of them in detail. */

import { act } from "../api/adapters.js";
import { size } from "../app/format.js";
import { html, useMemo, useState } from "../app/html.js";
import { Dialog } from "../ui/dialog.js";
import { TextField } from "../ui/fields.js";
import { Icon } from "../ui/icons.js";
import { Failed, notify, notifyFailure } from "../ui/notes.js";
import { Details } from "./details.js";
import { AdapterTable } from "./table.js";
import { UploadDialog } from "./upload.js";
import { useAdapters } from "./watch.js";

/** @param {{parts: string[]}} props the name of the adapter to show */
export function AdaptersView({ parts }) {
  const { adapters, error, known } = useAdapters();
  const [filter, setFilter] = useState("");
  const [dialog, setDialog] = useState(/** @type {{kind: string, files: File[]}} */ (null));
  const selected = adapters.find((adapter) => adapter.name === parts[0]);
  const shown = useMemo(() => matching(adapters, filter), [adapters, filter]);
  const close = () => setDialog(null);
  const drop = (event) => {
    event.preventDefault();
    if (event.dataTransfer.files.length)
      setDialog({ kind: "upload", files: [...event.dataTransfer.files] });
  };

  return html`<div class="stack" onDragOver=${(event) => event.preventDefault()} onDrop=${drop}>
      <div class="row apart">
        <h1 tabindex="-1">Adapters</h1>
        <div class="row">
          <button type="button" class="button quiet" onClick=${() => setDialog({ kind: "restore", files: [] })}>
            Restore a deleted one
          </button>
          <button type="button" class="button primary" onClick=${() => setDialog({ kind: "upload", files: [] })}>
            <${Icon} name="upload" /> Upload adapter
          </button>
        </div>
      </div>
      <${Failed} error=${error} />
      <div class=${selected ? "split" : ""}>
        <section class="panel flush" aria-label="Registered adapters">
          <div class="panel-head">
            <input
              class="input search"
              type="search"
              aria-label="Filter by name, alias or label"
              placeholder="Filter by name, alias or label"
              value=${filter}
              onInput=${(event) => setFilter(event.currentTarget.value)}
            />
            <span class="muted small number">${summary(adapters)}</span>
          </div>
          <${AdapterTable} adapters=${shown} selected=${parts[0]} />
          ${
            !shown.length &&
            html`<p class="empty">${known ? (filter ? "No adapter matches." : "No adapter is registered. Drop an adapter's files here.") : "Reading the adapters…"}</p>`
          }
        </section>
        ${selected && html`<${Details} key=${selected.name} adapter=${selected} />`}
      </div>
      ${known && parts[0] && !selected && html`<p class="empty">There is no adapter named ${parts[0]}.</p>`}
    </div>
    ${dialog?.kind === "upload" && html`<${UploadDialog} first=${dialog.files} onClose=${close} />`}
    ${dialog?.kind === "restore" && html`<${RestoreDialog} onClose=${close} />`}`;
}

function matching(adapters, filter) {
  const wanted = filter.trim().toLowerCase();
  if (!wanted) return adapters;
  return adapters.filter(({ name, aliases, labels }) =>
    [name, ...aliases, ...Object.entries(labels).map((pair) => pair.join("="))].some((text) =>
      text.toLowerCase().includes(wanted),
    ),
  );
}

function summary(adapters) {
  const resident = adapters.filter((adapter) => adapter.state === "resident");
  const bytes = adapters.reduce((sum, each) => sum + each.device_bytes + each.merged_bytes, 0);
  return `${resident.length} of ${adapters.length} on the device, ${size(bytes)}`;
}

function RestoreDialog({ onClose }) {
  const [name, setName] = useState("");
  const restore = async () => {
    onClose();
    try {
      await act("restore", name);
      notify("good", `${name} is restored with all its versions`);
    } catch (error) {
      notifyFailure(error);
    }
  };
  return html`<${Dialog} title="Restore a deleted adapter" onClose=${onClose} onSubmit=${restore}>
    <p class="muted">
      A deleted name keeps its versions until the operator collects garbage.
    </p>
    <${TextField} label="Name" value=${name} onChange=${setName} required autofocus />
    <div class="actions">
      <button type="button" class="button" onClick=${onClose}>Cancel</button>
      <button type="submit" class="button primary">Restore</button>
    </div>
  <//>`;
}

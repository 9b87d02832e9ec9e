/** Uploads an adapter: its two files, the report about them, and the registration. */

import { register, validate } from "../api/adapters.js";
import { size } from "../app/format.js";
import { html, useEffect, useRef, useState } from "../app/html.js";
import { href } from "../app/route.js";
import { Dialog } from "../ui/dialog.js";
import { Check, TextField } from "../ui/fields.js";
import { Failed, notify } from "../ui/notes.js";
import { ValidationReport } from "./report.js";

const CONFIG = "adapter_config.json";
const WEIGHTS = "adapter_model.safetensors";

/** @param {{first: File[], onClose: () => void}} props files that were dropped */
export function UploadDialog({ first, onClose }) {
  const [files, setFiles] = useState(() => sorted(first));
  const [name, setName] = useState("");
  const [replace, setReplace] = useState(false);
  const [load, setLoad] = useState(true);
  const [state, setState] = useState({ phase: "idle", report: null, error: null });
  const complete = Boolean(files.config && files.weights);

  const add = (more) => setFiles((before) => ({ ...before, ...sorted(more) }));
  useEffect(() => {
    if (!complete) return undefined;
    let current = true;
    setState({ phase: "checking", report: null, error: null });
    validate(files)
      .then((report) => current && setState({ phase: "idle", report, error: null }))
      .catch((error) => current && setState({ phase: "idle", report: null, error }));
    return () => {
      current = false;
    };
  }, [files]);

  const submit = async () => {
    setState({ ...state, phase: "sending", error: null });
    try {
      const { adapter, created } = await register(files, { name, replace, load });
      notify(
        "good",
        created ? `${adapter.id} is registered` : `${adapter.id} has these files already`,
      );
      onClose();
      location.hash = href("adapters", adapter.name);
    } catch (error) {
      setState({ ...state, phase: "idle", error });
    }
  };
  const usable = state.report?.valid && name && state.phase === "idle";

  return html`<${Dialog} title="Upload an adapter" onClose=${onClose} onSubmit=${() => usable && submit()}>
    <${DropZone} files=${files} onFiles=${add} />
    ${state.phase === "checking" && html`<p class="muted" role="status">Sending and checking the files…</p>`}
    ${state.report && html`<${ValidationReport} report=${state.report} />`}
    <${Failed} error=${state.error} />
    <${TextField}
      label="Name"
      hint="Lower-case letters, digits and hyphens"
      value=${name}
      onChange=${setName}
      pattern="[a-z0-9]([a-z0-9\\-]{0,61}[a-z0-9])?"
      required
    />
    <div class="stack tight">
      <${Check} label="Load it onto the device" checked=${load} onChange=${setLoad} />
      <${Check} label="Add a version if the name is taken" checked=${replace} onChange=${setReplace} />
    </div>
    <div class="actions">
      <button type="button" class="button" onClick=${onClose}>Cancel</button>
      <button type="submit" class="button primary" disabled=${!usable}>
        ${state.phase === "sending" ? "Registering…" : "Register"}
      </button>
    </div>
  <//>`;
}

function DropZone({ files, onFiles }) {
  const [over, setOver] = useState(false);
  const picker = useRef(null);
  const drop = (event) => {
    event.preventDefault();
    event.stopPropagation();
    setOver(false);
    onFiles([...event.dataTransfer.files]);
  };
  const drag = (event) => {
    event.preventDefault();
    setOver(true);
  };
  return html`<div class=${`drop-zone ${over ? "over" : ""}`} onDragOver=${drag} onDragLeave=${() => setOver(false)} onDrop=${drop}>
    <ul class="stack tight">
      <${Expected} name=${CONFIG} file=${files.config} />
      <${Expected} name=${WEIGHTS} file=${files.weights} />
    </ul>
    <div class="row">
      <button type="button" class="button" onClick=${() => picker.current.click()}>Choose files</button>
      <span class="muted small">or drop them here</span>
    </div>
    <input
      ref=${picker}
      type="file"
      class="spoken"
      tabindex="-1"
      aria-label="Files of the adapter"
      accept=".json,.safetensors"
      multiple
      onChange=${(event) => onFiles([...event.currentTarget.files])}
    />
  </div>`;
}

function Expected({ name, file }) {
  return html`<li class="row">
    <span class=${`badge ${file ? "good" : ""}`}>${file ? "Chosen" : "Missing"}</span>
    <code>${name}</code>
    ${file && html`<span class="muted small number">${size(file.size)}</span>`}
  </li>`;
}

/**
 * Finds an adapter's files by their names, or else by what their names end with.
 *
 * @param {File[]} files
 * @returns {{config?: File, weights?: File}}
 */
function sorted(files) {
  const found = {};
  for (const [part, name, end] of [
    ["config", CONFIG, ".json"],
    ["weights", WEIGHTS, ".safetensors"],
  ]) {
    const file =
      files.find((each) => each.name === name) ?? files.find((each) => each.name.endsWith(end));
    if (file) found[part] = file;
  }
  return found;
}

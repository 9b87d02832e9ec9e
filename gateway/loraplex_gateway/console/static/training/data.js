/** Chooses a file of examples, and looks at it before it is sent. */

import { count, size } from "../app/format.js";
import { html, useEffect, useId, useState } from "../app/html.js";

/** Larger files are sent without being looked at: the server checks all of them anyway. */
const LOOKED_AT = 32e6;

/** @param {{label: string, hint: string, file: File | null, onChange: (file: File | null) => void}} props */
export function DataFile({ label, hint, file, onChange }) {
  const id = useId();
  const [over, setOver] = useState(false);
  const drop = (event) => {
    event.preventDefault();
    setOver(false);
    if (event.dataTransfer.files[0]) onChange(event.dataTransfer.files[0]);
  };
  const drag = (event) => {
    event.preventDefault();
    setOver(true);
  };
  return html`<div class="field">
    <label for=${id}>${label}</label>
    <div class=${`drop-zone ${over ? "over" : ""}`} onDragOver=${drag} onDragLeave=${() => setOver(false)} onDrop=${drop}>
      <input
        id=${id}
        type="file"
        class="file-input"
        accept=".jsonl,.json,.ndjson,text/plain"
        aria-describedby=${`${id}-hint`}
        onChange=${(event) => onChange(event.currentTarget.files[0] ?? null)}
      />
      ${file && html`<${Summary} file=${file} />`}
    </div>
    <span class="hint" id=${`${id}-hint`}>${hint}</span>
  </div>`;
}

function Summary({ file }) {
  const [found, setFound] = useState({ lines: 0, fault: "", shape: "" });
  useEffect(() => {
    if (file.size > LOOKED_AT) return;
    let current = true;
    file.text().then((text) => current && setFound(inspect(text)));
    return () => {
      current = false;
    };
  }, [file]);
  return html`<div class="small" role="status">
    <span class="wrap-anywhere">${file.name}</span>
    <span class="muted number"> · ${size(file.size)}${found.lines > 0 && ` · ${count(found.lines)} examples`}</span>
    ${found.shape && html`<span class="muted"> with ${found.shape}</span>`}
    ${found.fault && html`<div class="badge bad">${found.fault}</div>`}
  </div>`;
}

/**
 * @param {string} text
 * @returns {{lines: number, fault: string, shape: string}} the number of examples, the first fault,
 *   and the fields of the first example
 */
export function inspect(text) {
  let lines = 0;
  let shape = "";
  for (const [at, line] of text.split("\n").entries()) {
    if (!line.trim()) continue;
    lines += 1;
    try {
      const example = JSON.parse(line);
      if (example === null || typeof example !== "object" || Array.isArray(example))
        throw new Error();
      shape ||= Object.keys(example).slice(0, 4).join(", ");
    } catch {
      return { lines: 0, shape, fault: `Line ${at + 1} is not a JSON object` };
    }
  }
  return { lines, shape, fault: lines ? "" : "The file has no examples" };
}

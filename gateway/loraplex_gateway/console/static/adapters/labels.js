/** The labels of an adapter's current version. */

import { labelAdapter } from "../api/adapters.js";
import { html, useState } from "../app/html.js";
import { TextField } from "../ui/fields.js";
import { Icon } from "../ui/icons.js";
import { notifyFailure } from "../ui/notes.js";

/** @param {{adapter: import("../api/adapters.js").Adapter}} props */
export function Labels({ adapter }) {
  const [name, setName] = useState("");
  const [value, setValue] = useState("");
  const change = async (set, remove) => {
    try {
      await labelAdapter(adapter.id, set, remove);
      return true;
    } catch (error) {
      notifyFailure(error);
      return false;
    }
  };
  const submit = async (event) => {
    event.preventDefault();
    if (name && (await change({ [name]: value }, []))) {
      setName("");
      setValue("");
    }
  };
  const labels = Object.entries(adapter.labels);
  return html`<div class="stack">
    <h3>Labels</h3>
    ${
      labels.length > 0 &&
      html`<ul class="row">
        ${labels.map(
          ([key, text]) => html`<li key=${key} class="badge">
            <span class="wrap-anywhere">${key}=${text}</span>
            <button type="button" class="badge-close" aria-label=${`Remove the label ${key}`} onClick=${() => change({}, [key])}>
              <${Icon} name="close" />
            </button>
          </li>`,
        )}
      </ul>`
    }
    <form class="alias-form" onSubmit=${submit}>
      <${TextField} label="Key" value=${name} onChange=${setName} pattern="[a-z0-9][a-z0-9._\\/\\-]*" maxlength="63" />
      <${TextField} label="Value" value=${value} onChange=${setValue} maxlength="256" />
      <button type="submit" class="button" disabled=${!name}>Set label</button>
    </form>
  </div>`;
}

/** The dialog in which the caller's key is entered, replaced or forgotten. */

import { Dialog } from "../ui/dialog.js";
import { TextField } from "../ui/fields.js";
import { html, useState } from "./html.js";
import { key, takeKey } from "./session.js";
import { useStore } from "./store.js";

/** @param {{onClose: () => void}} props */
export function KeyDialog({ onClose }) {
  const present = useStore(key);
  const [text, setText] = useState("");
  const take = (next) => {
    takeKey(next);
    onClose();
  };
  return html`<${Dialog} title="API key" onClose=${onClose} onSubmit=${() => text.trim() && take(text)}>
    <p class="muted">
      The key is sent to this gateway only, as a header. It stays in this browser tab until the tab
      is closed, and it is never part of a link.
    </p>
    <${TextField}
      label=${present ? "New key" : "Key"}
      type="password"
      value=${text}
      onChange=${setText}
      autofocus
      required
    />
    <div class="actions">
      ${
        present &&
        html`<button type="button" class="button danger" onClick=${() => take("")}>Forget key</button>`
      }
      <button type="button" class="button" onClick=${onClose}>Cancel</button>
      <button type="submit" class="button primary">Use key</button>
    </div>
  <//>`;
}

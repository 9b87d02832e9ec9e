/** Failures and other notes inside a view, and short notices at the edge of the page. */

import { html } from "../app/html.js";
import { createStore, useStore } from "../app/store.js";
import { Icon } from "./icons.js";

/** @param {{kind?: "" | "good" | "warn" | "bad", title: string, children?: any, role?: string}} props */
export function Note({ kind = "", title, children, role }) {
  return html`<div class=${`note-box ${kind}`} role=${role}>
    <strong>${title}</strong>
    ${children && html`<div class="small">${children}</div>`}
  </div>`;
}

/** What failed and what to do. @param {{error: Error | null | undefined}} props */
export function Failed({ error }) {
  if (!error) return null;
  return html`<${Note} kind="bad" role="alert" title=${error.message}>${hintOf(error)}<//>`;
}

/** @param {Error} error @returns {string} */
export function hintOf(error) {
  return "hint" in error ? String(error.hint) : "Reload the page; if it happens again, report it.";
}

/** @typedef {{id: number, kind: "good" | "bad", title: string, hint: string, undo?: () => void}} Notice */

/** @type {import("../app/store.js").Store<Notice[]>} */
const notices = createStore([]);
const SECONDS = 7;
let last = 0;

/**
 * Shows a notice: good ones for some seconds, bad ones until they are closed.
 *
 * @param {"good" | "bad"} kind
 * @param {string} title
 * @param {{hint?: string, undo?: () => void}} [options]
 */
export function notify(kind, title, { hint = "", undo } = {}) {
  last += 1;
  const id = last;
  notices.set([...notices.get().slice(-3), { id, kind, title, hint, undo }]);
  if (kind === "good") setTimeout(() => close(id), 1000 * SECONDS);
}

/** @param {Error} error */
export function notifyFailure(error) {
  notify("bad", error.message, { hint: hintOf(error) });
}

function close(id) {
  notices.set(notices.get().filter((notice) => notice.id !== id));
}

/** The notices, in regions that screen readers read out. */
export function Notices() {
  const shown = useStore(notices);
  const of = (kind) => shown.filter((notice) => notice.kind === kind);
  return html`<div class="notices">
    <div role="status">${of("good").map((notice) => html`<${Card} key=${notice.id} ...${notice} />`)}</div>
    <div role="alert">${of("bad").map((notice) => html`<${Card} key=${notice.id} ...${notice} />`)}</div>
  </div>`;
}

/** @param {Notice} props */
function Card({ id, kind, title, hint, undo }) {
  const undone = () => {
    close(id);
    undo?.();
  };
  return html`<div class=${`notice note-box ${kind}`}>
    <div class="stack tight wrap-anywhere">
      <strong>${title}</strong>
      ${hint && html`<span class="small">${hint}</span>`}
    </div>
    <div class="row">
      ${undo && html`<button type="button" class="button" onClick=${undone}>Undo</button>`}
      <button type="button" class="button quiet icon" aria-label="Close notice" onClick=${() => close(id)}>
        <${Icon} name="close" />
      </button>
    </div>
  </div>`;
}

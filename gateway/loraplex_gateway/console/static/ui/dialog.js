/** Dialogs, by the browser's own element: it holds the focus and closes with Escape. */

import { html, useEffect, useId, useRef } from "../app/html.js";

/**
 * @param {{title: string, onClose: () => void, onSubmit?: () => void, children: any}} props with
 *   `onSubmit`, the dialog is a form
 */
export function Dialog({ title, onClose, onSubmit, children }) {
  const element = useRef(null);
  const name = useId();
  useEffect(() => {
    element.current.showModal();
    return () => element.current?.close();
  }, []);
  const submit = (event) => {
    event.preventDefault();
    onSubmit();
  };
  const content = html`<h2 id=${name}>${title}</h2>
    ${children}`;
  return html`<dialog ref=${element} class="dialog" aria-labelledby=${name} onClose=${onClose}>
    ${onSubmit ? html`<form onSubmit=${submit}>${content}</form>` : html`<div>${content}</div>`}
  </dialog>`;
}

/**
 * Asks before something that cannot be taken back easily.
 *
 * @param {{title: string, action: string, onConfirm: () => void, onClose: () => void, children: any}} props
 */
export function Confirm({ title, action, onConfirm, onClose, children }) {
  const confirmed = () => {
    onClose();
    onConfirm();
  };
  return html`<${Dialog} title=${title} onClose=${onClose} onSubmit=${confirmed}>
    <div>${children}</div>
    <div class="actions">
      <button type="button" class="button" onClick=${onClose}>Cancel</button>
      <button type="submit" class="button danger">${action}</button>
    </div>
  <//>`;
}

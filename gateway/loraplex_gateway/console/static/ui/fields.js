/** Fields of forms, each with its label. */

import { html, useId, useState } from "../app/html.js";

/**
 * @param {{label: string, hint?: string, children: (id: string, hintId: string | undefined) => any}} props
 */
export function Field({ label, hint, children }) {
  const id = useId();
  const hintId = hint ? `${id}-hint` : undefined;
  return html`<div class="field">
    <label for=${id}>${label}</label>
    ${children(id, hintId)}
    ${hint && html`<span class="hint" id=${hintId}>${hint}</span>`}
  </div>`;
}

/** @param {{label: string, hint?: string, value: string, onChange: (text: string) => void}} props others are the input's */
export function TextField({ label, hint, value, onChange, ...rest }) {
  return html`<${Field} label=${label} hint=${hint}>
    ${(id, hintId) => html`<input
      id=${id}
      class="input"
      aria-describedby=${hintId}
      autocomplete="off"
      spellcheck=${false}
      value=${value}
      onInput=${(event) => onChange(event.currentTarget.value)}
      ...${rest}
    />`}
  <//>`;
}

/**
 * A number, or nothing if `optional`. What is no number in the range leaves the value as it was.
 *
 * @param {{label: string, hint?: string, value: number | null, min: number, max: number, optional?: boolean, onChange: (value: number | null) => void}} props
 */
export function NumberField({ value, onChange, optional = false, ...rest }) {
  const [typed, setTyped] = useState(null); // what is being typed, such as "0."
  const isValid = (text) =>
    text === "" ? optional : Number(text) >= rest.min && Number(text) <= rest.max;
  const changed = (text) => {
    setTyped(text);
    if (isValid(text)) onChange(text === "" ? null : Number(text));
  };
  return html`<${TextField}
    class="input number"
    inputmode="decimal"
    aria-invalid=${typed !== null && !isValid(typed) ? "true" : undefined}
    value=${typed ?? value ?? ""}
    onChange=${changed}
    onBlur=${() => setTyped(null)}
    ...${rest}
  />`;
}

/** @param {{label: string, checked: boolean, onChange: (on: boolean) => void}} props */
export function Check({ label, checked, onChange }) {
  return html`<label class="check">
    <input type="checkbox" checked=${checked} onChange=${(event) => onChange(event.currentTarget.checked)} />
    ${label}
  </label>`;
}

/**
 * A few choices, side by side.
 *
 * @param {{label: string, value: string, options: [string, string][], onChange: (value: string) => void}} props
 */
export function Choices({ label, value, options, onChange }) {
  const name = useId();
  return html`<div class="choices" role="radiogroup" aria-label=${label}>
    ${options.map(
      ([option, text]) => html`<label key=${option}>
        <input type="radio" name=${name} checked=${option === value} onChange=${() => onChange(option)} />
        ${text}
      </label>`,
    )}
  </div>`;
}

/** A text field with a list that narrows while one types (ARIA's editable combobox). */

import { html, useEffect, useId, useRef, useState } from "../app/html.js";
import { Icon } from "./icons.js";

/** @typedef {{value: string, group: string, note?: string}} Option */

const SHOWN = 60;

/**
 * @param {{label: string, value: string, options: Option[], placeholder?: string, free?: boolean, onChange: (value: string) => void, onType?: (text: string) => void}} props
 *   texts that match nothing in the list are allowed, with `free` all texts
 */
export function Combobox({ label, value, options, placeholder, free, onChange, onType }) {
  const id = useId();
  const list = useRef(null);
  const [open, setOpen] = useState(false);
  const [typed, setTyped] = useState(null);
  const [active, setActive] = useState(-1);
  const found = matching(options, typed);
  const shown = found.slice(0, SHOWN);

  useEffect(() => {
    list.current?.querySelector(".active")?.scrollIntoView({ block: "nearest" });
  }, [active, open]);

  const show = () => {
    setOpen(true);
    setActive(shown.findIndex((option) => option.value === value));
  };
  const hide = () => {
    setOpen(false);
    setTyped(null);
    setActive(-1);
  };
  const choose = (text) => {
    hide();
    if (text.trim() && text !== value) onChange(text.trim());
  };
  // What was typed stands for the first match, unless it is exact or matches nothing.
  const meant = () => {
    if (typed === null || free || found.some((option) => option.value === typed.trim()))
      return typed ?? value;
    return found[0]?.value ?? typed;
  };
  const type = (event) => {
    setTyped(event.currentTarget.value);
    setOpen(true);
    setActive(-1);
    onType?.(event.currentTarget.value);
  };
  const press = (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step) {
      event.preventDefault();
      if (!open) show();
      else if (shown.length) setActive((active + step + shown.length) % shown.length);
    } else if (event.key === "Enter" && open) {
      event.preventDefault();
      choose(shown[active]?.value ?? meant());
    } else if (event.key === "Escape" && open) {
      event.preventDefault();
      event.stopPropagation();
      hide();
    }
  };

  return html`<div class="combo">
    <input
      class="input"
      role="combobox"
      aria-label=${label}
      aria-expanded=${open}
      aria-controls=${`${id}-list`}
      aria-autocomplete="list"
      aria-activedescendant=${open && active >= 0 ? `${id}-${active}` : undefined}
      autocomplete="off"
      spellcheck=${false}
      placeholder=${placeholder}
      value=${typed ?? value}
      onInput=${type}
      onKeyDown=${press}
      onClick=${() => !open && show()}
      onFocus=${(event) => event.currentTarget.select()}
      onBlur=${() => (typed === null ? hide() : choose(meant()))}
    />
    <${Icon} name="down" />
    <div ref=${list} id=${`${id}-list`} role="listbox" aria-label=${label} class="options" hidden=${!open}>
      ${open && grouped(shown).map((group) => html`<${Group} ...${{ ...group, id, active, choose }} />`)}
      ${open && !found.length && html`<div class="group-name" role="presentation">Nothing has this name.</div>`}
      ${
        open &&
        found.length > SHOWN &&
        html`<div class="group-name" role="presentation">${found.length - SHOWN} more: type to narrow the list</div>`
      }
    </div>
  </div>`;
}

function Group({ name, options, id, active, choose }) {
  return html`<div role="group" aria-label=${name}>
    <div class="group-name" aria-hidden="true">${name}</div>
    ${options.map(
      ({ option, at }) => html`<div
        key=${option.value}
        id=${`${id}-${at}`}
        role="option"
        class=${at === active ? "active" : ""}
        aria-selected=${at === active}
        onMouseDown=${(event) => event.preventDefault()}
        onClick=${() => choose(option.value)}
      >
        <span class="wrap-anywhere">${option.value}</span>
        ${option.note && html`<span class="note">${option.note}</span>`}
      </div>`,
    )}
  </div>`;
}

/** @param {Option[]} options @param {string | null} typed null shows all */
function matching(options, typed) {
  const wanted = (typed ?? "").trim().toLowerCase();
  if (!wanted) return options;
  const starts = [];
  const contains = [];
  for (const option of options) {
    const at = option.value.toLowerCase().indexOf(wanted);
    if (at === 0) starts.push(option);
    else if (at > 0) contains.push(option);
  }
  return sortedByGroup([...starts, ...contains], options);
}

/** Keeps the options of a group together, in the order of the groups in `all`. */
function sortedByGroup(options, all) {
  const order = [...new Set(all.map((option) => option.group))];
  return options.toSorted((a, b) => order.indexOf(a.group) - order.indexOf(b.group));
}

/** @param {Option[]} options */
function grouped(options) {
  const groups = new Map();
  for (const [at, option] of options.entries()) {
    if (!groups.has(option.group)) groups.set(option.group, []);
    groups.get(option.group).push({ option, at });
  }
  return [...groups].map(([name, members]) => ({ key: name, name, options: members }));
}

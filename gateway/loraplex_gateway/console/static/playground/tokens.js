/** The tokens of an answer, tinted by their probability; one of them is looked at closely. */

import { percent, short } from "../app/format.js";
import { html, useLayoutEffect, useRef, useState } from "../app/html.js";

/** Probabilities below which a token gets the next stronger tint. */
const TINTS = [0.9, 0.5, 0.2, 0.05];

/** @param {number} logprob @returns {number} 0 to 4, the strongest */
export function tintOf(logprob) {
  const probability = Math.exp(logprob);
  return TINTS.filter((limit) => probability < limit).length;
}

/**
 * @param {{label: string, tokens: import("../api/generate.js").Token[], split: number}} props
 *   `split` is the number of the token at which the answer leaves the one that it is compared with;
 *   -1 for none
 */
export function Tokens({ label, tokens, split }) {
  const [at, setAt] = useState(-1);
  const group = useRef(null);
  const token = tokens[at];
  const look = (event) => {
    const found = event.target.closest?.("[data-at]");
    if (found) setAt(Number(found.dataset.at));
  };
  const press = (event) => {
    const next = target(event.key, at, tokens.length);
    if (next === undefined) return;
    event.preventDefault();
    setAt(next);
  };
  return html`<div class="tokens-frame" onMouseLeave=${() => setAt(-1)}>
    <div
      ref=${group}
      class="tokens"
      role="group"
      tabindex="0"
      aria-label=${`${label}. The arrow keys visit its tokens.`}
      onMouseOver=${look}
      onClick=${look}
      onKeyDown=${press}
      onBlur=${() => setAt(-1)}
    >
      ${tokens.map(
        (each, index) => html`<span
          key=${index}
          data-at=${index}
          class=${`token tint-${tintOf(each.logprob)} ${index === at ? "active" : ""} ${index === split ? "parting" : ""}`}
          >${each.text}</span
        >`,
      )}
    </div>
    ${token && html`<${Closer} token=${token} at=${at} group=${group} />`}
  </div>`;
}

/** The token to visit after a key; undefined for keys that mean nothing here. */
function target(name, at, length) {
  const last = length - 1;
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[name];
  if (step) return Math.min(last, Math.max(0, at + step));
  return { Home: 0, End: last, Escape: at < 0 ? undefined : -1 }[name];
}

/** A token's probability and what could have been in its place. */
function Closer({ token, at, group }) {
  const box = useRef(null);
  useLayoutEffect(() => {
    const span = group.current.querySelector(`[data-at="${at}"]`);
    place(box.current, span, group.current);
  }, [at, token]);
  return html`<div class="closer" ref=${box} role="status">
    <div class="row apart">
      <code>${visible(token.text)}</code>
      <span class="number">${percent(Math.exp(token.logprob))}</span>
    </div>
    <div class="muted small number">log-probability ${short(token.logprob)}</div>
    ${
      token.top.length > 0 &&
      html`<table class="alternatives">
        <caption class="spoken">Most probable tokens</caption>
        <tbody>
          ${token.top.map(
            (
              other,
              index,
            ) => html`<tr key=${index} class=${other.text === token.text ? "chosen" : ""}>
              <td><code>${visible(other.text)}</code></td>
              <td><div class="share" style=${{ width: `${100 * Math.exp(other.logprob)}%` }}></div></td>
              <td class="number">${percent(Math.exp(other.logprob))}</td>
            </tr>`,
          )}
        </tbody>
      </table>`
    }
  </div>`;
}

/** Puts the box below the token, or above it where there is no room. */
function place(box, span, frame) {
  if (!box || !span) return;
  span.scrollIntoView({ block: "nearest" });
  const word = span.getBoundingClientRect();
  const around = frame.getBoundingClientRect();
  const left = Math.min(word.left - around.left, around.width - box.offsetWidth);
  const below = word.bottom + box.offsetHeight + 8 < innerHeight;
  const top = below ? word.bottom + 4 : word.top - box.offsetHeight - 4;
  box.style.left = `${Math.max(0, left)}px`;
  box.style.top = `${top - around.top}px`;
}

/** @param {string} text @returns {string} with spaces and line breaks that can be seen */
export function visible(text) {
  if (!text) return "(part of a character)";
  return text.replaceAll(" ", "·").replaceAll("\n", "↵").replaceAll("\t", "⇥");
}

/** The prompt, the settings, and the buttons that ask and stop. */

import { html } from "../app/html.js";
import { Check, Choices, Field, NumberField, TextField } from "../ui/fields.js";
import { Icon } from "../ui/icons.js";

const MODES = [
  ["chat", "Chat"],
  ["text", "Text"],
];

/**
 * @param {{settings: import("../api/generate.js").Settings, running: boolean, ready: boolean, onChange: (part: Partial<import("../api/generate.js").Settings>) => void, onRun: () => void, onStop: () => void, onNewSeed: () => void, onLink: () => void}} props
 */
export function Composer({ settings, running, ready, onChange, onRun, onStop, onNewSeed, onLink }) {
  const chat = settings.mode === "chat";
  const press = (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      if (ready) onRun();
    }
  };
  const submit = (event) => {
    event.preventDefault();
    if (running) onStop();
    else if (ready) onRun();
  };
  return html`<form class="panel composer" onSubmit=${submit} onKeyDown=${press}>
    <div class="composer-text">
      ${
        chat &&
        html`<${TextField}
          label="System message"
          placeholder="None"
          value=${settings.system}
          onChange=${(system) => onChange({ system })}
        />`
      }
      <${Field} label=${chat ? "Message" : "Text to continue"}>
        ${(id) => html`<textarea
          id=${id}
          class="input"
          rows=${chat ? 3 : 5}
          value=${settings.prompt}
          onInput=${(event) => onChange({ prompt: event.currentTarget.value })}
        ></textarea>`}
      <//>
      <div class="row">
        ${
          running
            ? html`<button type="submit" class="button primary run">
                <${Icon} name="stop" /> Stop <kbd>Esc</kbd>
              </button>`
            : html`<button type="submit" class="button primary run" disabled=${!ready}>
                <${Icon} name="run" /> Run <kbd>Ctrl ↵</kbd>
              </button>`
        }
        <button type="button" class="button" disabled=${running || !ready} onClick=${onNewSeed}>
          <${Icon} name="dice" /> Run with a new seed
        </button>
        <button type="button" class="button quiet" onClick=${onLink}>
          <${Icon} name="link" /> Copy link
        </button>
        <div class="push">
          <${Choices}
            label="How the prompt is read"
            value=${settings.mode}
            options=${MODES}
            onChange=${(mode) => onChange({ mode })}
          />
        </div>
      </div>
    </div>
    <${Parameters} settings=${settings} onChange=${onChange} />
  </form>`;
}

function Parameters({ settings, onChange }) {
  const number = (label, name, min, max) => html`<${NumberField}
    label=${label}
    value=${settings[name]}
    min=${min}
    max=${max}
    onChange=${(value) => onChange({ [name]: value })}
  />`;
  return html`<div class="parameters" role="group" aria-label="Parameters">
    <div class="parameter-grid">
      <${NumberField}
        label="Seed"
        value=${settings.seed}
        min=${0}
        max=${1e15}
        optional
        placeholder="random"
        onChange=${(seed) => onChange({ seed: seed === null ? null : Math.floor(seed) })}
      />
      ${number("Temperature", "temperature", 0, 100)}
      ${number("Max tokens", "maxTokens", 1, 1e6)}
    </div>
    <details>
      <summary>More parameters</summary>
      <div class="parameter-grid">
        ${number("Top p", "topP", 1e-6, 1)} ${number("Top k", "topK", 0, 1e6)}
        ${number("Min p", "minP", 0, 1)}
        ${number("Repetition", "repetitionPenalty", 1e-3, 100)}
        ${number("Presence", "presencePenalty", -2, 2)}
        ${number("Frequency", "frequencyPenalty", -2, 2)}
      </div>
      <${Field} label="Stop texts, one a line">
        ${(id) => html`<textarea
          id=${id}
          class="input mono"
          rows="2"
          value=${settings.stop.join("\n")}
          onChange=${(event) => onChange({ stop: lines(event.currentTarget.value) })}
        ></textarea>`}
      <//>
    </details>
    <${Check}
      label="Tint tokens by probability"
      checked=${settings.logprobs}
      onChange=${(logprobs) => onChange({ logprobs })}
    />
  </div>`;
}

/** @param {string} text @returns {string[]} its lines that are not empty */
function lines(text) {
  return text.split("\n").filter(Boolean);
}

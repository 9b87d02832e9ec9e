/** The terms of a weighted mix of adapters. */

import { html } from "../app/html.js";
import { Combobox } from "../ui/combobox.js";
import { NumberField } from "../ui/fields.js";
import { Icon } from "../ui/icons.js";

const MOST_TERMS = 8;
const WEIGHT = 16;

/**
 * @param {{mix: import("../api/generate.js").MixTerm[], options: import("../ui/combobox.js").Option[], letter: string, onChange: (mix: import("../api/generate.js").MixTerm[]) => void}} props
 */
export function MixTerms({ mix, options, letter, onChange }) {
  const adapters = options.filter((option) => option.group !== "Base model");
  const change = (at, part) =>
    onChange(mix.map((term, index) => (index === at ? { ...term, ...part } : term)));
  const add = () => {
    const taken = new Set(mix.map((term) => term.adapter));
    const next = adapters.find((option) => !taken.has(option.value)) ?? adapters[0];
    if (next) onChange([...mix, { adapter: next.value, weight: 0.5 }]);
  };
  return html`<div class="mix">
    ${mix.map(
      (term, at) => html`<div class="mix-term" key=${at}>
        <${Combobox}
          label=${`Adapter ${at + 1} of mix ${letter}`}
          value=${term.adapter}
          options=${adapters}
          onChange=${(adapter) => change(at, { adapter })}
        />
        <input
          type="range"
          class="range"
          min="0"
          max="1"
          step="0.05"
          aria-label=${`Weight of ${term.adapter} in mix ${letter}`}
          value=${term.weight}
          onInput=${(event) => change(at, { weight: Number(event.currentTarget.value) })}
        />
        <${NumberField}
          label=${html`<span class="spoken">Exact weight of ${term.adapter} in mix ${letter}</span>`}
          value=${term.weight}
          min=${-WEIGHT}
          max=${WEIGHT}
          onChange=${(weight) => change(at, { weight })}
        />
        <button
          type="button"
          class="button quiet icon"
          aria-label=${`Remove ${term.adapter} from mix ${letter}`}
          disabled=${mix.length < 2}
          onClick=${() => onChange(mix.filter((_, index) => index !== at))}
        >
          <${Icon} name="close" />
        </button>
      </div>`,
    )}
    <div>
      <button type="button" class="button quiet" disabled=${mix.length >= MOST_TERMS} onClick=${add}>
        <${Icon} name="plus" /> Add adapter
      </button>
    </div>
  </div>`;
}

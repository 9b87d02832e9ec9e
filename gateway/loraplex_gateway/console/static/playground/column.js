/** One column: which model answers, its answer, and what the answer cost. */

import { duration, rate } from "../app/format.js";
import { html } from "../app/html.js";
import { seriesOf } from "../ui/colours.js";
import { Combobox } from "../ui/combobox.js";
import { Icon } from "../ui/icons.js";
import { Failed } from "../ui/notes.js";
import { agreement, isRunning, measured } from "./answer.js";
import { MixTerms } from "./mix.js";
import { nameOf } from "./settings.js";
import { Tokens } from "./tokens.js";

export const LETTERS = "ABCD";
const WEIGHTED_MIX = "Weighted mix…";

/**
 * @param {{at: number, choice: import("../api/generate.js").Choice, answer: import("./answer.js").Answer, compared: import("./answer.js").Answer | null, options: import("../ui/combobox.js").Option[], base: string, tinted: boolean, onChoose: (choice: import("../api/generate.js").Choice) => void, onType: (text: string) => void, onAgain: () => void, onRemove: (() => void) | null}} props
 */
export function Column(props) {
  const { at, choice, answer, compared, options, base } = props;
  const letter = LETTERS[at];
  const split = compared ? agreement(answer, compared) : -1;
  const running = isRunning(answer);
  return html`<section class="column" aria-label=${`Column ${letter}: ${nameOf(choice)}`} aria-busy=${running}>
    <header class="column-head">
      <span class=${`swatch ${swatch(choice, base)}`} aria-hidden="true"></span>
      <span class="letter" aria-hidden="true">${letter}</span>
      <div class="grow">
        <${Combobox}
          label=${`Model of column ${letter}`}
          value=${choice.mix ? WEIGHTED_MIX : choice.model}
          options=${[...options, { value: WEIGHTED_MIX, group: "Mix", note: "several adapters" }]}
          placeholder="Choose a model"
          onType=${props.onType}
          onChange=${(text) => props.onChoose(chosen(text, options))}
        />
      </div>
      <button
        type="button"
        class="button quiet icon"
        aria-label=${`Regenerate column ${letter}`}
        title="Regenerate with another seed"
        disabled=${running || !(choice.model || choice.mix)}
        onClick=${props.onAgain}
      >
        <${Icon} name="again" />
      </button>
      ${
        props.onRemove &&
        html`<button
          type="button"
          class="button quiet icon"
          aria-label=${`Remove column ${letter}`}
          onClick=${props.onRemove}
        >
          <${Icon} name="close" />
        </button>`
      }
    </header>
    ${
      choice.mix &&
      html`<${MixTerms}
        mix=${choice.mix}
        options=${options}
        letter=${letter}
        onChange=${(mix) => props.onChoose({ model: "", mix })}
      />`
    }
    <div class="answer">
      <${Body} letter=${letter} answer=${answer} tinted=${props.tinted} split=${split} />
    </div>
    <footer class="column-foot small muted">
      <${Cost} answer=${answer} split=${split} compared=${compared} />
    </footer>
  </section>`;
}

function Body({ letter, answer, tinted, split }) {
  if (answer.phase === "idle") return html`<p class="muted">No answer yet.</p>`;
  if (answer.phase === "waiting")
    return html`<p class="muted waiting">Computing the prompt<span aria-hidden="true"></span></p>`;
  const text =
    tinted && answer.tokens.length
      ? html`<${Tokens} label=${`Answer ${letter}`} tokens=${answer.tokens} split=${split} />`
      : html`<div class="tokens" role="group" tabindex="0" aria-label=${`Answer ${letter}`}>${answer.text}</div>`;
  return html`${answer.text && text}
    ${answer.phase === "streaming" && html`<span class="caret" aria-hidden="true"></span>`}
    ${answer.phase === "done" && !answer.text && html`<p class="muted">The answer is empty.</p>`}
    <${Failed} error=${answer.error} />`;
}

/** The line below an answer. */
function Cost({ answer, split, compared }) {
  if (answer.phase === "idle") return html`<span>\u00a0</span>`;
  const { tokens, firstSeconds, perSecond } = measured(answer);
  const ended =
    { stopped: "stopped by you", failed: "failed" }[answer.phase] ?? ENDS[answer.finish];
  return html`<div class="row number">
      ${perSecond > 0 && html`<span><b>${rate(perSecond)}</b> tok/s</span>`}
      ${firstSeconds > 0 && html`<span>first token <b>${duration(firstSeconds)}</b></span>`}
      ${tokens > 0 && html`<span>${tokens} tokens</span>`}
      ${ended && html`<span>${ended}</span>`}
      ${answer.usage?.cached > 0 && html`<span>${answer.usage.cached} prompt tokens reused</span>`}
    </div>
    ${compared && split >= 0 && html`<div>${likeness(answer, compared, split)}</div>`}
    ${answer.adapter && html`<div class="mono cut" title=${answer.adapter}>${answer.adapter}</div>`}`;
}

const ENDS = { stop: "complete", length: "cut at the limit" };

function likeness(answer, compared, split) {
  const whole = split === answer.tokens.length && split === compared.tokens.length;
  if (whole) return "same tokens as A";
  if (split === 0) return "differs from A from the first token on";
  return `same as A for ${split} ${split === 1 ? "token" : "tokens"}`;
}

function swatch(choice, base) {
  if (choice.mix) return "series-other";
  return seriesOf(choice.model === base ? "" : choice.model);
}

/** What a text in the list of models means. */
function chosen(text, options) {
  if (text !== WEIGHTED_MIX) return { model: text, mix: null };
  const adapters = options.filter((option) => option.group === "Adapters").slice(0, 2);
  const mix = adapters.map((option) => ({ adapter: option.value, weight: 0.5 }));
  return { model: "", mix: mix.length ? mix : [{ adapter: "", weight: 1 }] };
}

/** The playground: one prompt and seed for up to four models side by side. */

import { listVersions } from "../api/adapters.js";
import { listModels } from "../api/models.js";
import { html, useEffect, useRef, useState } from "../app/html.js";
import { href, route } from "../app/route.js";
import { server } from "../app/session.js";
import { usePolled, useStore } from "../app/store.js";
import { Icon } from "../ui/icons.js";
import { Failed, notify } from "../ui/notes.js";
import { ask, isRunning, NO_ANSWER } from "./answer.js";
import { Column, LETTERS } from "./column.js";
import { Composer } from "./composer.js";
import { keepDraft, MOST_COLUMNS, nameOf, startingDraft, toQuery } from "./settings.js";

const GROUPS = { base: "Base model", adapter: "Adapters", alias: "Aliases" };

export function PlaygroundView() {
  const { query } = useStore(route);
  const { state } = useStore(server);
  const models = usePolled(listModels, { inputs: [state] });
  const cards = models.value ?? [];
  const base = cards.find((card) => card.kind === "base")?.id ?? "";
  const [draft, setDraft] = useState(() => startingDraft(query));
  const { answers, run, stop, clear, forget } = useAnswers();
  const versions = useVersions(cards);
  const options = [...optionsOf(cards), ...versions.options];
  const { columns, settings } = draft;
  const running = answers.some(isRunning);

  useEffect(() => {
    if ([...query].length) setDraft(startingDraft(query));
  }, [query]);
  useEffect(() => keepDraft(draft), [draft]);
  useEffect(() => {
    if (!columns.length && cards.length) setDraft({ ...draft, columns: firstColumns(cards) });
  }, [models.value, columns.length]);

  const setColumns = (next) => setDraft({ ...draft, columns: next });
  const change = (part) => setDraft({ ...draft, settings: { ...settings, ...part } });
  const runAll = (seed = settings.seed) =>
    columns.forEach((choice, at) => void run(at, choice, { ...settings, seed }, base));
  const newSeed = () => {
    const seed = randomSeed();
    change({ seed });
    runAll(seed);
  };
  const choose = (at, next) => {
    // An answer must not stand under the name of another model.
    clear(at);
    setColumns(columns.map((old, index) => (index === at ? next : old)));
  };
  const remove = (at) => {
    setColumns(columns.filter((_, index) => index !== at));
    forget(at);
  };
  const add = () => {
    const taken = new Set(columns.map((column) => column.model));
    const next = cards.find((card) => card.kind !== "alias" && !taken.has(card.id)) ?? cards[0];
    setColumns([...columns, { model: next?.id ?? "", mix: null }]);
  };
  useEscape(running, stop);

  return html`<div class="row apart">
      <h1 tabindex="-1">Playground</h1>
      <span class="muted small">One prompt, computed by up to ${MOST_COLUMNS} models in one batch</span>
    </div>
    <${Composer}
      settings=${settings}
      running=${running}
      ready=${columns.length > 0 && columns.every(isComplete) && settings.prompt !== ""}
      onChange=${change}
      onRun=${() => runAll()}
      onStop=${stop}
      onNewSeed=${newSeed}
      onLink=${() => copyLink(draft)}
    />
    <${Failed} error=${models.error} />
    <div class=${`columns of-${columns.length}`}>
      ${columns.map(
        (choice, at) => html`<${Column}
          key=${at}
          at=${at}
          choice=${choice}
          answer=${answers[at] ?? NO_ANSWER}
          compared=${at > 0 ? (answers[0] ?? NO_ANSWER) : null}
          options=${options}
          base=${base}
          tinted=${settings.logprobs}
          onChoose=${(next) => choose(at, next)}
          onType=${versions.look}
          onAgain=${() => run(at, choice, { ...settings, seed: randomSeed() }, base)}
          onRemove=${columns.length > 1 ? () => remove(at) : null}
        />`,
      )}
      ${
        columns.length < MOST_COLUMNS &&
        html`<button type="button" class="add-column" onClick=${add}>
          <${Icon} name="plus" /> <span>Add column</span>
        </button>`
      }
    </div>
    <div class="spoken" role="status">${spoken(columns, answers)}</div>`;
}

/** The answers of the columns, and what starts and stops them. */
function useAnswers() {
  const [answers, setAnswers] = useState([]);
  const controls = useRef([]);
  const stop = () => {
    for (const control of controls.current) control?.abort();
  };
  useEffect(() => stop, []);

  const run = (at, choice, settings, base) => {
    controls.current[at]?.abort();
    const control = new AbortController();
    controls.current[at] = control;
    return ask(choice, settings, base, control.signal, (answer) => {
      if (controls.current[at] === control)
        setAnswers((before) => Object.assign([...before], { [at]: answer }));
    });
  };
  const clear = (at) => {
    controls.current[at]?.abort();
    controls.current[at] = undefined;
    setAnswers((before) => before.map((answer, index) => (index === at ? NO_ANSWER : answer)));
  };
  const forget = (at) => {
    // The answers of later columns move with their columns, so those that still grow are stopped.
    stop();
    controls.current = [];
    setAnswers((before) => before.filter((_, index) => index !== at));
  };
  return { answers, run, stop, clear, forget };
}

/** Versions of an adapter, read once somebody types "name@". */
function useVersions(cards) {
  const [name, setName] = useState("");
  const { value } = usePolled(async (signal) => (name ? listVersions(name, signal) : []), {
    inputs: [name],
  });
  const look = (text) => {
    const [typed, rest] = text.split("@");
    if (rest !== undefined && cards.some((card) => card.root === typed)) setName(typed);
  };
  const options = (value ?? []).map(({ id, digest }) => ({
    value: id,
    group: "Versions",
    note: digest.slice(7, 15),
  }));
  return { options, look };
}

/** @param {import("../api/models.js").ModelCard[]} cards */
function optionsOf(cards) {
  return Object.entries(GROUPS).flatMap(([kind, group]) =>
    cards
      .filter((card) => card.kind === kind)
      .map((card) => ({ value: card.id, group, note: kind === "alias" ? card.root : undefined })),
  );
}

/** The base and its first adapter. */
function firstColumns(cards) {
  const adapter = cards.find((card) => card.kind === "adapter");
  return [cards[0], adapter].filter(Boolean).map((card) => ({ model: card.id, mix: null }));
}

function isComplete({ model, mix }) {
  return mix ? mix.every((term) => term.adapter !== "") : model !== "";
}

function randomSeed() {
  return crypto.getRandomValues(new Uint32Array(1))[0];
}

function useEscape(active, stop) {
  useEffect(() => {
    if (!active) return undefined;
    const press = (event) => event.key === "Escape" && stop();
    addEventListener("keydown", press);
    return () => removeEventListener("keydown", press);
  }, [active]);
}

/** Puts the state into the address of the page, and the address into the clipboard. */
async function copyLink(draft) {
  history.replaceState(null, "", `${href("playground")}?${toQuery(draft)}`);
  try {
    await navigator.clipboard.writeText(location.href);
    notify("good", "The link is in the clipboard", { hint: "It has the prompt, not the key." });
  } catch {
    notify("good", "The link is in the address bar", { hint: "It has the prompt, not the key." });
  }
}

/** What screen readers say once all answers have ended. */
function spoken(columns, answers) {
  if (!answers.length || answers.some(isRunning)) return "";
  return columns
    .map((choice, at) => [choice, answers[at]?.phase, at])
    .filter(([, phase]) => phase && phase !== "idle")
    .map(([choice, phase, at]) => `Answer ${LETTERS[at]} of ${nameOf(choice)}: ${phase}.`)
    .join(" ");
}

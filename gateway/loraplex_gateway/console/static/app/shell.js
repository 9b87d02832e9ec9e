/** What surrounds every view: navigation, the server's state, the key, and notices. */

import { AdaptersView } from "../adapters/view.js";
import { checkHealth, listModels } from "../api/models.js";
import { BatchView } from "../batch/view.js";
import { PlaygroundView } from "../playground/view.js";
import { TrainingView } from "../training/view.js";
import { Icon } from "../ui/icons.js";
import { Note, Notices } from "../ui/notes.js";
import { html, useEffect, useRef, useState } from "./html.js";
import { KeyDialog } from "./key-dialog.js";
import { href, route } from "./route.js";
import { chooseScheme, key, keyRefused, scheme, server } from "./session.js";
import { usePolled, useStore } from "./store.js";

const VIEWS = {
  playground: { title: "Playground", component: PlaygroundView },
  adapters: { title: "Adapters", component: AdaptersView },
  training: { title: "Training", component: TrainingView },
  batch: { title: "Live batch", component: BatchView },
};

const HEALTH_SECONDS = 4;

export function Shell() {
  const { view, parts } = useStore(route);
  const secret = useStore(key);
  const [asks, setAsks] = useState(false);
  const { title, component } = VIEWS[view];
  const main = useRef(null);
  const first = useRef(true);
  useHealth();

  useEffect(() => {
    document.title = `${title} · Loraplex`;
    if (!first.current) main.current.querySelector("h1")?.focus();
    first.current = false;
  }, [view]);

  // Another key may see other models and adapters, so every view starts again with it.
  return html`<a class="skip" href="#main" onClick=${(event) => skip(event, main)}>Skip to content</a>
    <header class="bar">
      <a class="brand" href=${href("playground")}><img src="favicon.svg" alt="" /> Loraplex</a>
      <nav aria-label="Views">
        ${Object.entries(VIEWS).map(
          ([name, each]) => html`<a
            key=${name}
            href=${href(name)}
            aria-current=${name === view ? "page" : undefined}
            >${each.title}</a
          >`,
        )}
      </nav>
      <div class="bar-end">
        <${ServerState} key=${secret} />
        <${SchemeButton} />
        <button type="button" class="button" onClick=${() => setAsks(true)}>
          <${Icon} name="key" /> ${secret ? "Key set" : "Enter key"}
        </button>
      </div>
    </header>
    <main id="main" ref=${main} tabindex="-1" key=${secret}>
      <${KeyNote} onEnter=${() => setAsks(true)} />
      <${component} parts=${parts} />
    </main>
    <${Notices} />
    ${asks && html`<${KeyDialog} onClose=${() => setAsks(false)} />`}`;
}

function skip(event, main) {
  event.preventDefault(); // the fragment holds the view
  main.current.focus();
}

/** Asks again and again whether the server takes requests. */
function useHealth() {
  const { value, error } = usePolled(
    async () => {
      await checkHealth();
      return true;
    },
    { seconds: HEALTH_SECONDS },
  );
  useEffect(() => {
    if (error) server.set({ state: "away", why: error.message });
    else if (value) server.set({ state: "good", why: "" });
  }, [value, error]);
}

/** The base model's name, and whether the server answers. */
function ServerState() {
  const { state, why } = useStore(server);
  const { value } = usePolled(listModels, { inputs: [state] });
  const base = value?.find((card) => card.kind === "base");
  const text = { unknown: "Connecting", good: "Ready", away: "Away" }[state];
  return html`<div class="server-state" role="status" title=${why}>
    ${base && html`<span class="muted base-name">${base.id}</span>`}
    <span class=${`badge ${{ good: "good", away: "bad" }[state] ?? ""}`}>${text}</span>
  </div>`;
}

function KeyNote({ onEnter }) {
  const refused = useStore(keyRefused);
  const secret = useStore(key);
  const { state, why } = useStore(server);
  return html`${
    state === "away" &&
    html`<${Note} kind="warn" role="alert" title="The server is away">
      ${why} The page asks again every ${HEALTH_SECONDS} s; what it shows may be old.
    <//>`
  }
  ${
    refused &&
    html`<${Note} kind="bad" role="alert" title=${secret ? "The server does not accept this key" : "The server wants a key"}>
      <div class="row">
        <span>${secret ? "Check it for missing characters, or ask the operator for another one." : "Ask the operator for one."}</span>
        <button type="button" class="button" onClick=${onEnter}>Enter key</button>
      </div>
    <//>`
  }`;
}

const NEXT = { system: "light", light: "dark", dark: "system" };

function SchemeButton() {
  const chosen = useStore(scheme);
  const names = { system: "the system's", light: "light", dark: "dark" };
  const label = `Colours: ${names[chosen]}; switch to ${names[NEXT[chosen]]}`;
  return html`<button
    type="button"
    class="button quiet icon"
    aria-label=${label}
    title=${label}
    onClick=${() => chooseScheme(NEXT[chosen])}
  >
    <${Icon} name=${chosen} />
  </button>`;
}

/** What the engine computes now: rows by adapter, memory, and the last minute of both. */

import { listAdapters } from "../api/adapters.js";
import { watchEngine } from "../api/engine.js";
import { count, percent, rate } from "../app/format.js";
import { html, useState } from "../app/html.js";
import { usePolled } from "../app/store.js";
import { useStream } from "../app/stream.js";
import { Chart } from "../ui/chart.js";
import { seriesOf } from "../ui/colours.js";
import { Icon } from "../ui/icons.js";
import { Failed } from "../ui/notes.js";
import { appended, ratesOf, rowsOf, stackedRows, tokenRates, WINDOW_SECONDS } from "./history.js";
import { Memory } from "./memory.js";

const INTERVAL_SECONDS = 0.25;
const ADAPTERS_SECONDS = 2;
const WINDOW = [-WINDOW_SECONDS, 0];

export function BatchView() {
  const [history, setHistory] = useState(/** @type {import("./history.js").EngineState[]} */ ([]));
  const [paused, setPaused] = useState(false);
  const take = (state) => setHistory((before) => appended(before, state));
  const open = paused ? null : (signal) => watchEngine(INTERVAL_SECONDS, signal);
  const { error } = useStream(open, take, [paused]);
  const adapters = usePolled(listAdapters, { seconds: ADAPTERS_SECONDS }).value ?? [];
  const state = history.at(-1);

  return html`<div class="row apart">
      <h1 tabindex="-1">Live batch</h1>
      <button type="button" class="button" aria-pressed=${paused} onClick=${() => setPaused(!paused)}>
        <${Icon} name=${paused ? "run" : "stop"} /> ${paused ? "Continue" : "Pause"}
      </button>
    </div>
    <${Failed} error=${error} />
    ${!state && !error && html`<p class="empty">Waiting for the first state of the engine…</p>`}
    ${
      state &&
      html`<${Tiles} history=${history} />
        <div class="batch-grid">
          <div class="stack">
            <${RowsChart} history=${history} />
            <${RateChart} history=${history} />
          </div>
          <div class="stack">
            <${Now} state=${state} />
            <${Memory} state=${state} adapters=${adapters} />
          </div>
        </div>`
    }`;
}

function Tiles({ history }) {
  const state = history.at(-1);
  const { generated, prompt, steps } = ratesOf(history);
  const sum = (part) => state.adapters.reduce((total, entry) => total + part(entry), 0);
  const tiles = [
    ["Rows in the batch", count(sum(rowsOf)), `of ${count(state.max_rows)}`],
    [
      "Adapters in the batch",
      count(state.adapters.filter((each) => each.adapter && rowsOf(each)).length),
      "",
    ],
    ["Waiting", count(sum((entry) => entry.waiting)), ""],
    ["Tokens/s", rate(generated), ""],
    ["Prompt tokens/s", rate(prompt), ""],
    ["Steps/s", rate(steps), ""],
    ["KV blocks in use", percent(state.kv_blocks ? state.kv_blocks_used / state.kv_blocks : 0), ""],
  ];
  return html`<dl class="panel tiles large">
    ${tiles.map(
      ([name, value, note]) => html`<div key=${name}>
        <dt>${name}</dt>
        <dd class="number">${value} ${note && html`<small>${note}</small>`}</dd>
      </div>`,
    )}
  </dl>`;
}

function RowsChart({ history }) {
  const { layers, stacked } = stackedRows(history, seriesOf);
  // The highest layer is drawn first, and each lower one over it.
  const lines = layers.toReversed().map((layer) => ({
    label: layer.name,
    colour: layer.series,
    area: true,
    stepped: true,
  }));
  const spoken = layers.map((layer) => `${layer.name} ${layer.rows}`).join(", ") || "none";
  return html`<section class="panel stack">
    <h2>Rows of the batch by adapter</h2>
    <${Chart}
      label=${`Rows of the batch over the last minute. Now: ${spoken}`}
      lines=${lines}
      data=${stacked}
      height=${240}
      range=${WINDOW}
      most=${4}
      legend=${false}
      axis=${axisOf}
    />
    <ul class="legend-list">
      ${layers.map(
        (layer) => html`<li key=${layer.key}>
          <span class=${`swatch ${layer.series}`} aria-hidden="true"></span>
          <span>${layer.name}</span>
        </li>`,
      )}
    </ul>
  </section>`;
}

/** @param {number} age in seconds, below zero @returns {string} */
function axisOf(age) {
  return age === 0 ? "now" : `${age} s`;
}

const RATE = [{ label: "Tokens/s", colour: "series-1", text: rate }];

function RateChart({ history }) {
  const { generated } = ratesOf(history);
  return html`<section class="panel stack">
    <h2>Tokens per second</h2>
    <${Chart}
      label=${`Generated tokens per second over the last minute. Now: ${rate(generated)}`}
      lines=${RATE}
      data=${tokenRates(history)}
      height=${140}
      range=${WINDOW}
      most=${10}
      legend=${false}
      axis=${axisOf}
    />
  </section>`;
}

/** The batch at present, as a table. */
function Now({ state }) {
  const entries = state.adapters;
  return html`<section class="panel stack" aria-label="The batch now">
    <h2>Now</h2>
    ${
      entries.length
        ? html`<table class="table compact">
            <thead>
              <tr>
                <th scope="col">Adapter</th>
                <th scope="col" class="right">Generating</th>
                <th scope="col" class="right">Prompt</th>
                <th scope="col" class="right">Waiting</th>
              </tr>
            </thead>
            <tbody>
              ${entries.map(
                (entry) => html`<tr key=${entry.hidden ? "hidden" : entry.adapter}>
                  <th scope="row" class="wrap">
                    <span class="name-cell">
                      <span class=${`swatch ${entry.hidden ? "series-other" : seriesOf(entry.adapter)}`} aria-hidden="true"></span>
                      <span class="wrap-anywhere">${entry.hidden ? "Not visible to you" : entry.adapter || "Base model"}</span>
                    </span>
                  </th>
                  <td class="right number">${entry.decode}</td>
                  <td class="right number">${entry.prefill}</td>
                  <td class="right number">${entry.waiting}</td>
                </tr>`,
              )}
            </tbody>
          </table>`
        : html`<p class="muted">
            No request runs or waits. Run something in the playground and come back.
          </p>`
    }
  </section>`;
}

/** The playground's state, and the link that carries it. It never holds the key. */

/**
 * @typedef {import("../api/generate.js").Choice} Choice
 * @typedef {import("../api/generate.js").Settings} Settings
 * @typedef {{columns: Choice[], settings: Settings}} Draft
 */

export const MOST_COLUMNS = 4;
const DRAFT = "loraplex.playground";
const MIX = "mix ";

/** @type {Settings} */
const DEFAULTS = {
  mode: "chat",
  system: "",
  prompt: "What is the moon?",
  seed: 1,
  temperature: 0.7,
  maxTokens: 128,
  topP: 1,
  topK: 0,
  minP: 0,
  repetitionPenalty: 1,
  presencePenalty: 0,
  frequencyPenalty: 0,
  stop: [],
  logprobs: true,
};

/** Setting, its name in a link, its range. */
const NUMBERS = [
  ["temperature", "t", 0, 100],
  ["maxTokens", "n", 1, 1e6],
  ["topP", "p", 1e-6, 1],
  ["topK", "k", 0, 1e6],
  ["minP", "min", 0, 1],
  ["repetitionPenalty", "repeat", 1e-3, 100],
  ["presencePenalty", "presence", -2, 2],
  ["frequencyPenalty", "frequency", -2, 2],
];

/** @param {Draft} draft @returns {URLSearchParams} what differs from the defaults */
export function toQuery({ columns, settings }) {
  const query = new URLSearchParams();
  for (const column of columns) query.append("m", columnText(column));
  query.set("prompt", settings.prompt);
  if (settings.system) query.set("system", settings.system);
  if (settings.mode !== "chat") query.set("mode", settings.mode);
  query.set("seed", settings.seed === null ? "random" : String(settings.seed));
  for (const [name, short] of NUMBERS)
    if (settings[name] !== DEFAULTS[name]) query.set(short, String(settings[name]));
  for (const text of settings.stop) query.append("stop", text);
  if (!settings.logprobs) query.set("logprobs", "0");
  return query;
}

/** @param {URLSearchParams} query @returns {Draft} values out of their range count as left out */
export function fromQuery(query) {
  const settings = { ...DEFAULTS, stop: query.getAll("stop").filter(Boolean).slice(0, 16) };
  settings.prompt = query.get("prompt") ?? DEFAULTS.prompt;
  settings.system = query.get("system") ?? "";
  settings.mode = query.get("mode") === "text" ? "text" : "chat";
  settings.logprobs = query.get("logprobs") !== "0";
  const seed = query.get("seed") ?? String(DEFAULTS.seed);
  settings.seed = /^\d{1,15}$/.test(seed) ? Number(seed) : null;
  for (const [name, short, least, most] of NUMBERS) {
    const value = Number(query.get(short) ?? DEFAULTS[name]);
    if (value >= least && value <= most) settings[name] = value;
  }
  const columns = query.getAll("m").slice(0, MOST_COLUMNS).map(columnOf);
  return { columns: columns.filter((column) => column !== null), settings };
}

/** @param {Choice} choice @returns {string} such as "pirate@2" or "mix pirate=0.5 json=0.5" */
export function columnText({ model, mix }) {
  if (!mix) return model;
  return MIX + mix.map((term) => `${encodeURIComponent(term.adapter)}=${term.weight}`).join(" ");
}

/** @param {string} text @returns {Choice | null} null for a text that names nothing */
function columnOf(text) {
  if (!text.startsWith(MIX)) return text ? { model: text, mix: null } : null;
  const mix = [];
  for (const term of text.slice(MIX.length).split(" ")) {
    const found = /^(.+)=(-?[\d.]+)$/.exec(term);
    const weight = Number(found?.[2]);
    if (!found || !(Math.abs(weight) <= 16)) return null;
    try {
      mix.push({ adapter: decodeURIComponent(found[1]), weight });
    } catch {
      return null;
    }
  }
  return { model: "", mix };
}

/**
 * The draft of a link, or else the one that this tab had. A link without a prompt only chooses the
 * models.
 *
 * @param {URLSearchParams} query
 * @returns {Draft}
 */
export function startingDraft(query) {
  if (query.has("prompt")) return fromQuery(query);
  const kept = fromQuery(new URLSearchParams(keptDraft()));
  const { columns } = fromQuery(query);
  return columns.length ? { ...kept, columns } : kept;
}

function keptDraft() {
  try {
    return sessionStorage.getItem(DRAFT) ?? "";
  } catch {
    return ""; // storage may be forbidden
  }
}

/** Keeps the draft for this tab. @param {Draft} draft */
export function keepDraft(draft) {
  try {
    sessionStorage.setItem(DRAFT, String(toQuery(draft)));
  } catch {
    // Storage may be forbidden or full; the draft lives as long as the page then.
  }
}

/** @param {Choice} choice @returns {string} how a column is called in sentences */
export function nameOf({ model, mix }) {
  return mix ? mix.map((term) => `${term.weight} × ${term.adapter}`).join(" + ") : model;
}

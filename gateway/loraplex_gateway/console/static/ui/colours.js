/** One colour for each adapter, the same in all views of a page. */

const SERIES = 8;
/** @type {Map<string, string>} */
const given = new Map();
/** The version of each name that has the name's colour; other versions have their own. */
const firstVersions = new Map();

/**
 * The class and the variable of a style sheet that hold an adapter's colour.
 *
 * @param {string} adapter its name, with or without a version, or a mix's "a@1+b@1"; "" for the base
 * @returns {string} such as "series-3"
 */
export function seriesOf(adapter) {
  if (!adapter) return "series-base";
  const key = keyOf(adapter);
  let found = given.get(key);
  if (!found) {
    found = `series-${(given.size % SERIES) + 1}`;
    given.set(key, found);
  }
  return found;
}

/** What has a colour of its own: a name, a further version of it, or a mix. */
function keyOf(adapter) {
  const [name, version] = adapter.split("@");
  if (adapter.includes("+") || version === undefined) return adapter;
  if (!firstVersions.has(name)) firstVersions.set(name, version);
  return firstVersions.get(name) === version ? name : adapter;
}

/**
 * The present value of a colour; charts are drawn with it.
 *
 * @param {string} variable name of a custom property without its dashes
 * @returns {string} such as "rgb(47, 107, 216)"
 */
export function colour(variable) {
  const probe = document.createElement("span");
  probe.style.color = `var(--${variable})`;
  document.body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

/** Calls `draw` whenever the page's colour scheme changes. @returns {() => void} ends it */
export function onSchemeChange(draw) {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const chosen = new MutationObserver(draw);
  system.addEventListener("change", draw);
  chosen.observe(document.documentElement, { attributeFilter: ["data-scheme"] });
  return () => {
    system.removeEventListener("change", draw);
    chosen.disconnect();
  };
}

/** One colour for each adapter, the same in all views of a page. */

const SERIES = 8;
/** @type {Map<string, string>} */
const given = new Map();

/**
 * The class and the variable of a style sheet that hold an adapter's colour.
 *
 * @param {string} adapter its name, with or without a version, or a mix's "a@1+b@1"; "" for the base
 * @returns {string} such as "series-3"
 */
export function seriesOf(adapter) {
  const name = adapter.includes("+") ? adapter : adapter.replace(/@.*$/, "");
  if (!name) return "series-base";
  let found = given.get(name);
  if (!found) {
    found = `series-${(given.size % SERIES) + 1}`;
    given.set(name, found);
  }
  return found;
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

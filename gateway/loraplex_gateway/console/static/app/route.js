/** Which view the fragment of the page's address names: `#/view/part/part?query`. */

import { createStore } from "./store.js";

/** @typedef {{view: string, parts: string[], query: URLSearchParams}} Route */

const VIEWS = new Set(["playground", "adapters", "training", "batch"]);

/**
 * @param {string} fragment with or without its leading "#"
 * @returns {Route}
 */
export function parse(fragment) {
  const [path, query = ""] = split(fragment.replace(/^#?\/?/, ""));
  const [view, ...parts] = path.split("/").filter(Boolean).map(decoded);
  const known = view !== undefined && VIEWS.has(view);
  return { view: known ? view : "playground", parts, query: new URLSearchParams(query) };
}

/**
 * @param {string} view
 * @param {string[]} parts
 * @returns {string} the address of a view within this page
 */
export function href(view, ...parts) {
  return `#/${[view, ...parts].map(encodeURIComponent).join("/")}`;
}

function split(text) {
  const at = text.indexOf("?");
  return at < 0 ? [text] : [text.slice(0, at), text.slice(at + 1)];
}

function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

export const route = createStore(parse(location.hash));

addEventListener("hashchange", () => route.set(parse(location.hash)));

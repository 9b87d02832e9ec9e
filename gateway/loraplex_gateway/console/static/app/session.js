/** Whose key the page uses, which base model the server has, and whether it answers. */

import { createStore } from "./store.js";

const KEY = "loraplex.key";
const SCHEME = "loraplex.scheme";

/**
 * The key that is sent with every call; "" for none. It is kept for this tab only, and is never
 * part of an address.
 */
export const key = createStore(read(sessionStorage, KEY));

/** Whether the server has refused a call because of the key, or of its absence. */
export const keyRefused = createStore(false);

/** @param {string} next the new key; "" forgets it */
export function takeKey(next) {
  key.set(next.trim());
  keyRefused.set(false);
  write(sessionStorage, KEY, key.get());
}

/** "system", "light" or "dark". */
export const scheme = createStore(read(localStorage, SCHEME) || "system");

/** @param {string} next */
export function chooseScheme(next) {
  scheme.set(next);
  write(localStorage, SCHEME, next === "system" ? "" : next);
  if (next === "system") delete document.documentElement.dataset.scheme;
  else document.documentElement.dataset.scheme = next;
}

/**
 * Whether the server answers.
 *
 * @type {import("./store.js").Store<{state: "unknown" | "good" | "away", why: string}>}
 */
export const server = createStore({ state: "unknown", why: "" });

/** @param {Storage} storage @param {string} name @returns {string} */
function read(storage, name) {
  try {
    return storage.getItem(name) ?? "";
  } catch {
    return ""; // storage may be forbidden
  }
}

/** @param {Storage} storage @param {string} name @param {string} value */
function write(storage, name, value) {
  try {
    if (value) storage.setItem(name, value);
    else storage.removeItem(name);
  } catch {
    // The value lives as long as the page then.
  }
}

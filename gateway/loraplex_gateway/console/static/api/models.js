/** The models that the caller may use: the base, adapters, and other names for them. */

import { call } from "./http.js";

/**
 * @typedef {object} ModelCard
 * @property {string} id
 * @property {"base" | "adapter" | "alias"} kind
 * @property {string} root name of the adapter, or of the base
 * @property {number} context longest context in tokens
 */

/** @param {AbortSignal} [signal] @returns {Promise<ModelCard[]>} the base first */
export async function listModels(signal) {
  const { data } = await call("GET", "v1/models", { signal });
  const seen = new Set();
  return data.map((card) => {
    const base = card.parent === null || card.parent === undefined;
    // The first card of an adapter has its own id, all others are aliases.
    const kind = base ? "base" : seen.has(card.root) ? "alias" : "adapter";
    seen.add(card.root);
    return { id: card.id, kind, root: card.root ?? card.id, context: card.max_model_len ?? 0 };
  });
}

/** @returns {Promise<void>} @throws {import("./http.js").Failure} if the server takes no requests */
export async function checkHealth() {
  await call("GET", "health", { seconds: 5 });
}

/** The table of adapters, kept up to date by the server's events. */

import { watchAdapters } from "../api/adapters.js";
import { useMemo, useState } from "../app/html.js";
import { useStream } from "../app/stream.js";

/**
 * @returns {{adapters: import("../api/adapters.js").Adapter[], error: Error | null, known: boolean}}
 *   the current versions in the order of their names, and whether they have been read
 */
export function useAdapters() {
  const [table, setTable] = useState(/** @type {Map<string, any>} */ (null));
  const take = (event) => setTable((before) => changed(before, event));
  const { error } = useStream(watchAdapters, take, []);
  const adapters = useMemo(
    () => [...(table?.values() ?? [])].sort((a, b) => (a.name < b.name ? -1 : 1)),
    [table],
  );
  return { adapters, error, known: table !== null };
}

/** The table after an event. */
function changed(before, event) {
  if (event.adapters) return new Map(event.adapters.map((adapter) => [adapter.name, adapter]));
  const after = new Map(before);
  const { kind, adapter } = event;
  if (!adapter?.name) return after;
  const known = after.get(adapter.name);
  if (kind === "deleted") after.delete(adapter.name);
  // Events of older versions, which are resident besides, do not change the row of the current one.
  else if (!known || adapter.version >= known.version) after.set(adapter.name, adapter);
  return after;
}

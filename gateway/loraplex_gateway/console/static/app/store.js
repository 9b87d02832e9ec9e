/** Values that several components share, and values that are read from the server again and again. */

import { useCallback, useEffect, useReducer, useRef, useState } from "./html.js";

/**
 * @template T
 * @typedef {{get: () => T, set: (next: T) => void, subscribe: (f: () => void) => () => void}} Store
 */

/**
 * Returns a value that components can subscribe to.
 *
 * @template T
 * @param {T} first
 * @returns {Store<T>}
 */
export function createStore(first) {
  let value = first;
  /** @type {Set<() => void>} */
  const listeners = new Set();
  return {
    get: () => value,
    set(next) {
      if (next === value) return;
      value = next;
      for (const listener of [...listeners]) listener();
    },
    subscribe(listener) {
      listeners.add(listener);
      return () => listeners.delete(listener);
    },
  };
}

/**
 * Returns a store's value, and renders the component again whenever it changes.
 *
 * @template T
 * @param {Store<T>} store
 * @returns {T}
 */
export function useStore(store) {
  const [, redraw] = useReducer((count) => count + 1, 0);
  const shown = store.get();
  useEffect(() => {
    if (store.get() !== shown) redraw(undefined);
    return store.subscribe(() => redraw(undefined));
  }, [store]);
  return shown;
}

/**
 * Reads a value from the server, now, every `seconds`, and whenever one of `inputs` changes.
 *
 * The last good value stays until the next one is there, also if reads fail. Nothing is read again while the page is hidden.
 *
 * @template T
 * @param {(signal: AbortSignal) => Promise<T>} read
 * @param {{seconds?: number, inputs?: unknown[]}} [options] `seconds` may become 0, which ends it
 * @returns {{value: T | undefined, error: Error | null, reload: () => Promise<void>}}
 */
export function usePolled(read, { seconds = 0, inputs = [] } = {}) {
  const [state, setState] = useState({ value: undefined, error: null });
  const latest = useRef(read);
  latest.current = read;
  const pause = useRef(seconds);
  pause.current = seconds;
  const running = useRef(new AbortController());

  const reload = useCallback(async () => {
    const { signal } = running.current;
    try {
      const value = await latest.current(signal);
      if (!signal.aborted) setState({ value, error: null });
    } catch (error) {
      if (!signal.aborted) setState((before) => ({ value: before.value, error }));
    }
  }, []);

  useEffect(() => {
    const control = new AbortController();
    running.current = control;
    let timer = 0;
    const again = () => {
      if (pause.current && !control.signal.aborted) timer = setTimeout(turn, 1000 * pause.current);
    };
    const turn = async () => {
      if (!document.hidden) await reload();
      again();
    };
    reload().then(again);
    return () => {
      control.abort();
      clearTimeout(timer);
    };
  }, inputs);

  return { ...state, reload };
}

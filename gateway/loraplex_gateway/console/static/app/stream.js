/** Streams of the server that a view follows for as long as it is shown. */

import { useEffect, useRef, useState } from "./html.js";

const AGAIN_SECONDS = 2;

/**
 * Follows a stream, and opens it again whenever it ends.
 *
 * A hidden page follows nothing: browsers open few connections to one server, and the page that is
 * looked at needs them.
 *
 * @template T
 * @param {((signal: AbortSignal) => AsyncIterable<T>) | null} open null follows nothing
 * @param {(value: T) => void} take gets every value
 * @param {unknown[]} inputs the stream is opened again when one of them changes
 * @returns {{connected: boolean, error: Error | null}}
 */
export function useStream(open, take, inputs) {
  const [state, setState] = useState({ connected: false, error: null });
  const latest = useRef(take);
  latest.current = take;

  useEffect(() => {
    if (!open) return undefined;
    let control = new AbortController();
    let timer = 0;
    const follow = async () => {
      const { signal } = control;
      let error = null;
      let connected = false;
      try {
        for await (const value of open(signal)) {
          if (!connected) setState({ connected: true, error: null });
          connected = true;
          latest.current(value);
        }
      } catch (failure) {
        error = failure;
      }
      if (signal.aborted) return;
      setState({ connected: false, error });
      timer = setTimeout(follow, 1000 * AGAIN_SECONDS);
    };
    const stop = () => {
      control.abort();
      clearTimeout(timer);
    };
    const turn = () => {
      stop();
      control = new AbortController();
      if (!document.hidden) follow();
    };
    turn();
    document.addEventListener("visibilitychange", turn);
    return () => {
      document.removeEventListener("visibilitychange", turn);
      stop();
    };
  }, inputs);

  return state;
}

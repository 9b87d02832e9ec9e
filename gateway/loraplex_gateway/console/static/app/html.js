/** Preact's functions and the `html` template tag, from the copies in `vendor/`. */

import htm from "../vendor/htm.mjs";
import { h } from "../vendor/preact.mjs";

export {
  useCallback,
  useEffect,
  useId,
  useLayoutEffect,
  useMemo,
  useReducer,
  useRef,
  useState,
} from "../vendor/hooks.mjs";
export { Fragment, render } from "../vendor/preact.mjs";

/** Makes elements from a template: html`<p class=${name}>${text}</p>`. */
export const html = htm.bind(h);

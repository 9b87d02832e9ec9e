/** Icons, drawn in lines on a square of 16 units. They are decoration: names are in the text. */

import { html } from "../app/html.js";

const SHAPES = {
  close: "M4 4l8 8M12 4l-8 8",
  plus: "M8 3v10M3 8h10",
  run: "M5 3.5v9l7-4.5z",
  stop: "M4.5 4.5h7v7h-7z",
  again: "M13 8a5 5 0 1 1-1.6-3.7M13 2.5v2.8h-2.8",
  dice: "M3 3h10v10H3zM6 6h.01M10 6h.01M8 8h.01M6 10h.01M10 10h.01",
  link: "M7 9.5a2.5 2.5 0 0 0 3.6 0l2-2A2.5 2.5 0 0 0 9 4l-.8.8M9 6.5a2.5 2.5 0 0 0-3.6 0l-2 2A2.5 2.5 0 0 0 7 12l.8-.8",
  key: "M9.5 6.5a3 3 0 1 1-2-2.800M7 8.5l6 4.5M11 11.5l1-1.5",
  upload: "M8 11V3M4.5 6.5L8 3l3.5 3.5M3 13h10",
  down: "M4.5 6.5L8 10l3.5-3.5",
  pin: "M6 2.5h4M7 2.5v4L5 9h6L9 6.5v-4M8 9v4.5",
  light:
    "M8 5.5a2.5 2.5 0 1 1 0 5 2.5 2.5 0 0 1 0-5M8 1.5v1.5M8 13v1.5M1.5 8H3M13 8h1.5M3.5 3.5l1 1M11.5 11.5l1 1M12.5 3.5l-1 1M4.5 11.5l-1 1",
  dark: "M13 9.5A5.5 5.5 0 0 1 6.5 3 5.5 5.5 0 1 0 13 9.5z",
  system: "M2.5 3.5h11v7h-11zM6 13h4M8 10.5V13",
};

/** @param {{name: keyof SHAPES}} props */
export function Icon({ name }) {
  return html`<svg class="icon-shape" viewBox="0 0 16 16" aria-hidden="true" focusable="false">
    <path d=${SHAPES[name]} />
  </svg>`;
}

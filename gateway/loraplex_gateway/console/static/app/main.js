/** Starts the page. */

import { html, render } from "./html.js";
import { Shell } from "./shell.js";

render(html`<${Shell} />`, document.getElementById("app"));

/** A page of the console under test, and what it must never do. */

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

/** Each view, as its fragment, and what it shows once it has read everything from the server. */
export const VIEWS = {
  playground: ".column",
  adapters: "tbody th a",
  "adapters/": ".details tbody th",
  training: '[aria-label="Jobs"] :is(tbody a, .empty)',
  "training/new": "form",
  batch: ".tiles.large",
};
const READING = /Reading the|Waiting for the first/;
const ANSWERS = /\/v1\/(chat\/)?completions$/;

const AXE = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");

export class ConsolePage {
  /**
   * @param {import("playwright-core").Browser} browser
   * @param {string} url of the gateway
   * @param {object} [options] of the browser's context, such as `colorScheme`
   */
  static async open(browser, url, options = {}) {
    const context = await browser.newContext({
      viewport: { width: 1360, height: 860 },
      ...options,
    });
    const page = await context.newPage();
    const found = new ConsolePage(page, url);
    page.on("request", (request) => found.requests.push(request));
    page.on("pageerror", (error) => found.faults.push(String(error)));
    page.on("console", (message) => {
      // Browsers report answers with status 4xx and 5xx, which some scenarios want.
      const expected = message.text().startsWith("Failed to load resource");
      if (message.type() === "error" && !expected) found.faults.push(message.text());
    });
    return found;
  }

  constructor(page, url) {
    this.page = page;
    this.url = url;
    this.requests = [];
    this.faults = [];
  }

  /** Opens a view. @param {string} [fragment] such as "adapters/pirate" */
  async go(fragment = "playground") {
    await this.page.goto(`${this.url}console/#/${fragment}`);
    await this.page.locator("h1").waitFor();
  }

  /** Opens a view and waits until it shows what it reads. @param {string} name of an adapter */
  async see(view, name) {
    await this.go(view.endsWith("/") ? view + name : view);
    await this.page.locator(VIEWS[view]).first().waitFor();
    await this.page.locator(".server-state").getByText("Ready", { exact: true }).waitFor();
    await this.page.getByText(READING).first().waitFor({ state: "detached" });
  }

  button(name, options = {}) {
    return this.page.getByRole("button", { name, exact: true, ...options });
  }

  /** The bodies of the requests to a path, decoded from JSON. */
  bodies(path) {
    return this.requests
      .filter((request) => new URL(request.url()).pathname === path && request.method() === "POST")
      .map((request) => request.postDataJSON());
  }

  /** Chooses the model of a column. */
  async choose(letter, text) {
    const box = this.page.getByRole("combobox", { name: `Model of column ${letter}` });
    await box.fill(text);
    await box.press("Enter");
  }

  /** Asks for answers with a button, and waits until they have ended. */
  async run(button = "Run Ctrl ↵") {
    // The columns of an earlier run look ended until this one has asked.
    const asked = this.page.waitForRequest((request) => ANSWERS.test(request.url()));
    await this.button(button).click();
    await asked;
    await this.answered();
  }

  /** Waits until no answer grows any more. */
  async answered() {
    await this.page.locator(".column").first().waitFor();
    await this.page.waitForFunction(
      () =>
        !document.querySelector('.column[aria-busy="true"]') &&
        document.querySelector(".column-foot b"),
    );
  }

  /** axe's findings that are serious or critical, as texts. */
  async serious() {
    await this.page.evaluate(AXE);
    const { violations } = await this.page.evaluate(() => globalThis.axe.run());
    return violations
      .filter(({ impact }) => impact === "serious" || impact === "critical")
      .map(
        ({ id, nodes }) =>
          `${id}: ${nodes
            .map((node) => node.html)
            .join(" ")
            .slice(0, 400)}`,
      );
  }

  /** Addresses of other origins that were asked for. */
  get strangers() {
    const { origin } = new URL(this.url);
    return this.requests.map((request) => request.url()).filter((url) => !url.startsWith(origin));
  }

  async close() {
    await this.page.context().close();
  }
}

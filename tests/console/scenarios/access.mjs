/** Keys, a server that is away, the keyboard, colour schemes, small screens. */

import assert from "node:assert/strict";
import { VIEWS } from "../page.mjs";

export const wrongKey = {
  name: "a wrong key is said to be wrong; the right one opens the page",
  fakeOnly: true,
  async run({ console: view, control }) {
    const { page } = view;
    await control({ key: "right" });
    await view.go("adapters");
    await page.getByText("The server wants a key").waitFor();
    const enter = async (text) => {
      await page.locator(".bar").getByRole("button", { name: /key/i }).click();
      await page.getByLabel(/^(New )?[Kk]ey$/).fill(text);
      await view.button("Use key").click();
    };
    await enter("wrong");
    await page.getByText("The server does not accept this key").waitFor();
    await enter("right");
    await page.getByRole("link", { name: "pirate", exact: true }).waitFor();
    await page.getByText("does not accept").waitFor({ state: "detached" });
    assert.ok(!page.url().includes("right"));
    const kept = await page.evaluate(() => JSON.stringify(localStorage));
    assert.ok(!kept.includes("right"), "the key outlives the tab");
    for (const request of view.requests) assert.ok(!request.url().includes("right"));
  },
};

export const serverAway = {
  name: "the page says that the server is away, and goes on when it is back",
  fakeOnly: true,
  async run({ console: view, control }) {
    const { page } = view;
    await view.go("playground");
    await page.getByText("Ready", { exact: true }).waitFor();
    await control({ away: true });
    await page.getByText("The server is away").waitFor();
    await view.button("Run Ctrl ↵").click();
    await page.locator(".column").first().getByText("does not answer").waitFor();
    await control({ away: false });
    await page.getByText("Ready", { exact: true }).waitFor();
    await page.getByText("The server is away").waitFor({ state: "detached" });
    await view.run();
  },
};

export const keyboard = {
  name: "everything is reached with the keyboard alone",
  async run({ console: view, base, adapters }) {
    const { page } = view;
    const press = (key) => page.keyboard.press(key);
    const focused = () =>
      page.evaluate(
        () =>
          document.activeElement.getAttribute("aria-label") ??
          document.activeElement.textContent.trim(),
      );
    await view.go();
    await page.locator(".column").nth(1).waitFor();
    await press("Tab");
    assert.equal(await focused(), "Skip to content");
    await press("Enter");
    for (let at = 0; (await focused()) !== "Model of column A"; at += 1) {
      assert.ok(at < 30, "the model of column A is not reached");
      await press("Tab");
    }
    await page.keyboard.type(base);
    await press("Enter");
    await press("Control+Enter");
    await page.getByLabel("Message", { exact: true }).focus();
    await press("Control+Enter");
    await view.answered();
    for (let at = 0; !(await focused()).startsWith("Answer A"); at += 1) {
      assert.ok(at < 30, "the answer is not reached");
      await press("Tab");
    }
    await press("ArrowRight");
    await press("ArrowRight");
    await page
      .locator(".closer")
      .getByText(/log-probability/)
      .waitFor();
    await press("Escape");
    await page.locator(".closer").waitFor({ state: "detached" });
    await view.go("adapters");
    for (let at = 0; (await focused()) !== adapters[0]; at += 1) {
      assert.ok(at < 30, "the adapter is not reached");
      await press("Tab");
    }
    await press("Enter");
    await page.getByRole("region", { name: `Adapter ${adapters[0]}` }).waitFor();
    await view.button("Upload adapter").focus();
    await press("Enter");
    await page.getByRole("dialog").waitFor();
    await press("Escape");
    await page.getByRole("dialog").waitFor({ state: "detached" });
    assert.equal(await focused(), "Upload adapter", "the focus does not come back");
  },
};

export const schemes = {
  name: "the page follows the system's colours, and remembers a choice",
  async run({ browser, ConsolePage, url, console: view }) {
    const becomes = (page, scheme) =>
      page.waitForFunction((wanted) => {
        const [red] = getComputedStyle(document.body).backgroundColor.match(/\d+/g).map(Number);
        return wanted === "light" ? red > 200 : red < 60;
      }, scheme);
    await view.go();
    await becomes(view.page, "light");
    const dark = await ConsolePage.open(browser, url, { colorScheme: "dark" });
    await dark.go();
    await becomes(dark.page, "dark");
    await dark.page.getByRole("button", { name: /^Colours/ }).click();
    await becomes(dark.page, "light");
    await dark.page.reload();
    await dark.page.locator("h1").waitFor();
    await becomes(dark.page, "light"); // it is remembered
    await dark.close();
  },
};

export const smallScreen = {
  name: "no view is wider than a small screen",
  async run({ browser, ConsolePage, url, adapters }) {
    const small = await ConsolePage.open(browser, url, { viewport: { width: 390, height: 780 } });
    for (const view of Object.keys(VIEWS)) {
      await small.see(view, adapters[0]); // what is read from the server widens the page
      const width = await small.page.evaluate(() => document.documentElement.scrollWidth);
      assert.ok(width <= 390, `${view} is ${width} pixels wide`);
    }
    await small.close();
  },
};

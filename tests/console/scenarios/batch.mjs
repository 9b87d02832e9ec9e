/** The live batch. */

import assert from "node:assert/strict";

export const seeing = {
  name: "the batch shows the rows of each adapter while they run, and the memory",
  async run({ console: view, browser, ConsolePage, base, adapters }) {
    const { page } = view;
    await view.go("batch");
    await page.getByText("No request runs or waits").waitFor();
    const other = await ConsolePage.open(browser, view.url);
    await other.go();
    await other.choose("A", base);
    await other.choose("B", adapters[1]);
    await other.page.getByLabel("Max tokens").fill("1500");
    await other.page.getByLabel("Message", { exact: true }).fill("A long story");
    await other.button("Run Ctrl ↵").click();
    const now = page.getByRole("region", { name: "The batch now" });
    await Promise.all([
      now.getByRole("rowheader", { name: "Base model" }).waitFor(),
      now.getByRole("rowheader", { name: new RegExp(`^${adapters[1]}@`) }).waitFor(),
      page.getByRole("region", { name: "Memory" }).getByText(adapters[1]).first().waitFor(),
    ]);
    await other.close(); // which ends its requests
    await page.getByText("No request runs or waits").waitFor();
    const chart = page.getByRole("img", { name: /Rows of the batch over the last minute/ });
    assert.equal(await chart.locator("canvas").count(), 1);
  },
};

export const pausing = {
  name: "pause keeps the picture, continue goes on",
  async run({ console: view, control }) {
    const { page } = view;
    const watch = (request) => request.url().includes("/v1/engine/watch");
    await control({ load: true }); // so that the picture would change
    await view.go("batch");
    await page.locator(".tiles.large").waitFor();
    const ended = page.waitForEvent("requestfailed", watch);
    await view.button("Pause").click();
    await view.button("Continue").waitFor();
    await ended; // no state is on its way any more
    const before = await page.locator(".tiles.large").textContent();
    const asked = view.requests.filter(watch).length;
    // Meanwhile the view goes on with what it reads every two seconds.
    for (const _ of ["a stream that ended would be opened again", "and would have sent a state"])
      await page.waitForResponse((answer) => new URL(answer.url()).pathname === "/v1/adapters");
    assert.equal(view.requests.filter(watch).length, asked);
    assert.equal(await page.locator(".tiles.large").textContent(), before);
    const again = page.waitForRequest(watch);
    await view.button("Continue").click();
    await again;
    await view.button("Pause").waitFor();
  },
};

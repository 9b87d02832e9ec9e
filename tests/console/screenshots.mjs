/**
 * Writes the pictures of the documentation: node screenshots.mjs URL [VIEW]
 *
 * One view, or each view, in both colour schemes, from a server that has the adapters json and pirate.
 */

import { mkdirSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { chromium } from "playwright-core";
import { ConsolePage } from "./page.mjs";

const IMAGES = fileURLToPath(new URL("../../docs/images/", import.meta.url));
const SIZE = { width: 1280, height: 760 };

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    real: { type: "boolean" },
    base: { type: "string", default: "smollm2-135m-instruct" },
    files: { type: "string" },
  },
});
const [url, wanted = ""] = positionals;

async function playground(view, save) {
  const { page } = view;
  await view.go();
  await view.choose("A", values.base);
  await view.choose("B", "pirate");
  await view.button("Add column").click();
  await view.choose("C", "Weighted mix");
  for (const [at, name] of ["pirate", "json"].entries()) {
    const term = page.getByRole("combobox", { name: `Adapter ${at + 1} of mix C` });
    await term.fill(name);
    await term.press("Enter");
  }
  await page.getByLabel("Max tokens").fill("80");
  await view.button("Run Ctrl ↵").click();
  await view.answered();
  await page.locator(".column").nth(1).locator(".token").nth(9).hover();
  await page.locator(".closer").waitFor();
  await save("playground");
}

async function adapters(view, save) {
  await view.go("adapters/pirate");
  await view.page.getByRole("rowheader", { name: "@1" }).waitFor();
  await save("adapters");
}

const WAITS = 90_000;

async function training(view, save) {
  const { page } = view;
  const examples = Array.from({ length: 48 }, (_, at) =>
    JSON.stringify({
      prompt: `What is star number ${at}?`,
      completion: `Arr, star ${at} be a lantern.`,
    }),
  );
  await view.go("training/new");
  await page
    .getByLabel("Training data")
    .setInputFiles([
      { name: "stars.jsonl", mimeType: "text/plain", buffer: Buffer.from(examples.join("\n")) },
    ]);
  await page.getByLabel("Adapter name").fill("corsair");
  await page.getByLabel("Learning rate").fill("0.002");
  await view.button("Start training").click();
  await page
    .getByText("Succeeded")
    .last()
    .waitFor({ timeout: 4 * WAITS });
  await page
    .getByRole("button", { name: "Close notice" })
    .first()
    .click({ timeout: 1000 })
    .catch(() => {});
  await save("training");
}

/** Requests of other pages fill the batch. */
async function batch(view, save, browser) {
  const others = [];
  await view.go("batch");
  for (let at = 0; at < 4; at += 1) {
    const other = await ConsolePage.open(browser, url);
    others.push(other);
    await other.go();
    await other.choose("A", ["json", "pirate", values.base, "pirate@1"][at]);
    await other.choose("B", ["pirate", values.base, "json", "pirate"][at]);
    await other.page.getByLabel("Max tokens").fill("300");
    await other.page
      .getByLabel("Message", { exact: true })
      .fill("Tell a long story about the moon.");
  }
  for (const [at, other] of [...others, ...others].entries()) {
    await other.page.waitForTimeout(1500 + 900 * (at % 3));
    await other
      .button("Run Ctrl ↵")
      .click({ timeout: 2000 })
      .catch(() => {});
  }
  for (const other of others) await other.page.keyboard.press("Escape");
  for (const other of others) await other.button("Run Ctrl ↵").click();
  await view.page.waitForTimeout(1500);
  await save("batch");
  for (const other of others) await other.close();
}

mkdirSync(IMAGES, { recursive: true });
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-dev-shm-usage"],
});
for (const [name, take] of Object.entries({ playground, adapters, training, batch })) {
  if (!name.includes(wanted)) continue;
  const view = await ConsolePage.open(browser, url, { viewport: SIZE });
  view.page.setDefaultTimeout(WAITS);
  const save = async () => {
    for (const colorScheme of ["light", "dark"]) {
      await view.page.emulateMedia({ colorScheme });
      await view.page.waitForTimeout(400); // charts are drawn again
      await view.page.screenshot({ path: `${IMAGES}console-${name}-${colorScheme}.png` });
    }
  };
  await take(view, save, browser);
  await view.close();
  console.log(`docs/images/console-${name}-{light,dark}.png`);
}
await browser.close();

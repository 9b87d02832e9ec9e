/**
 * Runs the scenarios in Chromium and prints one line for each, then one JSON line.
 *
 *   node run.mjs URL [--real BASE ADAPTER,ADAPTER] [NAME]
 *
 * `--real` leaves out what needs the fake gateway; the two adapters must be registered, the second
 * with two versions. NAME runs the scenarios whose names contain it.
 */

import { readdirSync, readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { chromium } from "playwright-core";
import { ConsolePage, VIEWS } from "./page.mjs";

const HERE = dirname(fileURLToPath(import.meta.url));
/** How long a state may take to come, on a busy machine. */
const SECONDS = { fake: 30, real: 90 };

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    real: { type: "boolean" },
    base: { type: "string" },
    adapters: { type: "string" },
    files: { type: "string" },
  },
});
const [url, wanted = ""] = positionals;
const base = values.base ?? "smollm2-135m-instruct";
const adapters = (values.adapters ?? "json,pirate").split(",");

/** The files of an adapter that the server can serve. */
function goodFiles() {
  const config = JSON.stringify({ peft_type: "LORA", r: 8, target_modules: ["q_proj", "v_proj"] });
  const read = (name, otherwise) =>
    values.files ? readFileSync(join(values.files, name)) : Buffer.from(otherwise);
  return [
    ["adapter_config.json", config],
    ["adapter_model.safetensors", "weights"],
  ].map(([name, content]) => ({ name, base64: read(name, content).toString("base64") }));
}

async function control(changes) {
  if (!values.real) await fetch(`${url}fake`, { method: "POST", body: JSON.stringify(changes) });
}

async function scenarios() {
  const found = [];
  for (const file of readdirSync(join(HERE, "scenarios")).sort())
    found.push(...Object.values(await import(`./scenarios/${file}`)));
  return found.filter((each) => each.name.includes(wanted) && !(values.real && each.fakeOnly));
}

/** @returns {Promise<string>} what went wrong; "" if nothing did */
async function outcome(browser, scenario) {
  await control({});
  const page = await ConsolePage.open(browser, url);
  page.page.setDefaultTimeout(
    1000 * Math.max(scenario.seconds ?? 0, values.real ? SECONDS.real : SECONDS.fake),
  );
  try {
    await scenario.run({
      console: page,
      browser,
      ConsolePage,
      url,
      control,
      base,
      adapters,
      goodFiles: goodFiles(),
    });
    if (page.strangers.length) return `other origins were asked: ${page.strangers.join(" ")}`;
    return page.faults.join("\n");
  } catch (error) {
    return [error.stack ?? String(error), ...page.faults].join("\n");
  } finally {
    await page.close();
  }
}

/** @returns {Promise<string[]>} axe's serious findings in every view and both schemes */
async function axeFindings(browser) {
  await control({});
  await control({ load: true });
  const found = [];
  for (const colorScheme of ["light", "dark"]) {
    const page = await ConsolePage.open(browser, url, { colorScheme });
    const look = async (what) =>
      found.push(...(await page.serious()).map((text) => `${what}, ${colorScheme}: ${text}`));
    for (const view of Object.keys(VIEWS)) {
      await page.see(view, adapters[1]);
      await look(view);
    }
    await page.see("playground");
    await page.run();
    await page.page.locator(".token").nth(2).hover();
    await look("an answer");
    await page.page.getByRole("combobox", { name: "Model of column A" }).click();
    await look("a list of models");
    await page.button("Enter key").click();
    await look("the key's dialog");
    await page.page.keyboard.press("Escape");
    await page.go("adapters");
    await page.button("Upload adapter").click();
    await look("the upload's dialog");
    await page.close();
  }
  return found;
}

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-dev-shm-usage"],
});
const all = await scenarios();
let passed = 0;
for (const scenario of all) {
  const fault = await outcome(browser, scenario);
  if (!fault) passed += 1;
  console.log(
    `${fault ? "FAILED" : "ok    "} ${scenario.name}${fault && `\n${fault.replace(/^/gm, "       ")}`}`,
  );
}
const serious = wanted ? [] : await axeFindings(browser);
for (const finding of serious) console.log(`axe    ${finding}`);
await browser.close();
console.log(JSON.stringify({ scenarios: all.length, passed, axe_serious: serious.length }));
process.exitCode = passed === all.length && !serious.length ? 0 : 1;

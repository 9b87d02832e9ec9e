/** The playground. */

import assert from "node:assert/strict";

const CHAT = "/v1/chat/completions";

export const compareTwo = {
  name: "two models answer one prompt with one seed, side by side",
  async run({ console: view, base, adapters }) {
    const { page } = view;
    await view.go();
    await view.choose("A", base);
    await view.choose("B", adapters[0]);
    await page.getByLabel("Message", { exact: true }).fill("What is the moon?");
    await page.getByLabel("Seed").fill("7");
    await view.run();
    const bodies = view.bodies(CHAT);
    assert.deepEqual(
      bodies.map((body) => body.model),
      [base, adapters[0]],
    );
    for (const body of bodies) {
      assert.equal(body.seed, 7);
      assert.equal(body.messages.at(-1).content, "What is the moon?");
    }
    const foot = page.locator(".column-foot").nth(1);
    await foot.getByText(/tok\/s/).waitFor();
    await foot.getByText(/first token \d/).waitFor();
    await foot.getByText(new RegExp(`${adapters[0]}@\\d+ sha256:`)).waitFor();
    assert.ok((await page.locator(".column").first().locator(".token").count()) > 3);
  },
};

export const alternatives = {
  name: "a token shows its probability and what could have been in its place",
  async run({ console: view, base }) {
    const { page } = view;
    await view.go();
    await view.choose("A", base);
    await view.run();
    await page.locator(".column").first().locator(".token").nth(2).hover();
    const closer = page.locator(".closer");
    await closer.getByText(/log-probability/).waitFor();
    assert.ok((await closer.locator(".alternatives tr").count()) >= 2);
    await page.getByLabel("Tint tokens by probability").uncheck();
    await view.run();
    assert.equal(view.bodies(CHAT).at(-1).logprobs, undefined);
    assert.equal(await page.locator(".token").count(), 0);
  },
};

export const stopping = {
  name: "stop ends the answers, regenerate asks with another seed",
  async run({ console: view, base }) {
    const { page } = view;
    await view.go();
    await view.choose("A", base);
    await page.getByLabel("Max tokens").fill("1000");
    await page.getByLabel("Message", { exact: true }).fill("A long story");
    await view.button("Run Ctrl ↵").click();
    await page.locator(".column .token").first().waitFor();
    await page.keyboard.press("Escape");
    await page.getByText("stopped by you").first().waitFor();
    await page.getByLabel("Max tokens").fill("8");
    const asked = view.bodies(CHAT).length;
    await view.run("Regenerate column A");
    const [body, ...more] = view.bodies(CHAT).slice(asked);
    assert.equal(more.length, 0, "one column alone is asked again");
    assert.notEqual(body.seed, view.bodies(CHAT)[0].seed);
  },
};

export const mixes = {
  name: "a column asks for a weighted mix of adapters",
  async run({ console: view, base, adapters }) {
    const { page } = view;
    await view.go();
    await view.choose("B", "Weighted mix");
    for (const [at, name] of adapters.slice(0, 2).entries()) {
      const term = page.getByRole("combobox", { name: `Adapter ${at + 1} of mix B` });
      await term.fill(name);
      await term.press("Enter");
    }
    await page.getByLabel(`Exact weight of ${adapters[1]} in mix B`).fill("0.25");
    await view.run();
    const body = view.bodies(CHAT).at(-1);
    assert.equal(body.model, base);
    assert.deepEqual(body.loraplex.mix, [
      { adapter: adapters[0], weight: 0.5 },
      { adapter: adapters[1], weight: 0.25 },
    ]);
    await page
      .locator(".column")
      .nth(1)
      .getByText(/ tokens/)
      .first()
      .waitFor();
  },
};

export const versions = {
  name: "a version of an adapter is found by typing its name and @",
  async run({ console: view, adapters }) {
    const { page } = view;
    await view.go();
    const box = page.getByRole("combobox", { name: "Model of column A" });
    await box.fill(`${adapters[1]}@`);
    await page.getByRole("option", { name: new RegExp(`${adapters[1]}@1`) }).click();
    await view.run();
    assert.equal(view.bodies(CHAT)[0].model, `${adapters[1]}@1`);
  },
};

export const textMode = {
  name: "a text is continued without a conversation",
  async run({ console: view }) {
    const { page } = view;
    await view.go();
    await page.getByText("Text", { exact: true }).click();
    await page.getByLabel("Text to continue").fill("The moon");
    await view.run();
    const [body] = view.bodies("/v1/completions");
    assert.equal(body.prompt, "The moon");
    assert.ok((await page.locator(".token").count()) > 2);
  },
};

export const links = {
  name: "a link carries the state, and never the key",
  async run({ console: view, browser, ConsolePage, base, adapters }) {
    const { page } = view;
    await view.go();
    await page.locator(".bar").getByRole("button", { name: /key/i }).click();
    await page.getByLabel("Key", { exact: true }).fill("lpx-secret");
    await view.button("Use key").click();
    await view.choose("A", `${adapters[0]}@1`);
    await view.choose("B", base);
    await page.getByLabel("Message", { exact: true }).fill("Wo ist der Mond? 🌙 #&=%");
    await page.getByLabel("Seed").fill("99");
    await page.getByLabel("Temperature").fill("0.25");
    await view.button("Copy link").click();
    await page.waitForFunction(() => location.hash.includes("prompt="));
    const link = page.url();
    assert.ok(!link.includes("secret"), "the key is in the link");
    const other = await ConsolePage.open(browser, view.url);
    await other.page.goto(link);
    await other.page.locator(".column").nth(1).waitFor();
    assert.equal(
      await other.page.getByLabel("Message", { exact: true }).inputValue(),
      "Wo ist der Mond? 🌙 #&=%",
    );
    assert.equal(await other.page.getByLabel("Seed").inputValue(), "99");
    assert.equal(await other.page.getByLabel("Temperature").inputValue(), "0.25");
    const model = (letter) =>
      other.page.getByRole("combobox", { name: `Model of column ${letter}` }).inputValue();
    assert.deepEqual([await model("A"), await model("B")], [`${adapters[0]}@1`, base]);
    await other.close();
  },
};

export const noSuchModel = {
  name: "a model that does not exist is said to be missing, with what to do",
  async run({ console: view }) {
    const { page } = view;
    await view.go();
    await view.choose("A", "nobody");
    await view.button("Run Ctrl ↵").click();
    const alert = page.locator(".column").first().getByRole("alert");
    await alert.getByText("does not exist").waitFor();
    await alert.getByText("Choose another model").waitFor();
  },
};

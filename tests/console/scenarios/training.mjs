/** Training jobs. */

import assert from "node:assert/strict";

/** Different ones, since the trainer counts equal examples once. */
const EXAMPLES = Array.from({ length: 24 }, (_, at) =>
  JSON.stringify({ prompt: `What is star ${at}?`, completion: `Arr, star ${at} be a lantern.` }),
).join("\n");

async function start(view, name, epochs = 2) {
  const { page } = view;
  await view.go("training/new");
  await page
    .getByLabel("Training data")
    .setInputFiles([
      { name: "pirate.jsonl", mimeType: "application/jsonl", buffer: Buffer.from(EXAMPLES) },
    ]);
  await page.getByText("24 examples").waitFor();
  await page.getByLabel("Adapter name").fill(name);
  await page.getByLabel("Rank").fill("4");
  await page.getByLabel("Learning rate").fill("0.001");
  await page.getByLabel("Epochs").fill(String(epochs));
  await view.button("Start training").click();
  return page.getByRole("region", { name: `Job for ${name}` });
}

export const watching = {
  name: "a job is started, watched to its end, and its adapter tried",
  seconds: 240,
  async run({ console: view }) {
    const { page } = view;
    const job = await start(view, "corsair");
    await job.getByRole("img", { name: /Loss by step: training loss [\d.]+ at step/ }).waitFor();
    await job.getByText("Succeeded", { exact: true }).waitFor({ timeout: 200_000 });
    await job.getByRole("img", { name: /evaluation loss [\d.]+ at step/ }).waitFor();
    const [body] = view.bodies("/v1/fine_tuning/jobs");
    assert.equal(body.suffix, "corsair");
    assert.equal(body.method.supervised.hyperparameters.n_epochs, 2);
    await job.getByRole("link", { name: "Try it" }).click();
    await page.getByRole("heading", { name: "Playground" }).waitFor();
    const box = page.getByRole("combobox", { name: "Model of column B" });
    assert.match(await box.inputValue(), /corsair/);
  },
};

export const samples = {
  name: "samples before and after training stand side by side",
  fakeOnly: true,
  async run({ console: view }) {
    const job = await start(view, "corsair");
    await job.getByText("Succeeded", { exact: true }).waitFor();
    const table = job.getByRole("table").filter({ hasText: "Before training" });
    await table.getByText("X marks the spot, matey.").waitFor();
    await table.getByText("I do not know.").waitFor();
  },
};

export const cancelling = {
  name: "a job is cancelled",
  seconds: 120,
  async run({ console: view }) {
    const { page } = view;
    const job = await start(view, "shortlived", 1000); // it does not end by itself meanwhile
    await job.getByRole("button", { name: "Cancel job" }).click();
    await page.getByRole("dialog").getByRole("button", { name: "Cancel the job" }).click();
    await job.getByText("Cancelled", { exact: true }).waitFor();
  },
};

export const badData = {
  name: "a file that is no data is found out before it is sent",
  async run({ console: view }) {
    const { page } = view;
    await view.go("training/new");
    await page.getByLabel("Training data").setInputFiles([
      {
        name: "x.jsonl",
        mimeType: "text/plain",
        buffer: Buffer.from('{"text": "a"}\nnot json\n'),
      },
    ]);
    await page.getByText("Line 2 is not a JSON object").waitFor();
  },
};

/** Adapters: their life, their names, and uploads. */

import assert from "node:assert/strict";

const file = (name, content) => ({
  name,
  mimeType: "application/octet-stream",
  buffer: Buffer.from(content),
});

/** Weights without a tensor that an adapter could have. */
function tensors() {
  const header = JSON.stringify({ other: { dtype: "F32", shape: [4], data_offsets: [0, 16] } });
  const bytes = Buffer.alloc(8 + header.length + 16);
  bytes.writeBigUInt64LE(BigInt(header.length));
  bytes.write(header, 8);
  return bytes;
}

export const loading = {
  name: "an adapter is loaded, pinned, merged, unmerged and unloaded",
  async run({ console: view, adapters }) {
    const { page } = view;
    const [name] = adapters;
    await view.go(`adapters/${name}`);
    const details = page.getByRole("region", { name: `Adapter ${name}` });
    const row = page
      .getByRole("row")
      .filter({ has: page.getByRole("rowheader", { name: new RegExp(`^${name}`) }) });
    const place = (text) => row.getByText(text, { exact: true }).waitFor();
    const load = details.getByRole("button", { name: `Load ${name}`, exact: true });
    const unload = details.getByRole("button", { name: `Unload ${name}`, exact: true });
    await load.or(unload).waitFor();
    if (await unload.isVisible()) await unload.click();
    await load.click();
    await place("Device");
    await details.getByRole("button", { name: "Pin", exact: true }).click();
    await place("Pinned");
    await details.getByRole("button", { name: "Merge", exact: true }).click();
    await place("Merged");
    await details.getByRole("button", { name: "Unmerge", exact: true }).click();
    await row.getByText("Merged", { exact: true }).waitFor({ state: "detached" });
    await unload.click();
    await row.getByText("Device", { exact: true }).waitFor({ state: "detached" });
  },
};

export const deleting = {
  name: "an adapter is deleted, and the notice takes it back",
  async run({ console: view, adapters }) {
    const { page } = view;
    const [name] = adapters;
    await view.go(`adapters/${name}`);
    await view.button("Delete").click();
    await page.getByRole("dialog").getByRole("button", { name: "Delete" }).click();
    await page.getByText(`There is no adapter named ${name}`).waitFor();
    await view.button("Undo").click();
    await page.getByRole("region", { name: `Adapter ${name}` }).waitFor();
  },
};

export const aliases = {
  name: "an alias is made and moved to another version",
  async run({ console: view, adapters }) {
    const { page } = view;
    const name = adapters[1];
    await view.go(`adapters/${name}`);
    const details = page.getByRole("region", { name: `Adapter ${name}` });
    const point = async (version, button) => {
      const box = details.getByRole("combobox", { name: "Alias" });
      await box.fill("canary");
      await box.press("Enter");
      await details.getByLabel("Points to").selectOption(`${name}@${version}`);
      await details.getByRole("button", { name: button }).click();
      await page.getByText(`canary now means ${name}@${version}`).waitFor();
    };
    await point(1, "Add alias");
    await details.getByRole("button", { name: "Delete the alias canary" }).waitFor();
    await point(2, "Move alias");
    const row = details.getByRole("row").filter({ hasText: "@2" });
    await row.getByText("canary").waitFor();
  },
};

export const labels = {
  name: "a label is set and removed",
  async run({ console: view, adapters }) {
    const { page } = view;
    await view.go(`adapters/${adapters[0]}`);
    await page.getByLabel("Key", { exact: true }).fill("stage");
    await page.getByLabel("Value").fill("trial");
    await view.button("Set label").click();
    await page.getByText("stage=trial").waitFor();
    await view.button("Remove the label stage").click();
    await page.getByText("stage=trial").waitFor({ state: "detached" });
  },
};

export const badUpload = {
  name: "a bad adapter is not registered; the report says what is wrong with it",
  async run({ console: view }) {
    const { page } = view;
    await view.go("adapters");
    await view.button("Upload adapter").click();
    const dialog = page.getByRole("dialog");
    await dialog
      .getByLabel("Files of the adapter")
      .setInputFiles([
        file(
          "adapter_config.json",
          JSON.stringify({ peft_type: "LOHA", r: 512, target_modules: ["q_proj"] }),
        ),
        file("adapter_model.safetensors", tensors()),
      ]);
    await dialog.getByText(/cannot serve this adapter/).waitFor();
    await dialog
      .locator(".findings")
      .getByText(/^(ADAPTER|RANK)_/)
      .first()
      .waitFor();
    await dialog.getByLabel("Name", { exact: true }).fill("broken");
    assert.ok(await dialog.getByRole("button", { name: "Register" }).isDisabled());
    await page.keyboard.press("Escape");
    await dialog.waitFor({ state: "detached" });
    assert.equal(await page.getByRole("link", { name: "broken" }).count(), 0);
  },
};

export const goodUpload = {
  name: "a good adapter is dropped on the page, checked, registered and loaded",
  async run({ console: view, goodFiles }) {
    const { page } = view;
    await view.go("adapters");
    await page.locator("table").waitFor();
    const dropped = await page.evaluateHandle((files) => {
      const transfer = new DataTransfer();
      for (const { name, base64 } of files) {
        const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
        transfer.items.add(new File([bytes], name));
      }
      return transfer;
    }, goodFiles);
    await page.locator("table").dispatchEvent("drop", { dataTransfer: dropped });
    const dialog = page.getByRole("dialog");
    await dialog.getByText("The server can serve this adapter").waitFor();
    await dialog.getByLabel("Name", { exact: true }).fill("corsair");
    await dialog.getByRole("button", { name: "Register" }).click();
    const details = page.getByRole("region", { name: "Adapter corsair" });
    await details.getByText("Device", { exact: true }).waitFor();
    await details.getByRole("link", { name: "Try it" }).click();
    await page.getByRole("heading", { name: "Playground" }).waitFor();
    const boxes = page.getByRole("combobox", { name: /Model of column/ });
    assert.equal(await boxes.last().inputValue(), "corsair");
  },
};

export const filtering = {
  name: "the filter finds adapters by name, alias and label",
  async run({ console: view, adapters }) {
    const { page } = view;
    await view.go("adapters");
    await page.getByRole("link", { name: adapters[0], exact: true }).waitFor();
    await page.getByRole("searchbox").fill(adapters[1]);
    await page.getByRole("link", { name: adapters[0], exact: true }).waitFor({ state: "detached" });
    await page.getByRole("link", { name: adapters[1], exact: true }).waitFor();
    await page.getByRole("searchbox").fill("zzz");
    await page.getByText("No adapter matches").waitFor();
  },
};

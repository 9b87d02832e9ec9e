/** The versions of an adapter, and the aliases that point to them. */

import { deleteAlias, listAliases, seconds, setAlias } from "../api/adapters.js";
import { ago, shortDigest } from "../app/format.js";
import { html, useState } from "../app/html.js";
import { href } from "../app/route.js";
import { usePolled } from "../app/store.js";
import { Combobox } from "../ui/combobox.js";
import { Field } from "../ui/fields.js";
import { Icon } from "../ui/icons.js";
import { notify, notifyFailure } from "../ui/notes.js";

/** @param {{adapter: any, versions: any[], onChange: () => void}} props newest first */
export function Versions({ adapter, versions, onChange }) {
  const remove = async (alias) => {
    try {
      await deleteAlias(alias);
      notify("good", `The alias ${alias} is deleted`);
    } catch (error) {
      notifyFailure(error);
    }
    onChange();
  };
  return html`<div class="stack">
    <h3>Versions</h3>
    <table class="table compact">
      <thead class="spoken">
        <tr><th>Version</th><th>Digest</th><th>Registered</th><th>Aliases</th><th>Actions</th></tr>
      </thead>
      <tbody>
        ${versions.map(
          (version) => html`<tr key=${version.id}>
            <th scope="row" class="number">@${version.version}</th>
            <td><code title=${version.digest}>${shortDigest(version.digest)}</code></td>
            <td class="muted">${ago(seconds(version.create_time))}</td>
            <td>
              ${version.aliases.map(
                (alias) => html`<span key=${alias} class="badge accent">
                  ${alias}
                  <button type="button" class="badge-close" aria-label=${`Delete the alias ${alias}`} onClick=${() => remove(alias)}>
                    <${Icon} name="close" />
                  </button>
                </span>`,
              )}
            </td>
            <td class="right">
              <a href=${compareLink(version, adapter)} aria-label=${`Try ${version.id}`}>Try</a>
            </td>
          </tr>`,
        )}
      </tbody>
    </table>
    ${versions.length > 0 && html`<${AliasForm} versions=${versions} onChange=${onChange} />`}
  </div>`;
}

/** The current version, and beside it an older one. */
function compareLink(version, adapter) {
  const models = version.version === adapter.version ? [version.id] : [adapter.name, version.id];
  return `${href("playground")}?${new URLSearchParams(models.map((model) => ["m", model]))}`;
}

function AliasForm({ versions, onChange }) {
  const aliases = usePolled(listAliases, { inputs: [versions] });
  const [alias, setName] = useState("");
  const [version, setVersion] = useState(versions[0].id);
  const known = (aliases.value ?? []).find((each) => each.alias === alias);
  const submit = async (event) => {
    event.preventDefault();
    if (!alias) return;
    try {
      // What this page shows must still hold: somebody else may have moved the alias meanwhile.
      await setAlias(alias, version, known?.adapter ?? "");
      notify("good", `${alias} now means ${version}`);
      setName("");
    } catch (error) {
      notifyFailure(error);
    }
    onChange();
  };
  const options = (aliases.value ?? []).map((each) => ({
    value: each.alias,
    group: "Aliases",
    note: each.adapter,
  }));
  return html`<form class="alias-form" onSubmit=${submit}>
    <div class="field">
      <span class="legend">Alias</span>
      <${Combobox}
        label="Alias"
        value=${alias}
        options=${options}
        placeholder="New or existing"
        free
        onChange=${setName}
      />
    </div>
    <${Field} label="Points to">
      ${(
        id,
      ) => html`<select id=${id} class="input" value=${version} onChange=${(event) => setVersion(event.currentTarget.value)}>
        ${versions.map((each) => html`<option key=${each.id} value=${each.id}>${each.id}</option>`)}
      </select>`}
    <//>
    <button type="submit" class="button" disabled=${!alias}>${known ? "Move alias" : "Add alias"}</button>
  </form>`;
}

/** The form for a new training job. */

import { listModels } from "../api/models.js";
import { createJob, uploadFile } from "../api/training.js";
import { html, useState } from "../app/html.js";
import { href } from "../app/route.js";
import { usePolled } from "../app/store.js";
import { Field, NumberField, TextField } from "../ui/fields.js";
import { Failed, notify } from "../ui/notes.js";
import { DataFile } from "./data.js";

/** Name of the method for the trainer, name for people, and whether it has a rank. */
const METHODS = [
  ["lora", "LoRA", true],
  ["dora", "DoRA", true],
  ["adalora", "AdaLoRA", true],
  ["ia3", "IA³", false],
  ["prefix_tuning", "Prefix tuning", false],
  ["prompt_tuning", "Prompt tuning", false],
  ["p_tuning", "P-tuning", false],
  ["bottleneck", "Bottleneck adapters", false],
  ["bitfit", "BitFit", false],
];

const FIRST = {
  suffix: "",
  method: "lora",
  rank: 8,
  epochs: 3,
  learningRate: null,
  batchSize: null,
  seed: 0,
};

/** @param {{onCreated: () => void}} props */
export function NewJob({ onCreated }) {
  const models = usePolled(listModels);
  const base = models.value?.find((card) => card.kind === "base")?.id ?? "";
  const [form, setForm] = useState(FIRST);
  const [data, setData] = useState(/** @type {File | null} */ (null));
  const [evaluation, setEvaluation] = useState(/** @type {File | null} */ (null));
  const [state, setState] = useState({ phase: "", error: null });
  const change = (part) => setForm({ ...form, ...part });
  const [, , ranked] = METHODS.find(([name]) => name === form.method);
  const ready = Boolean(data && form.suffix && base && !state.phase);

  const submit = async (event) => {
    event.preventDefault();
    if (!ready) return;
    try {
      setState({ phase: "Uploading the data…", error: null });
      const training = await uploadFile(data);
      const validation = evaluation ? await uploadFile(evaluation) : null;
      setState({ phase: "Creating the job…", error: null });
      const rank = ranked ? form.rank : null;
      const job = await createJob(
        { ...form, rank, model: base },
        training.id,
        validation?.id ?? null,
      );
      notify("good", `The job for ${form.suffix} is created`);
      onCreated();
      location.hash = href("training", job.id);
    } catch (error) {
      setState({ phase: "", error });
    }
  };

  return html`<form class="panel stack wide" onSubmit=${submit} aria-label="New training job">
    <h2>New training job</h2>
    <div class="form-grid">
      <${DataFile}
        label="Training data"
        hint='JSON lines with "messages", "prompt" and "completion", "instruction" and "output", or "text"'
        file=${data}
        onChange=${setData}
      />
      <${DataFile}
        label="Evaluation data (optional)"
        hint="Without it, a part of the training data is set apart"
        file=${evaluation}
        onChange=${setEvaluation}
      />
    </div>
    <div class="form-grid">
      <${TextField}
        label="Adapter name"
        hint="It becomes a part of the model's id"
        value=${form.suffix}
        onChange=${(suffix) => change({ suffix })}
        maxlength="64"
        required
      />
      <${Field} label="Method">
        ${(id) => html`<select
          id=${id}
          class="input"
          value=${form.method}
          onChange=${(event) => change({ method: event.currentTarget.value })}
        >
          ${METHODS.map(([name, text]) => html`<option key=${name} value=${name}>${text}</option>`)}
        </select>`}
      <//>
    </div>
    <div class="form-row">
      ${
        ranked &&
        html`<${NumberField} label="Rank" value=${form.rank} min=${1} max=${1024} onChange=${(rank) => change({ rank: Math.round(rank) })} />`
      }
      <${NumberField} label="Epochs" value=${form.epochs} min=${0.01} max=${1000} onChange=${(epochs) => change({ epochs })} />
      <${NumberField}
        label="Learning rate"
        value=${form.learningRate}
        min=${1e-9}
        max=${10}
        optional
        placeholder="default"
        onChange=${(learningRate) => change({ learningRate })}
      />
      <${NumberField}
        label="Batch size"
        value=${form.batchSize}
        min=${1}
        max=${1024}
        optional
        placeholder="default"
        onChange=${(batchSize) => change({ batchSize: batchSize && Math.round(batchSize) })}
      />
      <${NumberField} label="Seed" value=${form.seed} min=${0} max=${1e15} onChange=${(seed) => change({ seed: Math.floor(seed) })} />
    </div>
    <${Failed} error=${state.error ?? models.error} />
    <div class="row">
      <button type="submit" class="button primary" disabled=${!ready}>${state.phase || "Start training"}</button>
      <span class="muted small">Trains ${base || "the base model"} beside the requests that it serves.</span>
    </div>
  </form>`;
}

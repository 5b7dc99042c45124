/** The server's health: the chips of the header, and what of the form depends on the server's model. */

import { ApiError, json } from "./api.js";
import { DEFAULT_MODEL } from "./fields.js";
import { pause, pollDelay } from "./tasks.js";

const HEALTH_INTERVAL = 5_000; // ms, at least

const byId = (id) => document.getElementById(id);

/** Show the health until the page is closed. `onHealth(health)` gets each answer. */
export async function watchHealth(onHealth) {
  let failures = 0;
  for (;;) {
    try {
      const health = await json("health", { background: true });
      showHealth(health);
      onHealth(health);
      failures = 0;
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      failures += 1;
      showChip("health", error.message, "bad");
      for (const chip of ["loaded-model", "gpu", "queue"]) byId(chip).hidden = true;
    }
    await pause(Math.max(pollDelay(failures), HEALTH_INTERVAL));
  }
}

function showHealth({ status, model_loaded, gpu_available, vram_free, version, model, models, workers, queue, provider, takes_images, loras, rewrites_prompts }) {
  showChip("health", ...stateInWords(status, model_loaded, workers));
  showChip("loaded-model", model && `Model: ${model}`);
  showChip("gpu", gpu_available ? `GPU, ${vram_free} free` : "No GPU");
  const busy = queue.waiting + queue.running > 0;
  showChip("queue", busy ? `${queue.waiting} waiting, ${queue.running} running` : "Queue empty");
  for (const id of ["demo", "examples"]) byId(id).hidden = model !== "demo";
  byId("ideas").hidden = model === null || model === "demo";
  byId("image").closest(".field").hidden = !takes_images;
  byId("loras").closest(".field").hidden = loras.length === 0;
  byId("loras-hint").textContent = `NAME or NAME:SCALE, with commas between: ${loras.join(", ")}`;
  byId("enhance_prompt").closest(".field").hidden = !rewrites_prompts;
  if (!rewrites_prompts) byId("enhance_prompt").checked = false;
  byId("version").textContent = `HunyuanVideo ${version}`;
  byId("provider").textContent = provider ? `Offered by ${provider}. ` : "";
  offerModels(models);
}

function stateInWords(status, loaded, workers) {
  if (status !== "healthy") return ["Degraded", "bad"];
  if (loaded) return ["Healthy", "good"];
  if (workers.loading > 0) return ["Loading the model", "busy"];
  return workers.failed > 0 ? ["The model failed to load", "bad"] : ["No worker", "bad"];
}

function showChip(id, text, tone = "") {
  const chip = byId(id);
  chip.hidden = !text;
  chip.dataset.tone = tone;
  if (chip.textContent !== text) chip.textContent = text ?? "";
}

function offerModels(models) {
  const choice = byId("model");
  choice.closest(".field").hidden = models.length < 2;
  const profiles = models.filter((name) => name !== DEFAULT_MODEL);
  if (choice.dataset.offered === profiles.join()) return;
  choice.dataset.offered = profiles.join();
  const chosen = choice.value;
  choice.replaceChildren(
    new Option("The server’s choice", ""),
    ...profiles.map((name) => new Option(profileInWords(name), name, false, name === chosen)),
  );
}

function profileInWords(model) {
  const profile = model.replace(`${DEFAULT_MODEL}-`, "");
  return profile[0].toUpperCase() + profile.slice(1);
}

// How texts are drawn: the fields of the settings, and what a request says of them.

import { el } from "./dom.js";
import { number, t } from "./strings.js";
import { USUAL_CONTINUATION } from "./api.js";

// Name, lowest, highest, step, and the API's own value.
const FIELDS = [
  ["temperature", 0, 100, 0.05, 1],
  ["top_p", 0.01, 1, 0.01, 1],
  ["top_k", 0, 1 << 24, 1, 0],
  ["min_p", 0, 1, 0.01, 0],
  ["repetition_penalty", 0.01, 100, 0.01, 1],
  ["presence_penalty", -2, 2, 0.1, 0],
  ["frequency_penalty", -2, 2, 0.1, 0],
  ["max_tokens", 1, 1 << 24, 1, null],
  ["seed", 0, Number.MAX_SAFE_INTEGER, 1, null],
];

/** Fields of a request. What the user leaves empty is as the model's folder recommends. */
export function requested(sampling, recommended = {}) {
  const found = {};
  for (const [name] of FIELDS) {
    const value = sampling[name] ?? recommended[name];
    if (Number.isFinite(value)) found[name] = value;
  }
  const stops = (sampling.stop ?? "").split("\n").filter((line) => line);
  const spelt = { n: "\n", t: "\t", "\\": "\\" };
  if (stops.length) found.stop = stops.map((line) => line.replace(/\\([nt\\])/g, (_, c) => spelt[c]));
  return found;
}

/**
 * Fill a form with the fields.
 * @param {HTMLElement} container
 * @param {Object} sampling what the user has set; changed in place
 * @param {Object} recommended by the model's folder
 * @param {boolean} isText whether texts are continued
 * @param {function} onChange
 */
export function showFields(container, sampling, recommended, isText, onChange) {
  container.replaceChildren(...FIELDS.map((field) => row(field, sampling, recommended, isText, onChange)),
    stopRow(sampling, onChange));
}

function row([name, low, high, step, usual], sampling, recommended, isText, onChange) {
  const value = recommended[name] ?? usual;
  const digits = String(value).split(".")[1]?.length ?? 0;
  const empty = value !== null ? number(value, digits) : t(name === "seed" ? "random" : "usual");
  const problem = el("p.problem", { id: `problem-${name}`, role: "alert" });
  const input = el("input", {
    id: `field-${name}`, type: "number", min: low, max: high, step, placeholder: empty,
    inputmode: step < 1 ? "decimal" : "numeric",
    "aria-describedby": `hint-${name} problem-${name}`,
    oninput: () => {
      const given = input.valueAsNumber;
      const isWrong = input.validity.badInput || given < low || given > high || (step === 1 && given % 1 !== 0);
      input.setAttribute("aria-invalid", String(isWrong));
      const range = { name: t(name), low: number(low, low % 1 ? 2 : 0), high: number(high) };
      problem.textContent = isWrong ? t(step === 1 ? "invalidWhole" : "invalid", range) : "";
      // Not the beginning of what was typed, which may have been a number in range.
      if (isWrong || Number.isNaN(given)) delete sampling[name];
      else sampling[name] = given;
      onChange();
    },
  });
  if (name in sampling) input.value = sampling[name];
  const hint = name === "max_tokens" && isText ? t("max_tokensText", { count: USUAL_CONTINUATION }) : t(`${name}Hint`);
  return el("div.field", {}, el("label", { for: input.id }, t(name)), input,
    el("p.quiet", { id: `hint-${name}` }, hint), problem);
}

function stopRow(sampling, onChange) {
  const area = el("textarea", {
    id: "field-stop", rows: "2", spellcheck: "false", "aria-describedby": "hint-stop",
    oninput: () => {
      if (area.value) sampling.stop = area.value;
      else delete sampling.stop;
      onChange();
    },
  });
  area.value = sampling.stop ?? "";
  return el("div.field.is-wide", {}, el("label", { for: area.id }, t("stopTexts")), area,
    el("p.quiet", { id: "hint-stop" }, t("stopTextsHint")));
}
